"""The engine behind VLLM is asked the right things; a stand-in that has vLLM's names answers them."""

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("transformers")

from tests.adapters import tiny
from tests.test_train import TINY

from fdiv.adapters.transformers import CausalLM
from fdiv.recipe import load, members
from fdiv.sample._sampler import Decoding
from fdiv.tasks.padding import unanswered
from fdiv.train import Run, train_member, train_reference


@dataclass
class SamplingParams:
    """Those of vLLM's parameters that are used, with vLLM's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    allowed_token_ids: list[int] | None = field(default=None)


class LLM:
    """Reads the weights that it is given, and draws one token after another with a generator of the seed."""

    def __init__(self, model, max_model_len=64, **options):
        self.options, self.calls, self.max_model_len = options, [], max_model_len
        self.load(model)

    def load(self, path):
        assert any(Path(path).glob("*.safetensors"))
        self.model = CausalLM.load(path).model.eval()

    def generate(self, prompts, sampling_params=None, use_tqdm=True):
        assert len(prompts) == len(sampling_params)
        self.calls.append(("generate", sampling_params))
        return [self.one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def one(self, prompt, params):
        generator = torch.Generator().manual_seed(params.seed)
        ids, told, reason = list(prompt), [], "length"
        room = min(params.max_tokens, self.max_model_len - len(prompt))
        while len(told) < room:
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
            if params.allowed_token_ids is not None:
                kept = torch.zeros_like(logits, dtype=torch.bool)
                kept[params.allowed_token_ids] = True
                logits = torch.where(kept, logits, -torch.inf)
            log_p = (logits / (params.temperature or 1)).log_softmax(-1)
            if params.top_k:
                log_p[log_p < log_p.topk(params.top_k).values[-1]] = -torch.inf
                log_p = log_p.log_softmax(-1)
            token = int(
                log_p.argmax() if not params.temperature else log_p.exp().multinomial(1, generator=generator)
            )
            ids.append(token)
            told.append({token: SimpleNamespace(logprob=log_p[token].item(), rank=1)})
            if token in (params.stop_token_ids or []) or (token == tiny.EOS and not params.ignore_eos):
                reason = "stop"
                break
        one = SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=told, finish_reason=reason)
        return SimpleNamespace(outputs=[one])

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert method == "reload_weights"
        self.calls.append(method)
        self.load(**{"path": (kwargs or {})["weights_path"]})

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")

    def sleep(self, level=1):
        self.calls.append(f"sleep {level}")
        self.model = None

    def wake_up(self, tags=None):
        self.calls.append(f"wake {tags}")


@pytest.fixture
def vllm(monkeypatch):
    """fdiv.adapters.vllm on the stand-in."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delitem(sys.modules, "fdiv.adapters.vllm", raising=False)
    yield importlib.import_module("fdiv.adapters.vllm")
    sys.modules.pop("fdiv.adapters.vllm", None)


def model(seed=0) -> CausalLM:
    return CausalLM(tiny.model(seed), tokenizer=tiny.tokenizer())


def asked(rows=6):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 24, (1 + n % 4,), generator=generator) for n in range(rows)]
    return unanswered(prompts), torch.rand(rows, 7, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("method", ["GKD(lmbda=1.0)", "GRPO()"])
def test_the_trainer_has_the_student_s_text_written_by_it(vllm, tmp_path, monkeypatch, method):
    """At each step by the weights of that step; the loss is that of the text which came back."""
    made = []
    monkeypatch.setattr(vllm, "LLM", lambda *a, **o: made.append(LLM(*a, **o)) or made[-1])
    changes = {"student": "reference" if "GRPO" in method else TINY["student"], "divergences": []}
    train = TINY["train"] | {"steps": 3, "generation": "vllm"}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changes | {"method": method, "train": train}))
    recipe = load(path)
    run = Run(recipe, 0, tmp_path / "run")
    train_reference(run)
    train_member(run, members(recipe)[0])
    names = [call if isinstance(call, str) else call[0] for call in made[0].calls]
    again = ["reload_weights", "reset_prefix_cache", "generate"]
    assert len(made) == 1 and names == ["generate", *again, *again]


def test_without_vllm_the_import_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "fdiv.adapters.vllm", raising=False)
    with pytest.raises(ImportError, match=r'pip install "vllm>=0\.22"'):
        importlib.import_module("fdiv.adapters.vllm")


def test_greedy_answers_are_those_of_the_model(vllm, tmp_path):
    mine, (prompts, draws) = model(), asked()
    text, log_probs = vllm.VLLM(mine, tmp_path).generate_with_log_probs(
        prompts, draws, Decoding(temperature=0)
    )
    wanted = mine.generate(prompts, draws, Decoding(temperature=0))
    assert text.ids.equal(wanted.ids) and text.mask.equal(wanted.mask)
    assert len(log_probs) == text.mask.sum() and not log_probs.any()


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(0.7), Decoding(1.2, top_k=4)], ids=repr)
def test_log_probabilities_are_those_that_the_model_would_draw_with(vllm, tmp_path, decoding):
    mine, (prompts, draws) = model(), asked()
    text, log_probs = vllm.VLLM(mine, tmp_path).generate_with_log_probs(prompts, draws, decoding)
    torch.testing.assert_close(log_probs, mine.drawn_log_probs(*text, decoding), atol=1e-5, rtol=1e-5)


