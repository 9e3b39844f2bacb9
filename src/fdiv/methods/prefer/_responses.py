"""What the preference methods that see each token of two responses have in common."""

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from fdiv._divergence import Divergence
from fdiv._math import in_working_precision
from fdiv.estimate._estimator import Estimator
from fdiv.methods._method import mean_over_tokens, named


def check_estimator(divergence: Divergence, estimator: Estimator, who: str) -> None:
    """Raise unless the divergence is of next-token distributions, seen whole or in part."""
    estimator.check(divergence)
    if estimator.sees not in ("logits", "heads"):
        raise TypeError(
            f"{who} sums the divergence of next-token distributions over text that neither model wrote, and "
            f"{estimator!r} looks at the text's own token; write FusedLinear() or Exact()"
        )


def log_ratios(log_p_label: Tensor, log_q_label: Tensor) -> Tensor:
    """log q - log p of each token, [R], in float32 or float64; the reference is not differentiated."""
    log_p, log_q = in_working_precision(log_p_label.detach(), log_q_label)
    for who, log_probs in (("reference", log_p), ("policy", log_q)):
        if not bool(log_probs.isfinite().all()):
            raise ValueError(
                f"a token of a response has no finite log-probability under the {who}, so that there is no "
                "log-ratio; leave the response out, or score it under a model that can write it"
            )
    return log_q - log_p


def token_divergences(divergence: Divergence, estimator: Estimator, evidence: dict[str, Any]) -> Tensor:
    """D(reference, policy) of the next token, [R], all finite."""
    (rows,) = in_working_precision(estimator(divergence, *named(evidence, estimator.evidence)))
    if not bool(rows.isfinite().all()):
        raise ValueError(
            f"{divergence!r} between reference and policy is not finite at some token: one of them has no "
            "mass where the other has some; write a bounded divergence, as JS(0.5)"
        )
    return rows


def totals(rows: Tensor, sequence: Tensor, responses: int) -> Tensor:
    """The sum over each response, [responses]; 0 for one without tokens."""
    return rows.new_zeros(responses).index_add(0, sequence, rows)


def preference_loss(margin: Tensor, pairs_in_batch: Tensor | float | None) -> Tensor:
    """-log sigmoid(margin), summed over the pairs of this call and divided by those of the global batch."""
    return mean_over_tokens(-logsigmoid(margin), count=pairs_in_batch)


def preference_metrics(margin: Tensor, **responses: Tensor) -> dict[str, Tensor]:
    """Means over pairs; what is given is [2 pairs], the chosen responses first."""
    pairs = len(margin)
    numbers = {"accuracy": (margin > 0).to(margin), "margin": margin}
    for name, rows in responses.items():
        numbers |= {f"{name}_chosen": rows[:pairs], f"{name}_rejected": rows[pairs:]}
    return {name: mean_over_tokens(rows.detach()) for name, rows in numbers.items()}
