"""TRL's trainers under fdiv's methods: TRL's own loss where it has one, the method by hand where not."""

import importlib

import pytest
import torch

trl = pytest.importorskip("trl")

import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from tests.adapters import tiny  # noqa: E402
from trl.trainer.distillation_trainer import DistillationTrainer as TheirDistillation  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer as TheirDPO  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer as TheirGRPO  # noqa: E402

import fdiv.adapters.trl  # noqa: E402
from fdiv import (  # noqa: E402
    FDPO,
    GKD,
    GRPO,
    JS,
    KL,
    SFT,
    Alpha,
    ChiKL,
    Exact,
    FusedLinear,
    MonteCarlo,
    ReverseKL,
    SquaredHellinger,
    TopK,
)
from fdiv.adapters.trl import DistillationTrainer, DPOTrainer, GRPOTrainer  # noqa: E402
from fdiv.methods.prefer.chi_po import ChiPO  # noqa: E402
from fdiv.methods.prefer.ipo import IPO  # noqa: E402
from fdiv.methods.prefer.kto import KTO  # noqa: E402
from fdiv.methods.rl.grpo import group_advantage  # noqa: E402

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant",
}
PROMPTS = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(16)]})
PAIRS = Dataset.from_dict(
    {
        "prompt": [f"w{i} w{i + 1}" for i in range(16)],
        "chosen": [f" w{i} w{i}" + " w3" * (i % 3) for i in range(16)],
        "rejected": [f" w{i + 2} w{i + 4} w{i + 1}" for i in range(16)],
    }
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, from which TRL loads policy and reference."""
    folder = tmp_path_factory.mktemp("home")
    tiny.model(1).save_pretrained(folder / "policy")
    tiny.tokenizer().save_pretrained(folder / "policy")
    return folder


def distillation(home, method, teacher=None, peft_config=None, **options):
    return DistillationTrainer(
        peft_config=peft_config,
        method=method,
        model=tiny.model(1),
        teacher_model=teacher or tiny.model(0, width=48),
        args=trl.DistillationConfig(
            **{"output_dir": str(home / "out"), "max_completion_length": 6} | COMMON | options
        ),
        train_dataset=PROMPTS,
        processing_class=tiny.tokenizer(),
    )


def dpo(home, method, model=None, peft_config=None, **options):
    return DPOTrainer(
        peft_config=peft_config,
        method=method,
        model=model or str(home / "policy"),
        args=trl.DPOConfig(**{"output_dir": str(home / "out")} | COMMON | options),
        train_dataset=PAIRS,
        processing_class=tiny.tokenizer(),
    )


def share_of_w3(completions, **_):
    return [text.split().count("w3") / 6 for text in completions]


def grpo(home, method, model=None, peft_config=None, **options):
    return GRPOTrainer(
        peft_config=peft_config,
        method=method,
        model=model or str(home / "policy"),
        reward_funcs=share_of_w3,
        args=trl.GRPOConfig(
            **{"output_dir": str(home / "out"), "num_generations": 4, "max_completion_length": 6}
            | COMMON
            | options
        ),
        train_dataset=PROMPTS,
        processing_class=tiny.tokenizer(),
    )


def equal(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


# -- distillation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distiller(home):
    return distillation(home, GKD(lmbda=1.0))


def distillation_loss(trainer, batch, count=None, owner=DistillationTrainer):
    return owner._compute_loss(trainer, trainer.model, batch, count)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("divergence", "beta"), [(KL(), 0.0), (ReverseKL(), 1.0), (JS(0.5), 0.5), (JS(0.2), 0.2)], ids=repr
)
@pytest.mark.parametrize("estimator", [Exact(), FusedLinear(chunk=5)], ids=repr)
def test_distillation_is_trls_own_at_its_beta(distiller, divergence, beta, estimator, temperature):
    distiller.method = GKD(divergence, estimator, lmbda=1.0, temperature=temperature)
    distiller.beta, distiller.temperature = beta, temperature
    batch = tiny.rollouts(6)
    ours = distillation_loss(distiller, batch)
    theirs = distillation_loss(distiller, batch, owner=TheirDistillation)
    equal(ours, theirs)
    equal(tiny.gradients(ours, distiller.model), tiny.gradients(theirs, distiller.model))


@pytest.mark.parametrize("estimator", [Exact(), FusedLinear()], ids=repr)
def test_micro_batches_of_distillation_add_up_to_the_batch(distiller, estimator):
    distiller.method = GKD(SquaredHellinger(), estimator, lmbda=1.0)
    batch = tiny.rollouts(6)
    whole = distillation_loss(distiller, batch)
    whole_gradient = tiny.gradients(whole, distiller.model)
    parts = tiny.split(batch, 3)
    assert len({int(part["completion_mask"].sum()) for part in parts}) > 1, (
        "the parts should differ in tokens"
    )
    distiller.model.train()
    total = sum(distiller.compute_loss(distiller.model, part) for part in parts)
    distiller.model.eval()
    equal(total, whole)
    equal(tiny.gradients(total, distiller.model), whole_gradient)


def test_distillation_moves_the_response_and_its_end_and_nothing_else(distiller):
    distiller.method = GKD(KL(), lmbda=1.0)
    batch = tiny.rollouts(4)
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"][1, 0] = 0  # a token that a tool wrote
    counted = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], dim=1)
    counted[1, batch["prompt_mask"].shape[1]] = 0
    moved = tiny.moved_positions(distiller.model, lambda: distillation_loss(distiller, batch))
    assert torch.equal(moved, tiny.predicts(counted))


def test_heads_are_handed_over_and_no_logits_are_made(distiller):
    distiller.method = GKD(JS(0.5), FusedLinear(), lmbda=1.0)

    def refuse(*_):
        raise AssertionError("the head was called")

    heads = [m.get_output_embeddings() for m in (distiller.model, distiller.teacher_model)]
    handles = [head.register_forward_pre_hook(refuse) for head in heads]
    try:
        assert distillation_loss(distiller, tiny.rollouts(4)) > 0
    finally:
        for handle in handles:
            handle.remove()


def test_distillation_trains_saves_and_resumes(home):
    folder = home / "distillation"
    options = {"max_steps": 12, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 6}
    first = distillation(home, GKD(JS(0.5), FusedLinear(), lmbda=1.0), output_dir=str(folder), **options)
    first.train()
    losses = [row["loss"] for row in first.state.log_history if "loss" in row]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert all(0 < row["entropy"] < 4 for row in first.state.log_history if "entropy" in row)
    second = distillation(home, GKD(JS(0.5), FusedLinear(), lmbda=1.0), output_dir=str(folder), **options)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert second.state.global_step == 12
    resumed = [row["loss"] for row in second.state.log_history if "loss" in row]
    assert resumed[:6] == losses[:6] and max(resumed[6:]) < losses[0]
    names = {name for name, _ in tiny.model(1).named_parameters()}
    assert {name for name, _ in second.model.named_parameters()} == names


def test_evaluation_reports_the_divergence(home):
    trainer = distillation(home, GKD(KL(), lmbda=1.0), teacher=tiny.model(1), per_device_eval_batch_size=4)
    metrics = trainer.evaluate(PROMPTS)
    assert metrics["eval_loss"] == pytest.approx(0, abs=1e-6)  # the teacher is the student


# -- preferences ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preferrer(home):
    """A trainer whose policy has left its reference, and a batch of its pairs."""
    trainer = dpo(home, FDPO())
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    trainer.model.eval()
    return trainer, next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        (FDPO(ReverseKL()), {}),
        (FDPO(ReverseKL(), beta=0.5), {"beta": 0.5}),
        (FDPO(KL()), {"f_divergence_type": "forward_kl"}),
        (FDPO(2 * JS(0.5)), {"f_divergence_type": "js_divergence"}),
        (FDPO(Alpha.trl(0.3)), {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
        (FDPO(ReverseKL(), loss="hinge"), {"loss_types": ["hinge"]}),
    ],
    ids=repr,
)
def test_preferences_are_trls_own_dpo(preferrer, method, theirs):
    trainer, batch = preferrer
    plain = {"beta": 0.1, "f_divergence_type": "reverse_kl", "loss_types": ["sigmoid"]}
    for name, value in (plain | theirs).items():
        setattr(trainer, name, value)
    trainer.method = method
    ours = trainer.compute_loss(trainer.model, batch)
    other = TheirDPO._compute_loss(trainer, trainer.model, batch, False)
    equal(ours, other)
    equal(tiny.gradients(ours, trainer.model), tiny.gradients(other, trainer.model))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"loss": "sigmoid"}, "sigmoid"),
        ({"loss": "hinge"}, "hinge"),
        ({"loss": "ipo", "length_normalised": True}, "ipo"),
        ({"loss": "sigmoid", "length_normalised": True}, "sigmoid_norm"),
        ({"loss": "robust", "label_smoothing": 0.1}, "robust"),
        ({"loss": "exo", "label_smoothing": 0.1}, "exo_pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize(
    ("divergence", "kind"),
    [
        (ReverseKL(), "reverse_kl"),
        (KL(), "forward_kl"),
        (2 * JS(0.5), "js_divergence"),
        (Alpha.trl(0.3), "alpha_divergence"),
        (Alpha.fdpo(0.7), "alpha_divergence"),  # the paper's alpha runs the other way
    ],
    ids=repr,
)
def test_every_loss_under_every_divergence_is_trls(preferrer, monkeypatch, divergence, kind, ours, theirs):
    trainer, batch = preferrer
    lengths = batch["completion_mask"].sum(1)
    assert len(lengths.unique()) > 1, "normalising by one length would be another beta"
    knobs = {"beta": 0.3, "f_divergence_type": kind, "f_alpha_divergence_coef": 0.3, "loss_types": [theirs]}
    for name, value in (knobs | {"label_smoothing": ours.get("label_smoothing", 0.0)}).items():
        monkeypatch.setattr(trainer, name, value)
    trainer.method = FDPO(divergence, beta=0.3, **ours)
    own = trainer.compute_loss(trainer.model, batch)
    other = TheirDPO._compute_loss(trainer, trainer.model, batch, False)
    equal(own, other)
    equal(tiny.gradients(own, trainer.model), tiny.gradients(other, trainer.model))


def test_other_methods_of_whole_responses_are_trained_too(preferrer):
    trainer, batch = preferrer
    for method, same in (
        (IPO(0.3, length_normalised=True), FDPO(beta=0.3, loss="ipo", length_normalised=True)),
        (ChiPO(0.3), FDPO(ChiKL(0.5).reverse, beta=0.3)),
    ):
        trainer.method = method
        loss = trainer.compute_loss(trainer.model, batch)
        trainer.method = same
        equal(loss, trainer.compute_loss(trainer.model, batch))


def test_micro_batches_of_pairs_add_up_to_the_batch(preferrer):
    trainer, batch = preferrer
    trainer.method = FDPO(JS(0.3))
    pairs = len(batch["input_ids"]) // 2
    rows = [torch.tensor([i, i + 1, i + pairs, i + pairs + 1]) for i in range(0, pairs, 2)]
    parts = [{name: t[some] for name, t in batch.items()} for some in rows]
    whole = trainer.compute_loss(trainer.model, batch)
    total = sum(trainer.compute_loss(trainer.model, part) for part in parts) / len(parts)
    equal(total, whole)
    equal(tiny.gradients(total, trainer.model), tiny.gradients(whole, trainer.model))
    assert trainer.loss_is_scaled_for_ga is False  # the Trainer divides by the number of micro-batches


def test_preferences_move_the_responses_and_nothing_else(preferrer):
    trainer, batch = preferrer
    trainer.method = FDPO(KL())
    moved = tiny.moved_positions(trainer.model, lambda: trainer.compute_loss(trainer.model, batch))
    assert torch.equal(moved, tiny.predicts(batch["completion_mask"]))


def test_the_logged_reward_is_the_one_that_is_optimised(preferrer):
    trainer, batch = preferrer
    trainer.method = FDPO(KL(), beta=0.2)
    trainer._metrics["eval"].clear()
    loss = trainer.compute_loss(trainer.model, batch)
    logged = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    log_p = trainer.compute_ref_log_probs(trainer.ref_model, batch)[0]
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    log_q = trainer.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        fused_lm_head=True,
    ).log_probs.sum(1)[: len(log_p)]
    assert logged["rewards/chosen"] == pytest.approx(
        0.2 * trainer.method.score(log_p, log_q).mean().item(), rel=1e-4
    )
    margins = logged["rewards/chosen"] - logged["rewards/rejected"]
    assert logged["rewards/margins"] == pytest.approx(margins, rel=1e-4)
    assert loss > 0


def test_preferences_train_save_and_resume(home):
    folder = home / "dpo"
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "output_dir": str(folder)}
    first = dpo(home, FDPO(JS(0.3), beta=0.5), **options)
    first.train()
    rows = [row for row in first.state.log_history if "loss" in row]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"]
    second = dpo(home, FDPO(JS(0.3), beta=0.5), **options)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_reference_log_probabilities_may_be_computed_beforehand(home):
    options = {"max_steps": 2, "dataloader_num_workers": 0}
    losses = []
    for precompute in (False, True):
        trainer = dpo(home, FDPO(KL(), beta=1.0), precompute_ref_log_probs=precompute, **options)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -- reinforcement -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reinforcer(home):
    trainer = grpo(home, GRPO())
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    trainer.model.eval()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


REWARDS = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 1.0, 0.2]])


def scored(trainer, off_policy=False):
    """Two groups of four completions with TRL's reference log-probabilities and advantages."""
    batch = tiny.rollouts(8)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        reference, _, _ = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, attention, 6)
        policy, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, 6)
    batch |= {"ref_per_token_logps": reference, "advantages": group_advantage(REWARDS).flatten()}
    if off_policy:
        noise = torch.randn(policy.shape, generator=torch.Generator().manual_seed(5))
        batch["old_per_token_logps"] = policy + 0.2 * noise
    return batch


