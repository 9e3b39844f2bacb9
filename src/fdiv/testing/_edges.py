"""Laws of zero mass, peaked rows and precision."""

import math

import torch

from fdiv._divergence import FDivergence
from fdiv.testing._problems import (
    EMPTY,
    check,
    check_close,
    distributions,
    gradient,
    log_ratios,
    measures,
    neighbours,
    require,
    scale_of,
)


def empty_masses_pay_the_prices_at_the_ends(divergence: FDivergence) -> None:
    """D = q f(0) where p is empty, p f'(inf) where q is, 0 where both are; never NaN."""
    for dtype in (torch.float32, torch.float64):
        log_p = torch.tensor([EMPTY, 0.3, EMPTY], dtype=dtype).unsqueeze(-1)
        log_q = torch.tensor([-0.7, EMPTY, EMPTY], dtype=dtype).unsqueeze(-1)
        prices = (divergence.f_at_zero, divergence.slope_at_infinity, 0.0)
        masses = (math.exp(-0.7), math.exp(0.3), 0.0)
        expected = [mass * price if mass else 0.0 for mass, price in zip(masses, prices, strict=True)]
        says = "an empty cell pays q f(0), p f'(inf), or nothing if both are empty"
        at = {"log_p": log_p, "log_q": log_q}
        check_close(divergence(log_p, log_q), torch.tensor(expected, dtype=dtype), says, 1e-5, **at)
        _check_masked_logits(divergence, dtype)
    x = log_ratios(300.0)
    limit = torch.where(x < 0, divergence.f_at_zero, divergence.slope_at_infinity * x.exp())
    says = "f(u) <= f(0) for u < 1 and f(u) <= u f'(inf) for u > 1"
    check(divergence.f(x) <= limit * (1 + 1e-9), says, divergence.f(x), limit, log_ratio=x)


def _check_masked_logits(divergence: FDivergence, dtype: torch.dtype) -> None:
    p_logits, q_logits = distributions(rows=4, dtype=dtype)
    p_logits[0, :3] = EMPTY  # p empty; q empty; cells of both; disjoint supports
    q_logits[1, 2:5] = EMPTY
    p_logits[2, 1], q_logits[2, 1], q_logits[2, 5], p_logits[2, 6] = EMPTY, EMPTY, EMPTY, EMPTY
    p_logits[3, :5], q_logits[3, 5:] = EMPTY, EMPTY

    def loss(a, b):
        return divergence(a.log_softmax(-1), b.log_softmax(-1))

    at = {"p_logits": p_logits, "q_logits": q_logits}
    value = loss(p_logits, q_logits)
    says = f"the value is never NaN beside empty cells ({dtype})"
    check(~value.isnan(), says, value, "a number", **at)
    slopes = gradient(loss, p_logits, q_logits)
    for name, slope in zip("pq", slopes, strict=True):
        says = f"the gradient of a finite value in the logits of {name} is finite ({dtype})"
        holds = slope.isfinite() | ~value.isfinite().unsqueeze(-1)
        check(holds, says, slope, "a finite number", **at)


def cells_empty_on_both_sides_change_nothing(divergence: FDivergence) -> None:
    """A cell with p = q = 0 changes neither value nor gradient: masked vocabularies are free."""
    pair = measures()
    padded = tuple(torch.nn.functional.pad(x, (2, 3), value=EMPTY) for x in pair)
    at = {"log_p": pair[0], "log_q": pair[1]}
    with_empty = divergence(padded[0], padded[1])
    check_close(with_empty, divergence(*pair), "empty cells change no value", 1e-12, **at)
    slopes, padded_slopes = gradient(divergence, *pair), gradient(divergence, *padded)
    for name, slope, with_padding in zip("pq", slopes, padded_slopes, strict=True):
        expected = torch.nn.functional.pad(slope, (2, 3))
        says = f"empty cells change no gradient in log {name}"
        check_close(with_padding, expected, says, 1e-12, log_p=padded[0], log_q=padded[1])
    for name, variation in zip("pq", divergence.first_variation(*padded), strict=True):
        says = f"the first variation in {name} is a number beside empty cells"
        check(~variation.isnan(), says, variation, "a number", log_p=padded[0], log_q=padded[1])


def peaked_rows_stay_finite(divergence: FDivergence) -> None:
    """At logit scale 30 float32 gives what float64 gives, wherever that fits; NaN nowhere."""
    limit = torch.finfo(torch.float32).max / 10
    for scale in (1.0, 30.0):
        log_p, log_q = distributions(rows=4, support=4096, scale=scale, seed=6, dtype=torch.float32)
        exact = divergence(log_p.double(), log_q.double())
        value = divergence(log_p, log_q).double()
        at = {"log_p": log_p, "log_q": log_q}
        says = f"float32 gives what float64 gives at logit scale {scale:g}"
        fits = exact.abs() < limit
        check_close(torch.where(fits, value, 0.0), torch.where(fits, exact, 0.0), says, 2e-3, 1e-5, **at)
        check(
            ~value.isnan(),
            f"the value is never NaN at logit scale {scale:g}",
            value,
            "a number",
            **at,
        )
        slopes = gradient(divergence, log_p, log_q)
        exact_slopes = gradient(divergence, log_p.double(), log_q.double())
        for name, slope, exact_slope in zip("pq", slopes, exact_slopes, strict=True):
            holds = slope.isfinite() | (exact_slope.abs() > limit)
            says = f"the gradient in log {name} is finite where float64's is (logit scale {scale:g})"
            check(holds, says, slope, exact_slope, **at)


def float32_agrees_with_float64(divergence: FDivergence) -> None:
    """float32 agrees with float64, near p = q up to what rounding the masses can do."""
    problems = {
        "far apart": measures(2.0, dtype=torch.float32),
        "log-ratios near 0.1": neighbours(0.1, torch.float32),
        "log-ratios near 0.001": neighbours(1e-3, torch.float32),
    }
    rounding = torch.finfo(torch.float32).eps * scale_of(divergence)
    for name, (log_p, log_q) in problems.items():
        exact = divergence(log_p.double(), log_q.double())
        value = divergence(log_p, log_q)
        require(value.dtype == torch.float32, f"float32 stays float32, got {value.dtype}")
        says = f"float32 agrees with float64 ({name})"
        check_close(value.double(), exact, says, 1e-4, rounding, log_p=log_p, log_q=log_q)


def half_precision_is_computed_in_float32(divergence: FDivergence) -> None:
    """bfloat16 and float16 inputs give the float32 value of what they hold, in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        log_p, log_q = (x.to(dtype) for x in distributions())
        value, expected = divergence(log_p, log_q), divergence(log_p.float(), log_q.float())
        got = [value.dtype, *(x.dtype for x in divergence.potentials(log_p - log_q))]
        require(set(got) == {torch.float32}, f"{dtype} gives float32 in and out of D, got {got}")
        says = f"{dtype} is computed in float32"
        check_close(value, expected, says, 0.0, log_p=log_p, log_q=log_q)
    for pair in ((log_p.float(), log_q.double()), (log_p.double(), log_q.float())):
        mixed = divergence(*pair).dtype
        require(mixed == torch.float64, f"float32 and float64 give float64, got {mixed}")
