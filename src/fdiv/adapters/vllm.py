"""Answers written by vLLM, for a CausalLM that is trained elsewhere."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from vllm import LLM, SamplingParams
except ImportError as error:
    raise ImportError('this needs vLLM and a GPU: pip install "vllm>=0.22"') from error

from fdiv.adapters.transformers import CausalLM
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text
from fdiv.tasks.padding import answered, rows_of, unanswered

COLDEST = 0.01  # below it vLLM would write at this temperature


class VLLM:
    """An engine that answers as `model` did when they were last synchronised.

    Asked as a CausalLM is, with two differences. The draws of a row are hashed to the seed of its request:
    an answer has the right distribution and is made of its own row, but is not the one that CausalLM makes of
    it. And it may change with the batch, as vLLM's kernels round differently with its size. Restricted
    vocabularies and padded heads are kept to; log-probabilities are those after temperature, top-k and top-p.

    folder: weights are passed on through it. options go to vllm.LLM (which makes float16 of float32 weights
    unless it is given a dtype); with enable_sleep_mode=True the engine gives its memory to the training by
    `sleep` and takes it back by `synchronise`.
    """

    def __init__(self, model: CausalLM, folder: str | Path, **options: Any):
        self.model, self.folder, self.version, self.asleep = model, Path(folder), 0, False
        self.can_sleep = bool(options.get("enable_sleep_mode"))
        options = {
            "logprobs_mode": "processed_logprobs",
            "skip_tokenizer_init": model.tokenizer is None,
        } | options
        self.engine: Any = LLM(model=str(self._saved()), **options)

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def ends(self) -> tuple[int, ...]:
        return self.model.ends

    def generate(
        self,
        prompts: Text,
        draws: Tensor,
        decoding: Decoding = Decoding(),
        ends: tuple[int, ...] | None = None,
    ) -> Text:
        """As `CausalLM.generate`."""
        return self.generate_with_log_probs(prompts, draws, decoding, ends)[0]

    def generate_with_log_probs(
        self,
        prompts: Text,
        draws: Tensor,
        decoding: Decoding = Decoding(),
        ends: tuple[int, ...] | None = None,
    ) -> tuple[Text, Tensor]:
        """As `CausalLM.generate_with_log_probs`."""
        if self.asleep:
            raise RuntimeError("the engine sleeps, without weights; call synchronise() first")
        if len(draws) != len(prompts.ids):
            raise ValueError(f"{len(prompts.ids)} answers need as many rows of draws, got {len(draws)}")
        if 0 < decoding.temperature < COLDEST:
            raise ValueError(f"vLLM has no temperature between 0 and {COLDEST}, got {decoding.temperature}")
        rows, ends = rows_of(prompts), self.ends if ends is None else ends
        options = self._options(decoding, draws.shape[1], ends)
        told = self.engine.generate(
            [{"prompt_token_ids": row.tolist()} for row in rows],
            sampling_params=[SamplingParams(seed=seed_of(draw), **options) for draw in draws],
            use_tqdm=False,
        )
        written = [request.outputs[0] for request in told]
        for one in written:
            _check(one, draws.shape[1], ends)
        responses = [torch.tensor(list(one.token_ids)) for one in written]
        steps = [(n, step) for one in written for n, step in zip(one.token_ids, one.logprobs, strict=True)]
        log_probs = torch.tensor([step[n].logprob for n, step in steps])
        if decoding.temperature == 0:  # a greedy choice is certain; vLLM tells how likely the token was
            log_probs = torch.zeros_like(log_probs)
        return answered(rows, responses, self.model.pad), log_probs

    def sample(
        self, prompts: Tensor, length: int, *, draws: Tensor, decoding: Decoding = Decoding()
    ) -> Tensor:
        """As `CausalLM.sample`: exactly `length` tokens after each prompt of one length."""
        return self.generate(unanswered(list(prompts.cpu())), draws[:, :length], decoding, ends=()).ids

    def _options(self, decoding: Decoding, length: int, ends: tuple[int, ...]) -> dict[str, Any]:
        return {
            "temperature": float(decoding.temperature),
            "top_k": decoding.top_k or 0,
            "top_p": decoding.top_p,
            "max_tokens": length,
            "logprobs": 0,  # of the drawn token alone
            "stop_token_ids": list(ends),
            "ignore_eos": True,  # the ends above are all there are
            "allowed_token_ids": self._allowed(),
            "detokenize": False,
        }

    def _allowed(self) -> list[int] | None:
        model = self.model
        if model.vocabulary is not None:
            return model.vocabulary.tolist()
        return list(range(model.true_size)) if model.true_size < model.rows else None

    # -- weights ------------------------------------------------------------------------------------------

    def synchronise(self) -> None:
        """The model's weights as they are now, on one process; wakes the engine if it sleeps."""
        before, now = self._path(), self._saved()
        if self.asleep:
            self.engine.wake_up(tags=["weights"])
        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(now)})
        if self.asleep:
            self.engine.wake_up(tags=["kv_cache"])
        self.engine.reset_prefix_cache()  # its keys and values are those of the old weights
        self.asleep = False
        shutil.rmtree(before)

    def sleep(self) -> None:
        """Give up weights and cache until `synchronise`."""
        if not self.can_sleep:
            raise ValueError("an engine that may sleep is made by VLLM(..., enable_sleep_mode=True)")
        self.engine.sleep(level=2)
        self.asleep = True

    def _path(self) -> Path:
        return self.folder / f"weights-{self.version}"

    def _saved(self) -> Path:
        """In a folder of a new name: vLLM may keep files open that it has read."""
        self.version += 1
        self.model.save(self._path())
        return self._path()


def seed_of(draws: Tensor) -> int:
    """A whole number below 2^63 that is made of a row of uniform numbers."""
    digest = hashlib.sha256(draws.detach().cpu().double().numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _check(one: Any, length: int, ends: tuple[int, ...]) -> None:
    """Raise unless an answer ended as it was asked to."""
    if one.finish_reason == "stop" and one.token_ids[-1] not in ends:
        raise RuntimeError(f"vLLM left the end of an answer out, or stopped for another reason: {one}")
    if one.finish_reason != "stop" and len(one.token_ids) < length:
        raise RuntimeError(
            f"vLLM stopped after {len(one.token_ids)} of {length} tokens ({one.finish_reason}); give a "
            "larger max_model_len=..."
        )
