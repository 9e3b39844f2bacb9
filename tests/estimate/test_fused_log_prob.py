"""FusedLogProb: selected log-probabilities and entropies, without the full logits."""

import pytest
import torch
from tests.worlds import close, gradient

import fdiv
from fdiv import FusedLogProb

ROWS, VOCAB, WIDTH = 11, 101, 5


def problem(rows=ROWS, dtype=torch.float64):
    """hidden, weight, index"""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (rows, VOCAB))
    index = torch.randint(VOCAB, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), index


def exact(logits, index):
    log_density = logits.log_softmax(-1)
    entropy = -(log_density.exp() * log_density.clamp(min=-1e9)).sum(-1)
    return log_density.gather(-1, index.unsqueeze(-1)).squeeze(-1), entropy


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("of_log_prob", "of_entropy"), [(1, 0), (0, 1), (-2, 0.3)])
def test_values_and_gradients_equal_those_of_the_full_logits(of_log_prob, of_entropy, compiled):
    hidden, weight, index = problem()
    upstream = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    full = exact(hidden @ weight.T, index)
    fused = FusedLogProb(chunk=4, compiled=compiled)(hidden, weight, index)
    for ours, theirs in zip(fused, full, strict=True):
        close(ours, theirs)
    losses = (of_log_prob * (upstream @ a) + of_entropy * (upstream**2 @ b) for a, b in (fused, full))
    ours, theirs = (gradient(loss, hidden, weight) for loss in losses)
    close(ours, theirs)


def test_the_head_is_that_of_fused_linear():
    hidden, weight, index = problem()
    bias = torch.randn(VOCAB, dtype=torch.float64).requires_grad_()
    head = fdiv.Head(weight, bias, scale=0.7, softcap=3.0, temperature=1.3)
    full = exact(3 * torch.tanh(0.7 * (hidden @ weight.T + bias) / 3) / 1.3, index)
    fused = FusedLogProb(chunk=4)(hidden, head, index)
    ours, theirs = (gradient((a - 0.1 * b).sum(), hidden, weight, bias) for a, b in (fused, full))
    close(ours, theirs)


def test_a_bfloat16_model_gives_float32_and_the_gradient_of_float64_on_the_same_values():
    hidden, weight, index = problem(dtype=torch.bfloat16)
    fused = FusedLogProb()(hidden, weight, index)
    assert fused.log_prob.dtype == torch.float32
    doubles = tuple(t.detach().double().requires_grad_() for t in (hidden, weight))
    full = exact(doubles[0] @ doubles[1].T, index)
    close(fused.log_prob.double(), full[0], 1e-6)
    actual = gradient(fused.log_prob.sum(), hidden, weight).double()
    expected = gradient(full[0].sum(), *doubles)
    assert (actual - expected).norm() < 2**-8 * expected.norm()


def test_columns_of_minus_infinity_have_no_part_in_it():
    hidden, weight, index = problem()
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[-10:] = -torch.inf
    index = index.clamp(max=VOCAB - 11)
    fused = FusedLogProb()(hidden, fdiv.Head(weight, bias), index)
    full = exact(hidden @ weight[:-10].T, index)
    for ours, theirs in zip(fused, full, strict=True):
        close(ours, theirs)
    close(gradient(sum(fused).sum(), hidden, weight), gradient(sum(full).sum(), hidden, weight))


def test_masked_rows_are_skipped_and_their_index_is_not_read():
    hidden, weight, index = problem()
    mask = torch.arange(ROWS) % 3 != 0
    full = exact(hidden[mask] @ weight.T, index[mask])
    fused = FusedLogProb()(hidden, weight, torch.where(mask, index, -100), mask=mask)
    close(fused.log_prob[mask], full[0])
    assert not fused.log_prob[~mask].any() and not fused.entropy[~mask].any()
    close(gradient(fused.log_prob.sum(), hidden, weight), gradient(full[0].sum(), hidden, weight))


def test_no_row_gives_nothing_with_its_graph():
    hidden, weight, index = problem(rows=0)
    log_prob, entropy = FusedLogProb()(hidden, weight, index)
    assert log_prob.shape == entropy.shape == (0,)
    assert not gradient(log_prob.sum(), hidden, weight).any()


def test_wrong_shapes_are_refused():
    hidden, weight, index = problem()
    with pytest.raises(ValueError, match="one token a row"):
        FusedLogProb()(hidden, weight, index[:3])
    with pytest.raises(ValueError, match="one token a row"):
        FusedLogProb()(hidden, weight, index.float())
    with pytest.raises(ValueError, match="width of the head"):
        FusedLogProb()(hidden[:, :2], weight, index)
    with pytest.raises(ValueError, match="rows >= 1"):
        FusedLogProb(chunk=0)


def clipped_gain(log_prob, entropy, old, advantage):
    ratio = (log_prob - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) - 0.01 * entropy


@pytest.mark.parametrize("weights", [torch.ones(ROWS), torch.linspace(1, 2, ROWS)], ids=["sum", "weighted"])
def test_a_loss_of_rows_has_the_gradient_of_its_formula(weights):
    hidden, weight, index = problem()
    log_prob, entropy = exact(hidden @ weight.T, index)
    old, advantage = log_prob.detach() + 0.1, torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    full = clipped_gain(log_prob, entropy, old, advantage)
    fused = FusedLogProb(chunk=4).loss(clipped_gain, hidden, weight, index, old, advantage)
    close(fused, full)
    ours, theirs = (gradient(weights.double() @ loss, hidden, weight) for loss in (fused, full))
    close(ours, theirs)


def test_a_loss_of_rows_may_ignore_the_entropy_and_skips_masked_rows():
    hidden, weight, index = problem()
    mask = torch.arange(ROWS) % 3 != 0
    full = -exact(hidden[mask] @ weight.T, index[mask])[0] * index[mask]
    fused = FusedLogProb().loss(lambda log_prob, _, k: -log_prob * k, hidden, weight, index, index, mask=mask)
    close(fused[mask], full)
    assert not fused[~mask].any()
    close(gradient(fused.sum(), hidden, weight), gradient(full.sum(), hidden, weight))
    with pytest.raises(ValueError, match="gets no gradient"):
        FusedLogProb().loss(clipped_gain, hidden, weight, index, hidden[:, 0], hidden[:, 0])
