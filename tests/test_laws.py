"""Every law on every row of the table; and for every law a divergence that breaks it."""

import inspect
import math
from dataclasses import dataclass, field

import pytest
import torch
from tests.test_divergences import ROWS
from tests.thinned import thinned

import fdiv
from fdiv import KL, FDivergence, testing
from fdiv.testing import LAWS, _dual, _edges, _objects, _slopes, _values

QUICK = [law for law in LAWS if law is not _objects.compiles_and_transforms]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("law", QUICK, ids=lambda law: law.__name__)
def test_every_law_holds_for_every_row(law, row):
    law(row.divergence)


@pytest.mark.parametrize("row", thinned(ROWS), ids=str)
def test_every_row_compiles_and_transforms(row):
    _objects.compiles_and_transforms(row.divergence)


def test_laws_leave_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for law in LAWS:
        law(fdiv.Pearson())
    assert torch.equal(torch.rand(4), expected)


def test_a_lambda_has_no_notation_and_keeps_every_other_law():
    kl = fdiv.Generator(lambda log_ratio: log_ratio.exp() * log_ratio)
    for law in (_objects.is_a_value, _objects.is_its_own_notation, _values.is_never_negative):
        law(kl)


@dataclass(frozen=True)
class Broken(FDivergence):
    """KL with something wrong."""

    def perspective(self, log_p, log_q):
        return KL().perspective(log_p, log_q)


class NotStandard(Broken):
    def perspective(self, log_p, log_q):  # f(u) = u log u, which is negative for u < 1
        return log_p.exp() * (log_p - log_q)


class NotConvex(Broken):
    def perspective(self, log_p, log_q):  # f(u) = (u - 1)^2 / (u^2 + 1) falls at infinity
        p, q = log_p.exp(), log_q.exp()
        return q * (p - q).square() / (p.square() + q.square())


class NotHomogeneous(Broken):
    def perspective(self, log_p, log_q):
        return (log_p.exp() - log_q.exp()).square()


class Clamped(Broken):
    def perspective(self, log_p, log_q):
        ratio = (log_p - log_q).clamp(-5, 5)
        return log_q.exp() * KL().perspective(ratio, torch.zeros_like(log_q))


class FromTheRatio(Broken):
    def perspective(self, log_p, log_q):  # f(u) from u: 0 * inf on peaked rows and empty cells
        u = (log_p - log_q).exp()
        return log_q.exp() * (u * u.log() - u + 1)


class PhiOff(Broken):
    def phi(self, log_ratio):
        return super().phi(log_ratio) + 1e-3


class PsiSign(Broken):
    def psi(self, log_ratio):
        return -super().psi(log_ratio)


class PsiOffByAConstant(Broken):
    def psi(self, log_ratio):
        return super().psi(log_ratio) + log_ratio / 100


class CurvatureOff(Broken):
    curvature_at_one = 2.0


class CurvatureFunctionOff(Broken):
    def curvature(self, log_ratio):
        return 2 * super().curvature(log_ratio)


class NoInfinity(Broken):
    def conjugate(self, slope):
        return slope.expm1() - 0.01 * (slope > 1)


class InverseOff(Broken):
    def closed_inverse_slope(self, slope):
        return slope + slope.square() / 50


class RiseOff(Broken):
    def closed_rise(self, log_ratio):
        return 1 + log_ratio / 50


class ReversesToItself(Broken):
    @property
    def reverse(self):
        return self


class DetachedGradient(Broken):
    def perspective(self, log_p, log_q):
        return KL().perspective(log_p, log_q.detach() + 0.5 * (log_q - log_q.detach()))


class CountsEmptyCells(Broken):
    def __call__(self, log_p, log_q, dim=-1):
        empty = (log_p == -math.inf) & (log_q == -math.inf)
        return super().__call__(log_p, log_q, dim) + 1e-3 * empty.sum(dim)


class LosesDigits(Broken):
    def perspective(self, log_p, log_q):
        if log_p.dtype == torch.float64:
            return KL().perspective(log_p, log_q)
        return KL().perspective(log_p, log_q).bfloat16().float()


