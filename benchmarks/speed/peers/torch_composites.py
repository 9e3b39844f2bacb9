"""What people write by hand, on logits for all rows."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from benchmarks.speed.case import Outcome
from benchmarks.speed.heads import Heads, differentiate
from benchmarks.speed.measure import Absent
from fdiv import JS, KL, FDivergence, ReverseKL


def log_softmax_and_kl_div(divergence: FDivergence, given: Heads) -> Outcome:
    with torch.no_grad():
        log_p = (given.p_hidden @ given.p_weight.T).log_softmax(-1)
    log_q = (given.q_hidden @ given.q_weight.T).log_softmax(-1)
    match divergence:
        case KL():
            loss = kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        case ReverseKL():
            loss = kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        case _:
            raise Absent(f"torch has KL alone, not {divergence!r}")
    return differentiate(loss, given.trained)


def gathered_log_prob(given: Heads, index: Tensor, entropy_weight: float) -> Outcome:
    log_q = (given.q_hidden @ given.q_weight.T).log_softmax(-1)
    log_prob = log_q.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    return differentiate(-log_prob.mean() - entropy_weight * entropy.mean(), given.trained)


def gathered_atoms(divergence: FDivergence, index: Tensor, log_p: Tensor, given: Heads) -> Outcome:
    """Gather k log-probabilities, put what is left into a tail atom, and sum over the k + 1."""
    log_q = (given.q_hidden @ given.q_weight.T).log_softmax(-1).gather(-1, index)
    p, q = (torch.cat([t.exp(), 1 - t.exp().sum(-1, keepdim=True)], -1) for t in (log_p, log_q))
    return differentiate(_of_masses(divergence, p, q).sum(-1).mean(), given.trained)


def _of_masses(divergence: FDivergence, p: Tensor, q: Tensor) -> Tensor:
    match divergence:
        case KL():
            return p * (p / q).log()
        case JS(beta=beta):
            m = beta * p + (1 - beta) * q
            return beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    raise Absent(f"written out for KL and JS, not for {divergence!r}")
