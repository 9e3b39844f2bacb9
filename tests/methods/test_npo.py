"""NPO: its closed value and weights, gradient ascent as its limit, and other divergences' scores."""

import math

import pytest
import torch
from tests.worlds import DIVERGENCES, close, each_other_object, each_smooth_divergence, gradient

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.prefer.fdpo import FDPO
from fdiv.methods.unlearn.gradient_ascent import GradientAscent
from fdiv.methods.unlearn.npo import NPO

L = torch.tensor([-9.0, -3.0, -0.4, 0.0, 0.2, 1.7], dtype=torch.float64)  # log q - log p
P = torch.tensor([-20.0, -5.0, -7.0, -1.0, -3.0, -2.0], dtype=torch.float64)


def out_of(method, log_ratio):
    return method(log_p_rejected=P, log_q_rejected=P + log_ratio)


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_the_loss_is_the_papers(beta):
    """-(2/b) log sigmoid(-b l) = (2/b) log(1 + (q/p)^b)."""
    close(out_of(NPO(beta=beta), L).loss, (2 / beta * (1 + (beta * L).exp()).log()).mean(), 1e-13)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_weight_of_the_ascent_fades_with_the_answer(beta):
    log_ratio = L.clone().requires_grad_()
    q, p = (P + L).exp(), P.exp()
    weight = 2 * q**beta / (q**beta + p**beta)
    close(gradient(out_of(NPO(beta=beta), log_ratio).loss, log_ratio), weight / len(L), 1e-12)


def test_for_a_small_beta_it_is_gradient_ascent_but_for_a_constant():
    ratios = [L.clone().requires_grad_() for _ in range(2)]
    ascent = GradientAscent()(log_q_rejected=P + ratios[1])
    for beta, error in ((1e-2, 0.05), (1e-4, 5e-4), (1e-6, 5e-6)):
        out = out_of(NPO(beta=beta), ratios[0])
        close(gradient(out.loss, ratios[0]), gradient(ascent.loss, ratios[1]), error)
        constant = 2 * math.log(2) / beta + (-P).mean()
        assert (out.loss - ascent.loss - constant).abs() <= beta * (L**2).mean() / 4 + 1e-7


def test_it_is_the_rejected_half_of_dpo():
    """DPO with a chosen answer that stays where the reference has it is half of beta times NPO."""
    zero = torch.zeros_like(P)
    dpo = FDPO(beta=0.3)(log_p_chosen=zero, log_q_chosen=zero, log_p_rejected=P, log_q_rejected=P + L)
    close(dpo.loss, 0.3 / 2 * out_of(NPO(beta=0.3), L).loss, 1e-13)


@each_smooth_divergence
def test_under_another_divergence_the_score_is_f_dpos(divergence):
    log_ratio = L.clone().requires_grad_()
    score = FDPO(fdiv.ReverseKL()).score if divergence == fdiv.ReverseKL() else None
    expected = score(P, P + L) if score else divergence.psi(-L)
    out = out_of(NPO(divergence, beta=0.5), log_ratio)
    close(out.loss, (4 * (1 + (0.5 * expected).exp()).log()).mean(), 1e-12)
    assert (gradient(out.loss, log_ratio) >= 0).all()  # descent lowers every answer
    assert gradient(out.loss, log_ratio)[3] > 0


def test_at_the_reference_all_divergences_agree_up_to_their_curvature():
    for divergence in (d for d in DIVERGENCES if d.is_smooth):
        at = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        slope = gradient(out_of(NPO(divergence), at).loss, at)
        close(slope / divergence.curvature_at_one, torch.full((6,), 1 / 6, dtype=torch.float64), 1e-8)


def test_the_reference_receives_no_gradient():
    log_p, log_q = P.clone().requires_grad_(), (P + L).requires_grad_()
    NPO()(log_p_rejected=log_p, log_q_rejected=log_q).loss.backward()
    assert log_p.grad is None and log_q.grad is not None


def test_retained_text_is_added():
    kept = {
        "log_q_retain_label": torch.tensor([-1.0, -3.0, -0.5], dtype=torch.float64),
        "retain_sequence": torch.tensor([0, 0, 1]),
    }
    out = NPO(retain=0.5)(log_p_rejected=P, log_q_rejected=P + L, **kept)
    close(out.loss, out_of(NPO(), L).loss + 0.5 * 1.25, 1e-13)
    assert NPO(retain=0.5).reads == ("log_p_rejected", "log_q_rejected", *kept)
    assert NPO().reads == ("log_p_rejected", "log_q_rejected")


def test_the_metrics_are_plain_numbers_of_the_answers():
    metrics = out_of(NPO(fdiv.KL()), L).metrics
    close(metrics["log_q_forget"], (P + L).mean())
    close(metrics["log_ratio_forget"], L.mean())
    close(metrics["score"], (1 - (-L).exp()).mean())


@each_smooth_divergence
def test_log_ratios_far_beyond_the_range_of_exp_give_finite_values_and_gradients(divergence):
    log_ratio = torch.tensor([1e4, -1e4, 200.0, -200.0, 0.0, -95.0], requires_grad=True)
    out = NPO(divergence)(log_p_rejected=torch.full((6,), -1.0), log_q_rejected=log_ratio - 1)
    assert out.loss.isfinite() and gradient(out.loss, log_ratio).isfinite().all()


@each_smooth_divergence
def test_an_answer_that_the_policy_has_forgotten_altogether_costs_nothing_more(divergence):
    log_q = torch.tensor([-math.inf, -3.0], dtype=torch.float64, requires_grad=True)
    out = NPO(divergence)(log_p_rejected=P[:2], log_q_rejected=log_q)
    assert out.loss.isfinite() and gradient(out.loss, log_q).isfinite().all()


def test_an_answer_that_the_reference_never_gives_is_refused():
    with pytest.raises(ValueError, match="the reference never gives one of the answers"):
        NPO()(log_p_rejected=torch.tensor([-math.inf, -1.0]), log_q_rejected=torch.tensor([-3.0, -3.0]))


def test_a_score_that_no_number_holds_is_refused():
    with pytest.raises(ValueError, match=r"score of Alpha\(alpha=-3.0\) is beyond torch.float32"):
        NPO(fdiv.Alpha(-3.0))(log_p_rejected=torch.tensor([-200.0]), log_q_rejected=torch.tensor([-3.0]))


@pytest.mark.parametrize("divergence", [fdiv.TV(), fdiv.KL() + fdiv.TV()], ids=repr)
def test_a_score_that_jumps_at_the_reference_is_refused(divergence):
    with pytest.raises(TypeError, match="jumps where the policy is the reference"):
        NPO(divergence)


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="NPO takes an f-divergence"):
        NPO(other)


def test_wrong_settings_are_refused():
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"its limit at 0 is GradientAscent\(\)"):
            NPO(beta=beta)
    with pytest.raises(ValueError, match="retain is a finite weight"):
        NPO(retain=-0.1)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = NPO(fdiv.KL(), beta=0.3, retain=1.0)
    assert fdiv.parse(repr(method), ["fdiv.methods.unlearn.npo"]) == method
    assert isinstance(method, Method) and NPO().divergence == fdiv.ReverseKL()