@pytest.mark.parametrize(
    ("method", "off_policy"),
    [
        (GRPO(beta=0.0), False),
        (GRPO(beta=0.0, clip=0.1), True),
        (GRPO(ReverseKL(), MonteCarlo(), beta=0.3, future=False), False),
        (GRPO(ReverseKL(), MonteCarlo(gradient="importance"), beta=0.3, future=False), False),
        (GRPO(ReverseKL(), MonteCarlo("behaviour"), beta=0.3, future=False), True),
    ],
    ids=repr,
)
def test_reinforcement_is_trls_own_grpo_with_its_k3_corrected(reinforcer, method, off_policy):
    trainer = reinforcer
    trainer.method, trainer.beta = method, method.beta
    trainer.epsilon_low = trainer.epsilon_high = method.clip
    batch = scored(trainer, off_policy)
    ours = trainer.compute_loss(trainer.model, batch)
    theirs = TheirGRPO._compute_loss(trainer, trainer.model, batch)
    equal(ours, theirs)
    equal(tiny.gradients(ours, trainer.model), tiny.gradients(theirs, trainer.model))


def test_the_denominator_is_trls_also_where_a_generation_lasts_for_several_steps(reinforcer, monkeypatch):
    trainer = reinforcer
    trainer.method = method = GRPO(ReverseKL(), MonteCarlo("behaviour"), beta=0.3, future=False)
    trainer.beta, trainer.epsilon_low, trainer.epsilon_high = method.beta, method.clip, method.clip
    batch = scored(trainer, off_policy=True)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 2)
    monkeypatch.setattr(trainer.args, "steps_per_generation", 6)
    trainer.model.train()
    losses = [owner._compute_loss(trainer, trainer.model, batch) for owner in (GRPOTrainer, TheirGRPO)]
    trainer.model.eval()
    equal(*losses)


