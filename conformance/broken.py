"""fdiv with one mistake at a time, one for every case that applies to it: each has to fail its case."""

import math

import torch
from torch import Tensor

from conformance.systems.fdiv import BY_NAME, Adapter, on_logits
from fdiv import GKD, JS, KL, Alpha, FDivergence, MonteCarlo, ReverseKL


def _logs(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    return teacher.log_softmax(-1), student.log_softmax(-1)


def _only(name: str, function):
    return lambda self, *arguments, **options: {name: function}


def _plain_kl(teacher: Tensor, student: Tensor) -> Tensor:
    log_p, log_q = _logs(teacher, student)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _without_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    log_p, log_q = _logs(teacher, student)
    return -(log_p.exp() * log_q).sum(-1)


def _adaptive(teacher: Tensor, student: Tensor) -> Tensor:
    log_p, log_q = _logs(teacher.float(), student.float())
    gap = (log_p - log_q).abs().sum(-1)
    return KL()(log_p, log_q) * gap / gap


def _one_sided_tv(teacher: Tensor, student: Tensor) -> Tensor:
    log_p, log_q = _logs(teacher, student)
    gap = log_p.exp() - log_q.exp()
    return torch.where(gap >= 0, gap, -gap).sum(-1) / 2


def _masked_value_alone(teacher: Tensor, student: Tensor) -> Tensor:
    log_p, log_q = _logs(teacher, student)
    return (log_q.exp() * (log_q - log_p)).masked_fill(log_p == -math.inf, 0.0).sum(-1)


def _mixture_of_probabilities(self, teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (p.log() - m) + (1 - beta) * q * (q.log() - m)).sum(-1)


def _truncated_sum(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    log_p, log_q = _logs(teacher, student)
    index = log_p.topk(k).indices
    log_p, log_q = log_p.gather(-1, index), log_q.gather(-1, index)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def _truncated_reverse_sum(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    log_p, log_q = _logs(teacher, student)
    index = log_p.topk(k).indices
    log_p, log_q = log_p.gather(-1, index), log_q.gather(-1, index)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def _renormalised(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    index = teacher.topk(k).indices
    return on_logits(KL())(teacher.gather(-1, index), student.gather(-1, index))


def _epsilon_tail(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    log_p, log_q = _logs(teacher, student)
    index = log_p.topk(k).indices
    log_p, log_q = log_p.gather(-1, index), log_q.gather(-1, index)
    p, q = ((1 - t.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-10)).log() for t in (log_p, log_q))
    return KL()(torch.cat([log_p, p], -1), torch.cat([log_q, q], -1))


def _tempered_log_probs(self, teacher: Tensor, student: Tensor, k: int, temperature: float) -> Tensor:
    return _truncated_sum(*(t.log_softmax(-1) for t in (teacher, student)), k) / temperature


def _rounded_fused(self, teacher, student, beta, mask=None, chunk=None) -> Tensor:
    logits = teacher[0] @ teacher[1].T, student[0] @ student[1].T
    return on_logits(KL())(*logits).mean()


def _mean_of_chunks(self, teacher, student, beta, mask=None, chunk=None) -> Tensor:
    rows = on_logits(KL())(teacher[0] @ teacher[1].T, student[0] @ student[1].T)
    pairs = zip(rows.split(chunk), mask.split(chunk), strict=True)
    return torch.stack([rows[mask].mean() for rows, mask in pairs]).mean()


def _half_fused(self, teacher, student, beta, mask=None, chunk=None) -> Tensor:
    return 0.5 * Adapter.fused_jsd(self, teacher, student, beta, mask, chunk)


def _bare(divergence: FDivergence):
    return lambda log_p, log_q, log_behaviour: MonteCarlo()(divergence, log_p, log_q)


def _on_policy(divergence: FDivergence):
    return lambda log_p, log_q, log_behaviour: MonteCarlo().surrogate(divergence, log_p, log_q)


def _negated(divergence: FDivergence):
    return lambda log_p, log_q, log_behaviour: -MonteCarlo().surrogate(divergence, log_p, log_q)


def _state_as_advantage(self, reference: Tensor, policy: Tensor, name: str) -> Tensor:
    advantage = on_logits(BY_NAME[name])(reference, policy).detach()
    log_policy = policy.log_softmax(-1)
    return (log_policy.exp().detach() * advantage * log_policy).sum()


def _live_reward(self, log_policy: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    return -(rewards.unsqueeze(1) * log_policy * mask).mean()


def _discounted_by_position(self, log_ratios: Tensor, mask: Tensor) -> Tensor:
    return Adapter.future_credit(self, log_ratios, mask) * 0.9 ** torch.arange(len(log_ratios))


def _clamped_forward_only(x: Tensor) -> Tensor:
    return x + (x.clamp(-20, 20) - x).detach()


def _unshifted(self, teacher, student, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        log_p = teacher(input_ids=ids).logits.log_softmax(-1)
    return GKD()(log_p=log_p, log_q=student(input_ids=ids).logits.log_softmax(-1), mask=mask).loss


def _every_token(self, teacher, student, ids: Tensor, mask: Tensor) -> Tensor:
    everything = torch.ones_like(mask)
    everything[:, 0] = False
    return Adapter.distil(self, teacher, student, ids, everything)


def _unused(self, teacher, student, ids: Tensor, mask: Tensor) -> Tensor:
    logits = student(input_ids=ids).logits
    return Adapter.distil(self, teacher, student, ids, mask).detach() + 0 * logits.sum()


def _without_stop_token(self, rollout: Tensor, prompt: int, eos: int) -> Tensor:
    return (rollout != eos) & (torch.arange(rollout.shape[1]) >= prompt)


def _local_mean(self, teacher: Tensor, student: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
    return Adapter.token_mean(self, teacher, student, mask)


def _divided_twice(self, teacher: Tensor, student: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
    return Adapter.token_mean(self, teacher, student, mask, count) / len(teacher)


def _zero_over_zero(self, teacher: Tensor, student: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
    return on_logits(KL())(teacher, student)[mask].mean()


def _padded_with_zeros(self, teacher: Tensor, student: Tensor, size: int = 0) -> Tensor:
    missing = teacher.shape[-1] - student.shape[-1]
    return on_logits(ReverseKL())(teacher, torch.nn.functional.pad(student, (0, missing)))


def _padded_with_a_copy(self, teacher: Tensor, student: Tensor) -> Tensor:
    return on_logits(ReverseKL())(teacher, torch.cat([student, teacher[:, student.shape[-1] :]], 1))


def _keyed_by_order(self) -> tuple[Tensor, Tensor]:
    computed, cached = Adapter.cached_signal(self)
    return computed, cached.flip(0)


def _log_ratio_logged(self, chosen: float, rejected: float) -> tuple[float, float]:
    return 0.1 * (chosen - rejected), Adapter.preference_margins(self, chosen, rejected)[1]


MISTAKES: dict[str, dict] = {
    "C01": {"jsd": lambda self, p, q, beta: on_logits(JS(1 - beta))(p, q)},
    "C02": {"jsd": lambda self, p, q, beta: on_logits(JS(beta) if beta else KL())(p, q)},
    "C03": {"configure_jsd": lambda self, beta: JS(min(max(beta, 1e-6), 1 - 1e-6))},
    "C04": {"divergences": _only("forward KL", on_logits(ReverseKL()))},
    "C05": {"penalties": _only("reverse KL", _negated(ReverseKL()))},
    "C06": {"alpha_score": lambda self, x, alpha: Alpha.trl(alpha).psi(-x)},
    "C07": {"absolute_scores": _only("JS", lambda x: torch.nn.functional.logsigmoid(x))},
    "C08": {"preference_margins": _log_ratio_logged},
    "C09": {"penalties": _only("reverse KL", _bare(ReverseKL()))},
    "C10": {"off_policy_penalties": _only("reverse KL", _on_policy(ReverseKL()))},
    "C11": {"full_penalty": _state_as_advantage},
    "C12": {"policy_gradient": _live_reward},
    "C13": {"future_credit": _discounted_by_position},
    "C15": {"ratio_functions": _only("a clamp", _clamped_forward_only)},
    "C16": {"preference_scores": _only("forward KL", lambda x: 1 - (-x).exp())},
    "C17": {"doubled_penalty": lambda self: lambda: None},
    "C18": {"divergences": _only("forward KL", _plain_kl)},
    "C19": {"served": lambda self, p, ids, q: _plain_kl(p, q.gather(-1, ids)).mean()},
    "C20": {"jsd": _mixture_of_probabilities},
    "C21": {"truncated": _only("forward KL", _epsilon_tail)},
    "C22": {"fused_jsd": _rounded_fused},
    "C23": {"divergences": _only("forward KL", _plain_kl)},
    "C24": {"divergences": _only("forward KL", _adaptive)},
    "C25": {"divergences": _only("forward KL", _without_entropy)},
    "C26": {"divergences": _only("reverse KL", _masked_value_alone)},
    "C27": {"divergences": _only("TV", _one_sided_tv)},
    "C28": {"truncated": _only("forward KL", _truncated_sum)},
    "C29": {"truncated": _only("reverse KL", _truncated_reverse_sum)},
    "C30": {"truncated": _only("forward KL", _renormalised)},
    "C31": {"with_tail": _only("forward KL", _renormalised)},
    "C32": {"tempered_truncated": _tempered_log_probs},
    "C34": {"distil": _unshifted},
    "C35": {"distil": _every_token},
    "C36": {"stop_token_mask": _without_stop_token},
    "C37": {"distil": _every_token},
    "C38": {"fused_jsd": lambda self, p, q, beta, mask=None: Adapter.fused_jsd(self, p, q, beta)},
    "C39": {"token_mean": _local_mean},
    "C40": {"on_policy_denominator": lambda self: (10.0, 4.0)},
    "C41": {"token_mean": _divided_twice},
    "C42": {"fused_jsd": _mean_of_chunks},
    "C43": {"token_mean": _zero_over_zero},
    "C44": {"padded_vocabulary": _padded_with_zeros},
    "C45": {"mismatched_vocabulary": _padded_with_a_copy},
    "C47": {"fused_jsd": _half_fused},
    "C48": {"unknown_options": _only("a keyword", lambda **options: dict(temprature=2))},
    "C49": {"cached_signal": _keyed_by_order},
    "C51": {"distil": _unused},
}


def broken(case: str) -> Adapter:
    """fdiv with the mistake of this case."""
    return type("Broken", (Adapter,), MISTAKES[case])()
