"""A tokenizer of bytes with the marks of a chat, and small models that read them: no downloads."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fdiv.adapters.transformers import CausalLM

CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKS = ["<|text|>", "<|start|>", "<|end|>"]


def tokenizer(
    template=CHAT, eos="<|text|>", marks=MARKS, space=False, merges=(), **options
) -> PreTrainedTokenizerFast:
    """One token a byte; eos is not what a turn ends with, as in many models that were only pretrained.

    space: a text begins with a space, as under SentencePiece. merges: pairs of letters that are one token.
    """
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    bytes_ = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, list(merges)))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    found = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token=eos, **options)
    found.chat_template = template
    return found


def model(reads: PreTrainedTokenizerFast, seed=0, width=16) -> CausalLM:
    """A random Llama whose distributions are far from uniform."""
    found = CausalLM.fresh(len(reads), hidden_size=width, layers=1, heads=2, seed=seed, positions=512)
    with torch.no_grad():
        found.model.lm_head.weight.mul_(20)
    return CausalLM(found.model, tokenizer=reads)
