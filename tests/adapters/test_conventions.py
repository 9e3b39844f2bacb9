"""Other systems' knobs give other systems' numbers: in closed form, and from the installed systems."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fdiv import FDPO, JS, KL, Alpha, FDivergence, ReverseKL
from fdiv.adapters import conventions

torch.set_num_threads(1)  # tensors of a few numbers: more threads only cost

P = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
Q = torch.tensor([[0.2, 0.2, 0.25, 0.35], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
RATIOS = torch.linspace(-2, 2, 9, dtype=torch.float64)  # log policy / reference


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def teacher_weighted(beta: float) -> Tensor:
    m = beta * P + (1 - beta) * Q
    return beta * kl(P, m) + (1 - beta) * kl(Q, m)


def student_weighted(beta: float) -> Tensor:
    m = beta * Q + (1 - beta) * P
    return beta * kl(Q, m) + (1 - beta) * kl(P, m)


def score(divergence: FDivergence, log_ratio: Tensor = RATIOS) -> Tensor:
    return divergence.psi(-log_ratio)


@pytest.mark.parametrize("translate", [conventions.trl_beta, conventions.trl_distillation_alpha])
def test_trl_beta_weighs_the_teacher_and_jumps_to_the_kls_at_its_ends(translate):
    assert (translate(0.0), translate(1.0), translate(0.3)) == (KL(), ReverseKL(), JS(0.3))
    torch.testing.assert_close(translate(0.3)(P.log(), Q.log()), teacher_weighted(0.3))


def test_kdflow_weighs_the_student():
    torch.testing.assert_close(conventions.kdflow_jsd_beta(0.1)(P.log(), Q.log()), student_weighted(0.1))
    assert conventions.kdflow_jsd_beta(0.1) == conventions.trl_beta(0.9)


@pytest.mark.parametrize(
    "translate", [conventions.torchtune_sym_kd_ratio, conventions.nemo_rl_mixed_kl_weight]
)
def test_a_blend_weighs_the_forward_kl(translate):
    assert (translate(0.0), translate(1.0)) == (ReverseKL(), KL())
    torch.testing.assert_close(translate(0.3)(P.log(), Q.log()), 0.3 * kl(P, Q) + 0.7 * kl(Q, P))


def test_todays_trl_mirrors_alpha():
    u = RATIOS.exp()
    for coefficient in (0.3, 1.7, -0.5):
        divergence = conventions.trl_dpo_f_divergence("alpha_divergence", coefficient)
        expected = (u ** (coefficient - 1) - 1) / (coefficient - 1)
        torch.testing.assert_close(score(divergence), expected)
    assert conventions.trl_dpo_f_divergence("alpha_divergence", 1) == ReverseKL()
    assert conventions.trl_dpo_f_divergence("alpha_divergence", 0) == KL()


def test_the_defaults_are_the_systems():
    assert conventions.trl_dpo_f_divergence("alpha_divergence") == Alpha(0.5)
    assert conventions.trl_dpo_f_divergence_old("alpha_divergence") == KL()
    assert conventions.ms_swift_dpo_f_divergence("alpha_divergence") == Alpha(0.5)


@pytest.mark.parametrize(
    "translate", [conventions.trl_dpo_f_divergence_old, conventions.ms_swift_dpo_f_divergence]
)
def test_the_older_convention_is_the_authors(translate):
    u = RATIOS.exp()
    for coefficient in (0.3, 1.7):
        divergence = translate("alpha_divergence", coefficient)
        assert divergence == conventions.fdpo_alpha(coefficient)
        torch.testing.assert_close(score(divergence), (1 - u**-coefficient) / coefficient)
    assert translate("alpha_divergence", 1.0) == KL()


@pytest.mark.parametrize(
    "translate",
    [
        conventions.trl_dpo_f_divergence,
        conventions.trl_dpo_f_divergence_old,
        conventions.ms_swift_dpo_f_divergence,
    ],
)
def test_named_scores_are_the_systems(translate):
    u = RATIOS.exp()
    torch.testing.assert_close(score(translate("reverse_kl")), RATIOS)
    torch.testing.assert_close(score(translate("js_divergence")), (2 * u / (1 + u)).log())


def test_forward_kl_is_a_name_in_todays_trl_alone():
    forward = score(conventions.trl_dpo_f_divergence("forward_kl"))
    torch.testing.assert_close(forward, 1 - (-RATIOS).exp())
    with pytest.raises(ValueError, match="FDPO"):
        conventions.trl_dpo_f_divergence_old("forward_kl")


@pytest.mark.parametrize(
    ("translate", "value"),
    [
        (conventions.trl_beta, -0.1),
        (conventions.trl_beta, 1.1),
        (conventions.trl_beta, math.nan),
        (conventions.trl_distillation_alpha, 2),
        (conventions.kdflow_jsd_beta, 0.0),
        (conventions.kdflow_jsd_beta, 1.0),
        (conventions.torchtune_sym_kd_ratio, 1.5),
        (conventions.nemo_rl_mixed_kl_weight, -1.0),
        (conventions.fdpo_alpha, 0.0),
        (conventions.trl_dpo_f_divergence, "jensen"),
    ],
)
def test_what_a_system_cannot_use_is_refused_with_what_to_write(translate, value):
    with pytest.raises(ValueError, match="writ"):
        translate(value)


# -- against the systems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gkd_of_trl_gives_the_same_numbers(beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    theirs = gkd.GKDTrainer.generalized_jsd_loss(Q.log(), P.log(), beta=beta, reduction="none").sum(-1)
    torch.testing.assert_close(conventions.trl_beta(beta)(P.log(), Q.log()), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_sdpo_of_trl_gives_the_same_numbers(alpha):
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    theirs = losses.compute_divergence(Q.log(), P.log(), alpha)
    ours = conventions.trl_distillation_alpha(alpha)(P.log(), Q.log())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.9, 1.0])
def test_the_jsd_of_liger_gives_the_same_numbers(beta):
    jsd = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    theirs = jsd.LigerFusedLinearJSDFunction.distillation_loss_fn(Q.log(), P.log(), beta=beta)
    torch.testing.assert_close(conventions.trl_beta(beta)(P.log(), Q.log()).sum(), theirs)


@pytest.mark.parametrize(
    ("kind", "coefficient"),
    [
        ("reverse_kl", 0.5),
        ("forward_kl", 0.5),
        ("js_divergence", 0.5),
        ("alpha_divergence", 0.3),
        ("alpha_divergence", 0.0),
        ("alpha_divergence", 1.0),
    ],
)
def test_dpo_of_trl_gives_the_same_loss(kind, coefficient):
    trl = pytest.importorskip("trl")
    chosen, rejected = torch.tensor([0.7]), torch.tensor([-0.4])
    ours = FDPO(divergence=conventions.trl_dpo_f_divergence(kind, coefficient), beta=0.2)(
        log_p_chosen=torch.zeros(1),
        log_p_rejected=torch.zeros(1),
        log_q_chosen=chosen,
        log_q_rejected=rejected,
    ).loss
    theirs = dpo_loss_of_trl(trl.DPOTrainer, kind, coefficient, chosen, rejected, beta=0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def dpo_loss_of_trl(
    trainer_class, kind: str, coefficient: float, chosen: Tensor, rejected: Tensor, beta: float
):
    """One pair of responses, each one token long, through the trainer's own loss."""
    alone = SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t)
    metrics = {"eval": {name: [] for name in METRICS}}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=alone,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=kind,
        f_alpha_divergence_coef=coefficient,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=metrics,
        _total_train_tokens=0,
    )
    ids, nothing = torch.ones(2, 2, dtype=torch.long), torch.zeros(2, 1)
    log_probs = torch.stack([chosen, rejected])
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": torch.tensor([[0, 1], [0, 1]]),
        "ref_chosen_logps": torch.zeros(1),
        "ref_rejected_logps": torch.zeros(1),
    }
    return trainer_class._compute_loss(trainer, lambda **_: outputs, inputs, False)


METRICS = (
    "entropy",
    "num_tokens",
    "logits/chosen",
    "logits/rejected",
    "mean_token_accuracy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
