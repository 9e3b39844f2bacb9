"""transformers.Trainer under fdiv's methods: the method by hand, and the Trainer's own loss for SFT."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402
from tests.adapters import tiny  # noqa: E402

from fdiv import (  # noqa: E402
    FDPO,
    GKD,
    JS,
    KL,
    SFT,
    Exact,
    FusedLinear,
    ReverseKL,
    SampledLogits,
    TopK,
)
from fdiv.adapters._evidence import as_forward  # noqa: E402
from fdiv.adapters.trainer import Trainer  # noqa: E402

COMMON = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


class Rows(torch.utils.data.Dataset):
    """A batch as a data set of its rows."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, i):
        return {name: tensor[i] for name, tensor in self.batch.items()}


def trainer(folder, method, teacher=None, host=Trainer, rows=16, **options):
    extra = {"method": method, "teacher": teacher} if host is Trainer else {}
    return host(
        **extra,
        model=tiny.model(1),
        args=transformers.TrainingArguments(**{"output_dir": str(folder)} | COMMON | options),
        train_dataset=Rows(tiny.responses(rows)),
    )


def by_hand(method, student, teacher, batch):
    """The method on whole logits, masked and shifted here."""
    mask = batch["labels"][:, 1:] != -100
    log_p, log_q = (
        m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        for m in (teacher, student)
    )
    temperature = method.temperature
    log_p, log_q = ((t / temperature).log_softmax(-1) for t in (log_p.detach(), log_q))
    rows = (TopK(5) if isinstance(method.estimator, TopK) else Exact())(method.divergence, log_p, log_q)
    return rows[mask].mean()


def equal(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize(
    "method",
    [
        GKD(),
        GKD(JS(0.2), FusedLinear(chunk=5)),
        GKD(ReverseKL(), FusedLinear(), temperature=2.0),
        GKD(ReverseKL(), temperature=2.0),
        GKD(KL(), TopK(5)),
    ],
    ids=repr,
)
def test_distillation_is_the_method_called_by_hand(tmp_path, method):
    teacher, batch = tiny.model(0, width=48), tiny.responses(6)
    host = trainer(tmp_path, method, teacher)
    ours = host.compute_loss(host.model, batch)
    hand = by_hand(method, host.model, teacher, batch)
    equal(ours, hand)
    equal(tiny.gradients(ours, host.model), tiny.gradients(hand, host.model))


@pytest.mark.parametrize("steps", [1, 4])
def test_sft_is_the_trainers_own_loss(tmp_path, steps):
    """Two steps of either end at the same weights, also where micro-batches differ in their tokens."""
    options = {"max_steps": 2, "gradient_accumulation_steps": steps, "per_device_train_batch_size": 2}
    hosts = [trainer(tmp_path, SFT(), host=host, **options) for host in (Trainer, transformers.Trainer)]
    for host in hosts:
        host.train()
    losses = [[row["loss"] for row in host.state.log_history if "loss" in row] for host in hosts]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(hosts[0].model.parameters(), hosts[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_step_does_not_depend_on_its_micro_batches(tmp_path):
    teacher, weights, losses = tiny.model(0), [], []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        host = trainer(
            tmp_path,
            GKD(JS(0.5), FusedLinear()),
            teacher,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=1.0,
        )
        host.train()
        losses.append([row["loss"] for row in host.state.log_history if "loss" in row])
        weights.append(torch.cat([p.detach().flatten() for p in host.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny.model(1).parameters()])
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], rel=1e-5)
        equal(weights[other] - start, weights[0] - start, 1e-4)


@pytest.mark.parametrize("method", [GKD(KL()), GKD(JS(0.5), FusedLinear()), SFT()], ids=repr)
def test_labelled_tokens_are_moved_and_nothing_else(tmp_path, method):
    teacher = None if isinstance(method, SFT) else tiny.model(0)
    host, batch = trainer(tmp_path, method, teacher), tiny.responses(4)
    moved = tiny.moved_positions(host.model, lambda: host.compute_loss(host.model, batch))
    assert torch.equal(moved, tiny.predicts(batch["labels"] != -100))


def test_a_label_that_nothing_predicts_is_not_counted(tmp_path):
    """The first token of a sequence has a label and no prediction, whatever loss the model itself has."""
    batch = tiny.responses(4)
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    model = tiny.model(1)
    model.loss_type = "ForMaskedLM"
    host = Trainer(method=SFT(), model=model, args=transformers.TrainingArguments(str(tmp_path), **COMMON))
    count = host._get_num_items_in_batch([batch], torch.device("cpu"))
    assert count == (batch["labels"][:, 1:] != -100).sum()
    equal(
        host.compute_loss(model, batch, num_items_in_batch=count),
        torch.nn.functional.cross_entropy(
            model(batch["input_ids"]).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        ),
    )


def test_padding_changes_nothing(tmp_path):
    teacher, batch = tiny.model(0), tiny.responses(4)
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3), value=tiny.PAD),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 3)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 3), value=-100),
    }
    host = trainer(tmp_path, GKD(KL()), teacher)
    equal(host.compute_loss(host.model, padded), host.compute_loss(host.model, batch))


def test_padding_on_the_left_is_not_attended_to(tmp_path):
    teacher, batch = tiny.model(0), tiny.responses(4)
    shifted = {
        name: t.roll(2, 1) for name, t in batch.items()
    }  # at least two places of padding, now in front
    rows = (batch["attention_mask"][:, -2:] == 0).all(1)
    assert rows.any()
    shifted = {name: t[rows] for name, t in shifted.items()}
    host = trainer(tmp_path, GKD(KL()), teacher)
    padded = host.compute_loss(host.model, shifted)
    equal(padded, by_hand(host.method, host.model, teacher, shifted))
    equal(padded, host.compute_loss(host.model, {name: t[rows] for name, t in batch.items()}), 1e-4)


