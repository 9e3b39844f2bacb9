"""chi-PO: f-DPO with the paper's phi, and what its clip does and does not do."""

import math

import pytest
import torch
from tests.worlds import close, gradient
from torch.nn.functional import logsigmoid

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.prefer.chi_po import ChiPO
from fdiv.methods.prefer.fdpo import FDPO

L = torch.tensor([-9.0, -3.0, -0.4, 0.0, 0.2, 1.7, 3.0], dtype=torch.float64)


def pairs(chosen, rejected):
    zero = torch.zeros_like(chosen)
    return {
        "log_p_chosen": zero,
        "log_p_rejected": zero,
        "log_q_chosen": chosen,
        "log_q_rejected": rejected,
    }


def phi(log_ratio):
    """t + log t."""
    return log_ratio.exp() + log_ratio


def test_the_loss_is_the_papers():
    margin = 0.3 * (phi(L) - phi(L.flip(0) / 2))
    close(ChiPO(beta=0.3)(**pairs(L, L.flip(0) / 2)).loss, -logsigmoid(margin).mean(), 1e-12)
    clipped = -logsigmoid(margin.clamp(-1.4, 1.4)).mean()
    close(ChiPO(beta=0.3, reward_bound=0.7)(**pairs(L, L.flip(0) / 2)).loss, clipped, 1e-12)


def test_without_a_clip_it_is_fdpo_under_kl_and_half_a_chi_square_of_the_policy():
    q = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    value = (q * (q / p).log()).sum() + ((q - p).square() / p).sum() / 2
    close(ChiPO().divergence(p.log(), q.log()), value, 1e-14)
    chosen, rejected = L.clone().requires_grad_(), (L.flip(0) / 2).requires_grad_()
    ours = ChiPO(beta=0.3)(**pairs(chosen, rejected))
    theirs = FDPO(fdiv.ChiKL(0.5).reverse, beta=0.3)(**pairs(chosen, rejected))
    assert torch.equal(ours.loss, theirs.loss) and ours.metrics == theirs.metrics
    assert torch.equal(gradient(ours.loss, chosen, rejected), gradient(theirs.loss, chosen, rejected))


def test_a_pair_beyond_the_clip_has_no_gradient_and_is_counted():
    chosen = torch.tensor([0.0, 3.0, 0.1, -2.0]).requires_grad_()
    rejected = torch.tensor([0.0, 0.0, 0.0, 1.5])
    margin = phi(chosen.detach()) - phi(rejected)
    assert margin.abs().gt(2.0).tolist() == [False, True, False, True]
    out = ChiPO(beta=1.0, reward_bound=1.0)(**pairs(chosen, rejected))
    assert out.metrics["clipped"] == 0.5
    assert gradient(out.loss, chosen).eq(0).tolist() == [False, True, False, True]
    free = ChiPO(beta=1.0)(**pairs(chosen, rejected))
    slopes = [gradient(loss, chosen)[[0, 2]] for loss in (out.loss, free.loss)]
    assert torch.equal(*slopes)
    assert "clipped" not in free.metrics and not out.metrics["clipped"].requires_grad
    assert out.metrics["margin"] == pytest.approx(margin.mean().item())  # what it is, not what is left of it


def test_the_clip_is_idle_where_rewards_are_what_they_are_said_to_be():
    """Rewards in [0, R] differ by R at most, so that the optimum's margins are far from 2 R."""
    reward = torch.tensor([0.0, 0.6, 1.0], dtype=torch.float64)
    beta, reference = 0.5, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    low, high = torch.tensor(-5.0).double(), torch.tensor(5.0).double()
    for _ in range(60):  # of the multiplier, where the masses sum to one
        middle = (low + high) / 2
        t = fdiv.ChiKL(0.5).inverse_slope((reward - middle) / beta).exp()
        low, high = (middle, high) if (reference * t).sum() > 1 else (low, middle)
    close(beta * (phi(t.log()) - phi(t[:1].log())), reward, 1e-9)
    log_policy = (reference * t).log().requires_grad_()
    winners, losers = torch.tensor([[0, 0, 1], [1, 2, 2]])
    given = {
        "log_p_chosen": reference.log()[winners],
        "log_p_rejected": reference.log()[losers],
        "log_q_chosen": log_policy[winners],
        "log_q_rejected": log_policy[losers],
    }
    clipped, free = ChiPO(beta, reward_bound=1.0)(**given), ChiPO(beta)(**given)
    assert clipped.metrics["clipped"] == 0
    assert torch.equal(gradient(clipped.loss, log_policy), gradient(free.loss, log_policy))


@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("size", [200.0, 1e4])
def test_log_ratios_of_any_size_give_finite_values_and_gradients(size, bound):
    far = torch.tensor([size, -size, size, -size, 0.0])
    sides = [far.clone().requires_grad_(), far.flip(0).clone().requires_grad_()]
    out = ChiPO(reward_bound=bound)(**pairs(*sides))
    assert out.loss.isfinite() and gradient(out.loss, *sides).isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())
    assert out.metrics["linearised"] > 0


def test_equal_answers_empty_batches_and_answers_without_mass():
    assert ChiPO()(**pairs(L, L)).loss.item() == pytest.approx(math.log(2))
    none = torch.zeros(0, requires_grad=True)
    out = ChiPO(reward_bound=1.0)(**pairs(none, none))
    assert out.loss == 0 and gradient(out.loss, none).shape == (0,)
    with pytest.raises(ValueError, match="the reference gives probability 0 to a response of pair 0"):
        ChiPO()(**pairs(L, L) | {"log_p_chosen": torch.full_like(L, -math.inf)})


def test_the_object_is_its_recipe_and_keeps_the_contract():
    assert repr(ChiPO()) == "ChiPO(beta=0.1, reward_bound=None)"
    assert isinstance(ChiPO(), Method)
    for settings, message in (
        ({"beta": 0.0}, "beta must be > 0"),
        ({"reward_bound": 0.0}, "write None not to clip"),
    ):
        with pytest.raises(ValueError, match=message):
            ChiPO(**settings)
