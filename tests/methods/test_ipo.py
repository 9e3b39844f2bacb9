"""IPO: its margin, the optimum of the paper's equation in closed form, and that it is a loss of f-DPO."""

import math

import pytest
import torch
from tests.worlds import close, gradient

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.prefer.fdpo import FDPO
from fdiv.methods.prefer.ipo import IPO

REFERENCE = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
# How often of four comparisons the row beats the column; 4 and 0 are certain. Not of the Bradley-Terry kind.
WINS = torch.tensor([[2, 1, 0, 3], [3, 2, 0, 1], [4, 4, 2, 2], [1, 3, 2, 2]])


def comparisons():
    """Winners and losers, each pair four times and each answer against itself."""
    rows = [(i, j) for i in range(4) for j in range(4) for _ in range(int(WINS[i, j]))]
    return torch.tensor(rows).T


def compared(log_policy):
    winners, losers = comparisons()
    return {
        "log_p_chosen": REFERENCE.log()[winners],
        "log_p_rejected": REFERENCE.log()[losers],
        "log_q_chosen": log_policy[winners],
        "log_q_rejected": log_policy[losers],
    }


def one_pair(chosen, rejected):
    zero = torch.zeros_like(chosen)
    return {
        "log_p_chosen": zero,
        "log_p_rejected": zero,
        "log_q_chosen": chosen,
        "log_q_rejected": rejected,
    }


def closed_optimum(beta):
    """reference(y) exp(P(y beats a uniform y') / beta), normalised."""
    weights = REFERENCE * (WINS.double().mean(1) / 4 / beta).exp()
    return weights / weights.sum()


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_the_loss_is_zero_at_a_margin_of_exactly_half_over_beta(beta):
    rejected = torch.tensor([-3.0, 0.4, 2.0], dtype=torch.float64)
    chosen = (rejected + 1 / (2 * beta)).requires_grad_()
    out = IPO(beta)(**one_pair(chosen, rejected))
    assert out.loss < 1e-25 and gradient(out.loss, chosen).abs().max() < 1e-13
    close(out.metrics["margin"], torch.tensor(0.5, dtype=torch.float64))  # of the rewards beta l


@pytest.mark.parametrize("beta", [0.2, 0.5, 2.0])
def test_the_optimum_is_the_papers_closed_form(beta):
    logits = REFERENCE.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=60, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = IPO(beta)(**compared(logits.log_softmax(-1))).loss
        loss.backward()
        return loss

    optimiser.step(closure)
    close(logits.detach().softmax(-1), closed_optimum(beta), 1e-8)


def test_preferences_that_are_certain_leave_the_optimum_at_a_finite_distance():
    best = closed_optimum(beta=0.5).log().requires_grad_()
    out = IPO(0.5)(**compared(best))
    assert gradient(out.loss, best).abs().max() < 1e-14
    dpo = FDPO(beta=0.5)(**one_pair(torch.tensor([50.0]).requires_grad_(), torch.zeros(1)))
    assert dpo.loss > 0  # falls for ever where one answer always wins


def test_ipo_is_the_loss_of_fdpo():
    chosen = torch.tensor([-2.0, 0.0, 3.0]).requires_grad_()
    rejected = torch.tensor([1.0, 0.0, -2.0])
    lengths = {"length_chosen": torch.tensor([1.0, 2, 3]), "length_rejected": torch.tensor([4.0, 1, 0])}
    for normalised, more in ((False, {}), (True, lengths)):
        ours = IPO(0.3, length_normalised=normalised)(**one_pair(chosen, rejected), **more)
        fdpo = FDPO(fdiv.ReverseKL(), beta=0.3, loss="ipo", length_normalised=normalised)
        theirs = fdpo(**one_pair(chosen, rejected), **more)
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(gradient(ours.loss, chosen), gradient(theirs.loss, chosen))
        assert ours.metrics == theirs.metrics


def test_over_lengths_the_margin_is_per_token():
    chosen, rejected = torch.tensor([20.0 + 3.0]), torch.tensor([6.0])
    lengths = {"length_chosen": torch.tensor([4.0]), "length_rejected": torch.tensor([8.0])}
    out = IPO(beta=0.1, length_normalised=True)(**one_pair(chosen, rejected), **lengths)
    assert out.loss.item() == pytest.approx((23 / 4 - 6 / 8 - 5) ** 2)


@pytest.mark.parametrize("size", [200.0, 1e4])
def test_log_ratios_of_any_size_give_finite_values_and_gradients(size):
    far = torch.tensor([size, -size, size, 0.0, 0.0])
    sides = [far.clone().requires_grad_(), far.flip(0).clone().requires_grad_()]
    out = IPO()(**one_pair(*sides))
    assert out.loss.isfinite() and gradient(out.loss, *sides).isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())


def test_empty_answers_and_empty_batches_are_finite_and_no_mass_is_refused():
    zero = torch.zeros(2)
    lengths = {"length_chosen": zero, "length_rejected": zero}
    assert IPO(length_normalised=True)(**one_pair(zero, zero), **lengths).loss == pytest.approx(25)
    assert IPO()(**one_pair(torch.zeros(0), torch.zeros(0))).loss == 0
    with pytest.raises(ValueError, match="the reference gives probability 0 to a response of pair 1"):
        IPO()(**one_pair(zero, zero) | {"log_p_chosen": torch.tensor([0.0, -math.inf])})


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = IPO(beta=0.3, length_normalised=True)
    assert repr(method) == "IPO(beta=0.3, length_normalised=True)"
    assert isinstance(method, Method) and method.divergence == fdiv.ReverseKL()
    assert method.reads[-2:] == ("length_chosen", "length_rejected") and len(IPO().reads) == 4
    with pytest.raises(ValueError, match="beta must be > 0"):
        IPO(beta=0.0)
