"""What the examples share: 24 words, two-layer Llamas with random weights, and text that one wrote."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(21))]
PAD, EOS, PROMPT = 0, 1, 3


def tokenizer():
    """Words between spaces; prompts are padded on the left."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def language_model(seed, width):
    """A Llama whose random weights are large, so that it has something to say."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def prompts(number, seed=0):
    """Three random words each, as text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, len(VOCABULARY), (number, PROMPT), generator=generator)
    return [" ".join(VOCABULARY[i] for i in row) for row in ids.tolist()]


def responses(teacher, number, length=8):
    """What `teacher` goes on to say, as examples with labels: -100 on prompts and padding, EOS counts."""
    torch.manual_seed(0)
    asked = tokenizer()(prompts(number), return_tensors="pt")
    asked.pop("token_type_ids", None)
    ids = teacher.eval().generate(**asked, max_new_tokens=length, do_sample=True)
    ended = (ids == EOS).cumsum(1) - (ids == EOS).long() > 0  # after the first EOS
    labels = ids.masked_fill(ended, -100)
    labels[:, :PROMPT] = -100
    columns = {"input_ids": ids, "attention_mask": (~ended).long(), "labels": labels}
    return [{name: column[i] for name, column in columns.items()} for i in range(number)]
