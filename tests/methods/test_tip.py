"""TIP: which tokens are kept, and that the others cost nothing."""

import math
from dataclasses import dataclass, field
from itertools import permutations

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import (
    GKD,
    JS,
    KL,
    Exact,
    FusedAtoms,
    FusedLinear,
    Head,
    Mix,
    MonteCarlo,
    ReverseKL,
    SampledLogits,
    TopK,
)
from fdiv.methods._method import Method
from fdiv.methods.distill.tip import TIP, lowered, quadrants, spread

ROWS, VOCAB = 10, 7
# Four tokens: settled, unsure, sure and wrong, in between.
ENTROPY = torch.tensor([0.1, 0.9, 0.2, 0.5], dtype=torch.float64)
DIVERGENCE = torch.tensor([0.0, 0.2, 2.0, 0.4], dtype=torch.float64)


def models(rows=ROWS):
    """log_p, and the student's logits, [rows, vocab]."""
    return random_rows(rows, VOCAB), random_rows(rows, VOCAB, seed=1).requires_grad_()


def heads(rows=ROWS):
    return {
        "p_hidden": random_rows(rows, 4),
        "p_weight": random_rows(VOCAB, 4, seed=3),
        "q_hidden": random_rows(rows, 3, seed=4).requires_grad_(),
        "q_weight": random_rows(VOCAB, 3, seed=5).requires_grad_(),
    }


def entropy_of(log_q):
    return -(log_q.exp() * log_q).sum(-1)


@dataclass(frozen=True)
class Watched:
    """Exact(), with a list of how many rows it was given and whether gradients were asked for."""

    sees = "logits"
    evidence = ("log_p", "log_q")
    guarantee = Exact.guarantee

    calls: list = field(default_factory=list)

    def check(self, divergence):
        pass

    def __call__(self, divergence, log_p, log_q):
        self.calls.append(len(log_q))
        return divergence(log_p, log_q)


# -- scores ------------------------------------------------------------------------------------------------


def test_the_worked_scores():
    close(TIP().scores(ENTROPY, DIVERGENCE), torch.tensor([0.0, 1.0, 1.0, 0.6], dtype=torch.float64), 1e-12)
    assert TIP(keep=0.5).select(ENTROPY, DIVERGENCE).tolist() == [1, 2]
    assert TIP(keep=0.75).select(ENTROPY, DIVERGENCE).tolist() == [1, 2, 3]


def test_entropy_alone_does_not_see_the_token_that_is_sure_and_wrong():
    assert TIP(keep=0.5, score="entropy").select(ENTROPY, DIVERGENCE).tolist() == [1, 3]
    assert TIP(keep=0.5, score="divergence").select(ENTROPY, DIVERGENCE).tolist() == [2, 3]


def test_soft_or_is_one_less_the_product_of_what_is_missing():
    entropy, divergence = random_rows(2, 40).exp()
    h, d = ((x - x.min()) / (x.max() - x.min()) for x in (entropy, divergence))
    close(TIP(ceiling=1.0).scores(entropy, divergence), 1 - (1 - h) * (1 - d), 1e-13)


def test_the_scale_of_either_axis_does_not_matter():
    entropy, divergence = random_rows(2, 40).exp()
    close(TIP().scores(3 * entropy + 1, 0.01 * divergence), TIP().scores(entropy, divergence), 1e-12)


def test_the_highest_entropies_are_lowered_before_the_scale_is_made():
    rows = torch.arange(100.0)
    assert lowered(rows, 0.98).tolist() == [*range(98), 97.0, 97.0]
    assert lowered(rows[:50], 0.98).tolist() == [*range(49), 48.0]
    for few in (1, 4, 49):  # the top 2 % of fewer than 50 rows is none
        assert lowered(rows[:few], 0.98).tolist() == rows[:few].tolist()
    outlier = torch.cat([torch.linspace(0, 1, 99), torch.tensor([1e6])])
    close(TIP(score="entropy").scores(outlier, outlier)[:99].max(), torch.tensor(1.0))


def test_an_axis_without_contrast_says_nothing():
    same = torch.full((4,), 0.3, dtype=torch.float64)
    assert spread(same).tolist() == [0, 0, 0, 0]
    close(TIP().scores(same, DIVERGENCE), DIVERGENCE / 2)
    close(TIP().scores(ENTROPY, same), (ENTROPY - 0.1) / 0.8)


