"""ULD: distillation between vocabularies that share nothing, by comparing sorted probabilities.

Boizard, El Haddad, Hudelot and Colombo, "Towards Cross-Tokenizer Distillation: the Universal Logit
Distillation Loss for LLMs", arXiv 2402.12030.

    L = CE(labels, q) + lambda  mean_t sum_i |q_t(i) - p_t(i)|

q_t(i) is the i-th largest probability of the student's t-th response token, p_t(i) that of the teacher's
t-th, zero beyond the smaller vocabulary. t runs to the end of the shorter of the two tokenisations: tokens
are paired by their number, whatever text they stand for. The paper's lambda is `weight`.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.sorted import SortedL1
from fdiv.methods._method import Consumes, Out, mean_over_sequences, mean_over_tokens
from fdiv.methods.distill._alignment import by_index
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Offline


@dataclass(frozen=True)
class ULD:
    """Cross-entropy over tokens, and the mean over sequences of each one's mean transport between its pairs.

    weight: of the transport. cross_entropy: of the labels.
    """

    consumes: ClassVar[Consumes] = "responses"
    reads: ClassVar[tuple[str, ...]] = (
        "log_p",
        "log_q",
        "log_q_label",
        "p_sequence",
        "q_sequence",
        "sequences",
    )
    divergence: ClassVar[Divergence] = SortedL1()

    weight: float = 1.5
    cross_entropy: float = 1.0
    sampler: Sampler = field(default_factory=Offline)

    def __post_init__(self):
        if not isinstance(self.sampler, Sampler):
            raise TypeError(f"a sampler says who writes, got {self.sampler!r}; write Offline() or Mix(lmbda)")
        if not self.weight > 0:
            raise ValueError(
                f"weight is the transport's, > 0, got {self.weight!r}; write SFT() for labels alone"
            )
        if not self.cross_entropy >= 0:
            raise ValueError(f"cross_entropy is a weight >= 0, got {self.cross_entropy!r}")

    def __call__(
        self,
        *,
        log_p: Tensor,
        log_q: Tensor,
        log_q_label: Tensor,
        p_sequence: Tensor,
        q_sequence: Tensor,
        count: Tensor | float | None = None,
        sequences: Tensor | float | None = None,
    ) -> Out:
        """Student's rows log_q [Rs, Vs], log_q_label, q_sequence [Rs]; teacher's log_p [Rt, Vt], p_sequence.

        count, sequences: the student's tokens and the sequences of the global batch (default: here).
        """
        q_rows, p_rows = by_index(q_sequence, p_sequence)
        rows = self.divergence(log_p.detach()[p_rows], log_q[q_rows])
        transport = mean_over_sequences(rows, q_sequence[q_rows], sequences)
        labels = mean_over_tokens(-log_q_label, count=count)
        metrics = {
            "transport": mean_over_tokens(rows.detach()),
            "cross_entropy": mean_over_tokens(-log_q_label.detach()),
        }
        return Out(self.cross_entropy * labels + self.weight * transport, metrics)