def test_an_answer_is_made_of_its_own_draws(vllm, tmp_path):
    engine, (prompts, draws) = vllm.VLLM(model(), tmp_path), asked()
    whole = engine.generate(prompts, draws)
    for n in range(len(draws)):
        alone = engine.generate(prompts.rows(slice(n, n + 1)), draws[n : n + 1])
        assert alone.ids[0][alone.mask[0]].equal(whole.ids[n][whole.mask[n]])
    assert not engine.generate(prompts, draws.flip(1)).ids.equal(whole.ids)
    seeds = [vllm.seed_of(row) for row in torch.rand(1000, 2)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert vllm.seed_of(draws[0]) == vllm.seed_of(draws[0].clone())


def test_answers_end_with_the_end_of_text_or_with_what_was_asked_for(vllm, tmp_path):
    engine, (prompts, draws) = vllm.VLLM(model(), tmp_path), asked()
    free = engine.generate(prompts, draws, ends=())
    assert free.mask.sum(1).tolist() == [7] * 6
    stop = int(free.ids[free.mask].mode().values)
    for ends, text in (
        ((stop,), engine.generate(prompts, draws, ends=(stop,))),
        ((1,), engine.generate(prompts, draws)),
    ):
        for ids, mask in zip(*text, strict=True):
            answer = ids[mask].tolist()
            assert not set(answer[:-1]) & set(ends) and (answer[-1] in ends or len(answer) == 7)


def test_a_restricted_vocabulary_and_a_padded_head_are_kept_to(vllm, tmp_path):
    whole, (prompts, draws) = model(), asked()
    kept = CausalLM(whole.model, torch.tensor([1, 4, 9, 20]), whole.tokenizer)
    text, log_probs = vllm.VLLM(kept, tmp_path / "kept").generate_with_log_probs(prompts, draws)
    assert torch.isin(text.ids[text.mask], kept.vocabulary).all()
    torch.testing.assert_close(log_probs, kept.drawn_log_probs(*text), atol=1e-5, rtol=1e-5)
    whole.model.resize_token_embeddings(32, mean_resizing=False)
    engine = vllm.VLLM(whole, tmp_path / "padded")
    engine.generate(prompts, draws)
    assert engine.engine.calls[0][1][0].allowed_token_ids == list(range(24))


def test_the_engine_writes_with_the_weights_that_it_was_last_given(vllm, tmp_path):
    mine, (prompts, draws) = model(), asked()
    engine = vllm.VLLM(mine, tmp_path)
    before = engine.generate(prompts, draws, Decoding(temperature=0))
    mine.model.load_state_dict(tiny.model(1).state_dict())
    assert engine.generate(prompts, draws, Decoding(temperature=0)).ids.equal(before.ids)
    engine.synchronise()
    after = engine.generate(prompts, draws, Decoding(temperature=0))
    assert after.ids.equal(mine.generate(prompts, draws, Decoding(temperature=0)).ids)
    assert engine.engine.calls[2:4] == ["reload_weights", "reset_prefix_cache"]
    assert [path.name for path in tmp_path.iterdir()] == ["weights-2"]


def test_a_sleeping_engine_is_woken_by_weights(vllm, tmp_path):
    mine, (prompts, draws) = model(), asked()
    engine = vllm.VLLM(mine, tmp_path, enable_sleep_mode=True)
    engine.sleep()
    with pytest.raises(RuntimeError, match=r"call synchronise\(\) first"):
        engine.generate(prompts, draws)
    engine.synchronise()
    wanted = ["sleep 2", "wake ['weights']", "reload_weights", "wake ['kv_cache']", "reset_prefix_cache"]
    assert engine.engine.calls == wanted
    engine.generate(prompts, draws)
    with pytest.raises(ValueError, match="enable_sleep_mode=True"):
        vllm.VLLM(mine, tmp_path / "other").sleep()


def test_what_vllm_would_do_otherwise_is_refused(vllm, tmp_path):
    engine, (prompts, draws) = vllm.VLLM(model(), tmp_path, max_model_len=9), asked()
    assert engine.engine.options["logprobs_mode"] == "processed_logprobs"
    with pytest.raises(ValueError, match=r"no temperature between 0 and 0\.01, got 0\.001"):
        engine.generate(prompts, draws, Decoding(0.001))
    with pytest.raises(ValueError, match="6 answers need as many rows of draws, got 2"):
        engine.generate(prompts, draws[:2])
    with pytest.raises(
        RuntimeError, match=r"stopped after 6 of 7 tokens \(length\); give a larger max_model_len"
    ):
        engine.generate(prompts, draws, ends=())