@pytest.mark.parametrize(
    "method",
    [GRPO(JS(0.3), beta=0.5), GRPO(KL(), Exact(), beta=0.5), GRPO(KL(), TopK(5), beta=0.5, future=False)],
    ids=repr,
)
def test_reinforcement_is_the_method_called_by_hand(reinforcer, method):
    trainer = reinforcer
    trainer.method = method
    batch = scored(trainer)
    ours = trainer.compute_loss(trainer.model, batch)

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    rows = [m(ids, attention_mask=attention).logits[:, -7:-1] for m in (trainer.ref_model, trainer.model)]
    log_p, log_q = (logits.float().log_softmax(-1) for logits in rows)
    index = batch["completion_ids"].unsqueeze(-1)
    log_policy = log_q.gather(-1, index).squeeze(-1)
    if method.estimator.sees == "log_probs":
        evidence = {"log_p": log_p.gather(-1, index).squeeze(-1).detach(), "log_q": log_policy}
    else:
        evidence = {"log_p": log_p.detach(), "log_q": log_q}
    out = method(
        log_policy=log_policy,
        log_behaviour=log_policy.detach(),
        rewards=REWARDS,
        mask=batch["completion_mask"].bool(),
        **evidence,
    )
    equal(ours, out.loss)
    equal(tiny.gradients(ours, trainer.model), tiny.gradients(out.loss, trainer.model))
    assert trainer._metrics["eval"]["divergence"][-1] == pytest.approx(
        out.metrics["divergence"].item(), rel=1e-4
    )


