"""AnyLoss: any metric of the confusion matrix as a loss, by probabilities pushed towards 0 and 1.

Han, Moniz and Chawla, "AnyLoss: Transforming Classification Metrics into Loss Functions", arXiv 2405.14745.

    y_i = 1/(1 + e^(-scale (p_i - threshold))),  TP = sum of y over positives, FN = the rest of them,
    FP = sum of y over negatives, TN = the rest of them,  L = 1 - metric(TP, FN, FP, TN)

p is the probability of the positive class, and the paper's L is `scale`, 73 there. Its metrics are
"accuracy", "f1" (F_beta), "g-mean" and "balanced accuracy", its classes two; `classes="each"` is ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.divergences.tv import TV
from fdiv.methods._method import Consumes, Out
from fdiv.methods.supervise._labels import scores_of
from fdiv.notation import function_named


class Confusion(NamedTuple):
    """Soft counts; tp + fn are the positives, fp + tn the negatives."""

    tp: Tensor
    fn: Tensor
    fp: Tensor
    tn: Tensor


@dataclass(frozen=True)
class AnyLoss:
    """1 - metric of a batch, which has to be whole: a metric of parts is not the metric.

    metric: of the paper's four, or "module:function" of tensors (tp, fn, fp, tn), the larger the better.
    classes: "positive", two classes, the label `positive` being the positive one; or "each" against the
        others, the losses of all classes averaged.
    start: the scale rises from here to `scale` in the course of training, in equal ratios; None is `scale`
        throughout. Where no p is within a few 1/scale of the threshold there is hardly a gradient.
    "g-mean", "balanced accuracy" and functions need a positive and a negative example; a class without either
    is left out, and a batch of no other costs 0 (metric `skipped`).
    """

    consumes: ClassVar[Consumes] = "examples"
    unit: ClassVar[str] = "batch"
    divergence: ClassVar[FDivergence] = TV()  # of an example's accuracy 1 - |e_y - (1 - y, y)|/2, of no other

    metric: str = "f1"
    beta: float = 1.0
    scale: float = 73.0
    threshold: float = 0.5
    classes: Literal["positive", "each"] = "positive"
    positive: int = 1
    start: float | None = None

    def __post_init__(self):
        if self.metric not in METRICS:
            if ":" not in self.metric:
                known = ", ".join(METRICS)
                raise ValueError(f"metric is one of {known} or 'module:function', got {self.metric!r}")
            function_named(self.metric)
        if not 0 < self.beta < math.inf or (self.beta != 1 and self.metric != "f1"):
            raise ValueError(f"beta is finite, > 0 and F_beta's alone, got {self.beta!r} for {self.metric!r}")
        for name, value in (("scale", self.scale), ("start", 1.0 if self.start is None else self.start)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is finite and > 0, got {value!r}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is a probability in (0, 1), got {self.threshold!r}")
        if self.classes not in ("positive", "each") or self.positive not in (0, 1):
            raise ValueError(
                f"classes is 'positive' or 'each', and positive is 0 or 1, got {self.classes!r} and "
                f"{self.positive!r}"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        return ("logits", "labels", *(("progress",) if self.start else ()))

    def __call__(
        self,
        *,
        logits: Tensor,
        labels: Tensor,
        progress: float | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """logits [B, C], labels [B]; count, if given, is B.

        metrics: `metric`, soft as it is trained, and `hard` with scale = inf.
        """
        scores = scores_of(logits, labels)
        if count is not None and int(count) != len(scores):
            raise ValueError(
                f"AnyLoss sees the whole batch of {int(count)} examples at once, got {len(scores)}; leave "
                "out micro_batch"
            )
        p, truth = self._probabilities(scores), self._truth(labels, scores)
        soft = confusion((self._scale(progress) * (p - self.threshold)).sigmoid(), truth)
        hard = confusion((p.detach() > self.threshold).to(p), truth)
        held = self._held(soft)
        if not bool(held.any()):  # a loss of 0, with its graph
            none = {"metric": p.new_zeros(()), "hard": p.new_zeros(()), "skipped": p.new_ones(())}
            return Out(scores[:0].sum(), none)
        value, found = (self._value(Confusion(*(n[held] for n in counts))) for counts in (soft, hard))
        if not bool(value.detach().isfinite()):
            raise ValueError(
                f"the metric {self.metric!r} is {value.item()} at {soft}; write one that is finite"
            )
        return Out(1 - value, {"metric": value.detach(), "hard": found, "skipped": p.new_zeros(())})

    def _probabilities(self, scores: Tensor) -> Tensor:
        """[B, classes that are looked at]."""
        if self.classes == "each":
            return scores.softmax(-1)
        if scores.shape[1] != 2:
            raise ValueError(
                f"a positive class is one of two, got {scores.shape[1]} classes; write classes='each'"
            )
        return (scores[:, self.positive] - scores[:, 1 - self.positive]).sigmoid().unsqueeze(-1)

    def _truth(self, labels: Tensor, scores: Tensor) -> Tensor:
        looked_at = range(scores.shape[1]) if self.classes == "each" else [self.positive]
        return torch.stack([labels == k for k in looked_at], -1).to(scores)

    def _scale(self, progress: float | None) -> float:
        if self.start is None:
            return self.scale
        if progress is None:
            raise TypeError(f"start={self.start!r} reads progress; write start=None for one scale throughout")
        return self.start * (self.scale / self.start) ** progress

    def _held(self, counts: Confusion) -> Tensor:
        """The classes of which the metric is defined."""
        positives, negatives = counts.tp + counts.fn, counts.fp + counts.tn
        if self.metric in ("accuracy", "f1"):
            return positives + negatives > 0
        return (positives > 0) & (negatives > 0)

    def _value(self, counts: Confusion) -> Tensor:
        if self.metric == "f1":
            return f_beta(*counts, beta=self.beta).mean()
        function = METRICS[self.metric] if self.metric in METRICS else function_named(self.metric)
        return function(*counts).mean()


def confusion(predicted: Tensor, truth: Tensor) -> Confusion:
    """Counts [classes] of predicted and truth, [B, classes] both."""
    missed = 1 - predicted
    return Confusion(
        *(
            (x * y).sum(0)
            for y, x in ((truth, predicted), (truth, missed), (1 - truth, predicted), (1 - truth, missed))
        )
    )


def accuracy(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    return (tp + tn) / (tp + fn + fp + tn)


def f_beta(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor, beta: float = 1.0) -> Tensor:
    """0 where nothing is positive, nor taken for it."""
    weighted = (1 + beta**2) * tp
    whole = weighted + beta**2 * fn + fp
    return weighted / torch.where(whole > 0, whole, 1.0)


def g_mean(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    """sqrt(recall of positives * recall of negatives); its gradient at 0 is 0."""
    square = tp / (tp + fn) * tn / (fp + tn)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def balanced_accuracy(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    return (tp / (tp + fn) + tn / (fp + tn)) / 2


METRICS: dict[str, Callable[..., Tensor]] = {
    "accuracy": accuracy,
    "f1": f_beta,
    "g-mean": g_mean,
    "balanced accuracy": balanced_accuracy,
}
