"""The contract of a method, and the one reduction they share."""

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fdiv._divergence import Divergence

Consumes = Literal["tokens", "responses", "pairs", "rollouts", "examples", "paths"]

# What a method that consumes "responses" can ask for in `reads`, beside its estimator's evidence. Rows are
# the R response tokens of a micro-batch, sequence by sequence, in the order of the text.
READABLE = {
    "labels": "[R] the token itself, an index into the vocabulary",
    "sequence": "[R] the number of the sequence that a row belongs to, ascending from 0",
    "sequences": "the number of sequences in the global batch, as `count` is that of its tokens",
    "by_student": "[R] whether the student wrote it (a dataset or the teacher wrote the others)",
    "log_p_label": "[R] the teacher's log-probability of the token, at temperature 1",
    "log_q_label": "[R] the student's, with its gradient",
    "label_logit, state_value": "[R] the student's logit of the token, and logsumexp of all logits there",
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

# What one that consumes "pairs" can ask for in `reads`; without it, it is handed the first four. Rows are the
# R tokens of both responses, those of all chosen ones first.
READABLE_IN_PAIRS = {
    "log_p_chosen, log_p_rejected": "[pairs] the reference's log-probability of whole responses",
    "log_q_chosen, log_q_rejected": "[pairs] the policy's, with its gradient",
    "length_chosen, length_rejected": "[pairs] their tokens",
    "log_p_label, log_q_label": "[R] the same, of each token",
    "sequence": "[R] the number of its response: below `pairs` those of chosen ones, then the others",
    "pairs": "the pairs of this call",
    "pairs_in_batch": "those of the global batch; one that does not ask returns a mean over its pairs",
    "log_ratio_mismatched": "[pairs in batch] log q - log p of chosen responses to another pair's prompt",
    "p_states": "[R, layers, width] the reference's hidden states, which predict the token",
    "p_activations": "[R, modules] its activations, averaged over hidden units",
    "module": "what the method's module(width, layers) made, which is trained beside the policy",
    "log_p_retain_label, log_q_retain_label, retain_sequence": "[rows] of text that is not to be unlearnt",
}

# And one that consumes "rollouts", beside log_policy, log_behaviour and mask [B, T], and count; without
# `reads` it is handed `advantage` and its estimator's evidence.
READABLE_IN_ROLLOUTS = {
    "advantage": "[B] the reward, normalised within the group",
    "reward": "[B] of the task",
    "correct": "[B] whether the task's verifier accepted the answer",
    "group": "[B] the number of the answer's group, ascending from 0; unit = 'group' keeps groups whole",
    "parent, branch": "[B] the answer of the group that one branches off, or -1; the tokens it keeps",
    "sequences, groups": "numbers of the global batch",
    "log_p, log_q": "[B, T] the reference's and the policy's log-probability of the token",
    "batch_value": "the mean over the global batch's tokens of the method's survey(...) of tensors [B, T]",
    "log_target": "[B] log of the unnormalised target at the answer, as the method's `target` says",
    "log_partition": "[B] the running estimate of its normaliser at the prompt",
    "stored_log_policy, stored_log_initial, stored_mask": "[b, T] of rehearsed answers, see DPH",
    "stored_count": "their tokens in the global batch",
    "progress, state": "as above",
}

# And one that consumes "examples": inputs with labels or, of a text, its tokens (those marked *). Without
# `reads` it is handed logits and labels. unit = "batch" keeps the global batch whole; teaches = "both" trains
# the reference as well. One with tables states `initial_memory(data, reference)`, which makes them, and
# `remember(memory, ...)`, which writes to them after each step; one with a `module(shapes)`, or with a
# `beside(network, p_network)`, has that trained. alternating = True: not every step gives both a gradient.
# `sample(network, noise, condition)` says how a generator's samples are made, as `log_probs` reads scores.
READABLE_IN_EXAMPLES = {
    "logits": "* [B, C] the student's scores, with gradient; in a regression the prediction [B, K]",
    "labels": "* [B] the class",
    "targets": "[B, K] the numbers to be predicted",
    "inputs": "[B, ...]",
    "features": "[B, width] what the student's last layer reads",
    "stages": "the outputs of its stages, a list; the last are the features",
    "network": "the student, a fdiv.networks Network",
    "q_hidden, q_weight": "* only of a text: its states and its head, see FusedLinear",
    "p_weight": "* only of a text: the reference's head",
    "p_logits, p_features, p_stages, p_network": "the same of the reference, without gradient",
    "index": "[B] the number of the example in the training data",
    "log_prior": "* [C] log of the classes' share of the training labels, or of what the task states",
    "module": "what the method's module(shapes) made",
    "memory": "its tables, by name",
    "step": "the number of the optimiser's step, from 0",
    "progress, state": "as above",
}

# And one that consumes "paths", of K steps, drawn by the sampler that is trained or by an earlier one. What
# module() makes is trained beside the sampler, what initial_memory(...) makes of the first paths is kept.
READABLE_IN_PATHS = {
    "positions": "[B, K + 1, ...] the states of a path",
    "moves": "[B, K, ...] its steps, less the unbiased drift",
    "log_reward": "[B] of the path",
    "length": "[B] the steps to the state that is nearest to the target",
    "target": "[...] the state that is to be reached",
    "when": "[K] the share of the horizon that is over before a step",
    "step_size, variance": "of a step, and of the noise for a unit of time",
    "network": "the sampler: network(states, target, when) is the force that it adds",
    "module, memory": "as above",
}


class Out(NamedTuple):
    """A scalar loss to call backward on, and numbers to log (detached)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@runtime_checkable
class Method(Protocol):
    """One paper: a frozen dataclass with a divergence, called with named tensors.

    `consumes` says what a step is made of: "tokens" (text with labels), "responses" (and a teacher),
    "pairs" (chosen and rejected), "rollouts" (sampled groups with rewards), "examples" (inputs and labels),
    "paths" (of a diffusion).
    `reads` names what is handed over, of the table READABLE that goes with it.

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
