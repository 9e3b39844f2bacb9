"""A group of answers written as a tree: new ones branch off old ones where it is open what they will mean.

Zhao et al., "Reinforced Efficient Reasoning via Semantically Diverse Exploration" (ROSE), arXiv 2601.05053,
section 3.1: each answer starts anew with probability epsilon, and else keeps the tokens before the place of
the largest semantic entropy among all answers of its group. Two measures of it:

    Dispersion        H SD,  H the entropy of the next token,  SD = sum_ij p_i p_j (1 - cos(e_i, e_j))
                      over the `top` likeliest tokens with embeddings e: the paper's, with a sign that serves
    SemanticEntropy   - sum_c n_c/K log n_c/K  over the clusters of meaning of K continuations
                      Kuhn, Gal and Farquhar, "Semantic Uncertainty", arXiv 2302.09664

The paper prints SD = -sum_ij p_i p_j cos(e_i, e_j), which is never above 0: its H SD is largest, 0, where the
next token is certain. The authors' code leaves out i = j: `Dispersion(distance=False)`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdiv.notation import function_named
from fdiv.sample.clustering import Clusterer, SameAnswer, Written


@dataclass(frozen=True)
class Dispersion:
    """H SD of the next token, of the model's own distribution and embeddings; nothing more is written.

    top: the likeliest tokens that SD is over. distance=False: SD as in the authors' code, -cos in the place
    of 1 - cos over pairs of different tokens; where candidates are alike it is largest at certain tokens.
    """

    top: int = 20
    distance: bool = True

    def __post_init__(self):
        if self.top < 2:
            raise ValueError(f"top is a number of tokens to compare, >= 2, got {self.top!r}")

    def __call__(self, log_probs: Tensor, embeddings: Tensor) -> Tensor:
        """[R] from log-probabilities [R, vocab] and the embedding of each token [vocab, width]."""
        found = log_probs.topk(min(self.top, log_probs.shape[-1]), -1)
        p = found.values.exp()
        directions = torch.nn.functional.normalize(embeddings[found.indices].to(p.dtype), dim=-1)
        alike = (p.unsqueeze(-1) * directions).sum(-2).square().sum(-1)  # sum_ij p_i p_j cos
        whole = p.sum(-1).square() if self.distance else p.square().sum(-1)
        return token_entropy(log_probs) * (whole - alike)


@dataclass(frozen=True)
class SemanticEntropy:
    """That of `continuations` answers, written out from each of a few places and then clustered.

    clusterer: a Clusterer, or "module:function". candidates: the places in each answer, behind its first
    token, where the next token's entropy is largest. An answer costs candidates * continuations more,
    none of which is kept.
    """

    clusterer: Clusterer | str = field(default_factory=SameAnswer)
    continuations: int = 4
    candidates: int = 4

    def __post_init__(self):
        if not callable(self.clusterer) and not (isinstance(self.clusterer, str) and ":" in self.clusterer):
            raise TypeError(
                f"clusterer is SameAnswer(), Overlap(), a function of answers or 'module:function', got "
                f"{self.clusterer!r}"
            )
        if self.continuations < 2 or self.candidates < 1:
            raise ValueError(
                f"at least 2 continuations of at least 1 place are compared, got {self.continuations!r} "
                f"and {self.candidates!r}"
            )

    def __call__(self, answers: Sequence[Written]) -> float:
        """Of the continuations of one place."""
        named = isinstance(self.clusterer, str)
        cluster: Callable = function_named(self.clusterer) if named else self.clusterer  # pyright: ignore
        told = [int(number) for number in cluster(answers)]
        if len(told) != len(answers):
            raise ValueError(f"{self.clusterer!r} told {len(told)} clusters of {len(answers)} answers")
        return float(semantic_entropy(torch.tensor(told)))


Measure = Dispersion | SemanticEntropy | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Branching:
    """How a group is written: `first` answers from the root, the others one after another off the tree.

    epsilon: the chance that one of these starts at the root too. measure: of how open each place is, see
    above; or a function as Dispersion's.
    """

    first: int = 1
    epsilon: float = 0.5
    measure: Measure = field(default_factory=Dispersion)

    def __post_init__(self):
        if self.first < 1:
            raise ValueError(f"first is a number of answers >= 1, got {self.first!r}")
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon is a chance in [0, 1], got {self.epsilon!r}")
        if not callable(self.measure):
            raise TypeError(f"measure is Dispersion() or SemanticEntropy(), got {self.measure!r}")

    def check(self, size: int) -> None:
        """Raise unless a group of `size` answers can be written so."""
        if self.first > size:
            raise ValueError(f"first={self.first} answers do not fit into groups of {size}")

    def place(self, scores: Sequence[Tensor], uniform: float) -> tuple[int, int]:
        """(answer, tokens kept of it) where the next one branches off; (-1, 0) is the root.

        scores: of each answer so far, those of its tokens, -inf where it is another's. uniform: in [0, 1).
        """
        if uniform < self.epsilon:
            return -1, 0
        best, found = -torch.inf, (-1, 0)
        for number, row in enumerate(scores):
            # Rounded: what is computed in another batch is the same up to that, and the first one counts.
            row = (row.double() * 1e6).round()
            if len(row) and float(row.max()) > best:
                best = float(row.max())
                found = number, int((row == best).nonzero()[0])
        return found if found[1] else (-1, 0)


def token_entropy(log_probs: Tensor) -> Tensor:
    """H of each row [R, vocab]."""
    return torch.special.entr(log_probs.exp()).sum(-1)


def semantic_entropy(clusters: Tensor) -> Tensor:
    """The entropy of how K members share in clusters, [..., K] -> [...]; equal numbers are one cluster."""
    size = (clusters.unsqueeze(-1) == clusters.unsqueeze(-2)).sum(-1).double()
    return -(size / clusters.shape[-1]).log().mean(-1)
