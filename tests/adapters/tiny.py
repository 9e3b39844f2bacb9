"""A world for trainers of language models: 24 words, two-layer Llamas with random weights, no downloads."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(21)]
VOCABULARY = ["<pad>", "<eos>", "<unk>", *WORDS]
PAD, EOS = 0, 1


def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(seed, width=32, **options):
    """A Llama whose distributions are far from uniform, and from those of another seed."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        initializer_range=0.3,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def responses(rows, seed=0, prompt=3, longest=6):
    """A padded batch whose responses differ in length and end with EOS; labels are -100 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, prompt + longest), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i in range(rows):
        end = prompt + int(torch.randint(2, longest + 1, (), generator=generator))
        ids[i, :end] = torch.randint(3, len(VOCABULARY), (end,), generator=generator)
        ids[i, end - 1] = EOS
        mask[i, :end] = 1
        labels[i, prompt:end] = ids[i, prompt:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rollouts(rows, seed=0, prompt=3, longest=6):
    """The same batch as TRL keeps it: prompts padded on the left, completions on the right."""
    batch = responses(rows, seed, prompt, longest)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prompts, attended = ids[:, :prompt].clone(), mask[:, :prompt].clone()
    prompts[0, 0], attended[0, 0] = PAD, 0
    return {
        "prompt_ids": prompts,
        "prompt_mask": attended,
        "completion_ids": ids[:, prompt:],
        "completion_mask": mask[:, prompt:],
        "num_items_in_batch": mask[:, prompt:].sum(),
    }


def split(batch, parts):
    """The batch in `parts` micro-batches; what is no row of it is kept."""
    rows = len(next(iter(batch.values())))
    step = rows // parts
    return [
        {name: t[i : i + step] if t.ndim else t for name, t in batch.items()} for i in range(0, rows, step)
    ]


def gradients(loss, model):
    """d loss / d each parameter, as one vector; the graph is used up."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def moved_positions(model, compute):
    """Where final hidden states have a gradient under compute(): bool [B, S]. One pass of the backbone."""
    states = []

    def keep(module, arguments, output):
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    handle = model.base_model.register_forward_hook(keep)
    try:
        compute().backward()
    finally:
        handle.remove()
    return (states[0].grad != 0).any(-1)


def predicts(mask):
    """The positions whose next token is where mask [B, S] is true: bool [B, S]."""
    return torch.cat([mask[:, 1:].bool(), torch.zeros_like(mask[:, :1]).bool()], dim=1)
