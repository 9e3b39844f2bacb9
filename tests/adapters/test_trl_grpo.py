"""GRPO against TRL 1.16's own loss on random log-probabilities, and what its trainer takes and refuses."""

from collections import defaultdict
from itertools import product
from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl")

from tests.adapters import tiny  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer as TheirGRPO  # noqa: E402

from fdiv import GRPO, MonteCarlo, ReverseKL  # noqa: E402
from fdiv.adapters.trl import GRPOTrainer  # noqa: E402
from fdiv.methods.rl.grpo import group_advantage  # noqa: E402

LENGTHS = torch.tensor([5, 2, 7, 1, 7, 3, 4, 6])
MASK = torch.arange(7) < LENGTHS.unsqueeze(1)
LONGEST = 9  # max_completion_length
REWARDS = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 1.0, 0.2]], dtype=torch.float64)
AGGREGATES = {"dapo": "tokens", "bnpo": "tokens", "grpo": "sequences", "dr_grpo": LONGEST}


class Alone:
    """An accelerator of one process."""

    device, num_processes = torch.device("cpu"), 1
    gather = gather_for_metrics = staticmethod(lambda tensor: tensor)
    reduce = staticmethod(lambda tensor, reduction: tensor)


def batch(off_policy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_policy, noise, other = torch.randn(3, 8, 7, generator=generator, dtype=torch.float64)
    log_policy = (-log_policy.abs() - 0.1).requires_grad_()
    return {
        "log_policy": log_policy,
        "log_behaviour": log_policy.detach() + 0.25 * noise * off_policy,
        "log_p": log_policy.detach() + 0.5 * other,
        "mask": MASK,
    }


def theirs(given, advantage, *, loss_type, clip=(0.2, 0.2), beta=0.0, level="token", corrected=True):
    """TRL's loss, of its own code."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            given["log_policy"], torch.zeros_like(given["log_policy"]), None
        ),
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=corrected),
        accelerator=Alone(),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=clip[0],
        epsilon_high=clip[1],
        max_completion_length=LONGEST,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"eval": defaultdict(list)},
    )  # fmt: skip
    mask, ids = given["mask"].long(), torch.ones(8, 1, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": mask, "completion_mask": mask}
    inputs |= {
        "advantages": advantage,
        "old_per_token_logps": given["log_behaviour"],
        "ref_per_token_logps": given["log_p"],
        "num_items_in_batch": mask.sum(),
    }
    loss = TheirGRPO._compute_loss(trainer, None, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["eval"].items()}


def ours(method, given):
    """With the rewards: TRL is given advantages that the method normalised."""
    given = given | ({"log_q": given["log_policy"]} if method.beta else {})
    if not method.beta:
        given = {name: tensor for name, tensor in given.items() if name != "log_p"}
    return method(**given, rewards=REWARDS)


def equal(out, loss, given):
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=1e-14)
    both = [torch.autograd.grad(x, given["log_policy"], retain_graph=True)[0] for x in (out.loss, loss)]
    torch.testing.assert_close(*both, rtol=1e-11, atol=1e-14)
    assert both[0].any()


@pytest.mark.parametrize(
    ("loss_type", "clip", "off_policy", "advantage"),
    list(product(AGGREGATES, ((0.2, 0.2), (0.2, 0.28), (0.1, 0.4)), (False, True), ("std", "mean"))),
)
def test_the_clipped_gain_is_trls(loss_type, clip, off_policy, advantage):
    given = batch(off_policy)
    method = GRPO(beta=0.0, clip=clip, aggregate=AGGREGATES[loss_type], advantage=advantage)
    advantages = group_advantage(REWARDS, advantage).flatten()
    loss, metrics = theirs(given, advantages, loss_type=loss_type, clip=clip)
    out = ours(method, given)
    equal(out, loss, given)
    assert out.metrics["clipped"].item() == pytest.approx(metrics["clip_ratio/region_mean"], abs=1e-6)
    assert (out.metrics["clipped"] > 0) == off_policy


@pytest.mark.parametrize("loss_type", AGGREGATES)
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_penalty_is_trls_corrected_k3_without_the_future(loss_type, off_policy):
    given = batch(off_policy)
    estimator = MonteCarlo("behaviour") if off_policy else MonteCarlo()
    method = GRPO(ReverseKL(), estimator, 0.3, future=False, aggregate=AGGREGATES[loss_type])
    loss, metrics = theirs(given, group_advantage(REWARDS).flatten(), loss_type=loss_type, beta=0.3)
    out = ours(method, given)
    equal(out, loss, given)
    assert out.metrics["divergence"].item() == pytest.approx(metrics["kl"], rel=1e-5)


def test_uncorrected_trl_differentiates_the_value_and_is_not_among_the_settings():
    given = batch(False)
    loss, _ = theirs(given, group_advantage(REWARDS).flatten(), loss_type="dapo", beta=0.3, corrected=False)
    (naive,) = torch.autograd.grad(loss, given["log_policy"])
    (exact,) = torch.autograd.grad(ours(GRPO(beta=0.3, future=False), given).loss, given["log_policy"])
    # What k3 in the loss leaves out is the value times the gradient of the token's log-probability.
    value = ReverseKL().f(given["log_p"] - given["log_policy"].detach())
    torch.testing.assert_close(exact - naive, torch.where(MASK, 0.3 * value / MASK.sum(), 0.0))


@pytest.mark.parametrize("clip", [(0.2, 0.2), (3e-4, 4e-4), (0.1, 0.2)])
@pytest.mark.parametrize("off_policy", [False, True])
def test_a_ratio_a_sequence_is_trls(clip, off_policy):
    given = batch(off_policy)
    method = GRPO(beta=0.0, clip=clip, ratio="sequence", aggregate="sequences")
    advantages = group_advantage(REWARDS).flatten()
    loss, _ = theirs(given, advantages, loss_type="grpo", clip=clip, level="sequence")
    equal(ours(method, given), loss, given)


# -- the trainer ---------------------------------------------------------------------------------------


def trainer(folder, method, **options):
    from datasets import Dataset

    policy = folder / "policy"
    tiny.model(1).save_pretrained(policy)
    tiny.tokenizer().save_pretrained(policy)
    return GRPOTrainer(
        method=method,
        model=str(policy),
        reward_funcs=lambda completions, **_: [text.split().count("w3") / 6 for text in completions],
        args=trl.GRPOConfig(
            **{
                "output_dir": str(folder / "out"),
                "num_generations": 4,
                "per_device_train_batch_size": 8,
                "max_completion_length": 6,
                "use_cpu": True,
                "bf16": False,
                "report_to": [],
                "disable_tqdm": True,
                "logging_steps": 1,
                "save_strategy": "no",
            }
            | options
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(16)]}),
        processing_class=tiny.tokenizer(),
    )


@pytest.mark.parametrize(
    "method",
    [
        GRPO(beta=0.1, place="reward", clip=(0.2, 0.28)),
        GRPO(beta=0.1, level="sequence", ratio="sequence", aggregate="sequences", clip=None),
        GRPO(beta=0.1, aggregate=6, advantage="mean"),
    ],
    ids=repr,
)
def test_every_setting_trains_in_trls_trainer(tmp_path, method):
    options = {"scale_rewards": False} if method.advantage == "mean" else {}
    host = trainer(tmp_path, method, max_steps=2, gradient_accumulation_steps=2, **options)
    host.train()
    rows = [row for row in host.state.log_history if "reward" in row]
    assert len(rows) == 2 and all(row["ratio"] == pytest.approx(1, abs=1e-4) for row in rows)
    assert rows[0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert all(row["clip_ratio/region_mean"] == 0 for row in rows)


def test_micro_batches_of_a_mean_over_sequences_add_up_to_the_batch(tmp_path):
    host = trainer(tmp_path, GRPO(beta=0.0, aggregate="sequences"))
    whole = tiny.rollouts(8) | {"advantages": group_advantage(REWARDS.float()).flatten()}
    host.model.eval()
    expected = host._compute_loss(host.model, whole)
    host.model.train()
    host.current_gradient_accumulation_steps = 2
    parts = [
        {name: t[rows] if t.ndim else t for name, t in whole.items()} for rows in (slice(0, 4), slice(4, 8))
    ]
    total = sum(host._compute_loss(host.model, part) for part in parts)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "options", "instead"),
    [
        (GRPO(), {"epsilon_high": 0.28}, r"GRPO\(clip=\(low, high\)\)"),
        (GRPO(), {"importance_sampling_level": "sequence"}, "GRPO\\(ratio='sequence'\\)"),
        (GRPO(), {"loss_type": "grpo"}, "'sequences' for 'grpo'"),
        (GRPO(advantage="mean"), {}, r"GRPOConfig\(scale_rewards=False\)"),
    ],
    ids=repr,
)
def test_options_that_the_method_decides_name_its_field(tmp_path, method, options, instead):
    with pytest.raises(ValueError, match=instead):
        trainer(tmp_path, method, **options)
