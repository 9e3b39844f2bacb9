"""A toy world in two vocabularies: fresh models whose byte-level tokenizers are made from the text itself."""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fdiv.adapters.transformers import CausalLM, load_tokenizer
from fdiv.tasks._task import Text
from fdiv.tasks.sources import documents
from fdiv.tasks.text import Corpus, split

END = "<|end|>"


@dataclass(frozen=True)
class TwoTokenizers:
    """Blocks of `corpus`; each tokenizer has the 256 bytes and its number of longer pieces."""

    corpus: Corpus = field(default_factory=lambda: Corpus(vocabulary="full", block=48, continuations=8))
    teacher_merges: int = 700
    student_merges: int = 150

    @property
    def answer_length(self) -> int:
        return self.corpus.answer_length

    def load(self, spec, seed, reference=None):
        merges = self.teacher_merges if reference is None else self.student_merges
        tokenizer = byte_level(self.corpus, merges)
        size = (len(tokenizer), spec.hidden_size, spec.layers, spec.heads)
        return CausalLM(CausalLM.fresh(*size, seed, positions=4 * self.corpus.block).model, None, tokenizer)

    def reopen(self, path, spec, seed):
        return CausalLM(CausalLM.load(path).model, None, load_tokenizer(path))

    def data(self, kind, count, generator):
        return self._some(byte_level(self.corpus, self.teacher_merges), count, generator)

    def responses(self, teacher, count, generator):
        return self._some(teacher.tokenizer, count, generator)

    def held_out_responses(self, teacher, count, generator):
        return self._some(teacher.tokenizer, count, generator, held_out=True)

    def _some(self, tokenizer, count, generator, held_out=False):
        found = split(self.corpus, tokenizer)
        blocks = found.held_out if held_out else found.train
        ids = blocks[torch.randperm(len(blocks), generator=generator)[:count]]
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, : self.corpus.block // 4] = False
        return Text(ids, mask)

    def evaluate(self, model, reference, measures, seed):
        return self.corpus.evaluate(model, reference, measures, seed)


@lru_cache(maxsize=4)
def byte_level(corpus: Corpus, merges: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    bpe.train_from_iterator(documents(corpus.source, corpus.column, corpus.documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
