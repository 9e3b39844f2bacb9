"""The contract between a teacher and who reads it: which vocabulary, which temperature, which atoms."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from fdiv.estimate._estimator import Estimator
from fdiv.estimate.sampled_logits import SampledLogits
from fdiv.estimate.top_k import TopK
from fdiv.notation import parse

if TYPE_CHECKING:
    from fdiv.adapters.transformers import CausalLM


class TeacherError(ValueError):
    """A signal that cannot be had or must not be used, and what to write instead."""


@dataclass(frozen=True)
class Vocabulary:
    """What token numbers mean.

    size: how many tokens there are; further rows of a head are padding.
    fingerprint: of the table of (id, token), and of the ids that a model is restricted to.
    """

    size: int
    fingerprint: str

    @classmethod
    def of(cls, model: "CausalLM") -> "Vocabulary":
        """By the model's tokenizer; without one all rows of the head are tokens, named by their number."""
        name = f"unnamed-{model.true_size}"
        if model.tokenizer is not None:
            table = sorted((number, token) for token, number in model.tokenizer.get_vocab().items())
            name = hashlib.sha256(json.dumps(table).encode()).hexdigest()
        if model.vocabulary is not None:
            ids = model.vocabulary.cpu().long().numpy().tobytes()
            name = f"{name} among {hashlib.sha256(ids).hexdigest()[:16]}"
        return cls(model.size, name)


@dataclass(frozen=True)
class Terms:
    """What a source states before it gives any signal.

    support: "heads" (hidden states; whoever reads them applies the temperature), "logits" (log_p of the whole
    vocabulary), the repr of TopK(k) or SampledLogits(n, 'teacher'), or "labels" (log_p of each token itself).
    model: the fingerprint of the teacher's weights, or the name that a server gives its model.
    """

    vocabulary: Vocabulary
    temperature: float
    support: str
    model: str

    def require(self, estimator: Estimator, student: Vocabulary, temperature: float) -> None:
        """Raise TeacherError, saying what to write instead, unless the signal fits what is trained."""
        self.require_support(estimator)
        self.require_temperature(temperature)
        self.require_vocabulary(student, "the student's")

    def require_support(self, estimator: Estimator) -> None:
        wanted = support_of(estimator)
        if not serves(self.support, wanted):
            raise TeacherError(
                f"the signal holds {described(self.support)}, and {estimator!r} reads {described(wanted)}; "
                f"write {_estimator_for(self.support)}, or make a signal with {described(wanted)}"
            )

    def require_temperature(self, temperature: float) -> None:
        if self.support != "heads" and abs(self.temperature - temperature) > 1e-9:
            raise TeacherError(
                f"the signal was made at temperature {self.temperature:g} and is read at {temperature:g}; "
                "atoms cannot be tempered afterwards, for the shape of their tail is not known: write "
                f"temperature={self.temperature:g}, or make the signal at {temperature:g}"
            )

    def require_vocabulary(self, other: Vocabulary, whose: str) -> None:
        if self.vocabulary == other:
            return
        ours, theirs = (f"{v.size} tokens, {_short(v.fingerprint)}" for v in (self.vocabulary, other))
        if self.vocabulary.fingerprint == other.fingerprint:
            raise TeacherError(
                f"one tokenizer, but heads of different size: the signal's vocabulary has {ours} and {whose} "
                f"{theirs}; resize the smaller model's embeddings to the tokenizer's size"
            )
        raise TeacherError(
            f"the signal's vocabulary ({ours}) is not {whose} ({theirs}): token numbers mean different "
            "tokens, or the models are restricted to different ones. Use a cross-tokenizer method (ULD, "
            "GOLD, DSKD), or models with the same tokenizer and the same restriction"
        )


class TeacherSignal(NamedTuple):
    """What a teacher says about the R tokens under a mask, row by row in the order of the text.

    evidence, named as estimators name it: p_hidden [R, width] and p_weight [size, width]; or log_p
    [R, size]; or index and log_p [R, k], with log_weight [R, k] where atoms were drawn; or log_p [R].
    """

    evidence: dict[str, Tensor]
    terms: Terms


@runtime_checkable
class Teacher(Protocol):
    """Says what it knows of the tokens ids [B, S] (right-padded) where mask [B, S] is true.

    The first token of a sequence is predicted by nothing, whatever its mask.
    """

    terms: Terms

    def __call__(self, ids: Tensor, mask: Tensor) -> TeacherSignal: ...


@runtime_checkable
class Source(Protocol):
    """A frozen dataclass that a recipe names."""

    def open(self, estimator: Estimator, temperature: float, reference: "CausalLM | None") -> Teacher:
        """The teacher that answers what `estimator` reads; `reference`: its model, if that is here."""
        ...


def support_of(estimator: Estimator) -> str:
    """What of a teacher the estimator reads, as `Terms.support` names it."""
    names = set(estimator.evidence)
    if "p_hidden" in names:
        return "heads"
    if "index" in names:
        of = estimator.of  # type: ignore[attr-defined]
        if isinstance(of, SampledLogits) and of.proposal != "teacher":
            raise TeacherError(
                f"{estimator!r} draws atoms from a proposal that the student is part of, and a teacher draws "
                f"from itself alone; write SampledLogits({of.n}, 'teacher')"
            )
        return repr(of)
    if "log_p" in names and estimator.sees == "logits":
        return "logits"
    if "log_p" in names and estimator.sees == "log_probs":
        return "labels"
    raise TeacherError(
        f"{estimator!r} reads {', '.join(sorted(names)) or 'nothing'}, which no teacher gives; write "
        "FusedLinear(), Exact() or FusedAtoms(TopK(k))"
    )


def atoms_of(support: str) -> TopK | SampledLogits | None:
    """Which atoms a support is made of; None where it is no atoms."""
    found = parse(support) if "(" in support else None
    return found if isinstance(found, TopK | SampledLogits) else None


def serves(support: str, wanted: str) -> bool:
    """Whether a signal of one support answers another; the k likeliest atoms hold any fewer."""
    has, asks = atoms_of(support), atoms_of(wanted)
    return support == wanted or (isinstance(has, TopK) and isinstance(asks, TopK) and asks.k <= has.k)


def described(support: str) -> str:
    plain = {
        "heads": "hidden states and a head",
        "logits": "log-probabilities of the whole vocabulary",
        "labels": "log-probabilities of the tokens themselves",
    }
    return plain.get(support) or f"atoms of {support}"


def _short(fingerprint: str) -> str:
    """Enough to tell two apart by eye."""
    return " ".join(word[:16] for word in fingerprint.split())


def _estimator_for(support: str) -> str:
    plain = {"heads": "FusedLinear()", "logits": "Exact()", "labels": "MonteCarlo()"}
    return "estimator=" + (plain.get(support) or f"FusedAtoms({support})")
