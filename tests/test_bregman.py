"""Bregman divergences from their generator alone, with empty atoms and peaked rows."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fdiv


@dataclass(frozen=True)
class Entropic(fdiv.BregmanDivergence):
    def generator(self, log_x: Tensor) -> Tensor:
        return log_x.exp() * log_x


@dataclass(frozen=True)
class Euclidean(fdiv.BregmanDivergence):
    def generator(self, log_x: Tensor) -> Tensor:
        return log_x.exp().square()


@dataclass(frozen=True)
class ItakuraSaito(fdiv.BregmanDivergence):
    def generator(self, log_x: Tensor) -> Tensor:
        return -log_x


MEMBERS = [Entropic(), Euclidean(), ItakuraSaito()]


def closed_form(divergence, p: Tensor, q: Tensor) -> Tensor:
    if isinstance(divergence, Euclidean):
        return (p - q).square().sum(-1)
    if isinstance(divergence, ItakuraSaito):
        return (p / q - (p / q).log() - 1).sum(-1)
    return (p * (p / q).log() - p + q).sum(-1)


def rows(*shape: int, scale: float = 1.0, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    draw = scale * torch.randn(2, *shape, generator=generator, dtype=dtype)
    return draw.log_softmax(-1).unbind(0)


@pytest.mark.parametrize("divergence", MEMBERS, ids=repr)
def test_the_value_follows_from_the_generator(divergence):
    log_p, log_q = rows(4, 7)
    torch.testing.assert_close(divergence(log_p, log_q), closed_form(divergence, log_p.exp(), log_q.exp()))


@pytest.mark.parametrize("divergence", MEMBERS, ids=repr)
def test_gradients_follow_from_the_generator(divergence):
    log_p, log_q = (t.requires_grad_() for t in rows(2, 4))
    assert torch.autograd.gradcheck(divergence, (log_p, log_q))


@pytest.mark.parametrize("divergence", MEMBERS, ids=repr)
def test_equal_rows_are_at_exactly_zero(divergence):
    log_p, _ = rows(4, 7, dtype=torch.float32)
    assert torch.equal(divergence(log_p, log_p), torch.zeros(4))


@pytest.mark.parametrize(
    ("divergence", "empty_p", "empty_q"),
    [
        (Entropic(), 0.5, math.inf),
        (Euclidean(), 0.5, 0.5),
        (ItakuraSaito(), math.inf, math.inf),
    ],
    ids=repr,
)
def test_an_atom_empty_on_one_side_costs_its_limit(divergence, empty_p, empty_q):
    empty = torch.tensor([0.0, -math.inf])
    half = torch.tensor([0.5, 0.5]).log()
    # p = (1, 0), q = (1/2, 1/2): the second atom costs F(0) - F(q) + F'(q) q
    first = closed_form(divergence, torch.tensor([1.0]), torch.tensor([0.5])).item()
    second = {0.5: 0.25 if isinstance(divergence, Euclidean) else 0.5}.get(empty_p, math.inf)
    assert divergence(empty, half).item() == pytest.approx(first + second)
    reverse = divergence(half, empty).item()
    assert reverse == pytest.approx(0.5 if empty_q == 0.5 else math.inf)


@pytest.mark.parametrize("divergence", MEMBERS, ids=repr)
def test_an_atom_empty_on_both_sides_costs_nothing(divergence):
    log_p, log_q = rows(5)
    padded_p, padded_q = (torch.cat([t, torch.tensor([-math.inf])]) for t in (log_p, log_q))
    padded_p.requires_grad_(), padded_q.requires_grad_()
    value = divergence(padded_p, padded_q)
    assert value.item() == pytest.approx(divergence(log_p, log_q).item())
    for gradient in torch.autograd.grad(value, (padded_p, padded_q)):
        assert gradient.isfinite().all() and gradient[-1] == 0


@pytest.mark.parametrize("divergence", [Entropic(), Euclidean()], ids=repr)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_peaked_rows_in_float32_agree_with_float64(divergence, scale):
    log_p, log_q = rows(16, 300, scale=scale, dtype=torch.float32)
    log_p.requires_grad_(), log_q.requires_grad_()
    value = divergence(log_p, log_q)
    exact = closed_form(divergence, log_p.double().exp(), log_q.double().exp())
    torch.testing.assert_close(value, exact.float(), rtol=1e-4, atol=1e-6)
    for gradient in torch.autograd.grad(value.sum(), (log_p, log_q)):
        assert gradient.isfinite().all()


def test_masses_below_the_range_of_float64_keep_a_finite_price():
    log_p, log_q = torch.tensor([-0.7, -0.7]), torch.tensor([0.0, -1e4])
    assert Entropic()(log_p, log_q).item() == pytest.approx(
        math.exp(-0.7) * (1e4 - 1.4) + 1 - 2 * math.exp(-0.7), rel=1e-6
    )


def test_the_first_variation_is_the_difference_of_slopes():
    log_p, log_q = rows(6)
    in_p, in_q = Euclidean().first_variation(log_p, log_q)
    torch.testing.assert_close(in_p, 2 * (log_p.exp() - log_q.exp()))
    torch.testing.assert_close(in_q, 2 * (log_q.exp() - log_p.exp()))
