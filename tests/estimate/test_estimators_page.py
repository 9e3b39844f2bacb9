"""docs/estimators.md: its code runs, and the sizes of errors that it states are those of the enumeration."""

import re
from pathlib import Path

import pytest
from tests.worlds import LOG_P, gradient, six_symbols

import fdiv
from fdiv import MonteCarlo

PAGE = (Path(__file__).parents[2] / "docs" / "estimators.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_page_has_code():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_its_code_runs(block):
    exec(compile(block, "docs/estimators.md", "exec"), {})


@pytest.mark.parametrize(
    ("divergence", "in_loss", "in_reward"),
    [(fdiv.ReverseKL(), 55, 125), (fdiv.KL(), 71, 163), (fdiv.JS(0.5), 68, 147)],
    ids=repr,
)
def test_its_errors_are_those_of_the_enumeration(divergence, in_loss, in_reward):
    theta, log_q = six_symbols()
    right = gradient(divergence(LOG_P, log_q), theta)
    q, value = log_q.exp().detach(), MonteCarlo()(divergence, LOG_P, log_q)
    for wrong, percent in ((q @ value, in_loss), ((q * value.detach()) @ log_q, in_reward)):
        error = 100 * (gradient(wrong, theta) - right).norm() / right.norm()
        assert error.item() == pytest.approx(percent, abs=0.5)
        name = repr(divergence).replace("beta=", "")
        assert re.search(rf"\b{percent} %( off for)? `{re.escape(name)}`", PAGE)


@pytest.mark.parametrize(
    ("distance", "row"),
    [
        (0.1, (0.0038, 0.0035, 0.087)),
        (0.5, (0.087, 0.10, 0.40)),
        (1.0, (0.29, 0.50, 0.67)),
        (1.5, (0.52, 1.33, 0.84)),
    ],
)
def test_its_standard_deviations_are_those_of_the_enumeration(distance, row):
    """q on the straight line, in logarithms, from p through the world's policy."""
    _, log_q = six_symbols()
    log_q = (LOG_P + distance * (log_q.detach() - LOG_P)).log_softmax(-1)
    k3, k1 = (MonteCarlo()(fdiv.ReverseKL(), LOG_P, log_q, control=c) for c in (0.0, -1.0))
    chance = log_q.exp()
    spreads = [(chance @ (k - chance @ k).square()).sqrt().item() for k in (k3, k1)]
    actual = [fdiv.ReverseKL()(LOG_P, log_q).item(), *spreads]
    for computed, stated in zip(actual, row, strict=True):
        assert computed == pytest.approx(stated, rel=0.05)
