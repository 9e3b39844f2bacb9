"""The distance between two distributions whose atoms have no names in common."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from fdiv._divergence import Divergence
from fdiv._math import in_working_precision


@dataclass(frozen=True)
class SortedL1(Divergence):
    """sum over i of |p_(i) - q_(i)|, the masses of each in descending order, the shorter padded with zeros.

    V times the Wasserstein-1 distance between the V masses of p and the V masses of q, as points on a line.
    It sees how peaked a distribution is and not on what: 0 wherever q is a permutation of p, at most 2, and
    over one support at most ||p - q||_1. The supports may differ in size, the other dimensions broadcast.
    Memory: both inputs again, and the orders as int64.
    Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
    LLMs", arXiv 2402.12030.
    """

    def __call__(self, log_p: Tensor, log_q: Tensor, dim: int = -1) -> Tensor:
        log_p, log_q = in_working_precision(log_p, log_q)
        p, q = (t.movedim(dim, -1).exp().sort(-1, descending=True).values for t in (log_p, log_q))
        atoms = max(p.shape[-1], q.shape[-1])
        p, q = (pad(t, (0, atoms - t.shape[-1])) for t in (p, q))
        return (p - q).abs().sum(-1)
