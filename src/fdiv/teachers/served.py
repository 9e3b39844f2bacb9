"""The teacher runs behind an HTTP server that speaks vLLM's dialect of the OpenAI API.

A sequence is sent as token ids to /v1/completions with `prompt_logprobs=k`; vLLM scores the prompt at
temperature 1 and gives, at each place, the k likeliest tokens and the token that stands there.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdiv.estimate._estimator import Estimator
from fdiv.estimate.top_k import TopK
from fdiv.teachers._sample import Sample, samples
from fdiv.teachers._scores import row_of
from fdiv.teachers._server import Server
from fdiv.teachers._signal import (
    TeacherError,
    TeacherSignal,
    Terms,
    Vocabulary,
    atoms_of,
    described,
    support_of,
)

if TYPE_CHECKING:
    from fdiv.adapters.transformers import CausalLM


@dataclass(frozen=True)
class Served:
    """Asks for the k likeliest tokens at most, of which TopK(k) takes what it needs, at temperature 1.

    url: up to and with /v1. model: as the server names it. api_key_env: the name of the environment variable
    that holds the key. timeout: seconds a request; retries: after 429, 5xx and timeouts, waiting longer each
    time; concurrency: requests under way at once. trust_vocabulary: do not ask the server for its tokenizer.

    A vLLM server gives 20 log-probabilities at most, unless started with --max-logprobs.
    """

    url: str
    model: str
    k: int = 20
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 4
    concurrency: int = 8
    trust_vocabulary: bool = False

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise TeacherError(f"url begins with http:// or https://, got {self.url!r}")
        if self.k < 1 or self.concurrency < 1 or self.retries < 0 or not self.timeout > 0:
            raise TeacherError(
                "k and concurrency are >= 1, retries >= 0 and timeout > 0; got "
                f"{self.k!r}, {self.concurrency!r}, {self.retries!r} and {self.timeout!r}"
            )

    def open(self, estimator: Estimator, temperature: float, reference: "CausalLM | None") -> "ServedTeacher":
        """`reference`: any model with the student's tokenizer; it is never asked for probabilities."""
        support, vocabulary = self._support(estimator), self._vocabulary(reference)
        if temperature != 1:
            raise TeacherError(
                f"the server scores a prompt at temperature 1 whatever it is asked, got {temperature:g}; a "
                "tail cannot be tempered afterwards: write temperature=1.0, or Local() or `fdiv cache` with "
                "the teacher's weights"
            )
        server = Server(self.url, self.model, self._key(), self.timeout, self.retries)
        longest = server.longest()
        if not self.trust_vocabulary:
            server.require_tokenizer(reference.tokenizer)  # type: ignore[union-attr]
        return ServedTeacher(server, Terms(vocabulary, 1.0, support, self.model), self.concurrency, longest)

    def _support(self, estimator: Estimator) -> str:
        support = support_of(estimator)
        of = atoms_of(support)
        if support == "labels":
            return support
        if not isinstance(of, TopK):
            raise TeacherError(
                f"a server gives the likeliest tokens alone, and {estimator!r} reads {described(support)}; "
                f"write estimator=FusedAtoms(TopK({self.k}))"
            )
        if of.k > self.k:
            raise TeacherError(
                f"{estimator!r} reads {of.k} tokens and the server is asked for {self.k} at most; "
                f"write Served(..., k={of.k}), and start vLLM with --max-logprobs {of.k}"
            )
        return support

    def _vocabulary(self, reference: "CausalLM | None") -> Vocabulary:
        if reference is None:
            raise TeacherError(
                "Served() checks the server's tokenizer against that of a local model; pass the student as "
                "reference"
            )
        if reference.vocabulary is not None:
            raise TeacherError(
                "a server's distribution is over its whole vocabulary, and the models here are restricted to "
                f"{len(reference.vocabulary)} tokens; write Corpus(vocabulary='full')"
            )
        if reference.tokenizer is None and not self.trust_vocabulary:
            raise TeacherError(
                "the models here have no tokenizer that the server's could be checked against; write "
                "Served(..., trust_vocabulary=True) if the server's token numbers are known to mean the same"
            )
        return Vocabulary.of(reference)

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise TeacherError(
                f"the environment variable {self.api_key_env} holds no key: export {self.api_key_env}=..."
            )
        return key


class ServedTeacher:
    """One request a sequence, `concurrency` of them at a time."""

    def __init__(self, server: Server, terms: Terms, concurrency: int, longest: int | None):
        self.server, self.terms, self.longest = server, terms, longest
        of = atoms_of(terms.support)
        self.k = min(of.k, terms.vocabulary.size) if isinstance(of, TopK) else 0
        self.pool = ThreadPoolExecutor(concurrency, thread_name_prefix="fdiv-served")

    def __call__(self, ids: Tensor, mask: Tensor) -> TeacherSignal:
        """On the device of `ids`."""
        some = samples(ids, mask)
        for sample in some:
            self._check_length(sample)
        rows = [row for found in self.pool.map(self._ask, some) for row in found]
        log_p = torch.tensor([row[1] for row in rows], dtype=torch.float32, device=ids.device)
        if not self.k:
            return TeacherSignal({"log_p": log_p.reshape(-1)}, self.terms)
        index = torch.tensor([row[0] for row in rows], dtype=torch.long, device=ids.device)
        shape = (len(rows), self.k)
        return TeacherSignal({"index": index.reshape(shape), "log_p": log_p.reshape(shape)}, self.terms)

    def _check_length(self, sample: Sample) -> None:
        if self.longest is not None and len(sample.ids) >= self.longest:
            raise TeacherError(
                f"a sequence of {len(sample.ids)} tokens and the one that the server adds exceed its limit "
                f"of {self.longest}; shorten the sequences, or start it with a larger --max-model-len"
            )

    def _ask(self, sample: Sample) -> list[tuple[list[int], list[float]]]:
        """(index, log_p) of each predicted token."""
        prompt = sample.ids.tolist()
        scores = self.server.scores(prompt, self.k)
        size = self.terms.vocabulary.size
        return [row_of(prompt[n], scores[n], self.k, size) for n in sample.places.tolist()]
