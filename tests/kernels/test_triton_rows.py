"""The Triton kernels, run in Triton's interpreter on the CPU, against float64 and autograd."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.kernels.cases import (
    BOTH_EMPTY,
    CASES,
    DIVERGENCES,
    DTYPES,
    FEW,
    INF,
    NEAR,
    PARITY,
    PICKS,
    SIDED,
    SPOILED,
    WEIGHTS,
    float64_gradients,
)
from torch import Tensor

import fdiv
from fdiv import Exact

pytest.importorskip("triton", reason="needs triton, which has wheels for Linux")

from fdiv.kernels import triton_rows

ROOT = Path(__file__).parents[2]
# Of the value and, by norm, of the gradient: what float32 rounds away in sums of 2500 terms.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float64: 1e-13}


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> dict[str, dict]:
    """What the kernels made of the cases, in a process that has the interpreter."""
    path = tmp_path_factory.mktemp("interpreter") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpret", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path)


@pytest.fixture(scope="module")
def rows(computed) -> dict[str, triton_rows.Rows]:
    return {name: triton_rows.Rows(*parts) for name, parts in computed["rows"].items()}


@pytest.fixture(scope="module")
def picks(computed) -> dict[str, triton_rows.Selected]:
    return {name: triton_rows.Selected(*parts) for name, parts in computed["picks"].items()}


def exact(name: str) -> tuple[Tensor, ...]:
    """Value and both gradients in float64. Missing mass is e^-400 instead, which autograd survives."""
    case = CASES[name]

    def value(z_p, z_q):
        return Exact()(case.divergence, z_p.log_softmax(-1), z_q.log_softmax(-1))

    return float64_gradients(value, *(z.clamp(min=-400.0) for z in (case.z_p, case.z_q)))


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("divergence", "dtype"), PARITY, ids=str)
def test_value_and_both_gradients_are_those_of_float64(rows, divergence, dtype):
    name = f"{divergence!r} {dtype}"
    value, dz_p, dz_q, *_ = rows[name]
    assert value.dtype == dz_p.dtype == dz_q.dtype == torch.promote_types(dtype, torch.float32)
    for actual, expected in zip((value, dz_p, dz_q), exact(name), strict=True):
        assert error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropies_are_those_of_float64(rows, dtype):
    name = f"{fdiv.KL()!r} {dtype}"
    out, case = rows[name], CASES[name]
    for entropy, z in ((out.p_entropy, case.z_p), (out.q_entropy, case.z_q)):
        expected = torch.distributions.Categorical(logits=z.double()).entropy()
        assert error(entropy, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "divergence", [d for d in DIVERGENCES if not isinstance(d, fdiv.Generator)], ids=repr
)
def test_equal_logits_have_value_and_gradient_exactly_zero(rows, divergence):
    out = rows[f"equal {divergence!r}"]
    assert not out.value.any() and not out.dz_p.any() and not out.dz_q.any()


@pytest.mark.parametrize("distance", NEAR)
@pytest.mark.parametrize("divergence", FEW, ids=repr)
def test_no_digits_are_lost_where_the_models_are_close(rows, divergence, distance):
    name = f"near {divergence!r} {distance}"
    for actual, expected in zip(rows[name][:3], exact(name), strict=True):
        assert error(actual, expected) < 5e-6
    z_p, z_q = CASES[name].z_p, CASES[name].z_q
    plain = divergence(z_p.log_softmax(-1), z_q.log_softmax(-1))
    if distance == min(NEAR):  # float32 through log_softmax has few digits left there
        assert error(plain, exact(name)[0]) > 10 * error(rows[name].value, exact(name)[0])


@pytest.mark.parametrize("divergence", FEW, ids=repr)
def test_no_digits_are_lost_to_what_all_logits_have_in_common(rows, divergence):
    name = f"far from 0 {divergence!r}"
    for actual, expected in zip(rows[name][:3], exact(name), strict=True):
        assert error(actual, expected) < 5e-6


@pytest.mark.parametrize("divergence", FEW, ids=repr)
def test_peaked_rows(rows, divergence):
    name = f"peaked {divergence!r}"
    for actual, expected in zip(rows[name][:3], exact(name), strict=True):
        # JS between disjoint peaks is flat: its gradient of 1e-13 is the difference of two numbers near 1.
        assert (actual - expected).norm() < 5e-6 * max(expected.norm().item(), 1e-2)


@pytest.mark.parametrize("divergence", SIDED, ids=repr)
def test_columns_empty_on_both_sides_cost_nothing_and_have_no_gradient(rows, divergence):
    name = f"both empty {divergence!r}"
    out = rows[name]
    for actual, expected in zip(out[:3], exact(name), strict=True):
        assert error(actual, expected) < 2e-6
    assert not out.dz_p[:, BOTH_EMPTY].any() and not out.dz_q[:, BOTH_EMPTY].any()


@pytest.mark.parametrize("side", ["p", "q"])
@pytest.mark.parametrize("divergence", SIDED, ids=repr)
def test_mass_on_one_side_alone_costs_what_it_should_and_is_never_nan(rows, divergence, side):
    name = f"{side} empty {divergence!r}"
    out = rows[name]
    price = divergence.f_at_zero if side == "p" else divergence.slope_at_infinity
    if math.isinf(price):
        assert (out.value == INF).all() and not out.dz_p.any() and not out.dz_q.any()
        return
    for actual, expected in zip(out[:3], exact(name), strict=True):
        assert error(actual, expected) < 2e-6
    assert out.dz_p.isfinite().all() and out.dz_q.isfinite().all()


@pytest.mark.parametrize("vocab", [2, 5, 257, 2048, 2049])
def test_any_vocabulary(rows, vocab):
    name = f"vocab {vocab}"
    for actual, expected in zip(rows[name][:3], exact(name), strict=True):
        assert error(actual, expected) < 2e-6


def test_a_vocabulary_of_one_atom_has_nothing_to_tell_apart(rows):
    out = rows["vocab 1"]
    assert not out.value.any() and not out.dz_p.any() and not out.dz_q.any()


@pytest.mark.parametrize("divergence", [fdiv.KL(), fdiv.TV()], ids=repr)
@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_row_without_a_softmax_is_nan_has_no_gradient_and_leaves_the_others_alone(
    rows, spoiled, divergence
):
    name = f"{spoiled} {divergence!r}"
    out, expected = rows[name], exact(name)
    assert out.value.isnan().tolist() == [False, True, False]
    assert not out.dz_p[1].any() and not out.dz_q[1].any()
    for actual, reference in zip(out[:3], expected, strict=True):
        assert error(actual[[0, 2]], reference[[0, 2]]) < 2e-6


def test_upstream_weights_the_gradients_of_each_row(rows):
    value, dz_p, dz_q = exact("upstream")
    weights = WEIGHTS.double().unsqueeze(-1)
    for actual, expected in zip(rows["upstream"][:3], (value, weights * dz_p, weights * dz_q), strict=True):
        assert error(actual, expected) < 2e-6


def test_gradients_may_be_written_in_bfloat16(rows):
    out, expected = rows["bfloat16 gradients"], exact("bfloat16 gradients")
    assert out.value.dtype == torch.float32 and error(out.value, expected[0]) < 2e-6
    assert out.dz_p.dtype == out.dz_q.dtype == torch.bfloat16
    for actual, reference in zip(out[1:3], expected[1:], strict=True):
        assert_rounded(actual, reference)


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    """To 8 bits. The interpreter cuts where a GPU rounds to nearest: a whole unit in the last of them."""
    assert ((actual.double() - expected).abs() <= (2**-7 + 1e-4) * expected.abs() + 1e-9).all()


@pytest.mark.parametrize("name", ["two dtypes", "transposed", "padded"])
def test_any_layout_and_mixed_dtypes(rows, name):
    for actual, expected in zip(rows[name][:3], exact(name), strict=True):
        assert error(actual, expected) < 2e-6


def test_only_what_is_wanted_is_computed(rows):
    value, *gradients = exact("only the student")
    for name, wanted in (("only the student", (0, 1)), ("only the teacher", (1, 0)), ("no gradient", (0, 0))):
        out = rows[name]
        assert error(out.value, value) < 2e-6
        for gradient, expected, needed in zip(out[1:3], gradients, wanted, strict=True):
            assert error(gradient, expected) < 2e-6 if needed else gradient is None


def test_no_rows_at_all(rows, picks):
    value, dz_p, dz_q, p_entropy, q_entropy = rows["no rows"]
    assert value.shape == p_entropy.shape == q_entropy.shape == (0,)
    assert dz_p.shape == dz_q.shape == CASES["no rows"].z_q.shape
    assert picks["no rows"].log_prob.shape == picks["no rows"].entropy.shape == (0,)


def picked(name: str) -> tuple[Tensor, ...]:
    """(log_prob, entropy, dz) in float64."""
    pick = PICKS[name]
    z = pick.z.double().requires_grad_()
    log_q = z.log_softmax(-1)
    log_prob = log_q.gather(-1, pick.index.unsqueeze(-1)).squeeze(-1)
    entropy = -torch.special.xlogy(log_q.exp(), log_q.exp()).sum(-1)
    to_log_prob, to_entropy = (w.double() for w in pick.options["upstream"])
    (dz,) = torch.autograd.grad(to_log_prob @ log_prob + to_entropy @ entropy, z)
    return log_prob.detach(), entropy.detach(), dz


@pytest.mark.parametrize("name", [*map(str, DTYPES), "peaked"])
def test_selected_log_probability_and_entropy_with_their_gradients(picks, name):
    dtype = PICKS[name].z.dtype
    for actual, expected in zip(picks[name], picked(name), strict=True):
        assert actual.dtype == torch.promote_types(dtype, torch.float32)
        assert error(actual, expected) < (5e-6 if name == "peaked" else TOLERANCE[dtype])


def test_selected_columns_without_mass_cost_nothing(picks):
    out, z = picks["empty"], PICKS["empty"].z.double()
    assert not out.dz[:, BOTH_EMPTY].any()
    filled = torch.distributions.Categorical(logits=z)
    assert error(out.log_prob, filled.log_prob(PICKS["empty"].index)) < 2e-6
    assert error(out.entropy, filled.entropy()) < 2e-6
    assert out.dz.isfinite().all()


def test_an_index_outside_the_vocabulary_is_nan_and_reads_nothing(picks):
    out = picks["outside"]
    assert out.log_prob.isnan().all() and out.entropy.isfinite().all() and out.dz.isfinite().all()


def test_a_selected_atom_without_mass_has_no_gradient_of_its_log_probability(picks):
    out, inside = picks["without mass"], picks["torch.float32"]
    assert out.log_prob[0] == -INF and torch.isfinite(out.log_prob[1])
    assert out.dz.isfinite().all() and not torch.equal(out.dz[0], inside.dz[0])
    z = PICKS["without mass"].z[:1].double()
    log_q = z.log_softmax(-1)
    q, entropy = log_q.exp(), torch.distributions.Categorical(logits=z).entropy()
    weight = PICKS["without mass"].options["upstream"][1][0].double()
    assert error(out.dz[:1], -weight * q * (log_q.clamp(min=-1e4) + entropy)) < 2e-6


def test_the_selected_kernel_writes_what_it_is_asked_for(picks):
    assert picks["no gradient"].dz is None
    assert torch.equal(picks["no gradient"].log_prob, picks["torch.float32"].log_prob)
    dz, reference = picks["bfloat16 gradients"].dz, picked("bfloat16 gradients")[2]
    assert dz.dtype == torch.bfloat16
    assert_rounded(dz, reference)


def test_wrong_arguments_are_refused_with_what_is_allowed():
    z = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"\[rows, vocab\] twice"):
        triton_rows.rows(fdiv.KL(), z, z[:, :4])
    with pytest.raises(ValueError, match=r"torch.float32 or torch.bfloat16"):
        triton_rows.rows(fdiv.KL(), z, z, out_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"index \[rows\]"):
        triton_rows.selected(z, torch.zeros(3, dtype=torch.long))


def test_available_where_there_is_a_gpu_and_a_translation():
    untranslated = fdiv.Generator(no_triton_form)
    assert triton_rows.available(fdiv.KL(), "cuda")
    assert triton_rows.available(fdiv.Generator(math_of_f), torch.device("cuda", 3))
    assert not triton_rows.available(fdiv.KL(), "cpu")
    assert not triton_rows.available(untranslated, "cuda")


def math_of_f(log_ratio: Tensor) -> Tensor:
    return log_ratio.exp() * log_ratio


def no_triton_form(log_ratio: Tensor) -> Tensor:
    """f(u) = u log u, with a term that is zero and has no line in the translator."""
    return log_ratio.exp() * log_ratio + 0 * torch.special.erfcx(log_ratio)
