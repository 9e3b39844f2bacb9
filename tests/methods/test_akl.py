"""AKL: the worked example, the weights by hand, and the two divergences they weigh."""

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import GKD, KL, Exact, FusedLinear, Offline, ReverseKL, TopK
from fdiv.methods._method import Method
from fdiv.methods.distill.akl import AKL, head_share

P = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
Q = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)


def test_the_worked_example():
    """The head is the first word alone; the gaps are .4 and .4."""
    out = AKL()(log_p=P.log(), log_q=Q.log())
    assert out.loss.item() == pytest.approx(0.541610040, abs=1e-9)
    assert out.metrics["head_share"].item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("mass", "head"), [(0.0, [1]), (0.2, [1]), (0.5, [1, 3]), (0.75, [1, 3, 0]), (0.9, [1, 3, 0, 4])]
)
def test_the_head_is_the_likeliest_words_up_to_a_mass_and_always_the_likeliest(mass, head):
    p = torch.tensor([0.2, 0.25, 0.1, 0.24, 0.15, 0.06], dtype=torch.float64)
    q = random_rows(1, 6).exp().squeeze()
    gap = (p - q).abs()
    close(head_share(p.log(), q.log(), mass), gap[head].sum() / gap.sum())


def test_the_order_of_the_vocabulary_does_not_matter():
    """A mask of sorted places, laid over unsorted gaps, would."""
    log_p, log_q = random_rows(8, 20), random_rows(8, 20, 1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    close(head_share(log_p, log_q, 0.5), head_share(log_p[:, order], log_q[:, order], 0.5))


def test_the_loss_is_the_weighted_pair_and_the_weights_carry_no_gradient():
    log_p, logits = random_rows(5, 7), random_rows(5, 7, 1).requires_grad_()
    log_q = logits.log_softmax(-1)
    share = head_share(log_p, log_q, 0.5)
    assert not share.requires_grad and share.max() > 2 * share.min()
    expected = (share * KL()(log_p, log_q) + (1 - share) * ReverseKL()(log_p, log_q)).mean()
    loss = AKL()(log_p=log_p, log_q=log_q).loss
    close(loss, expected)
    close(gradient(loss, logits), gradient(expected, logits))


def test_a_gap_in_the_tail_alone_leaves_the_reverse_divergence_alone():
    rows = ([[0.5, 0.25, 0.25]], [[0.5, 0.125, 0.375]])
    log_p, log_q = (torch.tensor(row, dtype=torch.float64).log() for row in rows)
    assert head_share(log_p, log_q, 0.2) == 0
    close(AKL(head=0.2)(log_p=log_p, log_q=log_q).loss, GKD(ReverseKL())(log_p=log_p, log_q=log_q).loss)


@each_divergence
def test_any_f_divergence_and_its_reverse_take_the_place_of_the_two_kls(divergence):
    log_p, log_q = random_rows(5, 7), random_rows(5, 7, 1)
    share = head_share(log_p, log_q, 0.5)
    expected = (share * divergence(log_p, log_q) + (1 - share) * divergence(log_q, log_p)).mean()
    close(AKL(divergence)(log_p=log_p, log_q=log_q).loss, expected)


def test_a_student_equal_to_its_teacher_has_weight_one_half_and_nothing_to_learn():
    log_p = random_rows(5, 7)
    logits = log_p.clone().requires_grad_()
    assert torch.equal(head_share(log_p, log_p, 0.5), torch.full((5,), 0.5, dtype=torch.float64))
    loss = AKL()(log_p=log_p, log_q=logits.log_softmax(-1)).loss
    assert loss.abs() < 1e-14 and gradient(loss, logits).abs().max() < 1e-14


def test_words_that_neither_model_allows_change_nothing():
    log_p, log_q = random_rows(4, 5), random_rows(4, 5, 1).requires_grad_()
    loss = AKL()(log_p=log_p, log_q=log_q).loss
    wide = [torch.nn.functional.pad(t, (0, 2), value=-torch.inf) for t in (log_p, log_q)]
    padded = AKL()(log_p=wide[0], log_q=wide[1]).loss
    close(padded, loss)
    close(gradient(padded, log_q), gradient(loss, log_q))


def test_micro_batches_add_up_and_an_empty_one_has_loss_zero_and_a_graph():
    log_p, logits = random_rows(6, 7), random_rows(6, 7, 1).requires_grad_()
    whole = AKL()(log_p=log_p, log_q=logits.log_softmax(-1)).loss
    parts = [
        AKL()(log_p=log_p[part], log_q=logits[part].log_softmax(-1), count=6).loss
        for part in (slice(0, 1), slice(1, 6), slice(6, 6))
    ]
    close(sum(parts), whole, 1e-13)
    close(gradient(sum(parts), logits), gradient(whole, logits), 1e-12)
    assert parts[2] == 0 and not gradient(parts[2], logits).any()


def test_wrong_settings_are_refused_with_what_to_write_instead():
    for sampler in ("data", Offline):
        with pytest.raises(TypeError, match=r"write Offline\(\)"):
            AKL(sampler=sampler)
    for head in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"write GKD\(\)"):
            AKL(head=head)
    with pytest.raises(TypeError, match=r"write Exact\(\)"):
        AKL(estimator=FusedLinear())
    with pytest.raises(TypeError, match="f-divergence"):
        AKL(fdiv.AlphaBeta(0.2, 0.7))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = AKL(fdiv.Alpha(0.3), TopK(3), head=0.8)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.akl"]) == method
    assert isinstance(method, Method) and AKL().estimator == Exact()
    close(AKL(estimator=TopK(7))(log_p=P.log(), log_q=Q.log()).loss, AKL()(log_p=P.log(), log_q=Q.log()).loss)
