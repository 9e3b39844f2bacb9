"""The contract of an f-divergence, as functions: run them on your own class.

    import fdiv, pytest

    @pytest.mark.parametrize("law", fdiv.testing.LAWS, ids=lambda law: law.__name__)
    def test_my_divergence(law):
        law(MyDivergence())

A law is `law(divergence) -> None`; it raises AssertionError saying what was expected, what was got
and at which input. Laws need torch alone, draw from generators of their own, and take seconds.
A divergence made from a function that cannot be imported (a lambda, a closure) has no notation: the
laws about pickling and notation ask nothing of it.
"""

from fdiv.testing._dual import (
    conjugate_is_the_supremum_of_the_tangents,
    inverse_slope_inverts_the_slope,
)
from fdiv.testing._edges import (
    cells_empty_on_both_sides_change_nothing,
    empty_masses_pay_the_prices_at_the_ends,
    float32_agrees_with_float64,
    half_precision_is_computed_in_float32,
    peaked_rows_stay_finite,
)
from fdiv.testing._objects import (
    batch_and_dimension_do_not_matter,
    compiles_and_transforms,
    is_a_value,
    is_its_own_notation,
    refuses_what_it_cannot_compare,
)
from fdiv.testing._slopes import (
    curvature_at_one_is_the_chi_square_limit,
    curvature_is_the_falling_slope_of_psi,
    gradients_agree_with_finite_differences,
    logit_gradient_is_centred_psi,
    potentials_are_the_derivatives_of_the_value,
)
from fdiv.testing._values import (
    is_bounded_below_by_any_critic,
    is_homogeneous,
    is_jointly_convex,
    is_never_negative,
    is_the_sum_of_its_potentials,
    is_zero_with_zero_slope_at_equality,
    never_rises_when_atoms_merge,
    reverses_by_swapping_its_arguments,
)

LAWS = (
    is_never_negative,
    is_zero_with_zero_slope_at_equality,
    is_homogeneous,
    is_the_sum_of_its_potentials,
    is_bounded_below_by_any_critic,
    never_rises_when_atoms_merge,
    is_jointly_convex,
    reverses_by_swapping_its_arguments,
    potentials_are_the_derivatives_of_the_value,
    logit_gradient_is_centred_psi,
    gradients_agree_with_finite_differences,
    curvature_at_one_is_the_chi_square_limit,
    curvature_is_the_falling_slope_of_psi,
    conjugate_is_the_supremum_of_the_tangents,
    inverse_slope_inverts_the_slope,
    empty_masses_pay_the_prices_at_the_ends,
    cells_empty_on_both_sides_change_nothing,
    peaked_rows_stay_finite,
    float32_agrees_with_float64,
    half_precision_is_computed_in_float32,
    batch_and_dimension_do_not_matter,
    compiles_and_transforms,
    is_a_value,
    is_its_own_notation,
    refuses_what_it_cannot_compare,
)

__all__ = ["LAWS"]