def test_an_infinite_divergence_is_the_largest_there_is():
    assert spread(torch.tensor([1.0, math.inf, 0.0, math.inf])).tolist() == [0, 1, 0, 1]
    assert spread(torch.tensor([math.inf, math.inf])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("keep", "rows", "kept"),
    [(0.5, 7, 3), (0.29, 100, 29), (0.2, 5, 1), (0.1, 5, 1), (1.0, 6, 6), (0.7, 10, 7)],
)
def test_the_fraction_is_rounded_down_but_a_call_keeps_one_token(keep, rows, kept):
    assert len(TIP(keep=keep).select(torch.rand(rows), torch.rand(rows))) == kept


def test_the_quadrants_are_told_apart_at_the_medians():
    shares = {name: rows.tolist() for name, rows in quadrants(ENTROPY, DIVERGENCE).items()}
    assert shares == {
        "unsure_far": [0, 0, 0, 1],
        "unsure_near": [0, 1, 0, 0],
        "sure_far": [0, 0, 1, 0],
        "sure_near": [1, 0, 0, 0],
    }


def test_the_authors_code_draws_in_turn_with_chances_in_proportion_to_the_product():
    """Two of three rows without replacement: the chance of each pair, in either order, enumerated."""
    entropy, divergence = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.4, 0.3, 0.25])
    weight = (entropy * divergence).tolist()
    chance = dict.fromkeys([(0, 1), (0, 2), (1, 2)], 0.0)
    for first, second in permutations(range(3), 2):
        left = sum(weight) - weight[first]
        chance[tuple(sorted((first, second)))] += weight[first] / sum(weight) * weight[second] / left
    torch.manual_seed(0)
    method, draws = TIP(keep=0.67, score="sampled"), 4000
    seen = [tuple(method.select(entropy, divergence).tolist()) for _ in range(draws)]
    for pair, expected in chance.items():
        spread_of_mean = math.sqrt(expected * (1 - expected) / draws)
        assert abs(seen.count(pair) / draws - expected) < 4 * spread_of_mean


def test_a_draw_is_not_led_astray_by_an_entropy_rounded_below_zero():
    entropy, ones = torch.tensor([-1e-9, 0.5, 0.7, 0.6]), torch.ones(4)
    for seed in range(5):
        torch.manual_seed(seed)
        assert TIP(keep=0.75, score="sampled").select(entropy, ones).tolist() == [1, 2, 3]


def test_the_draw_follows_js_whatever_is_trained():
    log_p, logits = models(60)
    log_q = logits.log_softmax(-1)
    torch.manual_seed(3)
    kept = TIP(score="sampled").select(entropy_of(log_q).detach(), JS(0.5)(log_p, log_q).detach())
    for divergence in (KL(), fdiv.TV()):
        torch.manual_seed(3)
        out = TIP(divergence, score="sampled")(log_p=log_p, log_q=log_q)
        close(out.loss, divergence(log_p[kept], log_q[kept]).mean())


def test_half_precision_is_scored_in_single():
    """Many of these entropies differ by less than bfloat16 can tell."""
    log_p, log_q = random_rows(200, 50).bfloat16(), random_rows(200, 50, seed=1).bfloat16()
    half = TIP(score="entropy", keep=0.1)(log_p=log_p, log_q=log_q)
    single = TIP(score="entropy", keep=0.1)(log_p=log_p.float(), log_q=log_q.float())
    assert half.loss == single.loss and half.metrics == single.metrics


# -- the loss -----------------------------------------------------------------------------------------------


@each_divergence
def test_the_loss_is_the_mean_over_the_rows_of_highest_score(divergence):
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    value, entropy = divergence(log_p, log_q), entropy_of(log_q)
    h, d = ((x - x.min()) / (x.max() - x.min()) for x in (entropy.detach(), value.detach()))
    kept = (h + d - h * d).argsort(descending=True)[:4]
    out = TIP(divergence, keep=0.4)(log_p=log_p, log_q=log_q)
    close(out.loss, value[kept].mean())
    close(gradient(out.loss, logits), gradient(value[kept].mean(), logits), 1e-9)
    close(out.metrics["divergence"], value.mean().detach())
    assert sum(out.metrics[name] for name in quadrants(entropy, value)) == 1


@each_divergence
def test_keeping_everything_is_gkd(divergence):
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    out, expected = (
        TIP(divergence, keep=1.0)(log_p=log_p, log_q=log_q),
        GKD(divergence)(log_p=log_p, log_q=log_q),
    )
    close(out.loss, expected.loss, 1e-13)
    close(gradient(out.loss, logits), gradient(expected.loss, logits), 1e-12)


