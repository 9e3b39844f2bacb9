"""Low-rank adapters of the peft library inside a causal language model."""

from typing import TYPE_CHECKING

import torch

from fdiv.adapters.transformers import CausalLM
from fdiv.recipe import LoraSpec

if TYPE_CHECKING:
    from peft import PeftModel


def adapted(model: CausalLM, spec: LoraSpec, seed: int) -> "PeftModel":
    """Put trainable adapters into the model's layers and freeze the rest; `model` itself keeps its class.

    They start from `seed` alone, whatever was drawn before in this process.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('train.lora needs peft: pip install "fdiv[train]"') from error
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=spec.targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model.model, config)  # type: ignore[return-value]


def merged(model: CausalLM, peft: "PeftModel") -> CausalLM:
    """The model with its adapters added to the weights, as transformers saves and loads it."""
    return CausalLM(peft.merge_and_unload(), model.vocabulary, model.tokenizer)  # type: ignore[arg-type]
