"""KTO: the paper's equation and its gradient, what its reference point is, and TRL's own loss."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from tests.worlds import DIVERGENCES, close, gradient

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.prefer.kto import KTO

L = torch.tensor([-9.0, -3.0, -0.4, 0.0, 0.2, 1.7, 8.0], dtype=torch.float64)
ADMISSIBLE = [d for d in DIVERGENCES if d.reverse.slope_at_zero == -math.inf]
each_admissible = pytest.mark.parametrize("divergence", ADMISSIBLE, ids=repr)


def answers(chosen, rejected, mismatched):
    """The arguments, with a reference of log-probability -1 everywhere."""
    p = torch.full_like(chosen, -1.0)
    return {
        "log_p_chosen": p,
        "log_p_rejected": p,
        "log_q_chosen": p + chosen,
        "log_q_rejected": p + rejected,
        "log_ratio_mismatched": mismatched,
    }


# -- the paper's ---------------------------------------------------------------------------------------


def test_the_loss_is_the_papers():
    mismatched = torch.tensor([0.5, 1.5, -0.2]).double()
    z0 = mismatched.mean()
    out = KTO(beta=0.3, desirable=1.2, undesirable=0.7)(**answers(L, L.flip(0) / 2, mismatched))
    liked = 1.2 * (1 - torch.sigmoid(0.3 * (L - z0)))
    disliked = 0.7 * (1 - torch.sigmoid(0.3 * (z0 - L.flip(0) / 2)))
    close(out.loss, torch.cat([liked, disliked]).mean(), 1e-14)
    close(out.metrics["reference_point"], 0.3 * z0)
    close(out.metrics["reward_chosen"], 0.3 * L.mean())


def test_the_reference_point_is_never_below_zero_and_has_no_gradient():
    mismatched = torch.tensor([-2.0, 0.5]).double().requires_grad_()
    out = KTO()(**answers(L, L, mismatched))
    assert out.metrics["reference_point"] == 0
    assert not out.loss.requires_grad
    above = KTO()(**answers(L, L, (mismatched + 3).clone()))
    assert above.metrics["reference_point"] > 0 and not above.loss.requires_grad


def test_answers_pull_most_where_their_reward_is_the_reference_point():
    chosen, rejected = L.clone().requires_grad_(), L.clone().requires_grad_()
    z0 = torch.tensor([0.2]).double()
    out = KTO(beta=0.5, desirable=2.0)(**answers(chosen, rejected, z0))
    s = torch.sigmoid(0.5 * (L - z0))
    step = 0.5 * s * (1 - s) / (2 * len(L))
    close(gradient(out.loss, chosen), -2 * step, 1e-13)
    close(gradient(out.loss, rejected), step, 1e-13)
    assert gradient(out.loss, chosen).abs().argmax() == L.tolist().index(0.2)


def test_at_the_reference_half_of_each_weight_is_lost():
    zero = torch.zeros(3)
    out = KTO(desirable=1.5, undesirable=0.5)(**answers(zero, zero, zero))
    assert out.loss == pytest.approx((1.5 + 0.5) / 4)


@each_admissible
def test_an_answer_as_often_desirable_as_not_is_not_moved_and_a_majority_wins_at_any_distance(divergence):
    """The loss of one answer is a + (b - a) sigmoid(reward - reference point): its optima are at the ends."""
    log_ratio = L.clone().requires_grad_()
    z0 = torch.tensor([0.3]).double()
    out = KTO(divergence, beta=0.5)(**answers(log_ratio, log_ratio, z0))
    assert gradient(out.loss, log_ratio).abs().max() < 1e-15
    more = KTO(divergence, beta=0.5, desirable=1.01)(**answers(log_ratio, log_ratio, z0))
    slopes = gradient(more.loss, log_ratio)
    assert (slopes < 1e-18).all() and slopes[2] < -1e-5  # up to rounding where both sigmoids are flat


def test_the_call_is_a_mean_over_its_pairs_whatever_the_reference_point_is_made_of():
    mismatched = torch.tensor([1.0, 2.0, 0.5, 0.1]).double()
    chosen, rejected = L, L.flip(0)
    whole = KTO()(**answers(chosen, rejected, mismatched)).loss
    parts = [KTO()(**answers(chosen[i], rejected[i], mismatched)).loss for i in (slice(0, 3), slice(3, 7))]
    close(whole, (3 * parts[0] + 4 * parts[1]) / 7, 1e-14)


def test_the_loss_is_trls():
    host = pytest.importorskip("trl.trainer.kto_trainer")
    chosen = torch.tensor([0.7, -1.0, 2.0]).requires_grad_()
    rejected = torch.tensor([-0.4, 0.6, 1.0]).requires_grad_()
    mismatched = torch.tensor([0.5, 1.5, -0.3, 0.2, 0.9, 0.1])
    method = KTO(beta=0.2, desirable=1.3, undesirable=0.6)
    ours = method(**answers(chosen, rejected, mismatched))
    theirs = loss_of_trl(host.KTOTrainer, method, torch.cat([chosen, rejected]), mismatched)
    close(ours.loss, theirs, 1e-6)
    sides = chosen, rejected
    close(gradient(ours.loss, *sides), gradient(theirs, *sides), 1e-6)


def loss_of_trl(trainer_class, method, log_ratio, mismatched):
    """Of answers that are one token long, the first half of them desirable, under a reference of log 1."""
    rows = len(log_ratio)
    alone = SimpleNamespace(device="cpu", gather_for_metrics=lambda t: t, gather=lambda t: t)
    outputs = SimpleNamespace(
        log_probs=log_ratio.unsqueeze(1),
        entropy=torch.zeros(rows, 1),
        mean_logits=torch.zeros(rows, 1),
        is_top1=torch.ones(rows, 1, dtype=torch.bool),
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=alone,
        aux_loss_enabled=False,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=method.beta,
        desirable_weight=method.desirable,
        undesirable_weight=method.undesirable,
        _compute_kl_logps=lambda *_: mismatched,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    ids = torch.ones(rows, 2, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": torch.tensor([[0, 1]] * rows),
        "label": torch.arange(rows) < rows // 2,
        "ref_logps": torch.zeros(rows),
        "ref_KL_logps": torch.zeros(rows),
    }
    return trainer_class._compute_loss(trainer, lambda **_: outputs, inputs, False)


# -- under another divergence, which is ours --------------------------------------------------------------

POLICY = torch.tensor([0.5, 0.2, 0.1, 0.2], dtype=torch.float64).log()
REFERENCE = torch.tensor([0.1, 0.3, 0.4, 0.2], dtype=torch.float64).log()


def policys_mean_score(divergence):
    """E_pi[psi], which z0 stands for."""
    return (POLICY.exp() * divergence.psi(REFERENCE - POLICY)).sum()


def test_the_policys_mean_score_is_its_kl_under_reverse_kl_and_zero_under_forward_kl():
    kl = (POLICY.exp() * (POLICY - REFERENCE)).sum()
    close(policys_mean_score(fdiv.ReverseKL()), kl, 1e-14)
    assert abs(policys_mean_score(fdiv.KL())) < 1e-15  # E_pi[1 - ref/pi]; the divergence itself is not 0
    assert fdiv.KL()(REFERENCE, POLICY) > 0.3


@each_admissible
def test_the_reference_point_is_the_mean_score_at_the_mismatched_answers(divergence):
    mismatched = (POLICY - REFERENCE).repeat_interleave(torch.tensor([5, 2, 1, 2]))  # in the policy's shares
    method = KTO(divergence, beta=0.3)
    expected = policys_mean_score(divergence).clamp(min=0)
    close(method.mean_score(mismatched), expected, 1e-12)
    out = method(**answers(L, L.flip(0) / 2, mismatched))
    psi = [divergence.psi(-side) for side in (L, L.flip(0) / 2)]
    liked = 1 - torch.sigmoid(0.3 * (psi[0] - expected))
    disliked = 1 - torch.sigmoid(0.3 * (expected - psi[1]))
    close(out.loss, (liked + disliked).mean() / 2, 1e-12)


def test_a_constant_of_the_prompt_cancels_against_the_mean_score_and_not_against_the_divergence():
    """f and f + c (t - 1) are one divergence. Scores f' differ by c, the means of the values f/t do not."""
    c, t = 0.7, (POLICY - REFERENCE).exp()
    score, value = t.log(), t.log() - 1 + 1 / t  # of f = t log t - t + 1
    other_score, other_value = score + c, value + c * (1 - 1 / t)

    def mean(x):
        return (POLICY.exp() * x).sum()

    close(other_score - mean(other_score), score - mean(score), 1e-14)
    close(other_score - mean(other_value), score - mean(value) + c, 1e-14)


