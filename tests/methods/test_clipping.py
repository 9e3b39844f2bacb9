"""The clipped surrogate and the means it is taken over, against their formulas."""

import math

import pytest
import torch
from tests.worlds import close, gradient

from fdiv.methods.rl.clipping import (
    aggregated,
    bounds,
    check_aggregate,
    check_clip,
    clipped_gain,
    log_importance,
)

RATIOS = torch.tensor([[0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5]] * 2, dtype=torch.float64)
ADVANTAGE = torch.tensor([[0.7], [-0.4]], dtype=torch.float64)
ALL = torch.ones_like(RATIOS, dtype=torch.bool)


@pytest.mark.parametrize("clip", [0.2, 0.1, (0.2, 0.28), (0.3, 2.0), None], ids=repr)
def test_the_gain_is_the_smaller_of_the_two_and_its_slope_ends_where_more_would_be_gained(clip):
    ratio = RATIOS.clone().requires_grad_()
    out = clipped_gain(ratio.log(), ADVANTAGE, clip)
    low, high = (1.0, math.inf) if clip is None else bounds(clip)
    for row, advantage in enumerate((0.7, -0.4)):
        for column, c in enumerate(RATIOS[row].tolist()):
            held = min(max(c, 1 - low), 1 + high)
            expected = min(c * advantage, held * advantage)
            assert out.gain[row, column].item() == pytest.approx(expected, abs=1e-15)
            stopped = (advantage > 0 and c > 1 + high) or (advantage < 0 and c < 1 - low)
            slope = torch.autograd.grad(out.gain[row, column], ratio, retain_graph=True)[0][row, column]
            assert slope.item() == pytest.approx(0.0 if stopped else advantage, abs=1e-15)
            assert out.clipped[row, column].item() == stopped
    assert not out.ratio.requires_grad


def test_the_asymmetric_clip_lets_rare_tokens_rise_further_and_fall_as_far():
    symmetric, wide = (clipped_gain(RATIOS.log(), ADVANTAGE, clip) for clip in (0.2, (0.2, 0.28)))
    close(wide.gain[1], symmetric.gain[1])
    close(wide.gain[0, :5], symmetric.gain[0, :5])
    close(wide.gain[0, 5:], 0.7 * torch.tensor([1.25, 1.28], dtype=torch.float64))


def test_an_advantage_may_differ_from_token_to_token():
    advantage = torch.linspace(-1, 1, 7, dtype=torch.float64).expand(2, 7)
    each = [clipped_gain(RATIOS[:, [i]].log(), advantage[:, [i]], 0.2).gain for i in range(7)]
    close(clipped_gain(RATIOS.log(), advantage, 0.2).gain, torch.cat(each, 1))


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    log_policy = RATIOS.log().requires_grad_()
    mask = ALL.clone()
    mask[0, 4:] = False
    ratio = log_importance(log_policy, torch.zeros_like(RATIOS), mask, "sequence").exp()
    expected = torch.stack([RATIOS[0, :4].prod() ** (1 / 4), RATIOS[1].prod() ** (1 / 7)])
    close(ratio, expected.unsqueeze(1).expand_as(ratio), 1e-14)
    share = mask.double() / mask.sum(1, keepdim=True)
    close(gradient(ratio[:, 0].sum(), log_policy).reshape(2, 7), expected.unsqueeze(1) * share, 1e-14)


def test_masked_tokens_have_the_ratio_one_whatever_they_hold():
    mask = ALL.clone()
    mask[:, 3:] = False
    for rubbish in (math.nan, math.inf, -math.inf):
        log_policy = torch.where(mask, RATIOS.log(), rubbish).requires_grad_()
        ratio = log_importance(
            log_policy, torch.full_like(RATIOS, rubbish).masked_fill(mask, 0.0), mask
        ).exp()
        close(ratio, torch.where(mask, RATIOS, 1.0))
        assert torch.autograd.grad(ratio.sum(), log_policy)[0][~mask].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [0.2, (0.2, 0.28), None], ids=repr)
def test_ratios_that_overflow_stay_finite_with_their_gradients(clip, dtype):
    far = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]] * 2, dtype=dtype).requires_grad_()
    log_ratio = log_importance(far, torch.zeros_like(far), torch.ones(2, 5, dtype=torch.bool))
    for size in (1.0, 1e20):
        gain, ratio, _ = clipped_gain(log_ratio, size * ADVANTAGE.to(dtype), clip)
        assert gain.isfinite().all() and gradient(gain.sum(), far).isfinite().all()
        assert ratio[0, 0] == 0 and (ratio.diff() >= 0).all()


# -- means ---------------------------------------------------------------------------------------------

ROWS = torch.arange(14, dtype=torch.float64).reshape(2, 7)


def test_the_three_means_are_dapos_grpos_and_dr_grpos():
    mask = ALL.clone()
    mask[0, 2:] = False
    sums, lengths = (0.0 + 1, 7 + 8 + 9 + 10 + 11 + 12 + 13), (2, 7)
    assert aggregated(ROWS, mask, "tokens").item() == pytest.approx(sum(sums) / 9)
    assert aggregated(ROWS, mask, "sequences").item() == pytest.approx((sums[0] / 2 + sums[1] / 7) / 2)
    assert aggregated(ROWS, mask, 10).item() == pytest.approx(sum(sums) / 20)
    assert sum(lengths) == 9


@pytest.mark.parametrize("over", ["tokens", "sequences", 10])
def test_parts_add_up_to_the_mean_of_the_global_batch(over):
    mask = ALL.clone()
    mask[0, 2:] = False
    parts = [aggregated(ROWS[[i]], mask[[i]], over, count=9, sequences=2) for i in range(2)]
    close(sum(parts), aggregated(ROWS, mask, over))


@pytest.mark.parametrize("over", ["tokens", "sequences", 10])
def test_an_empty_answer_and_an_empty_batch_give_zero_and_keep_the_graph(over):
    rows = torch.full((2, 3), math.nan, requires_grad=True)
    for some in (slice(0, 2), slice(0, 0)):
        loss = aggregated(rows[some], torch.zeros(2, 3, dtype=torch.bool)[some], over)
        assert loss.item() == 0 and not gradient(loss, rows).any()


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 1.0, 1.5, -0.2, (1.0, 0.2), (0.2, 0.0), (0.2, math.inf), math.nan])
def test_a_clip_that_holds_nothing_or_everything_is_refused(clip):
    with pytest.raises(ValueError, match=r"between 0 and 1.*clip=None"):
        check_clip(clip)


@pytest.mark.parametrize("clip", ["0.2", [0.2, 0.28], (0.2,), (0.1, 0.2, 0.3), (0.2, None)], ids=repr)
def test_a_clip_of_another_kind_is_refused(clip):
    with pytest.raises(TypeError, match=r"a pair \(low, high\) or None"):
        check_clip(clip)


@pytest.mark.parametrize("over", ["token", 0, -3, 2.5, True, None], ids=repr)
def test_a_mean_that_there_is_not_is_refused(over):
    with pytest.raises(ValueError, match="aggregate is 'tokens'"):
        check_aggregate(over)
