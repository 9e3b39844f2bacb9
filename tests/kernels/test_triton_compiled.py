"""The Triton kernels, compiled for an H100 or H200 (sm_90) without one: what came out, not how fast it is."""

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tests.worlds import kl_and_twice_its_reverse

import fdiv

pytest.importorskip("triton", reason="needs triton, which has wheels for Linux")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fdiv.kernels import triton_rows

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}


class Compiled(NamedTuple):
    ttir: str
    ptx: str
    sass: str
    registers: int
    stack: int

    @property
    def loops(self) -> list[list[str]]:
        """The instructions of each sweep: between a backward branch and where it goes."""
        code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ;", self.sass)]
        branches = [
            (int(m[1], 16), at) for at, text in code if (m := re.search(r"BRA.* 0x([0-9a-f]+)", text))
        ]
        bodies = [
            [text for at, text in code if first <= at <= last] for first, last in branches if first < last
        ]
        return [body for body in bodies if any("LDG" in text for text in body)]


def compiled(kernel, pointers: dict[str, str], constants: dict[str, object], dtype=torch.float32) -> Compiled:
    """`kernel` for sm_90, a vocabulary divisible by 16 and contiguous rows."""
    launch = triton_rows.launch(151936, dtype)
    constants = {**constants, "BLOCK": launch["BLOCK"], "DTYPE": launch["DTYPE"]}
    signature = {
        name: pointers.get(name, "i32") if name not in constants else "constexpr" for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"
    }
    options = {"num_warps": launch["num_warps"], "enable_fp_fusion": launch["enable_fp_fusion"]}
    source = ASTSource(kernel, signature, constants, aligned)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return Compiled(result.asm["ttir"], result.asm["ptx"], *_inspected(result.asm["cubin"]))


def _inspected(cubin: bytes) -> tuple[str, int, int]:
    """(machine code, registers, bytes of stack)"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return sass, int(found[1]), int(found[2])


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing of an earlier run is taken for this one's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@cache
def compiled_rows(
    divergence, dtype=torch.float32, logits=torch.float32, gradient=torch.bfloat16, teacher=False
):
    one = POINTER[dtype]
    names = ("value", "p_entropy", "q_entropy", "upstream")
    pointers = dict.fromkeys(names, one) | dict.fromkeys(("z_p", "z_q"), POINTER[logits])
    pointers |= {"dz_p": POINTER[gradient], "dz_q": POINTER[gradient]}
    constants = {"CELL": triton_rows.jit_cell(divergence, dtype)} | ({} if teacher else {"dz_p": None})
    return compiled(triton_rows.fdiv_rows, pointers, constants, dtype)


def assert_lean(kernel: Compiled, registers: int) -> None:
    """Nothing spilled to memory, and registers left for two programs of 8 warps on a multiprocessor."""
    assert kernel.stack == 0
    assert not re.search(r"\b(LDL|STL)\b", kernel.sass)
    assert kernel.registers <= registers


GENERATOR = fdiv.Generator(kl_and_twice_its_reverse)


FIRST, *OTHERS = [fdiv.JS(0.1), fdiv.KL(), fdiv.Alpha(0.5), GENERATOR]


@pytest.mark.parametrize(
    "divergence", [FIRST, *(pytest.param(d, marks=pytest.mark.slow) for d in OTHERS)], ids=repr
)
def test_the_kernel_is_lean_and_reads_16_bytes_at_a_time(divergence):
    kernel = compiled_rows(divergence)
    assert_lean(kernel, registers=112)  # 80 to 92 when written; of 65536, 512 threads may have 128
    assert len(kernel.loops) == 3
    for loop in kernel.loops:
        loads = [text for text in loop if "LDG" in text]
        assert len(loads) == 4 and all("LDG.E.128" in text for text in loads)  # 8 numbers of two rows
    stores = [text for text in kernel.loops[-1] if "STG" in text]
    assert len(stores) == 1 and "STG.E.128" in stores[0]  # 8 numbers of bfloat16


def test_both_gradients_of_bfloat16_logits_take_no_more():
    kernel = compiled_rows(fdiv.JS(0.1), logits=torch.bfloat16, teacher=True)
    assert_lean(kernel, registers=128)
    for loop in kernel.loops:
        assert sum("LDG.E.128" in text for text in loop) == 2 == sum("LDG" in text for text in loop)


def test_float64_compiles_without_spilling():
    kernel = compiled_rows(fdiv.KL(), torch.float64, torch.float64, torch.float64)
    assert_lean(kernel, registers=168)


def test_selected_atoms():
    pointers = dict.fromkeys(("log_prob", "entropy", "log_prob_upstream", "entropy_upstream", "z"), "*fp32")
    kernel = compiled(triton_rows.selected_rows, pointers | {"index": "*i64", "dz": "*bf16"}, {})
    assert_lean(kernel, registers=96)
    assert len(kernel.loops) == 2
    for loop in kernel.loops:
        assert sum("LDG.E.128" in text for text in loop) == 2 == sum("LDG" in text for text in loop)


def test_products_and_sums_are_fused_only_where_the_source_says_so():
    """What keeps equal models at exactly 0, whatever Triton's default is."""
    kernel = compiled_rows(fdiv.KL())
    assert triton_rows.launch(100, torch.float32)["enable_fp_fusion"] is False
    asked = re.search(r"math\.fma", kernel.ttir)
    assert asked and "fma.rn.f32" in kernel.ptx
    contracted = re.search(r"\b(mul|add|sub)\.f32", kernel.ptx)  # without .rn, which ptxas may contract
    assert contracted is None


def test_bfloat16_gradients_are_rounded_to_nearest():
    assert re.search(r"cvt\.rn\.bf16x?2?\.f32", compiled_rows(fdiv.KL()).ptx)


def test_offsets_of_rows_have_64_bits():
    """rows x vocab passes 2^31 at 14 thousand rows of 152 thousand logits."""
    kernel = compiled_rows(fdiv.KL())
    products = re.findall(r"arith\.muli .* : (i\d+)", kernel.ttir)
    assert products and set(products) == {"i64"}