@pytest.mark.parametrize("estimator", [MonteCarlo(), Exact()], ids=repr)
def test_micro_batches_of_rollouts_add_up_though_they_break_groups(reinforcer, estimator):
    trainer = reinforcer
    trainer.method = GRPO(KL(), estimator, beta=0.5)
    batch = scored(trainer)
    whole = trainer.compute_loss(trainer.model, batch)
    order = torch.tensor([0, 5, 2, 7, 4, 1, 6, 3])
    shuffled = {name: t[order] if t.ndim else t for name, t in batch.items()}
    total = sum(trainer.compute_loss(trainer.model, part) for part in tiny.split(shuffled, 4))
    equal(total, whole)
    equal(tiny.gradients(total, trainer.model), tiny.gradients(whole, trainer.model))


@pytest.mark.parametrize("estimator", [MonteCarlo(), Exact()], ids=repr)
def test_reinforcement_moves_the_completions_and_nothing_else(reinforcer, estimator):
    trainer = reinforcer
    trainer.method = GRPO(KL(), estimator, beta=0.5)
    batch = scored(trainer)
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"][:, 0] = 0  # a token that a tool wrote
    moved = tiny.moved_positions(trainer.model, lambda: trainer.compute_loss(trainer.model, batch))
    counted = batch["completion_mask"] * batch["tool_mask"]
    counted = torch.cat([torch.zeros_like(batch["prompt_mask"]), counted], dim=1)
    assert torch.equal(moved, tiny.predicts(counted))


