"""FusedAtoms: stored atoms of a teacher against a student's head."""

import pytest
import torch
from tests.worlds import close, each_divergence, each_other_object, gradient, random_rows

import fdiv
from fdiv import FusedAtoms, SampledLogits, TopK

ROWS, VOCAB, WIDTH = 11, 101, 5


def student():
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(n, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (ROWS, VOCAB)
    )


@each_divergence
def test_the_teachers_top_k_gives_what_top_k_of_the_full_logits_gives(divergence):
    log_p, (hidden, weight) = random_rows(ROWS, VOCAB), student()
    full = TopK(7).captured(divergence, log_p, (hidden @ weight.T).log_softmax(-1))
    top = log_p.topk(7)
    fused = FusedAtoms(TopK(7), chunk=4).captured(divergence, top.indices, top.values, hidden, weight)
    for ours, theirs in zip(fused, full, strict=True):
        close(ours, theirs)
    weights = torch.linspace(1, 2, ROWS, dtype=torch.float64)
    for row_weight in (torch.ones_like(weights), weights):
        ours, theirs = (gradient(row_weight @ value, hidden, weight) for value in (fused.value, full.value))
        close(ours, theirs)


@pytest.mark.parametrize("proposal", ["teacher", "mixture"])
def test_stored_draws_give_what_sampled_logits_gives(proposal):
    log_p, (hidden, weight) = random_rows(ROWS, VOCAB), student()
    log_q = (hidden @ weight.T).log_softmax(-1)
    of = SampledLogits(20, proposal)
    index, log_weight = of.draw(log_p, log_q)
    atoms = log_p.gather(-1, index), log_weight
    full = of.atoms(fdiv.JS(0.5), atoms[0], log_q.gather(-1, index), log_weight)
    fused = FusedAtoms(of, chunk=4)(fdiv.JS(0.5), index, *atoms, hidden, weight)
    close(fused, full)
    close(gradient(fused.sum(), hidden, weight), gradient(full.sum(), hidden, weight))


def test_a_place_without_atom_counts_for_nothing():
    log_p, (hidden, weight) = random_rows(ROWS, VOCAB), student()
    top = log_p.topk(7)
    padded = torch.nn.functional.pad(top.values, (0, 3), value=-torch.inf)
    index = torch.nn.functional.pad(top.indices, (0, 3))
    log_q = (hidden @ weight.T).log_softmax(-1).gather(-1, index)
    emptied = log_q.masked_fill(padded == -torch.inf, -torch.inf)
    expected = FusedAtoms(TopK(7))(fdiv.JS(0.5), top.indices, top.values, hidden, weight)
    close(TopK.atoms(fdiv.JS(0.5), padded, emptied).value, expected)
    fused = FusedAtoms(TopK(10))(fdiv.JS(0.5), index, padded, hidden, weight)
    close(fused, expected)
    close(gradient(fused.sum(), hidden, weight), gradient(expected.sum(), hidden, weight))


def test_masked_rows_are_skipped():
    log_p, (hidden, weight) = random_rows(ROWS, VOCAB), student()
    top, mask = log_p.topk(7), torch.arange(ROWS) % 3 != 0
    everything = FusedAtoms(TopK(7))(fdiv.KL(), top.indices, top.values, hidden, weight)
    rows = FusedAtoms(TopK(7))(fdiv.KL(), top.indices, top.values, hidden, weight, mask=mask)
    close(rows, everything * mask)
    close(gradient(rows.sum(), hidden, weight), gradient((everything * mask).sum(), hidden, weight))


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="FusedAtoms"):
        FusedAtoms(TopK(3)).check(other)


def test_what_cannot_have_been_stored_is_refused():
    log_p, (hidden, weight) = random_rows(ROWS, VOCAB), student()
    top = log_p.topk(3)
    for of in (TopK(3, "student"), TopK(3, "union"), SampledLogits(3, "student")):
        with pytest.raises(ValueError, match="stored atoms"):
            FusedAtoms(of)
    with pytest.raises(TypeError, match=r"FusedAtoms\(of\)"):
        FusedAtoms(fdiv.Exact())
    with pytest.raises(TypeError, match="reads index, log_p, log_weight, q_hidden, q_weight"):
        FusedAtoms(SampledLogits(3))(fdiv.KL(), top.indices, top.values, hidden, weight)
    with pytest.raises(ValueError, match=r"\[rows, k\] each"):
        FusedAtoms(TopK(3))(fdiv.KL(), top.indices[:, :2], top.values, hidden, weight)
    with pytest.raises(ValueError, match="constants"):
        FusedAtoms(TopK(3))(fdiv.KL(), top.indices, top.values.requires_grad_(), hidden, weight)