# -- adversarial inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [200.0, 1e4])
@each_admissible
def test_log_ratios_of_any_size_give_finite_values_and_gradients(divergence, size):
    sides = [torch.tensor([size, -size, size, 0.0]), torch.tensor([size, size, -size, -size])]
    sides = [side.requires_grad_() for side in sides]
    for mismatched in (torch.tensor([size, size]), torch.tensor([-size, size]), torch.tensor([-size])):
        out = KTO(divergence)(**answers(*sides, mismatched))
        assert out.loss.isfinite() and 0 <= out.loss <= 1
        assert gradient(out.loss, *sides).isfinite().all()
        assert all(value.isfinite() for value in out.metrics.values())


def test_empty_answers_equal_answers_and_empty_calls_are_finite():
    zero = torch.zeros(2)
    assert KTO()(**answers(zero, zero, zero)).loss == 0.5
    none = torch.zeros(0, requires_grad=True)
    out = KTO()(**answers(none, none, zero))
    assert out.loss == 0 and gradient(out.loss, none).shape == (0,)


def test_answers_without_mass_and_without_mismatches_are_refused():
    zero = torch.zeros(2)
    with pytest.raises(ValueError, match="the reference gives probability 0 to a response of pair 0"):
        KTO()(**answers(zero, zero, zero) | {"log_p_rejected": torch.full((2,), -math.inf)})
    with pytest.raises(ValueError, match="got 2 of them, 1 with an infinite log-ratio"):
        KTO()(**answers(zero, zero, torch.tensor([0.0, math.inf])))
    with pytest.raises(ValueError, match=r"got 0 of them.*give at least one"):
        KTO()(**answers(zero, zero, torch.zeros(0)))


def test_wrong_settings_are_refused():
    for settings, error, message in (
        ({"beta": 0.0}, ValueError, "beta must be > 0"),
        ({"desirable": -1.0}, ValueError, "weights >= 0"),
        ({"desirable": 0.0, "undesirable": 0.0}, ValueError, "not both 0"),
        ({"divergence": fdiv.TV()}, TypeError, "KTO cannot use TV.*0.1 \\* ReverseKL"),
        ({"divergence": "kl"}, TypeError, "KTO takes an f-divergence"),
    ):
        with pytest.raises(error, match=message):
            KTO(**settings)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    assert repr(KTO()) == "KTO(divergence=ReverseKL(), beta=0.1, desirable=1.0, undesirable=1.0)"
    assert isinstance(KTO(), Method)
    assert KTO.reads[-1] == "log_ratio_mismatched"
