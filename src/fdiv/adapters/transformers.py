"""A causal language model of the transformers library as teacher, student, policy or reference."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
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

from fdiv.adapters.generation import Writer
from fdiv.adapters.weights import keep_layers as keep_layers
from fdiv.adapters.weights import locate
from fdiv.estimate.fused_log_prob import FusedLogProb, LogProbs
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text


@dataclass(eq=False)
class CausalLM:
    """What fdiv asks of a model: hidden states, a head, log-probabilities and answers.

    Text is padded on the right, where a causal model never looks, so that no attention mask is needed; only
    `generate` takes prompts of different lengths and sees to it itself.

    `vocabulary`: if given, the ids [K] that the head is restricted to. Distributions are then conditional
    on the next token being one of them, in the order of `vocabulary` (ascending); the model itself stays
    whole. `tokenizer`: if given, it is saved beside the weights, and the rows of the head behind its last id,
    which only fill it up, are in no distribution.
    """

    model: PreTrainedModel
    vocabulary: Tensor | None = None
    tokenizer: Any = None  # PreTrainedTokenizerBase

    @classmethod
    def fresh(
        cls, vocab_size: int, hidden_size: int, layers: int, heads: int, seed: int, positions: int = 64
    ) -> "CausalLM":
        """A small Llama with random weights drawn from `seed`."""
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=positions,
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
    def rows(self) -> int:
        """Of the head, padding included."""
        return self._output.weight.shape[0]

    @property
    def true_size(self) -> int:
        """Tokens there are: the rows of the head, without those behind the last id of the tokenizer."""
        return self.rows if self.tokenizer is None else min(self.rows, _ids(self.tokenizer))

    @property
    def size(self) -> int:
        """Tokens that a distribution is over."""
        return self.true_size if self.vocabulary is None else len(self.vocabulary)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids after which a response is over, ascending: those of the model and of its tokenizer."""
        found = getattr(self.model.generation_config, "eos_token_id", None)
        found = self.model.config.eos_token_id if found is None else found
        listed = list(found) if isinstance(found, list | tuple) else [found]
        return tuple(sorted({*listed, getattr(self.tokenizer, "eos_token_id", None)} - {None}))

    @property
    def pad(self) -> int:
        """An id to fill rows up with; what it is makes no difference."""
        found = getattr(self.tokenizer, "pad_token_id", None)
        return found if found is not None else next(iter(self.ends), 0)

    @property
    def head(self) -> Tensor:
        """The output projection, [vocab, width]; refused where logits are more than hidden @ head.T."""
        if not self.has_plain_head:
            raise ValueError(
                f"{type(self.model).__name__} biases, scales or caps its logits, so hidden states and head "
                "do not tell them; use an estimator that sees logits, such as Exact() or TopK(k)"
            )
        weight = self._output.weight
        if self.vocabulary is not None:
            return weight[self.vocabulary.to(weight.device)]
        return weight if self.true_size == self.rows else weight[: self.true_size]

    def hidden(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Final hidden states that predict the tokens where mask [B, S] is true: [tokens, width]."""
        self._refuse_left_padding(input_ids)
        device = self.model.device
        states = self.model.base_model(input_ids=input_ids.to(device), use_cache=False).last_hidden_state
        return states[:, :-1][mask[:, 1:].to(device)]

    def log_softmax(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities for the tokens where mask [B, S] is true: [tokens, vocab], float32."""
        return self.logits(input_ids, mask).log_softmax(-1)

    def logits(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Before the softmax: [tokens, vocab], float32."""
        if self.has_plain_head:
            return self._logits_of(self.hidden(input_ids, mask))
        self._refuse_left_padding(input_ids)
        logits = self.model(input_ids=input_ids.to(self.model.device), use_cache=False).logits
        return self.restricted(logits[:, :-1][mask[:, 1:].to(logits.device)]).float()

    def rows_of_hidden(self, hidden: Tensor) -> Tensor:
        """Log-probabilities [tokens, vocab] that final hidden states [tokens, width] give."""
        return self._logits_of(hidden).log_softmax(-1)

    def _logits_of(self, hidden: Tensor) -> Tensor:
        # In float32 even under autocast, as FusedLinear: rounded logits are off by several percent.
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.float(), self.head.float())

    def restricted(self, logits: Tensor) -> Tensor:
        """Of logits [tokens, rows of the head], those that a distribution is made of: [tokens, vocab]."""
        if self.vocabulary is not None:
            return logits[:, self.vocabulary.to(logits.device)]
        return logits[:, : self.true_size]

    def tokens(self, index: Tensor) -> Tensor:
        """The ids at these places of the (restricted) vocabulary."""
        return index if self.vocabulary is None else self.vocabulary.to(index.device)[index]

    def _refuse_left_padding(self, ids: Tensor) -> None:
        # Seen only where padding has an id of its own: a text may well begin with the end of another.
        pad, bos = (getattr(self.tokenizer, f"{name}_token_id", None) for name in ("pad", "bos"))
        if pad is not None and pad not in (bos, *self.ends) and bool((ids[:, 0] == pad).any()):
            raise ValueError(
                f"rows begin with padding (id {pad}), which would be read as text: pad on the right, "
                "as fdiv.tasks.padding does"
            )

    def labels(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The tokens where mask is true, as indices into the (restricted) vocabulary: [tokens]."""
        chosen = input_ids[:, 1:][mask[:, 1:]].to(self.model.device)
        if self.vocabulary is None:
            return chosen
        return torch.searchsorted(self.vocabulary.to(chosen.device), chosen)

    def token_log_probs(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """log q of each token where mask is true: [tokens]."""
        return self.scored(input_ids, mask).log_prob

    def scored(self, input_ids: Tensor, mask: Tensor, hidden: Tensor | None = None) -> LogProbs:
        """(log q of each token where mask is true, the entropy of q there), [tokens] each.

        Never holds tokens x vocabulary where the head is plain; hidden: the states, where they are known.
        """
        labels = self.labels(input_ids, mask)
        if self.has_plain_head:
            hidden = self.hidden(input_ids, mask) if hidden is None else hidden
            return FusedLogProb()(hidden, self.head, labels)
        rows = self.log_softmax(input_ids, mask)
        entropy = torch.special.entr(rows.exp()).sum(-1)
        return LogProbs(rows.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy)

    def states(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states of each layer that predict the tokens where mask is true: [tokens, layers, width]."""
        self._refuse_left_padding(input_ids)
        device = self.model.device
        seen = self.model.base_model(
            input_ids=input_ids.to(device), use_cache=False, output_hidden_states=True
        ).hidden_states[1:]
        return torch.stack([layer[:, :-1][mask[:, 1:].to(device)] for layer in seen], 1)

    def activations(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """What each layer, its attention and its MLP put out, averaged over units: [tokens, modules]."""
        found: list[Tensor] = []

        def keep(module, arguments, output):
            states = output[0] if isinstance(output, tuple) else output
            found.append(states[:, :-1][mask[:, 1:].to(states.device)].mean(-1))

        hooks = [module.register_forward_hook(keep) for module in self._writers_to_the_stream()]
        try:
            self.hidden(input_ids, mask)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found, 1)

    def _writers_to_the_stream(self) -> list[torch.nn.Module]:
        """The layers, and of each what mixes tokens and what mixes units."""
        lists = [m for m in self.model.base_model.modules() if isinstance(m, torch.nn.ModuleList)]
        layers = list(next(iter(lists), ()))  # the outermost; experts have lists of their own
        parts = [
            child
            for layer in layers
            for name, child in layer.named_children()
            if "attn" in name or "attention" in name or "mlp" in name
        ]
        parts = [part for part in parts if "norm" not in type(part).__name__.lower()]
        return [*layers, *(part for part in parts if any(True for _ in part.parameters()))]  # no dropout

    # -- writing --------------------------------------------------------------------------------------------

    @property
    def _writer(self) -> Writer:
        return Writer((self,))

    def generate(
        self,
        prompts: Text,
        draws: Tensor,
        decoding: Decoding = Decoding(),
        ends: tuple[int, ...] | None = None,
    ) -> Text:
        """An answer, of at most draws.shape[1] tokens, to each prompt (padded as in fdiv.tasks.padding).

        draws: [prompts, tokens], uniform in [0, 1); answer i is made of row i alone. It stops with one of
        the ids `ends` (the model's own by default), which belongs to it: `mask` is true up to there, and
        false on the prompt and behind the answer.
        """
        return self._writer.generate(prompts, draws, decoding, ends)

    def generate_with_log_probs(
        self,
        prompts: Text,
        draws: Tensor,
        decoding: Decoding = Decoding(),
        ends: tuple[int, ...] | None = None,
    ) -> tuple[Text, Tensor]:
        """And the log-probability [tokens] with which each of the answers' tokens was drawn."""
        return self._writer.generate_with_log_probs(prompts, draws, decoding, ends)

    def sample(
        self,
        prompts: Tensor,
        length: int,
        generator: torch.Generator | None = None,
        *,
        draws: Tensor | None = None,
        decoding: Decoding = Decoding(),
    ) -> Tensor:
        """Exactly `length` tokens after each prompt, all of one length [B, S]: [B, S + length], on the CPU.

        With draws [B, length], or a generator (of the CPU) to make them; greedily without either.
        """
        return self._writer.sample(prompts, length, generator, draws=draws, decoding=decoding)

    def drawn_log_probs(self, ids: Tensor, mask: Tensor, decoding: Decoding = Decoding()) -> Tensor:
        """The log-probability with which the tokens where mask [B, S] is true would be drawn: [tokens]."""
        return self._writer.drawn_log_probs(ids, mask, decoding)

    def mixed_with(self, other: "CausalLM", alpha: float) -> Writer:
        """A writer whose tokens come from alpha * other + (1 - alpha) * self: the sampler of MiniLLM."""
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is a fraction between 0 and 1, got {alpha!r}")
        mine, theirs = (None if m.vocabulary is None else m.vocabulary.tolist() for m in (self, other))
        if mine != theirs or self.size != other.size:
            raise ValueError(f"{self.size} and {other.size} tokens, or others, have no mixture: share them")
        return Writer((self, other), (1 - alpha, alpha))

    def check_length(self, tokens: int) -> None:
        """Raise unless the model has positions for so many tokens."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and tokens > most:
            raise ValueError(
                f"{tokens} tokens, prompt and answer, but the model has {most} positions; shorten either"
            )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model at `path`, which is read as CausalLM.load reads it."""
    where, gguf = locate(path)
    return AutoTokenizer.from_pretrained(where, **({"gguf_file": gguf} if gguf else {}))


@lru_cache(maxsize=16)
def _ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id; that of len(tokenizer) where no id is left out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