@pytest.mark.parametrize("score", ["soft_or", "entropy", "divergence", "sampled"])
def test_rows_that_are_not_kept_get_no_gradient_and_no_work(score):
    log_p, _ = models()
    log_q = random_rows(ROWS, VOCAB, seed=1).requires_grad_()
    watched = Watched()
    out = TIP(estimator=watched, keep=0.3, score=score)(log_p=log_p, log_q=log_q)
    (grad,) = torch.autograd.grad(out.loss, log_q)
    assert watched.calls == [3]
    assert grad.any(-1).sum() == 3


@pytest.mark.parametrize("estimator", [TopK(3), TopK(3, "union"), Exact()], ids=repr)
def test_rows_are_chosen_by_the_whole_vocabulary_whatever_trains_them(estimator):
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    kept = TIP().select(entropy_of(log_q).detach(), ReverseKL()(log_p, log_q).detach())
    out = TIP(estimator=estimator)(log_p=log_p, log_q=log_q)
    close(out.loss, estimator(ReverseKL(), log_p[kept], log_q[kept]).mean())


@pytest.mark.parametrize("of", [Exact(), TopK(3)], ids=repr)
@pytest.mark.parametrize("score", ["soft_or", "entropy", "divergence"])
def test_heads_keep_the_same_rows_and_train_the_same_objective(of, score):
    given = heads()
    student = [given["q_hidden"], given["q_weight"]]
    log_p, log_q = ((given[f"{m}_hidden"] @ given[f"{m}_weight"].T).log_softmax(-1) for m in "pq")
    fused = TIP(estimator=FusedLinear(chunk=4, of=of), score=score)(**given)
    plain = TIP(estimator=of, score=score)(log_p=log_p, log_q=log_q)
    close(fused.loss, plain.loss, 1e-8)  # the tail of TopK is a small difference
    close(gradient(fused.loss, *student), gradient(plain.loss, *student), 1e-7)
    for name, number in plain.metrics.items():
        close(fused.metrics[name], number)
    assert gradient(fused.loss, student[0]).reshape(ROWS, -1).any(-1).sum() == ROWS // 2


def test_a_head_may_have_a_bias_and_a_temperature():
    given = heads()
    bias = random_rows(1, VOCAB, seed=8)[0].requires_grad_()
    given["q_weight"] = Head(given["q_weight"], bias, temperature=1.3)
    log_p = (given["p_hidden"] @ given["p_weight"].T).log_softmax(-1)
    log_q = ((given["q_hidden"] @ given["q_weight"].weight.T + bias) / 1.3).log_softmax(-1)
    fused, plain = TIP(estimator=FusedLinear())(**given).loss, TIP()(log_p=log_p, log_q=log_q).loss
    close(fused, plain)
    close(gradient(fused, bias), gradient(plain, bias), 1e-9)


def test_the_first_pass_asks_the_fused_estimator_for_no_gradient(monkeypatch):
    """It would take it in its forward pass, for all rows, whether or not anybody goes backward."""
    asked = []
    measured = FusedLinear.measured

    def spy(self, divergence, *tensors, **more):
        asked.append([t.requires_grad for t in tensors])
        return measured(self, divergence, *tensors, **more)

    monkeypatch.setattr(FusedLinear, "measured", spy)
    TIP(estimator=FusedLinear())(**heads())
    assert asked == [[False] * 4]


def test_more_rows_than_are_looked_at_together_make_no_difference():
    log_p, logits = models(600)
    log_q = logits.log_softmax(-1)
    kept = TIP(keep=0.1).select(entropy_of(log_q).detach(), ReverseKL()(log_p, log_q).detach())
    close(TIP(keep=0.1)(log_p=log_p, log_q=log_q).loss, ReverseKL()(log_p[kept], log_q[kept]).mean())


def test_symbols_that_a_model_excludes_do_no_harm():
    log_p, logits = models()
    log_p, log_q = (t.clone() for t in (log_p, logits.log_softmax(-1)))
    log_p[:, 0] = log_q[:, 0] = -torch.inf  # of both models
    out = TIP()(log_p=log_p, log_q=log_q)
    close(out.loss, TIP()(log_p=log_p[:, 1:], log_q=log_q[:, 1:]).loss)
    assert gradient(out.loss, logits).isfinite().all()


