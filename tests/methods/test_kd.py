"""KD: labels and tempered teacher, on one scale at every temperature."""

import pytest
import torch
from tests.worlds import close, each_divergence, each_smooth_divergence, gradient, random_rows

import fdiv
from fdiv import GKD, Exact, FusedLinear, MonteCarlo, TopK
from fdiv.methods._method import Method
from fdiv.methods.distill.kd import KD

ROWS, VOCAB = 6, 7
MASK = torch.tensor([True, False, True, True, False, True])
LABELS = torch.tensor([2, 0, 6, 6, 1, 3])
P, Q = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.6, 0.3, 0.1], [0.2, 0.3, 0.5]))


def logits(seed=0):
    """The teacher's and the student's, [rows, vocab]."""
    return random_rows(ROWS, VOCAB, seed), random_rows(ROWS, VOCAB, seed + 1).requires_grad_()


def evidence(teacher, student, temperature, rows=slice(None)):
    """What a trainer hands over: both models tempered, the label's log-probability not."""
    return {
        "log_p": (teacher[rows] / temperature).log_softmax(-1),
        "log_q": (student[rows] / temperature).log_softmax(-1),
        "log_q_label": student[rows].log_softmax(-1).gather(-1, LABELS[rows].unsqueeze(-1)).squeeze(-1),
    }


@each_divergence
def test_at_temperature_one_and_without_labels_it_is_gkd(divergence):
    teacher, student = logits()
    tensors = evidence(teacher, student, 1.0)
    loss = KD(divergence, temperature=1.0, weight=1.0)(**tensors, mask=MASK).loss
    expected = GKD(divergence)(log_p=tensors["log_p"], log_q=tensors["log_q"], mask=MASK).loss
    assert loss == expected
    assert torch.equal(gradient(loss, student), gradient(expected, student))


def test_the_worked_example_at_temperatures_one_and_two():
    def loss(temperature, weight):
        tensors = {"log_p": (P / temperature).log_softmax(-1), "log_q": (Q / temperature).log_softmax(-1)}
        return KD(temperature=temperature, weight=weight)(**tensors, log_q_label=Q[:, 0]).loss

    close(loss(1.0, 1.0), torch.tensor(0.498223582, dtype=torch.float64), 1e-8)
    # At 2 the masses are the square roots, normalised.
    p, q = P.exp().sqrt() / P.exp().sqrt().sum(), Q.exp().sqrt() / Q.exp().sqrt().sum()
    soft, hard = (p * (p / q).log()).sum(), -torch.tensor(0.2, dtype=torch.float64).log()
    close(loss(2.0, 0.3), 0.7 * hard + 0.3 * 4 * soft, 1e-12)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0, 4.0])
