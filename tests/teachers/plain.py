"""A teacher without a model, quick to import: `python -m tests.teachers.plain FOLDER` writes its cache."""

import sys
import time

import torch

from fdiv.teachers._signal import TeacherSignal, Terms, Vocabulary
from fdiv.teachers.write import write_cache

SEQUENCES = 200


class Plain:
    """The 8 likeliest of 50 tokens, by the sum of the tokens so far."""

    terms = Terms(Vocabulary(50, "plain"), 1.0, "TopK(k=8, support='teacher')", "plain")

    def __init__(self, seconds=0.0):
        self.seconds, self.sequences = seconds, 0

    def __call__(self, ids, mask):
        time.sleep(self.seconds)
        self.sequences += len(ids)
        before = ids.cumsum(1)[:, :-1][mask[:, 1:]].double()
        log_p = (before.unsqueeze(-1) * torch.arange(1, 51)).sin().float().log_softmax(-1)
        top = log_p.topk(8)
        return TeacherSignal({"index": top.indices, "log_p": top.values}, self.terms)


def text():
    ids = torch.randint(50, (SEQUENCES, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 4:] = True
    return ids, mask


def one_by_one():
    return zip(*(t.split(1) for t in text()), strict=True)


if __name__ == "__main__":
    write_cache(Plain(0.02), one_by_one(), sys.argv[1], shard_bytes=500)