def test_both_views_of_the_policy_agree_at_the_temperature_of_sampling(home):
    trainer = grpo(home, GRPO(), temperature=0.7)
    batch = scored(trainer)
    tokens, vocabulary = (
        trainer._see_tokens(trainer.model, batch),
        trainer._see_vocabulary(trainer.model, batch),
    )
    counted = batch["completion_mask"].bool()
    equal(vocabulary.log_policy[counted], tokens.log_policy[counted])
    equal(vocabulary.entropy[counted], tokens.entropy[counted])
    log_p = vocabulary.evidence["log_p"].gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    equal(log_p[counted], tokens.evidence["log_p"][counted])


@pytest.mark.parametrize("estimator", [MonteCarlo(), Exact()], ids=repr)
def test_reinforcement_trains_saves_and_resumes(home, estimator):
    folder = home / f"grpo-{type(estimator).__name__}"
    options = {
        "max_steps": 12,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 10,
        "output_dir": str(folder),
    }
    first = grpo(home, GRPO(JS(0.3), estimator, beta=0.1), **options)
    first.train()
    rows = [row for row in first.state.log_history if "reward" in row]
    assert sum(r["reward"] for r in rows[-4:]) > 1.2 * sum(r["reward"] for r in rows[:4])
    assert rows[0]["divergence"] == pytest.approx(0, abs=1e-6) and rows[-1]["divergence"] > 1e-3
    second = grpo(home, GRPO(JS(0.3), estimator, beta=0.1), **options)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
    assert second.state.global_step == 12
    resumed = [row for row in second.state.log_history if "reward" in row]
    assert resumed[-1]["divergence"] > 1e-3, "the reference is the model that training started from"