def test_the_gradient_is_that_of_cross_entropy_and_tau_times_the_tempered_difference(temperature):
    teacher, student = logits()
    loss = KD(temperature=temperature, weight=0.3)(**evidence(teacher, student, temperature)).loss
    q, one_hot = student.softmax(-1), torch.nn.functional.one_hot(LABELS, VOCAB)
    tempered = (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    close(
        gradient(loss, student),
        ((0.7 * (q - one_hot) + 0.3 * temperature * tempered) / ROWS).detach().flatten(),
        1e-12,
    )


def centred_difference():
    teacher, student = logits()
    difference = (student - teacher).detach()
    return difference - difference.mean(-1, keepdim=True)


def test_at_a_high_temperature_the_gradient_is_that_of_matching_centred_logits():
    teacher, student = logits()
    loss = KD(temperature=1e4, weight=1.0)(**evidence(teacher, student, 1e4)).loss
    close(gradient(loss, student), centred_difference().flatten() / (VOCAB * ROWS), 1e-3)


@each_smooth_divergence
def test_tau_squared_is_the_scale_of_every_smooth_divergence(divergence):
    teacher, student = logits()
    loss = KD(divergence, temperature=400.0, weight=1.0)(**evidence(teacher, student, 400.0)).loss
    limit = divergence.curvature_at_one / (2 * VOCAB) * centred_difference().square().sum(-1).mean()
    close(loss.detach(), limit, 0.02)


def test_under_tv_the_loss_grows_with_tau():
    teacher, student = logits()
    at = [KD(fdiv.TV(), temperature=t, weight=1.0)(**evidence(teacher, student, t)).loss for t in (1e3, 2e3)]
    close(at[0].detach(), 1e3 / (2 * VOCAB) * centred_difference().abs().sum(-1).mean(), 1e-2)
    close(at[1], 2 * at[0], 1e-2)


def test_without_labels_it_is_zero_only_where_the_logits_differ_by_a_constant():
    teacher, _ = logits()
    for shift, same in ((5.0, True), (torch.arange(7), False)):
        loss = KD(weight=1.0)(**evidence(teacher, teacher + shift, 2.0)).loss
        assert (loss.abs() < 1e-14) == same


@each_divergence
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(divergence):
    teacher, student = logits()
    method = KD(divergence)
    whole = method(**evidence(teacher, student, 2.0), mask=MASK)
    parts = [
        method(**evidence(teacher, student, 2.0, rows), mask=MASK[rows], count=MASK.sum())
        for rows in (slice(0, 2), slice(2, 6))
    ]
    loss = sum(part.loss for part in parts)
    close(loss, whole.loss, 1e-12)
    close(gradient(loss, student), gradient(whole.loss, student), 1e-12)
    for name, number in whole.metrics.items():  # one token of four, and three
        close(parts[0].metrics[name] / 4 + 3 * parts[1].metrics[name] / 4, number, 1e-12)


@pytest.mark.parametrize("rubbish", [torch.inf, torch.nan])
def test_masked_rows_do_no_harm(rubbish):
    teacher, student = logits()
    tensors = {name: t.detach().clone() for name, t in evidence(teacher, student, 2.0).items()}
    kept = KD()(**{name: t[MASK] for name, t in tensors.items()}).loss
    for t in tensors.values():
        t[~MASK] = rubbish
    tensors["log_q"].requires_grad_(), tensors["log_q_label"].requires_grad_()
    loss = KD()(**tensors, mask=MASK).loss
    close(loss.detach(), kept, 1e-14)
    assert gradient(loss, tensors["log_q"], tensors["log_q_label"]).isfinite().all()


@pytest.mark.parametrize("mask", [torch.zeros(ROWS, dtype=torch.bool), None])
def test_no_token_at_all_has_loss_zero_and_a_graph(mask):
    teacher, student = logits()
    rows = slice(None) if mask is not None else slice(0, 0)
    loss = KD()(**evidence(teacher, student, 2.0, rows), mask=mask).loss
    assert loss == 0 and not gradient(loss, student).any()


@each_divergence
def test_heads_and_logits_train_the_same_objective(divergence):
    shapes = {"p_hidden": (ROWS, 4), "p_weight": (VOCAB, 4), "q_hidden": (ROWS, 3), "q_weight": (VOCAB, 3)}
    heads = {name: random_rows(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    student = [heads["q_hidden"].requires_grad_(), heads["q_weight"].requires_grad_()]
    p, q = (heads[f"{who}_hidden"] @ heads[f"{who}_weight"].T for who in "pq")
    plain = KD(divergence)(**evidence(p, q, 2.0)).loss
    tempered = heads | {name: heads[name] / 2 for name in ("p_hidden", "q_hidden")}
    label = evidence(p, q, 2.0)["log_q_label"]
    fused = KD(divergence, FusedLinear(chunk=2))(**tempered, log_q_label=label).loss
    close(fused, plain)
    close(gradient(fused, *student), gradient(plain, *student))


def test_what_it_cannot_train_is_refused_when_it_is_built():
    with pytest.raises(TypeError, match=r"write Exact\(\)"):
        KD(estimator=MonteCarlo())
    with pytest.raises(TypeError, match="FusedLinear"):
        KD(fdiv.Renyi(0.5), FusedLinear())
    with pytest.raises(ValueError, match="temperature"):
        KD(temperature=0.0)
    for weight in (-0.1, 0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"write SFT\(\)"):
            KD(weight=weight)


def test_nothing_given_is_ignored_and_nothing_missing_is_guessed():
    tensors = evidence(*logits(), 2.0)
    with pytest.raises(TypeError, match="got log_p, log_q, labels"):
        KD()(**tensors, labels=LABELS)
    with pytest.raises(TypeError, match="log_q_label"):
        KD()(log_p=tensors["log_p"], log_q=tensors["log_q"])


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = KD(fdiv.JS(0.1), TopK(3), temperature=4.0, weight=0.9)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.kd"]) == method
    assert isinstance(method, Method) and method.reads == ("log_q_label",)
    assert KD() == KD(fdiv.KL(), Exact(), 2.0, 0.5)
    assert method.sampler == fdiv.Offline()
