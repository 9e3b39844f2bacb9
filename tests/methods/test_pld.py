"""PLD: the ranking, its surprise, the formula of its gradient, and the losses it contains."""

import math
from itertools import permutations

import pytest
import torch
from tests.worlds import close, gradient, random_rows

import fdiv
from fdiv import JS, KL, TV, Pearson, ReverseKL
from fdiv.methods._method import Method
from fdiv.methods.distill.pld import PLD, ranking

B, C = 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 1])


def scores(seed: int = 0) -> torch.Tensor:
    return random_rows(B, C, seed) + 2.0


def weights(p_logits, order):
    return p_logits.softmax(-1).gather(-1, order)


def test_the_worked_example():
    z, t = (torch.tensor([row], dtype=torch.float64) for row in ([1.0, 0.0, -1.0], [2.0, 0.0, -2.0]))
    labels = torch.tensor([1])
    order = ranking(t, labels)
    assert order.tolist() == [[1, 0, 2]]
    expected = torch.tensor([[0.117310428, 0.866813332, 0.015876240]], dtype=torch.float64)
    close(weights(t, order), expected, 1e-8)
    surprise = PLD().surprise(z.gather(-1, order))
    close(surprise, torch.tensor([[1.407605964, 0.126928011, 0.0]], dtype=torch.float64), 1e-9)
    loss = PLD()(logits=z, labels=labels, p_logits=t).loss
    close(loss, torch.tensor(0.275149750, dtype=torch.float64), 3e-9)


def test_the_ranking_is_the_label_and_then_the_teachers_order():
    order = ranking(scores(), LABELS)
    assert (order[:, 0] == LABELS).all()
    for row, classes in enumerate(order.tolist()):
        assert sorted(classes) == list(range(C))
        rest = [scores()[row, c] for c in classes[1:]]
        assert rest == sorted(rest, reverse=True)


def test_classes_that_the_teacher_ties_keep_their_order():
    t = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert ranking(t, torch.tensor([3, 2])).tolist() == [[3, 1, 2, 4, 0], [2, 0, 1, 3, 4]]
    large = torch.zeros(1, 1000)
    assert ranking(large, torch.tensor([7])).tolist()[0] == [7, *range(7), *range(8, 1000)]


def test_the_surprise_is_minus_the_log_probability_of_a_plackett_luce_ranking():
    """Unweighted, its sum over the ranking: exp(-sum) over all rankings is one."""
    z = scores(1)[:1, :4]
    total = 0.0
    for order in permutations(range(4)):
        total += math.exp(-PLD().surprise(z[:, list(order)]).sum().item())
    assert abs(total - 1) < 1e-12


def test_the_gradient_is_the_papers_formula():
    """w_pi(k) sigma_k(i) summed over the ranks k up to i's, less w_i."""
    logits, t = scores(1).requires_grad_(), scores()
    grad = gradient(PLD()(logits=logits, labels=LABELS, p_logits=t).loss * B, logits).view(B, C)
    order, w = ranking(t, LABELS), t.softmax(-1)
    expected = -w.clone()
    for b in range(B):
        for k in range(C):
            left = order[b, k:]
            expected[b, left] += w[b, order[b, k]] * logits[b, left].detach().softmax(-1)
    close(grad, expected, 1e-12)
    close(grad.sum(-1), torch.zeros(B, dtype=torch.float64))


@pytest.mark.parametrize("divergence", [KL(), JS(0.3), TV()], ids=repr)
def test_a_teacher_that_is_certain_of_the_label_leaves_the_divergence_from_the_label(divergence):
    """Under KL that is cross-entropy."""
    certain = 1e4 * torch.nn.functional.one_hot(LABELS, C).double()
    logits = scores(1).requires_grad_()
    loss = PLD(divergence)(logits=logits, labels=LABELS, p_logits=certain).loss
    one_hot = torch.nn.functional.one_hot(LABELS, C).double().log()
    expected = divergence(one_hot, logits.log_softmax(-1)).mean()
    close(loss, expected, 1e-12)
    close(gradient(loss, logits), gradient(expected, logits), 1e-11)
    if divergence == KL():
        close(loss, torch.nn.functional.cross_entropy(logits, LABELS), 1e-12)


def test_a_flat_teacher_is_listmle_over_the_classes():
    flat = PLD(temperature=1e9)
    logits, t = scores(1).requires_grad_(), scores()
    order = ranking(t, LABELS)
    z = logits.gather(-1, order)
    mle = torch.stack([z[:, k:].logsumexp(-1) - z[:, k] for k in range(C)], -1).sum(-1)
    close(flat(logits=logits, labels=LABELS, p_logits=t).loss, mle.mean() / C, 1e-8)


def test_the_last_choice_is_no_choice_and_costs_nothing():
    surprise = PLD().surprise(scores(1))
    assert (surprise[:, -1] == 0).all() and (surprise[:, :-1] > 0).all()