# -- models of another make ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(home):
    """A mixture of experts, whose router has a loss of its own."""
    config = transformers.MixtralConfig(
        vocab_size=len(tiny.VOCABULARY),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=tiny.PAD,
        bos_token_id=None,
        eos_token_id=tiny.EOS,
        router_aux_loss_coef=0.1,
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(home / "experts")
    tiny.tokenizer().save_pretrained(home / "experts")
    return str(home / "experts")


def test_the_loss_of_a_router_is_added_as_trl_adds_it(home, experts):
    trainer = dpo(home, FDPO(), model=experts)
    batch = next(iter(trainer.get_train_dataloader()))
    losses = [
        trainer.compute_loss(trainer.model, batch),
        TheirDPO._compute_loss(trainer, trainer.model, batch, False),
    ]
    equal(*losses)
    assert losses[0] > 0.7, "log 2 is the loss of a policy at its reference, the rest is the router's"

    trainer = grpo(home, GRPO(ReverseKL(), beta=0.3, future=False), model=experts)
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    batch = scored(trainer)
    losses = [owner._compute_loss(trainer, trainer.model, batch) for owner in (GRPOTrainer, TheirGRPO)]
    equal(*losses)
    with pytest.raises(ValueError, match=r"router loss; write GRPO\(estimator=MonteCarlo\(\)\)"):
        grpo(home, GRPO(KL(), Exact()), model=experts)


def test_an_adapter_is_trained_against_the_model_without_it(home):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    def disturb(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()

    trainer = dpo(home, FDPO(KL()), peft_config=lora)
    disturb(trainer.model)
    trainer.f_divergence_type = "forward_kl"
    batch = next(iter(trainer.get_train_dataloader()))
    equal(
        trainer.compute_loss(trainer.model, batch),
        TheirDPO._compute_loss(trainer, trainer.model, batch, False),
    )

    trainer = grpo(home, GRPO(KL(), Exact()), peft_config=lora)
    disturb(trainer.model)
    batch = tiny.rollouts(4)
    reference = trainer._see_vocabulary(trainer.model, batch).evidence["log_p"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        expected = tiny.model(1)(ids, attention_mask=attention).logits[:, -7:-1].log_softmax(-1)
    equal(reference, expected)

    trainer = distillation(home, GKD(KL(), lmbda=1.0), peft_config=lora)
    disturb(trainer.model)
    trainer.beta = 0.0
    ours = distillation_loss(trainer, batch)
    equal(ours, distillation_loss(trainer, batch, owner=TheirDistillation))
    assert tiny.gradients(ours, trainer.model).any()


def test_bfloat16_reaches_the_layers_and_not_the_loss(home):
    trainer, seen = distillation(home, GKD(KL(), FusedLinear(), lmbda=1.0), bf16=True, max_steps=1), []

    def note(module, arguments, output):
        seen.append(output.dtype)

    trainer.model.base_model.layers[0].mlp.register_forward_hook(note)
    loss = distillation_loss(trainer, tiny.rollouts(4))
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (distillation, FDPO(), r"consumes pairs; write method=GKD"),
        (distillation, GKD, r"takes a method, got <class"),
        (dpo, GKD(), r"consumes responses; write method=FDPO"),
        (dpo, KL(), r"takes a method, got KL\(\); write method=FDPO"),
        (dpo, KTO(), r"reads log_ratio_mismatched, which TRL's pairs do not have"),
        (grpo, SFT(), r"consumes tokens; write method=GRPO"),
    ],
)
def test_a_method_of_another_kind_is_refused(home, make, method, message):
    with pytest.raises(TypeError, match=message):
        make(home, method)


@pytest.mark.parametrize(
    ("make", "method", "option", "message"),
    [
        (distillation, GKD(lmbda=1.0), {"beta": 0.5}, r"JS\(beta\)"),
        (distillation, GKD(lmbda=1.0), {"temperature": 0.5}, r"GKD\(temperature=0.5\).*'temperature': 0.5"),
        (distillation, GKD(), {}, r"lmbda=1.0"),
        (dpo, FDPO(), {"beta": 0.3}, r"FDPO\(beta=0.3\)"),
        (dpo, FDPO(), {"f_divergence_type": "forward_kl"}, r"FDPO\(divergence="),
        (dpo, FDPO(), {"loss_type": ["ipo"]}, r"FDPO\(loss="),
        (dpo, FDPO(), {"label_smoothing": 0.1}, r"FDPO\(label_smoothing=0.1\)"),
        (dpo, FDPO(), {"ld_alpha": 0.5}, r"trl.DPOTrainer"),
        (grpo, GRPO(), {"beta": 0.1}, r"GRPO\(beta=0.1\)"),
        (grpo, GRPO(), {"epsilon": 0.1}, r"GRPO\(clip=0.1\)"),
        (grpo, GRPO(), {"loss_type": "dr_grpo"}, r"'dapo'"),
        (grpo, GRPO(), {"use_bias_correction_kl": False}, r"MonteCarlo\(\)"),
        (grpo, GRPO(), {"entropy_coef": 0.1}, r"trl.GRPOTrainer"),
        (grpo, GRPO(), {"use_vllm": True}, r"vllm_importance_sampling_correction=False"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:40],
)
def test_an_option_that_would_do_nothing_is_refused(home, make, method, option, message):
    with pytest.raises(ValueError, match=message):
        make(home, method, **option)


def test_every_option_that_is_refused_exists():
    for module, config in (
        (fdiv.adapters.trl.distillation, trl.DistillationConfig),
        (fdiv.adapters.trl.dpo, trl.DPOConfig),
        (fdiv.adapters.trl.grpo, trl.GRPOConfig),
    ):
        assert set(module.INSTEAD) <= set(config.__dataclass_fields__)


def test_a_distillation_without_a_teacher_is_refused():
    with pytest.raises(TypeError, match="write teacher_model="):
        DistillationTrainer(method=GKD(lmbda=1.0), model=tiny.model(1))


def test_a_head_that_cannot_be_read_is_refused(home):
    teacher = tiny.model(0)
    teacher.config.output_multiplier = 2.0
    with pytest.raises(ValueError, match=r"output_multiplier=2\.0"):
        distillation(home, GKD(lmbda=1.0), teacher=teacher)


def test_another_version_of_trl_is_refused(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"supports TRL 1\.16\.\*, found 1\.17\.0"):
        importlib.reload(fdiv.adapters.trl)
