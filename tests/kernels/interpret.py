"""Run every case in Triton's interpreter and save what came out: python -m tests.kernels.interpret FILE

A process of its own, because the interpreter has to be chosen before triton is first imported.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from tests.kernels.cases import CASES, PICKS

from fdiv.kernels import triton_rows


def main(path: str) -> None:
    with np.errstate(all="ignore"):  # -inf - -inf, where a kernel goes on to choose another value
        rows = {name: triton_rows.rows(c.divergence, c.z_p, c.z_q, **c.options) for name, c in CASES.items()}
        picks = {name: triton_rows.selected(p.z, p.index, **p.options) for name, p in PICKS.items()}
    torch.save(
        {"rows": {k: tuple(v) for k, v in rows.items()}, "picks": {k: tuple(v) for k, v in picks.items()}},
        path,
    )


if __name__ == "__main__":
    main(sys.argv[1])