def test_it_is_convex_in_the_logits_and_blind_to_a_common_shift():
    t, labels = scores(), LABELS

    def loss(z):
        return PLD()(logits=z, labels=labels, p_logits=t).loss

    for seed in range(1, 20):
        a, b = scores(seed), 3 * scores(seed + 50)
        assert loss((a + b) / 2) <= (loss(a) + loss(b)) / 2 + 1e-12
    close(loss(scores(1) + 5.0), loss(scores(1)), 1e-12)
    z, step = scores(1)[:1].requires_grad_(), 1e-5 * torch.eye(C, dtype=torch.float64)
    t, labels = t[:1], labels[:1]
    slopes = [[gradient(loss(z + side * e), z) for side in (1, -1)] for e in step]
    hessian = torch.stack([(up - down) / 2e-5 for up, down in slopes])
    assert torch.linalg.eigvalsh((hessian + hessian.T) / 2).min() > -1e-9


def test_a_teacher_that_is_wrong_about_the_label_takes_its_weight_away():
    """There is no cross-entropy beside it: a student that follows hardly pays for the label."""
    t = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.float64)
    out = PLD()(logits=t, labels=torch.tensor([1]), p_logits=t)
    close(out.metrics["label_weight"], t.softmax(-1)[0, 1])
    close(out.metrics["label_surprise"], torch.nn.functional.cross_entropy(t, torch.tensor([1])))
    assert out.metrics["label_surprise"] > 9 and out.loss < 0.01


def test_the_temperature_is_the_teachers_alone():
    t, z = scores(), scores(1)
    close(
        PLD(temperature=4.0)(logits=z, labels=LABELS, p_logits=t).loss,
        PLD()(logits=z, labels=LABELS, p_logits=t / 4).loss,
    )


def test_micro_batches_add_up_and_an_empty_one_has_loss_zero_and_a_graph():
    logits = scores(1).requires_grad_()
    whole = PLD()(logits=logits, labels=LABELS, p_logits=scores()).loss
    cuts = (slice(0, 1), slice(1, 6), slice(6, 6))
    losses = [
        PLD()(logits=logits[c], labels=LABELS[c], p_logits=scores()[c], count=float(B)).loss for c in cuts
    ]
    close(sum(losses), whole, 1e-13)
    close(gradient(sum(losses), logits), gradient(whole, logits), 1e-12)
    assert losses[2] == 0 and not gradient(losses[2], logits).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_stay_finite_and_exact(dtype):
    z = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]], dtype=dtype, requires_grad=True)
    t = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], dtype=dtype)
    labels = torch.tensor([0, 0])
    surprise = PLD().surprise(z)
    assert surprise[0].tolist() == [0, 0, 0] and surprise[1].tolist() == [2e4, 1e4, 0]
    loss = PLD()(logits=z, labels=labels, p_logits=t).loss
    close(loss, torch.tensor(5e3, dtype=dtype), 1e-6)
    grad = gradient(loss * 2, z).view(2, 3)
    expected = torch.tensor([[0.0, 0.0, 0.0], [-1 / 3, -1 / 3, 2 / 3]], dtype=dtype)
    close(grad, expected, 1e-3 if dtype == torch.float32 else 1e-11)  # differences of numbers of 1e4


def test_a_divergence_that_overflows_at_an_impossible_choice_is_refused():
    t = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    z = torch.tensor([[0.0, 0.0, 0.0], [-1e4, 0.0, 1e4]])
    with pytest.raises(ValueError, match=r"Pearson\(\) is infinite at 1 of 2 rows.*JS"):
        PLD(Pearson())(logits=z, labels=torch.tensor([0, 0]), p_logits=t)


def test_many_classes_lose_no_digits_in_single_precision():
    z, t = (10 * random_rows(4, 1000, seed).exp() + random_rows(4, 1000, seed) for seed in (0, 1))
    labels = torch.tensor([3, 500, 999, 0])
    exact = PLD()(logits=z, labels=labels, p_logits=t).loss
    single = PLD()(logits=z.float(), labels=labels, p_logits=t.float()).loss
    assert (single.double() / exact - 1).abs() < 1e-5


def test_classes_that_the_teacher_excludes_are_ranked_last_and_cost_nothing():
    t, z = scores(), scores(1).requires_grad_()
    t[:, 0] = -math.inf
    out = PLD()(logits=z, labels=LABELS, p_logits=t)
    assert (ranking(t, LABELS)[1:, -1] == 0).all()
    assert out.loss.isfinite() and gradient(out.loss, z).isfinite().all()
    t.requires_grad_()
    PLD()(logits=z, labels=LABELS, p_logits=t).loss.backward()
    assert t.grad is None


def test_wrong_settings_are_refused_with_what_to_write_instead():
    with pytest.raises(ValueError, match="temperature divides"):
        PLD(temperature=0.0)
    with pytest.raises(TypeError, match=r"write KL\(\), or a divergence with a finite f\(0\)"):
        PLD(ReverseKL())
    with pytest.raises(TypeError, match="f-divergence"):
        PLD(fdiv.Renyi(2.0))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = PLD(Pearson(), temperature=4.0)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.pld"]) == method
    assert isinstance(method, Method) and method.consumes == "examples"
