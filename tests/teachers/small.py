"""A teacher of 24 words, and texts of different lengths for it."""

import torch
from tests.adapters import tiny
from transformers import LlamaForCausalLM

from fdiv import FusedAtoms, TopK
from fdiv.adapters.transformers import CausalLM
from fdiv.teachers.cache import Cached
from fdiv.teachers.local import Local
from fdiv.teachers.write import write_cache

TOP = FusedAtoms(TopK(8))

TOKENIZER = tiny.tokenizer()
WORDS = len(tiny.VOCABULARY)


def teacher(seed=1, padding=0, mass=None, **options):
    """`padding`: rows of the head that are no tokens; `mass`: the logit of each of them, 0 by default."""
    model = tiny.model(seed, **options)
    if padding:
        model = padded(model, padding)
    return CausalLM(model, tokenizer=TOKENIZER)


def padded(model: LlamaForCausalLM, rows: int) -> LlamaForCausalLM:
    """The same model with rows of zeros behind its head and embeddings."""
    model.resize_token_embeddings(WORDS + rows, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[WORDS:] = 0
    return model.eval()


def text(rows=6, seed=0, prompt=3, longest=7):
    """Right-padded ids and mask [rows, S]: prompts of `prompt` tokens, responses of 1 to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (rows, prompt + longest), generator=generator)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(rows):
        end = prompt + int(torch.randint(1, longest + 1, (), generator=generator))
        mask[row, prompt:end] = True
        ids[row, end:] = 0
    return ids, mask


def wider(ids, mask, columns):
    """The same text with more padding on the right, of another token."""
    return torch.nn.functional.pad(ids, (0, columns), value=5), torch.nn.functional.pad(mask, (0, columns))


def logits(model: CausalLM, ids, mask):
    """Of the predicted tokens, by the model itself, in float64."""
    with torch.no_grad():
        every = model.model(input_ids=ids).logits[:, :-1]
    return every[mask[:, 1:]].double()


def same(first: dict, second: dict, tolerance=0.0):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=tolerance)


# -- caches --------------------------------------------------------------------------------------------------


TEACHER = teacher()


class Counting:
    """A teacher that counts what it is asked, and may fail at a call."""

    def __init__(self, teacher, fails_at=None):
        self.teacher, self.terms = teacher, teacher.terms
        self.sequences, self.calls, self.fails_at = 0, 0, fails_at

    def __call__(self, ids, mask):
        self.calls += 1
        self.sequences += len(ids)
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return self.teacher(ids, mask)


def local(estimator, temperature=1.0, model=TEACHER):
    return Local().open(estimator, temperature, model)


def batches(text, size=3):
    return list(zip(*(t.split(size) for t in text), strict=True))


def cache(folder, estimator=TOP, some=None, temperature=1.0, model=TEACHER, **options):
    """A cache in many shards."""
    options = {"shard_bytes": 500} | options
    return write_cache(local(estimator, temperature, model), batches(some or text(12)), folder, **options)


def opened(folder, estimator=TOP, temperature=1.0, model=TEACHER):
    return Cached(str(folder)).open(estimator, temperature, model)
