"""The contract of a method, and the one reduction they share."""

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fdiv._divergence import Divergence

Consumes = Literal["tokens", "responses", "pairs", "rollouts"]

# What a method that consumes "responses" can ask for in `reads`, beside its estimator's evidence. Rows are
# the R response tokens of a micro-batch, sequence by sequence, in the order of the text.
READABLE = {
    "labels": "[R] the token itself, an index into the vocabulary",
    "sequence": "[R] the number of the sequence that a row belongs to, ascending from 0",
    "sequences": "the number of sequences in the global batch, as `count` is that of its tokens",
    "by_student": "[R] whether the student wrote it (a dataset or the teacher wrote the others)",
    "log_p_label": "[R] the teacher's log-probability of the token, at temperature 1",
    "log_q_label": "[R] the student's, with its gradient",
    "log_behaviour": "[R] that of whoever wrote it, as it was drawn; by_student rows only, else log_q_label",
    "passes": "[R] how many of the `tries` answers to the row's prompt the task's verifier accepted",
    "tries": "[R] how many answers it was shown",
    "reward": "[R] the verifier's verdict on the row's own sequence, 0 or 1",
    "shown": "[R] whether the teacher was shown more than the student (a privileged context was found)",
    "progress": "the fraction of training steps that are done, 0 <= progress < 1",
    "state": "the method's own numbers, see Adaptive",
}

# And of a text that teacher and student read in two vocabularies, in Rt and Rs tokens: p_ is the teacher's.
READABLE_IN_TWO = {
    "log_p": "[Rt, Vt] the teacher's log-probabilities; log_p_label [Rt] that of its own tokens",
    "log_q": "[Rs, Vs] the student's",
    "p_labels, q_labels": "[Rt], [Rs] the tokens",
    "p_inputs, q_inputs": "[Rt], [Rs] the token before each",
    "p_sequence, q_sequence": "[Rt], [Rs] the number of the sequence",
    "p_group, q_group": "[Rt], [Rs] the stretch of text that a token is part of; -1: compared with nothing",
    "p_shared, q_shared": "[K] the ids of tokens that both write alike, pair by pair",
    "p_hidden, p_weight, p_embedding": "states [Rt, width], head and embedding; likewise q_",
    "projectors": "the DualSpace that is trained beside the student",
    "groups": "the stretches in the global batch",
    "p_count": "the teacher's tokens in the global batch, as `count` is the student's",
}


class Out(NamedTuple):
    """A scalar loss to call backward on, and numbers to log (detached)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@runtime_checkable
class Method(Protocol):
    """One paper: a frozen dataclass with a divergence, called with named tensors.

    `consumes` says what a step is made of: "tokens" (text with labels), "responses" (and a teacher),
    "pairs" (chosen and rejected), "rollouts" (sampled groups with rewards).

    One that consumes "responses" may state more, each as a field or a property: `estimator` (its evidence is
    handed over by name), `reads` (names of READABLE), `sampler` (who writes the responses, see fdiv.sample),
    `temperature` (divides both models' logits before the evidence is made), `context` ("same", or
    "privileged": the teacher is shown what the task knows beside the prompt) and `ema` (the teacher follows
    the student by this rate a step).
    """

    consumes: ClassVar[Consumes]

    @property
    def divergence(self) -> Divergence: ...

    __call__: Callable[..., Out]


@runtime_checkable
class Adaptive(Protocol):
    """A method with numbers that follow the training: pure functions, the trainer keeps and saves them."""

    def initial_state(self) -> dict[str, float]: ...

    def advance(
        self, state: dict[str, float], metrics: dict[str, float], progress: float
    ) -> dict[str, float]:
        """The state of the next step, from this one's metrics (means over the global batch)."""
        ...


def mean_over_tokens(rows: Tensor, mask: Tensor | None = None, count: Tensor | float | None = None) -> Tensor:
    """Sum of the rows where `mask` is true, over `count`: the tokens of the *global* batch.

    `count` defaults to the tokens of this call. Masked rows are selected away, not multiplied by 0; with no
    token at all the loss is 0 and its graph intact.
    """
    if mask is not None:
        check_mask(mask, rows.shape)
        rows = torch.where(mask, rows, 0.0)
        count = mask.sum() if count is None else count
    count = rows.numel() if count is None else count
    return rows.sum() / torch.as_tensor(count, device=rows.device).clamp(min=1)


def mean_over_sequences(rows: Tensor, sequence: Tensor, sequences: Tensor | float | None = None) -> Tensor:
    """The mean over sequences of each one's mean over its tokens, rows and sequence [R].

    `sequences`: how many there are in the *global* batch; those of this call by default.
    """
    lengths = sequence.bincount().clamp(min=1)
    present = (sequence.bincount() > 0).sum()
    return mean_over_tokens(rows / lengths[sequence], count=present if sequences is None else sequences)


def earlier(rows: Tensor, sequence: Tensor) -> Tensor:
    """The sum of the rows before each one in its own sequence, [R]."""
    total = rows.cumsum(0)
    starts = torch.ones_like(sequence, dtype=torch.bool)
    starts[1:] = sequence[1:] != sequence[:-1]
    before = total - rows  # of all rows, those of other sequences too
    return before - before[starts][starts.cumsum(0) - 1]


def later(rows: Tensor, sequence: Tensor) -> Tensor:
    """The sum of the rows after each one in its own sequence, [R]."""
    return earlier(rows.flip(0), sequence.flip(0)).flip(0)


def blank(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor` with zeros where `mask` is false, whose shape is that of its leading dimensions.

    A mask on a loss alone is too late: a gradient of 0 that passes through an infinity becomes nan.
    """
    check_mask(mask, tensor.shape[: mask.ndim])
    return torch.where(mask.reshape(mask.shape + (1,) * (tensor.ndim - mask.ndim)), tensor, 0.0)


def named(evidence: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    """The tensors of these names, in this order; nothing may be missing, or given and ignored."""
    if evidence.keys() != set(names):
        got = ", ".join(evidence) or "nothing"
        raise TypeError(f"the estimator reads {', '.join(names)}; got {got}")
    return [evidence[name] for name in names]


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raise unless `mask` is boolean and of this shape."""
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask is boolean, got {mask.dtype}; write mask.bool()")
    if mask.shape != shape:
        raise ValueError(f"mask {tuple(mask.shape)} and rows {tuple(shape)} differ in shape")