class StaysHalf(Broken):
    def __call__(self, log_p, log_q, dim=-1):
        return super().__call__(log_p, log_q, dim).to(log_p.dtype)


class LastDimensionOnly(Broken):
    def __call__(self, log_p, log_q, dim=-1):
        return super().__call__(log_p, log_q)


class LooksAtValues(Broken):
    def perspective(self, log_p, log_q):
        if log_p.max() > 0:
            return KL().perspective(log_p, log_q) + 0.0
        return KL().perspective(log_p, log_q)


@dataclass(frozen=True, eq=False)
class NoEquality(Broken):
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclass(frozen=True, repr=False)
class NoNotation(Broken):
    weight: float = field(default=2.0)

    def __repr__(self):
        return "NoNotation()" if self.weight == 2.0 else "NoNotation(2.0)"


class TakesAnything(Broken):
    def __call__(self, log_p, log_q, dim=-1):
        return super().__call__(*torch.broadcast_tensors(log_p.float(), log_q.float()), dim)


BREAKERS = {
    _values.is_never_negative: NotStandard(),
    _values.is_zero_with_zero_slope_at_equality: NotStandard(),
    _values.is_homogeneous: NotHomogeneous(),
    _values.is_the_sum_of_its_potentials: PhiOff(),
    _values.is_bounded_below_by_any_critic: PsiSign(),
    _values.never_rises_when_atoms_merge: NotConvex(),
    _values.is_jointly_convex: NotConvex(),
    _values.reverses_by_swapping_its_arguments: ReversesToItself(),
    _slopes.potentials_are_the_derivatives_of_the_value: PhiOff(),
    _slopes.logit_gradient_is_centred_psi: PsiOffByAConstant(),
    _slopes.gradients_agree_with_finite_differences: DetachedGradient(),
    _slopes.curvature_at_one_is_the_chi_square_limit: CurvatureOff(),
    _slopes.curvature_is_the_falling_slope_of_psi: CurvatureFunctionOff(),
    _dual.conjugate_is_the_supremum_of_the_tangents: NoInfinity(),
    _dual.inverse_slope_inverts_the_slope: InverseOff(),
    _edges.empty_masses_pay_the_prices_at_the_ends: FromTheRatio(),
    _edges.cells_empty_on_both_sides_change_nothing: CountsEmptyCells(),
    _edges.peaked_rows_stay_finite: FromTheRatio(),
    _edges.float32_agrees_with_float64: LosesDigits(),
    _edges.half_precision_is_computed_in_float32: StaysHalf(),
    _objects.batch_and_dimension_do_not_matter: LastDimensionOnly(),
    _objects.compiles_and_transforms: LooksAtValues(),
    _objects.is_a_value: NoEquality(),
    _objects.is_its_own_notation: NoNotation(weight=3.0),
    _objects.refuses_what_it_cannot_compare: TakesAnything(),
}


def test_a_closed_form_of_the_rise_is_held_to_it():
    with pytest.raises(AssertionError, match="closed_rise is the slope of phi"):
        _dual.inverse_slope_inverts_the_slope(RiseOff())


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_every_law_refuses_a_divergence_that_breaks_it(law):
    assert law in BREAKERS, f"write a divergence that breaks {law.__name__}"
    with pytest.raises(AssertionError, match=r"expected|got|:"):
        law(BREAKERS[law])


def test_a_broken_law_says_what_was_expected_and_got_and_where():
    with pytest.raises(AssertionError, match=r"expected .*, got .* at log_p = \[.*log_q = \["):
        _values.reverses_by_swapping_its_arguments(ReversesToItself())


def test_every_function_written_as_a_law_is_in_the_tuple():
    written = {
        function
        for module in (_dual, _edges, _objects, _slopes, _values)
        for name, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == module.__name__
        if not name.startswith("_") and name != "has_notation"
    }
    assert written == set(LAWS)
    assert testing.__all__ == ["LAWS"]
    assert all(law.__doc__ and "\n" not in law.__doc__ for law in LAWS)
