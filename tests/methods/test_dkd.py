"""DKD: what the teacher says of the label, and of the rest; together they are the divergence itself."""

import math

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import JS, KL, Alpha, ReverseKL
from fdiv.methods._method import Method
from fdiv.methods.distill.dkd import DKD, decoupled

B, C = 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 1])
P = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
Q = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
ALONE = DKD(alpha=1.0, beta=0.0, temperature=1.0, warmup=0.0, cross_entropy=0.0)


def scores(seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    """Logits with an offset, which no softmax sees."""
    return random_rows(B, C, seed, scale) + 3.0


def parts(divergence, p, q, labels=LABELS):
    return DKD(divergence, temperature=1.0).parts(p, q, labels)


def test_the_worked_example():
    target, others = parts(KL(), P, Q, torch.tensor([0]))
    close(target, torch.tensor([0.381908501], dtype=torch.float64), 3e-9)
    close(others, torch.tensor([0.290787702], dtype=torch.float64), 3e-9)
    close(target + 0.4 * others, torch.tensor([0.498223582], dtype=torch.float64), 3e-9)


def test_logits_are_parted_into_the_label_and_what_is_left_without_it():
    binary, others = decoupled(scores(), LABELS)
    p = scores().softmax(-1)
    label = p.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    close(binary.exp(), torch.stack([label, 1 - label], -1))
    for row, y in enumerate(LABELS.tolist()):
        rest = torch.cat([p[row, :y], p[row, y + 1 :]])
        close(others[row].exp(), rest / rest.sum())


def test_leaving_the_label_out_is_subtracting_a_thousand_from_its_logit_where_that_works():
    place = torch.nn.functional.one_hot(LABELS, C)
    p, log_q = (scores() - 1000 * place).softmax(-1), (scores(1) - 1000 * place).log_softmax(-1)
    expected = torch.where(place == 0, p * (p.log() - log_q), 0.0).sum(-1)
    close(parts(KL(), scores(), scores(1))[1], expected)


def test_kl_is_the_targets_part_and_the_others_times_the_mass_they_have():
    log_p, log_q = scores().log_softmax(-1), scores(1).log_softmax(-1)
    not_p, not_q = (1 - t.exp().gather(-1, LABELS.unsqueeze(-1)).squeeze(-1) for t in (log_p, log_q))
    for divergence, mass in ((KL(), not_p), (ReverseKL(), not_q)):
        target, others = parts(divergence, scores(), scores(1))
        close(target + mass * others, divergence(log_p, log_q), 1e-13)


@pytest.mark.parametrize("alpha", [-0.5, 0.3, 0.5, 1.7])
def test_powers_too_have_a_factor_that_joins_the_parts(alpha):
    log_p, log_q = scores().log_softmax(-1), scores(1).log_softmax(-1)
    not_p, not_q = (1 - t.exp().gather(-1, LABELS.unsqueeze(-1)).squeeze(-1) for t in (log_p, log_q))
    target, others = parts(Alpha(alpha), scores(), scores(1))
    close(target + not_p**alpha * not_q ** (1 - alpha) * others, Alpha(alpha)(log_p, log_q), 1e-12)


def test_js_has_no_factor_of_the_two_masses_which_is_why_none_is_claimed():
    """Two teachers with the same p_y, the same student: the factor would have to be the same."""
    q = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    factors = []
    for others in ([0.39, 0.01], [0.01, 0.39]):
        p = torch.tensor([[0.6, *others]], dtype=torch.float64).log()
        target, rest = parts(JS(0.5), p, q, torch.tensor([0]))
        factors.append((JS(0.5)(p, q) - target) / rest)
    assert (factors[0] - factors[1]).abs() > 1e-3


@each_divergence
def test_both_parts_are_divergences_and_the_targets_is_the_smaller_than_the_whole(divergence):
    target, others = parts(divergence, scores(), scores(1))
    assert (target >= 0).all() and (others >= 0).all()
    whole = divergence(scores().log_softmax(-1), scores(1).log_softmax(-1))
    assert (target <= whole + 1e-12).all()  # data processing: the binary part forgets the other classes
    same = parts(divergence, scores(), scores() + 7.0)
    assert max(part.abs().max() for part in same) < 1e-13


@each_divergence
def test_the_parts_are_of_the_tempered_softmax_and_scaled_by_its_square(divergence):
    logits = scores(1).requires_grad_()
    method = DKD(divergence, alpha=0.7, beta=3.0, temperature=2.5, warmup=0.0)
    out = method(logits=logits, labels=LABELS, p_logits=scores())
    pairs = [decoupled(t / 2.5, LABELS) for t in (scores(), logits)]
    target, others = (divergence(p, q) for p, q in zip(*pairs, strict=True))
    labelled = torch.nn.functional.cross_entropy(logits, LABELS)
    expected = labelled + 2.5**2 * (0.7 * target + 3 * others).mean()
    close(out.loss, expected)
    close(gradient(out.loss, logits), gradient(expected, logits), 1e-9)
    means = {"cross_entropy": labelled, "target": target.mean(), "others": others.mean()}
    for name, mean in means.items():
        close(out.metrics[name], mean.detach())


def test_the_gradient_of_the_target_part_is_that_of_logistic_regression():
    """d TCKD / d z_y = q_y - p_y, and the others share the opposite as they share their mass."""
    logits = scores(1).requires_grad_()
    loss = ALONE(logits=logits, labels=LABELS, p_logits=scores()).loss * B
    p, q = scores().softmax(-1), logits.detach().softmax(-1)
    place = torch.nn.functional.one_hot(LABELS, C).double()
    p_y, q_y = ((t * place).sum(-1, keepdim=True) for t in (p, q))
    expected = (q_y - p_y) * (place - (1 - place) * q / (1 - q_y))
    close(gradient(loss, logits).view(B, C), expected, 1e-12)


def test_the_part_of_the_others_does_not_touch_the_labels_logit():
    logits = scores(1).requires_grad_()
    method = DKD(alpha=0.0, beta=1.0, temperature=1.0, warmup=0.0, cross_entropy=0.0)
    grad = gradient(method(logits=logits, labels=LABELS, p_logits=scores()).loss, logits).view(B, C)
    assert (grad.gather(-1, LABELS.unsqueeze(-1)) == 0).all()
    close(grad.sum(-1), torch.zeros(B, dtype=torch.float64))


def test_the_teachers_terms_grow_over_the_warm_up_and_then_stay():
    given = {"logits": scores(1), "labels": LABELS, "p_logits": scores()}
    method = DKD(warmup=0.25)
    at = [method(**given, progress=progress).loss for progress in (0.0, 0.125, 0.25, 0.9)]
    labelled = torch.nn.functional.cross_entropy(scores(1), LABELS)
    close(at[0], labelled)
    close(at[1] - labelled, (at[3] - labelled) / 2)
    assert at[2] == at[3] == method(**given).loss


def test_micro_batches_add_up_and_an_empty_one_has_loss_zero_and_a_graph():
    logits = scores(1).requires_grad_()
    whole = DKD()(logits=logits, labels=LABELS, p_logits=scores()).loss
    cuts = (slice(0, 1), slice(1, 6), slice(6, 6))
    losses = [
        DKD()(logits=logits[c], labels=LABELS[c], p_logits=scores()[c], count=float(B)).loss for c in cuts
    ]
    close(sum(losses), whole, 1e-13)
    close(gradient(sum(losses), logits), gradient(whole, logits), 1e-12)
    assert losses[2] == 0 and not gradient(losses[2], logits).any()


def test_the_teacher_gets_no_gradient_and_half_precision_is_computed_in_single():
    logits, p_logits = scores(1).requires_grad_(), scores().requires_grad_()
    DKD()(logits=logits, labels=LABELS, p_logits=p_logits).loss.backward()
    assert p_logits.grad is None
    half = DKD()(logits=scores(1).bfloat16(), labels=LABELS, p_logits=scores().bfloat16())
    single = DKD()(logits=scores(1).bfloat16().float(), labels=LABELS, p_logits=scores().bfloat16().float())
    assert half.loss == single.loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_stay_finite_and_the_others_keep_their_digits(dtype):
    """Both models are sure of the label; what is said of the others is small numbers beside a large one."""
    p = torch.tensor([[1e4, 1.0, 0.0, -1.0], [-1e4, 1.0, 0.0, -1.0]], dtype=dtype)
    logits = torch.tensor([[1e4, -1.0, 0.0, 1.0], [1e4, -1.0, 0.0, 1.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 0])
    _, others = parts(KL(), p, logits, labels)
    expected = KL()(*(t[:, 1:].detach().double().log_softmax(-1) for t in (p, logits)))
    close(others.detach().double(), expected, 1e-6 if dtype == torch.float32 else 1e-13)
    out = DKD()(logits=logits, labels=labels, p_logits=p)
    assert out.loss.isfinite() and gradient(out.loss, logits).isfinite().all()


def test_a_teacher_that_excludes_classes_does_no_harm():
    p = scores()
    p[:, 0] = -math.inf  # the label of the first example among them
    p[1, :] = -math.inf
    p[1, 1] = 0.0  # nothing but the label: nothing is said of the others
    logits = scores(1).requires_grad_()
    target, others = parts(KL(), p, logits, LABELS)
    assert target.isfinite().all() and others.isfinite().all() and others[1] == 0
    assert gradient((target + others).sum(), logits).isfinite().all()
    with pytest.raises(ValueError, match=r"ReverseKL\(\) is infinite at 2 of 6 rows.*JS"):
        parts(ReverseKL(), p, logits, LABELS)


def test_wrong_settings_are_refused_with_what_to_write_instead():
    for setting in ({"alpha": -1.0}, {"beta": math.inf}, {"cross_entropy": math.nan}):
        with pytest.raises(ValueError, match="weight >= 0"):
            DKD(**setting)
    with pytest.raises(ValueError, match=r"write SFT\(\)"):
        DKD(alpha=0.0, beta=0.0)
    with pytest.raises(ValueError, match="temperature divides"):
        DKD(temperature=0.0)
    with pytest.raises(ValueError, match="fraction of the training"):
        DKD(warmup=20)
    with pytest.raises(TypeError, match="f-divergence"):
        DKD(fdiv.Renyi(2.0))
    with pytest.raises(ValueError, match="two classes"):
        DKD()(logits=torch.zeros(2, 1), labels=torch.zeros(2, dtype=torch.long), p_logits=torch.zeros(2, 1))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = DKD(Alpha(0.3), beta=2.0, warmup=0.0)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.dkd"]) == method
    assert isinstance(method, Method) and method.consumes == "examples"
