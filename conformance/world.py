"""The inputs of the cases: seeded, small, and asymmetric, so that two sides that were swapped differ."""

from collections.abc import Callable

import torch
from torch import Tensor


def logits(
    rows: int, vocab: int, seed: int, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Random logits [rows, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype)


def pair(
    rows: int = 8, vocab: int = 12, dtype: torch.dtype = torch.float64, scale: float = 2.0
) -> tuple[Tensor, Tensor]:
    """(teacher, student) logits; the student is a leaf that takes gradients."""
    return logits(rows, vocab, 0, scale, dtype), logits(rows, vocab, 1, scale, dtype).requires_grad_()


def heads(
    rows: int, width: int, vocab: int, dtype: torch.dtype, apart: float = 1.0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((hidden, head) of the teacher, of the student); the student is the teacher moved by `apart`."""
    hidden, head = logits(rows, width, 2, 1.0), logits(vocab, width, 3, width**-0.25)
    student = hidden + apart * logits(rows, width, 4, 1.0)
    leaf = student.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    return (hidden.to(dtype), head.to(dtype)), leaf


# One draw from six symbols: small enough to sum over everything that can happen.
REFERENCE = torch.tensor([0.31, 0.24, 0.18, 0.13, 0.09, 0.05], dtype=torch.float64).log()
BEHAVIOUR = torch.tensor([0.05, 0.15, 0.25, 0.25, 0.2, 0.1], dtype=torch.float64).log()


def policy() -> Tensor:
    """Logits [6] of the policy, a leaf."""
    return torch.tensor([-0.7, 0.4, 0.9, -0.2, 0.6, -1.1], dtype=torch.float64, requires_grad=True)


def language_model(seed: int, vocab: int = 11):
    """A Llama with one layer and random weights, in float32."""
    # transformers takes seconds to import, and most cases do without it.
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.8,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def batch() -> tuple[Tensor, Tensor]:
    """Ids [3, 9] and, true for each token of a response, a mask: prompts and responses differ in length."""
    ids = torch.randint(1, 11, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for row, (start, stop) in enumerate([(2, 9), (4, 7), (5, 8)]):
        mask[row, start:stop] = True
    return ids, mask


def padded(ids: Tensor, mask: Tensor, columns: int, fill: int) -> tuple[Tensor, Tensor]:
    """The batch with columns of padding on the right."""
    extra = ids.new_full((len(ids), columns), fill)
    return torch.cat([ids, extra], 1), torch.cat([mask, torch.zeros_like(extra, dtype=torch.bool)], 1)


def gradient_at_positions(model, loss: Callable[[], Tensor], shape: torch.Size) -> Tensor:
    """The norm of the gradient of `loss()` in the model's last hidden states at each position, [B, T]."""
    caught: list[Tensor] = []

    def catch(module, arguments, output: Tensor) -> None:
        output.retain_grad()
        caught.append(output)

    handle = model.model.norm.register_forward_hook(catch)
    loss().backward()
    handle.remove()
    gradient = caught[-1].grad
    return torch.zeros(shape) if gradient is None else gradient.norm(dim=-1)
