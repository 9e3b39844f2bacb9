"""TRL's experimental GKDTrainer: its own loss on given responses, and a denominator that it does not have."""

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from tests.adapters import tiny
from trl.experimental.gkd.gkd_config import GKDConfig
from trl.experimental.gkd.gkd_trainer import GKDTrainer as TheirGKD

from fdiv import GKD, JS, KL, Exact, FusedLinear, ReverseKL
from fdiv.adapters.trl.gkd import GKDTrainer

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
    "max_new_tokens": 9,
}


def rows(number=16):
    batch = tiny.responses(number)
    batch |= {"prompts": batch["input_ids"][:, :3], "prompt_attention_mask": batch["attention_mask"][:, :3]}
    return Dataset.from_dict({name: t.tolist() for name, t in batch.items()}).with_format("torch")


def gkd(folder, method, **options):
    return GKDTrainer(
        method=method,
        model=tiny.model(1),
        teacher_model=tiny.model(0, width=48),
        args=GKDConfig(**{"output_dir": str(folder)} | COMMON | options),
        data_collator=torch.utils.data.default_collate,
        train_dataset=rows(),
        processing_class=tiny.tokenizer(),
    )


def equal(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize(("divergence", "beta"), [(KL(), 0), (ReverseKL(), 1), (JS(0.2), 0.2)], ids=repr)
@pytest.mark.parametrize("estimator", [Exact(), FusedLinear()], ids=repr)
def test_given_responses_cost_what_they_cost_in_trl(tmp_path, divergence, beta, estimator):
    trainer, batch = gkd(tmp_path, GKD(divergence, estimator)), tiny.responses(6)
    trainer.beta = beta
    count = torch.tensor(40)
    ours = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    theirs = TheirGKD.compute_loss(trainer, trainer.model, batch, num_items_in_batch=count)
    equal(ours, theirs)
    equal(tiny.gradients(ours, trainer.model), tiny.gradients(theirs, trainer.model))


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_loss_is_divided_by_the_tokens_that_count(tmp_path, monkeypatch, lmbda):
    trainer = gkd(tmp_path, GKD(KL(), lmbda=lmbda), gradient_accumulation_steps=2, max_steps=2)
    given, seen = int((tiny.responses(16)["labels"] != -100).sum()), []
    original = trainer.compute_loss

    def note(model, inputs, return_outputs=False, num_items_in_batch=None):
        seen.append((int((inputs["labels"][:, 1:] != -100).sum()), int(num_items_in_batch)))
        return original(model, inputs, return_outputs, num_items_in_batch)

    monkeypatch.setattr(trainer, "compute_loss", note)
    trainer.train()
    (first, count), (second, same) = seen[:2]
    assert first + second == count == same
    total = sum(tokens for tokens, _ in seen)
    assert (total == given) == (lmbda == 0), "written responses should differ in length from the given ones"


def test_it_learns_from_a_mix_saves_and_resumes(tmp_path):
    method = GKD(JS(0.5), FusedLinear(), lmbda=0.5)
    options = {"max_steps": 16, "save_strategy": "steps", "save_steps": 8}
    first = gkd(tmp_path, method, **options)
    first.train()
    losses = [row["loss"] for row in first.state.log_history if "loss" in row]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    second = gkd(tmp_path, method, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert second.state.global_step == 16
    metrics = second.evaluate(rows(4))
    assert 0 < metrics["eval_loss"] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"), [({"beta": 0.1}, r"JS\(beta\)"), ({"lmbda": 0.9}, r"GKD\(lmbda=0.9\)")]
)
def test_an_option_that_would_do_nothing_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        gkd(tmp_path, GKD(), **options)
