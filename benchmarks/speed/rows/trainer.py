"""B19: one step of a whole trainer, tokens to gradients of all weights, at a vocabulary of 151,936."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.case import Candidate, Case, Outcome
from benchmarks.speed.peers import peer
from fdiv import GKD, JS, FusedLinear
from fdiv.adapters.transformers import CausalLM
from fdiv.feeds import Counts, Part
from fdiv.feeds.responses import Responses
from fdiv.parallel import World
from fdiv.recipe import TrainSpec
from fdiv.tasks._task import Text

SEQUENCES, LENGTH, WIDTH, LAYERS, VOCAB = 8, 65, 128, 2, 151936
TINY_VOCAB = 1024
DIVERGENCE = JS(0.5)


def cases(quick: bool) -> Iterator[Case]:
    vocab = TINY_VOCAB if quick else VOCAB
    teacher, student = (CausalLM.fresh(vocab, WIDTH, LAYERS, 4, seed, positions=LENGTH) for seed in (0, 1))
    networks = (teacher.model, student.model)
    ids = torch.randint(vocab, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    yield Case(
        rows="B19",
        setting=f"{DIVERGENCE!r} float32, {SEQUENCES} x {LENGTH - 1} tokens, {LAYERS} x {WIDTH} x {vocab}",
        candidates=(
            Candidate("fdiv train", partial(_step, teacher, student, ids)),
            Candidate("TRL GKDTrainer", peer("trl", "gkd_training_step", DIVERGENCE, *networks, ids)),
        ),
    )


def _step(teacher: CausalLM, student: CausalLM, ids: Tensor) -> Outcome:
    """What fdiv.train does with a micro-batch; the teacher is asked in the step, as TRL asks it."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    method, spec = GKD(DIVERGENCE, FusedLinear()), TrainSpec(signal="each step", batch_size=len(ids))
    feed = Responses(method, Given(Text(ids, mask)), teacher, spec, 0, World())
    part = Part(Text(ids, mask), {"place": torch.full((len(ids),), -1)})
    student.model.zero_grad()
    out = feed.loss(student, part, Counts(float(mask.sum()), len(ids), 0, 0))
    out.loss.backward()
    return Outcome(out.loss.detach())


class Given:
    """The task of text that is there."""

    def __init__(self, text: Text):
        self.text = text

    def responses(self, teacher: CausalLM, count: int, generator: torch.Generator) -> Text:
        return self.text