@pytest.mark.parametrize("rubbish", [torch.inf, -torch.inf, torch.nan])
def test_masked_rows_are_neither_scored_nor_trained(rubbish):
    log_p, logits = models()
    mask = torch.arange(ROWS) % 3 != 0
    leaf = logits.detach().log_softmax(-1)
    alone = TIP()(log_p=log_p[mask], log_q=leaf[mask])
    log_p[~mask], leaf[~mask] = rubbish, rubbish
    leaf.requires_grad_()
    out = TIP()(log_p=log_p, log_q=leaf, mask=mask)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert out.loss == alone.loss and out.metrics == alone.metrics
    assert grad.isfinite().all() and not grad[~mask].any() and grad[mask].any()


# -- the global batch ---------------------------------------------------------------------------------------


def test_equal_micro_batches_make_the_loss_of_one_of_them():
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    once = TIP(keep=0.3)(log_p=log_p, log_q=log_q)
    parts = [TIP(keep=0.3)(log_p=log_p, log_q=log_q, count=3 * ROWS) for _ in range(3)]
    close(sum(part.loss for part in parts), once.loss, 1e-13)
    close(gradient(sum(part.loss for part in parts), logits), gradient(once.loss, logits), 1e-12)
    assert parts[0].metrics == once.metrics


def test_a_call_weighs_as_much_as_it_has_tokens_however_its_fraction_is_rounded():
    """keep=0.5 keeps 1 of 3 rows and 3 of 7: divided by half of all tokens, their means would not average."""
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    parts = [{"log_p": log_p[rows], "log_q": log_q[rows]} for rows in (slice(0, 3), slice(3, 10))]
    means = [TIP()(**part).loss for part in parts]
    close(sum(TIP()(**part, count=ROWS).loss for part in parts), 0.3 * means[0] + 0.7 * means[1], 1e-13)


def test_keeping_everything_does_not_depend_on_the_split_into_micro_batches():
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    whole = TIP(keep=1.0)(log_p=log_p, log_q=log_q).loss
    split = (slice(0, 3), slice(3, 10))
    parts = [TIP(keep=1.0)(log_p=log_p[r], log_q=log_q[r], count=ROWS).loss for r in split]
    close(sum(parts), whole, 1e-13)


@pytest.mark.parametrize("score", ["soft_or", "sampled"])
@pytest.mark.parametrize("estimator", [Exact(), TopK(3), SampledLogits(4), FusedLinear()], ids=repr)
def test_without_a_row_the_loss_is_zero_and_has_a_graph(estimator, score):
    shapes = [(0, 3), (VOCAB, 3)] * 2 if estimator.sees == "heads" else [(0, VOCAB)] * 2
    tensors = {
        name: torch.zeros(shape).requires_grad_()
        for name, shape in zip(estimator.evidence, shapes, strict=True)
    }
    for count in (None, 12):
        out = TIP(estimator=estimator, score=score)(**tensors, count=count)
        assert out.loss == 0 and not any(out.metrics.values())
        assert not gradient(out.loss, *tensors.values()).any()


# -- what is refused -----------------------------------------------------------------------------------------


def test_wrong_settings_are_refused():
    for name in ("keep", "ceiling"):
        for fraction in (0.0, 1.2, math.nan):
            with pytest.raises(ValueError, match=f"{name} is a fraction"):
                TIP(**{name: fraction})
    with pytest.raises(
        ValueError, match="score is one of soft_or, entropy, divergence, sampled, got 'softor'"
    ):
        TIP(score="softor")
    with pytest.raises(TypeError, match="only a sampled token"):
        TIP(estimator=MonteCarlo())
    with pytest.raises(TypeError, match=r"write FusedLinear\(\)"):
        TIP(estimator=FusedAtoms(TopK(5)))


def test_wrong_tensors_are_refused():
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    with pytest.raises(TypeError, match="reads log_p, log_q; got log_p"):
        TIP()(log_p=log_p)
    with pytest.raises(TypeError, match=r"mask\.bool\(\)"):
        TIP()(log_p=log_p, log_q=log_q, mask=torch.ones(ROWS))
    with pytest.raises(ValueError, match="pass mask="):
        TIP()(log_p=log_p.reshape(2, 5, VOCAB), log_q=log_q.reshape(2, 5, VOCAB))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = TIP(KL(), FusedLinear(of=TopK(20)), keep=0.2, score="entropy")
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.tip"]) == method
    assert isinstance(method, Method) and method.sampler == Mix(1.0)
    assert TIP(JS(0.5)).divergence == JS(0.5)
