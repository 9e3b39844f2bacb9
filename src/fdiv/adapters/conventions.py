"""Other systems' knobs as fdiv's objects: the same name and number gives the same loss.

Each function is named after a system and its knob and returns the divergence that the system trains with at
that value. p is the teacher or the reference, q the student or the policy. Values that a system refuses, or
with which it computes nothing of use, are refused. Two knobs need no function: TRL's GRPOConfig.beta is
GRPO(beta=...), a coefficient, and the beta of any DPO is FDPO(beta=...).

>>> trl_beta(0.0), trl_beta(0.3)
(KL(), JS(beta=0.3))
"""

from typing import NoReturn

from fdiv._divergence import FDivergence
from fdiv.divergences.alpha import Alpha
from fdiv.divergences.js import JS
from fdiv.divergences.kl import KL, ReverseKL

# -- distillation -----------------------------------------------------------------------------------------


def trl_beta(beta: float) -> FDivergence:
    """`beta` of TRL's GKD, Distillation and GOLD trainers, of ms-swift's GKD and of Liger's JSD.

    0         KL(), KL(p, q)
    0 .. 1    JS(beta): beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q
    1         ReverseKL()

    The ends are not the limits of the interior, whose loss and gradient vanish there. At one learning rate
    beta = 0.01 takes steps of a hundredth; (1 / 0.01) * JS(0.01) is on the scale of KL.
    """
    return _between_the_kls(beta, "beta")


def trl_distillation_alpha(alpha: float) -> FDivergence:
    """`distillation_alpha` of TRL's SDPO and SDFT trainers, a second name for `trl_beta`.

    0         KL()
    0 .. 1    JS(alpha)
    1         ReverseKL()

    With `distillation_topk` these trainers look at the student's likeliest tokens: TopK(k, "student") is the
    same with `distillation_add_tail`; without it they renormalise, for which fdiv has no estimator.
    """
    return _between_the_kls(alpha, "distillation_alpha")


def kdflow_jsd_beta(beta: float) -> FDivergence:
    """`jsd_beta` of KDFlow, which weighs the student: JS(1 - jsd_beta).

    0, 1      refused, as KDFlow does
    0 .. 1    beta KL(q, m) + (1 - beta) KL(p, m), m = beta q + (1 - beta) p
    """
    if not 0 < beta < 1:
        _refuse("jsd_beta", beta, "0 < jsd_beta < 1", "KL() or ReverseKL() for a KL divergence")
    return JS(1 - beta)


def torchtune_sym_kd_ratio(ratio: float) -> FDivergence:
    """`sym_kd_ratio` of torchtune's SymmetricKLLoss, the weight of the forward KL.

    0         ReverseKL()
    0 .. 1    ratio KL() + (1 - ratio) ReverseKL()
    1         KL()

    torchtune leaves the teacher's entropy out of the forward KL: its loss is larger by ratio H(p), with the
    same gradient.
    """
    return _blend(ratio, "sym_kd_ratio")


def nemo_rl_mixed_kl_weight(weight: float) -> FDivergence:
    """`mixed_kl_weight` of NeMo-RL's distillation (`kl_type: mixed`), the weight of the forward KL.

    0         ReverseKL()
    0 .. 1    weight KL() + (1 - weight) ReverseKL()
    1         KL()
    """
    return _blend(weight, "mixed_kl_weight")


def _between_the_kls(beta: float, knob: str) -> FDivergence:
    if not 0 <= beta <= 1:
        _refuse(knob, beta, f"0 <= {knob} <= 1", "0 for KL, 1 for reverse KL")
    if beta == 0:
        return KL()
    return ReverseKL() if beta == 1 else JS(beta)


def _blend(weight: float, knob: str) -> FDivergence:
    if not 0 <= weight <= 1:
        _refuse(
            knob, weight, f"0 <= {knob} <= 1", "a sum such as 2 * KL() + 0.5 * ReverseKL() for other weights"
        )
    if weight == 0:
        return ReverseKL()
    return KL() if weight == 1 else weight * KL() + (1 - weight) * ReverseKL()


# -- preferences ------------------------------------------------------------------------------------------


def trl_dpo_f_divergence(f_divergence_type: str, f_alpha_divergence_coef: float = 0.5) -> FDivergence:
    """`f_divergence_type` and `f_alpha_divergence_coef` of TRL >= 0.29's DPOConfig, for FDPO.

    "reverse_kl"        ReverseKL()       score log u, u = policy / reference
    "forward_kl"        KL()              1 - 1/u
    "js_divergence"     2 * JS(0.5)       log(2u / (1 + u))
    "alpha_divergence"  Alpha(1 - coef)   (u^(coef-1) - 1) / (coef - 1)
                        coef 0: KL();  coef 1: ReverseKL()

    coef > 1 is a score that FDPO refuses, because its optima drop responses. TRL's help text calls the last
    row u^-alpha, which is the older convention: see `trl_dpo_f_divergence_old`.
    """
    if f_divergence_type != "alpha_divergence":
        return _named(f_divergence_type, {"forward_kl": KL()})
    if f_alpha_divergence_coef in (0, 1):
        return KL() if f_alpha_divergence_coef == 0 else ReverseKL()
    return Alpha.trl(f_alpha_divergence_coef)


def trl_dpo_f_divergence_old(f_divergence_type: str, f_alpha_divergence_coef: float = 1.0) -> FDivergence:
    """The same two of TRL < 0.29, where alpha is the f-DPO authors' and runs the other way.

    "reverse_kl"        ReverseKL()       score log u
    "js_divergence"     2 * JS(0.5)       log(u / (1 + u)): less log 2, which cancels between two scores
    "alpha_divergence"  Alpha(coef)       (1 - u^-coef) / coef, of which a constant cancels
                        coef towards 0: ReverseKL(), though 0 itself divides by 0;  coef 1: KL()
    """
    if f_divergence_type == "alpha_divergence":
        return fdpo_alpha(f_alpha_divergence_coef)
    return _named(f_divergence_type, {})


def ms_swift_dpo_f_divergence(f_divergence_type: str, f_alpha_divergence_coef: float = 0.5) -> FDivergence:
    """The same two of ms-swift, which keeps the older convention of alpha under today's names.

    As `trl_dpo_f_divergence_old`. Under any other name, "forward_kl" too, ms-swift trains with reverse KL;
    here such a name is refused, for it says something else.
    """
    return trl_dpo_f_divergence_old(f_divergence_type, f_alpha_divergence_coef)


def fdpo_alpha(alpha: float) -> FDivergence:
    """alpha of the f-DPO paper (arXiv 2309.16240) and its authors' code: the score is (1 - u^-alpha) / alpha.

    towards 0    ReverseKL(), though 0 itself divides by 0
    0 .. 1       Alpha(alpha)
    1            KL()
    """
    if alpha == 0:
        _refuse(
            "alpha", alpha, "another number than 0, by which the score is divided", "ReverseKL(), its limit"
        )
    return KL() if alpha == 1 else Alpha.fdpo(alpha)


def _named(name: str, more: dict[str, FDivergence]) -> FDivergence:
    known = {"reverse_kl": ReverseKL(), "js_divergence": 2 * JS(0.5)} | more
    if name not in known:
        allowed = ", ".join(map(repr, (*known, "alpha_divergence")))
        raise ValueError(
            f"f_divergence_type is one of {allowed} in this convention, got {name!r}; write any "
            "other divergence as itself, FDPO(divergence=...)"
        )
    return known[name]


def _refuse(knob: str, value: float, allowed: str, instead: str) -> NoReturn:
    raise ValueError(f"{knob} is {allowed}, got {value!r}; write {instead}")
