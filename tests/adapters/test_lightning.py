"""The LightningModule: gradients of the mean over a step's tokens, whatever Lightning cuts it into."""

import warnings

import pytest
import torch

lightning = pytest.importorskip("lightning")
pytest.importorskip("transformers")

from tests.adapters import tiny  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from fdiv import FDPO, GKD, JS, KL, SFT, Exact, FusedLinear, ReverseKL  # noqa: E402
from fdiv.adapters.lightning import MethodModule  # noqa: E402


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, i):
        return {name: tensor[i] for name, tensor in self.batch.items()}


def loader(rows, size, seed=0):
    return DataLoader(Rows(tiny.responses(rows, seed)), batch_size=size)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def module(method, teacher=None, optimizer=sgd):
    return MethodModule(method=method, teacher=teacher, model=tiny.model(1), optimizer=optimizer)


def host(folder, **options):
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False} | options,
    )


def fit(folder, subject, batches, ckpt_path=None, **options):
    trainer = host(folder, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loaders without worker processes, and the like
        trainer.fit(subject, batches, ckpt_path=ckpt_path)
    return trainer


def by_hand(method, student, teacher, batch):
    mask = batch["labels"][:, 1:] != -100
    log_p, log_q = (
        m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        for m in (teacher, student)
    )
    return method.divergence(log_p.detach(), log_q)[mask].mean()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def equal(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("estimator", [Exact(), FusedLinear()], ids=repr)
@pytest.mark.parametrize(("rows", "size", "parts"), [(8, 8, 1), (8, 2, 4), (8, 1, 8), (6, 2, 4)])
def test_a_step_is_one_on_the_mean_over_its_tokens(tmp_path, estimator, rows, size, parts):
    """The last row is a step that the end of the epoch cuts short, which Lightning alone divides wrongly."""
    method, teacher = GKD(JS(0.3), estimator), tiny.model(0, width=48)
    subject = module(method, teacher)
    fit(tmp_path, subject, loader(rows, size), max_epochs=1, accumulate_grad_batches=parts)
    student = tiny.model(1)
    start = weights(student)
    loss = by_hand(method, student, teacher, tiny.responses(rows))
    expected = -0.5 * tiny.gradients(loss, student)
    equal(weights(subject.model) - start, expected)


def test_lightning_clips_the_gradient_of_the_mean(tmp_path):
    subject = module(GKD(KL()), tiny.model(0))
    start = weights(tiny.model(1))
    fit(tmp_path, subject, loader(8, 2), max_epochs=1, accumulate_grad_batches=4, gradient_clip_val=1e-3)
    assert (weights(subject.model) - start).norm().item() == pytest.approx(0.5 * 1e-3, rel=1e-2)


def test_sft_needs_no_teacher_and_is_cross_entropy(tmp_path):
    subject, student = module(SFT()), tiny.model(1)
    start = weights(student)
    fit(tmp_path, subject, loader(8, 4), max_epochs=1, accumulate_grad_batches=2)
    expected = -0.5 * tiny.gradients(student(**tiny.responses(8)).loss, student)
    equal(weights(subject.model) - start, expected)


def test_only_labelled_tokens_are_moved():
    subject, batch = module(GKD(ReverseKL()), tiny.model(0)), tiny.responses(4)
    subject.log_dict = lambda *arguments, **options: None
    moved = tiny.moved_positions(subject.model, lambda: subject.training_step(batch, 0))
    assert torch.equal(moved, tiny.predicts(batch["labels"] != -100))


def test_validation_is_a_mean_over_the_tokens_of_the_whole_set(tmp_path):
    method, teacher = GKD(JS(0.5), FusedLinear()), tiny.model(0)
    subject = module(method, teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (numbers,) = host(tmp_path).validate(subject, loader(7, 3, seed=3), verbose=False)
    expected = by_hand(method, subject.model, teacher, tiny.responses(7, seed=3)).item()
    assert numbers["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert numbers["val_divergence"] == pytest.approx(expected, rel=1e-5)


def test_it_learns_logs_saves_the_student_alone_and_resumes_exactly(tmp_path):
    class Losses(lightning.Callback):
        def __init__(self):
            self.values = []

        def on_train_batch_end(self, trainer, *_):
            self.values.append(trainer.callback_metrics["train_loss"].item())

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=5e-3)

    method, teacher = GKD(JS(0.5), FusedLinear()), tiny.model(0, width=48)
    losses, first = Losses(), module(method, teacher, adamw)
    fit(tmp_path, first, loader(8, 4), max_epochs=8, callbacks=[losses])
    assert losses.values[-1] < 0.8 * losses.values[0]

    half = module(method, teacher, adamw)
    trainer = fit(tmp_path, half, loader(8, 4), max_epochs=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]
    assert set(saved) == {f"model.{name}" for name in tiny.model(1).state_dict()}
    second = module(method, teacher, adamw)
    fit(tmp_path, second, loader(8, 4), max_epochs=8, ckpt_path=tmp_path / "half.ckpt")
    equal(weights(second.model), weights(first.model))


def test_the_teacher_neither_trains_nor_is_trained(tmp_path):
    teacher = tiny.model(0).train()
    before = weights(teacher)
    subject = module(GKD(KL()), teacher)
    fit(tmp_path, subject, loader(4, 4), max_epochs=1)
    assert subject.model.training and not teacher.training
    assert torch.equal(weights(teacher), before)
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("method", "teacher", "error", "message"),
    [
        (FDPO(), None, TypeError, r"consumes pairs; write method=GKD"),
        (GKD(), None, TypeError, r"write MethodModule\(teacher=model"),
        (SFT(), 24, TypeError, r"would ignore the teacher"),
        (GKD(lmbda=1.0), 24, ValueError, r"write lmbda=0"),
        (GKD(), 30, ValueError, r"the student has 24 tokens and the teacher 30"),
    ],
)
def test_what_it_cannot_do_it_refuses(method, teacher, error, message):
    model = None
    if teacher is not None:
        model = tiny.model(0)
        model.resize_token_embeddings(teacher)
    with pytest.raises(error, match=message):
        module(method, model)
