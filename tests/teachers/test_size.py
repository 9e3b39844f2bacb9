"""How large a token is on disk: the numbers of docs/teachers.md, on logits that fall off as Zipf's law."""

import pytest
import torch

from fdiv import FusedAtoms, FusedLinear, SampledLogits, TopK
from fdiv.teachers._signal import TeacherSignal, Terms, Vocabulary, support_of
from fdiv.teachers.local import drawn
from fdiv.teachers.write import write_cache

VOCABULARY, LENGTH, SEQUENCES = 32_000, 257, 8


class Zipf:
    """A teacher whose r-th likeliest token has a mass in proportion to r^-exponent."""

    def __init__(self, estimator, exponent=1.2, width=0):
        self.exponent, self.width = exponent, width
        support = support_of(estimator)
        self.of = getattr(estimator, "of", None)
        self.terms = Terms(Vocabulary(VOCABULARY, "zipf"), 1.0, support, "zipf")

    def __call__(self, ids, mask):
        generator = torch.Generator().manual_seed(int(ids.sum()))
        rows = int(mask[:, 1:].sum())
        if self.width:
            states = torch.randn(rows, self.width, generator=generator).bfloat16()
            return TeacherSignal({"p_hidden": states, "p_weight": torch.zeros(1, self.width)}, self.terms)
        log_p = (-self.exponent * torch.arange(1, VOCABULARY + 1).log()).log_softmax(-1)  # by rank
        shift = torch.randint(VOCABULARY, (rows, 1), generator=generator)  # which token has the first
        if isinstance(self.of, TopK):
            rank = torch.arange(self.of.k).expand(rows, -1)
        else:
            level = torch.rand(1, rows * self.of.n, dtype=torch.float64, generator=generator)
            rank = drawn(log_p.unsqueeze(0), level)[0]
            rank = rank[torch.randperm(len(rank), generator=generator)].reshape(rows, -1)
        return TeacherSignal({"index": (rank + shift) % VOCABULARY, "log_p": log_p[rank]}, self.terms)


def size(folder, estimator, precision="float32", **options):
    """Bytes a token."""
    ids = torch.arange(SEQUENCES * LENGTH).reshape(SEQUENCES, LENGTH)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batches = zip(ids.split(2), mask.split(2), strict=True)
    return write_cache(Zipf(estimator, **options), batches, folder, precision=precision).bytes_per_token


KEYS = 36 / (LENGTH - 1) + 1  # of a sample, and the heads of the files


@pytest.mark.parametrize(("precision", "stated"), [("float32", 384), ("float16", 260)])
def test_the_64_likeliest(tmp_path, precision, stated):
    """An id of 2 bytes and a log-probability of 4 or 2; in float16 4 bytes more a row, for the mass."""
    found = size(tmp_path, FusedAtoms(TopK(64)), precision)
    assert stated == 64 * (6 if precision == "float32" else 4) + (4 if precision == "float16" else 0)
    assert stated < found < stated + KEYS


@pytest.mark.parametrize(
    ("exponent", "precision", "stated"),
    [
        (1.0, "float32", 294),
        (1.0, "float16", 210),
        (1.2, "float32", 220),
        (1.2, "float16", 157),
        (1.5, "float32", 130),
        (1.5, "float16", 93),
    ],
)
def test_50_draws(tmp_path, exponent, precision, stated):
    """Each different atom once, of which there are sum 1 - (1 - p)^50; an id, a number, a log-probability."""
    p = torch.arange(1, VOCABULARY + 1).double() ** -exponent
    different = (1 - (1 - p / p.sum()) ** 50).sum().item()
    estimator = FusedAtoms(SampledLogits(50, "teacher"))
    found = size(tmp_path, estimator, precision, exponent=exponent)
    assert found == pytest.approx((7 if precision == "float32" else 5) * different, rel=0.01)
    assert found == pytest.approx(stated, rel=0.01)


def test_hidden_states_of_a_model_of_width_4096(tmp_path):
    assert 8192 < size(tmp_path, FusedLinear(), width=4096) < 8192 + KEYS
