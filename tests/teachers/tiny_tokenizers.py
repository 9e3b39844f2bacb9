"""Small tokenizers, made here: byte-level BPE, sentencepiece-like BPE and unigram, and characters."""

from functools import cache
from itertools import product

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "the cat sat on the mat, and the hat was on the cat",
    "hello there, the theatre is other than that",
    "déjà vu é 漢字 漢語 😀 naïve café",
)
TEXTS = (
    "the cat sat",
    "hello there",
    "é",
    "déjà vu 漢字 and 😀😀!",
    " two  spaces ",
    "new\nlines\tand tabs",
    "漢",
    "x",
)


@cache
def byte_level(merges: int, prefix: bool = False) -> PreTrainedTokenizerFast:
    """256 byte pieces and the first `merges` of the corpus: few of them split letters into bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=257 + merges,
            initial_alphabet=alphabet,
            special_tokens=["<|end|>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: a space before the text, "▁" for spaces, bytes for what has no piece, and BOS."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz,é", "th", "the", "▁the", "▁c", "at", "▁cat"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "c"), ("a", "t"), ("▁c", "at")]
    bpe = Tokenizer(
        models.BPE({p: n for n, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replace = decoders.Replace("▁", " ")
    bpe.decoder = decoders.Sequence(
        [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@cache
def unigram() -> PreTrainedTokenizerFast:
    """With "▁" for spaces; it does not know every character."""
    model = Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    specials = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(CORPUS, trainer)
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@cache
def characters() -> PreTrainedTokenizerFast:
    """A piece a character, and none added to a text."""
    alphabet = sorted(set("".join((*CORPUS, *TEXTS))))
    pieces = ["<end>", "<unk>", *alphabet]
    model = Tokenizer(models.WordLevel({p: n for n, p in enumerate(pieces)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), behavior="isolated")
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<end>", unk_token="<unk>", pad_token="<end>"
    )


@cache
def composed() -> PreTrainedTokenizerFast:
    """Byte-level, of a text that is lower-cased and brought to composed letters first."""
    plain = byte_level(40)
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


TOKENIZERS = {
    "bytes": byte_level(0),
    "few merges": byte_level(12),
    "many merges": byte_level(90),
    "prefix space": byte_level(40, prefix=True),
    "sentencepiece": sentencepiece(),
    "unigram": unigram(),
    "characters": characters(),
    "composed": composed(),
}

each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
each_pair = pytest.mark.parametrize(
    ("student", "teacher"),
    [pytest.param(TOKENIZERS[a], TOKENIZERS[b], id=f"{a}-{b}") for a, b in product(TOKENIZERS, TOKENIZERS)],
)