def test_a_micro_batch_without_a_label_costs_nothing(tmp_path):
    batch = tiny.responses(2)
    batch["labels"].fill_(-100)
    for estimator in (Exact(), FusedLinear()):
        host = trainer(tmp_path, GKD(KL(), estimator), tiny.model(0))
        loss = host.compute_loss(host.model, batch, num_items_in_batch=torch.tensor(5))
        assert loss == 0
        assert not tiny.gradients(loss, host.model).any()


def test_evaluation_is_a_mean_over_the_tokens_of_the_whole_set(tmp_path):
    teacher, batch = tiny.model(0), tiny.responses(7, seed=3)
    host = trainer(
        tmp_path, GKD(JS(0.5), FusedLinear(), temperature=2.0), teacher, per_device_eval_batch_size=3
    )
    metrics = host.evaluate(Rows(batch))
    expected = by_hand(host.method, host.model, teacher, batch).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_divergence"] == pytest.approx(expected, rel=1e-5)
    other = tiny.responses(4, seed=5)
    again = host.evaluate(Rows(other), metric_key_prefix="test")
    assert again["test_loss"] == pytest.approx(
        by_hand(host.method, host.model, teacher, other).item(), rel=1e-5
    )


def test_it_learns_saves_the_student_alone_and_resumes_exactly(tmp_path):
    teacher, folder = tiny.model(0, width=48).train(), tmp_path / "run"
    options = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    first = trainer(folder, GKD(JS(0.5), FusedLinear()), teacher, rows=8, **options)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    first.train()
    losses = [row["loss"] for row in first.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    saved = load_file(folder / "checkpoint-12" / "model.safetensors")
    assert set(saved) == set(tiny.model(1).state_dict())
    second = trainer(folder, GKD(JS(0.5), FusedLinear()), teacher, rows=8, **options)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_metrics_of_a_method_are_logged(tmp_path):
    class Counted(GKD):
        def __call__(self, **tensors):
            out = super().__call__(**tensors)
            return out._replace(metrics={"rows": torch.tensor(float(len(tensors["log_q"])))})

    options = {"max_steps": 2, "per_device_train_batch_size": 8}
    host = trainer(tmp_path, Counted(KL(), SampledLogits(5)), tiny.model(0), **options)
    host.train()
    first, second = (row["rows"] for row in host.state.log_history if "rows" in row)
    assert first != second and first + second == (tiny.responses(16)["labels"] != -100).sum()


def test_a_wrapper_sees_the_forward_pass():
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *arguments):
            self.calls += 1
            return self.inner(*arguments)

    inner = torch.nn.Linear(2, 2)
    wrapper = Wrapper(inner)
    x = torch.ones(1, 2)
    inside = as_forward(wrapper, inner, lambda y: inner(y) + 1, x)
    torch.testing.assert_close(inside, inner(x) + 1)
    assert wrapper.calls == 1
    torch.testing.assert_close(wrapper(x), inner(x))


@pytest.mark.parametrize(
    ("method", "teacher", "options", "error", "message"),
    [
        (FDPO(), None, {}, TypeError, r"consumes pairs; write method=GKD"),
        (KL(), None, {}, TypeError, r"takes a method, got KL\(\)"),
        (GKD(), None, {}, TypeError, r"needs a teacher"),
        (SFT(), 24, {}, TypeError, r"would ignore the teacher"),
        (GKD(lmbda=0.5), 24, {}, ValueError, r"write lmbda=0"),
        (GKD(), 30, {}, ValueError, r"the student has 24 tokens and the teacher 30"),
        (GKD(), 24, {"label_smoothing_factor": 0.1}, ValueError, r"label_smoothing_factor=0.1"),
        (GKD(), 24, {"average_tokens_across_devices": False}, ValueError, r"global batch"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_it_cannot_do_it_refuses(tmp_path, method, teacher, options, error, message):
    model = None
    if teacher is not None:
        model = tiny.model(0)
        model.resize_token_embeddings(teacher)
    with pytest.raises(error, match=message):
        trainer(tmp_path, method, model, **options)


def test_adapters_that_would_not_be_trained_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    for config, message in (
        (peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"), "leave the head out"),
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "such as LoRA"),
    ):
        student = peft.get_peft_model(tiny.model(1), config)
        with pytest.raises(ValueError, match=message):
            Trainer(method=SFT(), model=student, args=transformers.TrainingArguments(str(tmp_path), **COMMON))


def test_the_loss_of_a_router_is_refused_for_it_would_be_left_out(tmp_path):
    student = tiny.model(1)
    student.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits = False"):
        Trainer(method=SFT(), model=student, args=transformers.TrainingArguments(str(tmp_path), **COMMON))


def test_low_rank_adapters_are_trained(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    student, batch = peft.get_peft_model(tiny.model(1), lora), tiny.responses(4)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    host = Trainer(
        method=GKD(KL()),
        teacher=tiny.model(0),
        model=student,
        args=transformers.TrainingArguments(str(tmp_path), **COMMON),
    )
    loss = host.compute_loss(student, batch)
    equal(loss, by_hand(host.method, student, host.teacher, batch))
    assert tiny.gradients(loss, student).any()


def test_a_function_that_would_never_be_called_is_refused(tmp_path):
    with pytest.raises(TypeError, match="compute_metrics"):
        Trainer(method=SFT(), model=tiny.model(1), compute_metrics=lambda prediction: {})


def test_a_batch_without_labels_is_refused(tmp_path):
    host, batch = trainer(tmp_path, SFT()), tiny.responses(2)
    del batch["labels"]
    with pytest.raises(ValueError, match="labels"):
        host.compute_loss(host.model, batch)
