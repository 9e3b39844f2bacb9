"""LDR and ALDR: closed forms, limits, maximisers by enumeration, and the adaptive lam where it stays."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.optimize import minimize
from tests.thinned import fewer
from tests.worlds import DIVERGENCES, close, each_divergence, each_other_object, gradient

import fdiv
from fdiv import JS, KL, TV, Alpha, Pearson, ReverseKL
from fdiv.methods._method import Method
from fdiv.methods.supervise._margins import margins, uniform, worst
from fdiv.methods.supervise.ldr import ALDR, LDR

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
LABELS = torch.tensor([0, 4, 1, 1, 3, 2])
K = 5


def out_of(method, logits=LOGITS, labels=LABELS, **more):
    return method(logits=logits, labels=labels, **more)


def delta(margin=0.1):
    rows = LOGITS - LOGITS[torch.arange(6), LABELS][:, None] + margin
    rows[torch.arange(6), LABELS] = 0
    return rows


# -- closed forms and limits --------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.05, 1.0, 7.0])
@pytest.mark.parametrize("margin", [0.0, 0.1, 2.0])
def test_under_kl_it_is_a_log_mean_exp_of_margins(lam, margin):
    expected = lam * ((delta(margin) / lam).logsumexp(-1) - math.log(K))
    close(out_of(LDR(lam=lam, margin=margin)).loss, expected.mean(), 1e-12)


def test_at_one_and_without_margin_it_is_cross_entropy_less_log_k():
    expected = torch.nn.functional.cross_entropy(LOGITS, LABELS) - math.log(K)
    close(out_of(LDR(lam=1.0, margin=0.0)).loss, expected, 1e-12)
    close(out_of(LDR(Alpha(1.0), margin=0.0)).loss, expected, 1e-12)


@fewer(each_divergence)
def test_a_small_lam_makes_it_crammer_and_singers_hinge(divergence):
    hinge = delta(1.0).amax(-1).mean()
    assert out_of(LDR(divergence, lam=0.0, margin=1.0)).loss == hinge
    if math.isfinite(divergence.f_at_zero):  # then D of one class is finite, and lam times it a bound
        error = 1e-7 * ALDR(divergence)._most(K) + 1e-12
        assert hinge - error <= out_of(LDR(divergence, lam=1e-7, margin=1.0)).loss <= hinge + 1e-12
    close(out_of(LDR(divergence, lam=1e-9, margin=1.0)).loss, hinge, 1e-3)


@each_divergence
def test_a_large_lam_makes_it_the_mean_margin(divergence):
    mean = delta(1.0).mean()
    assert out_of(LDR(divergence, lam=math.inf, margin=1.0)).loss == mean
    close(out_of(LDR(divergence, lam=1e7, margin=1.0)).loss, mean, 1e-5)


@fewer(each_divergence)
def test_no_weighting_of_the_margins_does_better(divergence):
    """The value is attained at p, and higher than at a thousand random weightings."""
    rows, lam = delta(), 0.8
    value, p, _ = worst(rows, divergence, lam)
    reached = (p * rows).sum(-1) - lam * divergence(p.log(), uniform(p))
    close(-value, reached, 1e-9)
    close(out_of(LDR(divergence, lam)).loss, reached.mean(), 1e-9)
    concentration = torch.full((K,), 0.5, dtype=torch.float64)
    torch.manual_seed(0)
    tried = torch.distributions.Dirichlet(concentration).sample((1000,))
    other = tried @ rows.T - lam * divergence(tried.log(), uniform(p))[:, None]
    assert (other.amax(0) <= -value + 1e-9).all()


@fewer(each_divergence)
def test_the_gradient_is_the_worst_weighting_less_the_label(divergence):
    logits = LOGITS.clone().requires_grad_()
    p = worst(delta(), divergence, 0.8).distribution
    expected = (p - torch.eye(K, dtype=torch.float64)[LABELS]) / 6
    close(gradient(out_of(LDR(divergence, 0.8), logits).loss, logits), expected.flatten(), 1e-9)


def test_total_variation_is_a_worked_value():
    """1/K of the mass below max - lam moves to the max: mean of max(delta, max delta - lam)."""
    rows = delta()
    expected = torch.maximum(rows, rows.amax(-1, keepdim=True) - 0.8).mean()
    close(out_of(LDR(TV(), 0.8)).loss, expected, 1e-12)


@pytest.mark.parametrize("divergence", [2 * KL(), Pearson(), 0.5 * JS(0.5)], ids=repr)
def test_a_weight_of_the_divergence_is_a_weight_of_lam(divergence):
    close(out_of(LDR(3 * divergence, 0.4)).loss, out_of(LDR(divergence, 1.2)).loss, 1e-12)


def test_micro_batches_add_up_to_the_global_batch():
    for method in (LDR(JS(0.5)), LDR(top=2)):
        whole = out_of(method).loss
        parts = [out_of(method, LOGITS[s], LABELS[s], count=6).loss for s in (slice(0, 2), slice(2, 6))]
        close(sum(parts), whole, 1e-12)
        assert out_of(method, LOGITS[:0], LABELS[:0], count=6).loss == 0


# -- a bound on the weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [2, 3, 4])
@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_with_a_bound_it_is_the_bounded_maximum(top, lam):
    """Against a general solver, row by row."""
    rows = delta()
    found = []
    for row in rows:
        d = row.numpy()

        def loss(p, d=d):
            return -(p @ d - lam * (p * torch.log(K * torch.tensor(p).clamp(min=1e-300)).numpy()).sum())

        solved = minimize(
            loss,
            [1 / K] * K,
            bounds=[(1e-12, 1 / top)] * K,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        found.append(-solved.fun)
    close(
        out_of(LDR(lam=lam, top=top)).loss,
        torch.tensor(found, dtype=torch.float64).mean(),
        3e-6,
    )


def test_a_bound_of_one_class_is_none_and_of_all_is_the_mean():
    for lam in (0.0, 0.3, math.inf):
        close(out_of(LDR(lam=lam, top=K)).loss, delta().mean(), 1e-12)
    capped = LDR(2 * KL(), lam=0.3, top=2)
    close(out_of(capped).loss, out_of(LDR(lam=0.6, top=2)).loss, 1e-13)


def test_a_small_lam_under_a_bound_is_the_mean_of_the_largest():
    largest = delta().topk(3).values.mean()
    close(out_of(LDR(lam=0.0, top=3)).loss, largest, 1e-14)
    close(out_of(LDR(lam=1e-8, top=3)).loss, largest, 1e-6)


def test_the_gradient_under_a_bound_holds_the_largest_at_it():
    logits = LOGITS.clone().requires_grad_()
    p = 6 * gradient(out_of(LDR(lam=0.5, top=2), logits).loss, logits).reshape(6, K)
    p = p + torch.eye(K, dtype=torch.float64)[LABELS]
    close(p.sum(-1), torch.ones(6, dtype=torch.float64), 1e-12)
    assert (p <= 0.5 + 1e-12).all() and (p > 0).all() and (p > 0.5 - 1e-12).any()
    for row, d in zip(p, delta() / 0.5, strict=True):  # below the bound, in proportion to e^(delta/lam)
        free = row < 0.5 - 1e-9
        ratio = (row[free].log() - d[free]).diff()
        close(ratio, torch.zeros_like(ratio), 1e-8)


# -- the scores' scale --------------------------------------------------------------------------------------


def test_the_authors_scores_do_not_depend_on_their_size():
    close(out_of(LDR(scores="unit"), 5 * LOGITS).loss, out_of(LDR(scores="unit")).loss, 1e-12)
    f = LOGITS / LOGITS.abs().mean(-1, keepdim=True)
    close(out_of(LDR(scores="unit")).loss, out_of(LDR(), f).loss, 1e-12)
    g = LOGITS.exp().log1p()
    g = g / g.mean(-1, keepdim=True)
    close(out_of(LDR(scores="softplus")).loss, out_of(LDR(), g).loss, 1e-12)


def test_scores_that_are_all_zero_stay_so():
    logits = torch.zeros(2, 3, requires_grad=True)
    out = out_of(LDR(scores="unit"), logits, torch.tensor([0, 1]))
    assert out.loss.isfinite() and gradient(out.loss, logits).isfinite().all()


@pytest.mark.parametrize("divergence", [KL(), ReverseKL(), JS(0.5), Alpha(1.5), 2 * Pearson()], ids=repr)
@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_without_a_margin_the_log_probabilities_are_the_truth_where_the_loss_is_least(divergence, lam):
    truth = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04], dtype=torch.float64)
    f = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([f], max_iter=60, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def expected_loss():
        optimiser.zero_grad()
        loss = -(truth * worst(margins(f.expand(K, K), torch.arange(K), 0.0), divergence, lam).value).sum()
        loss.backward()
        return loss

    optimiser.step(expected_loss)
    close(LDR(divergence, lam, margin=0.0).log_probs(f.detach()[None]).exp()[0], truth, 1e-4)


def test_at_the_limits_the_probabilities_are_those_of_softmax():
    for lam in (0.0, math.inf):
        assert torch.equal(LDR(lam=lam).log_probs(LOGITS), LOGITS.log_softmax(-1))
    close(LDR(lam=2.0).log_probs(LOGITS), (LOGITS / 2).log_softmax(-1), 1e-12)


# -- ALDR ---------------------------------------------------------------------------------------------------

FINITE = [d for d in DIVERGENCES if math.isfinite(d.f_at_zero)]
each_finite_divergence = pytest.mark.parametrize("divergence", FINITE, ids=repr)
DATA = SimpleNamespace(inputs=torch.zeros(10, 2))
INDEX = torch.tensor([3, 1, 7, 0, 9, 5])


def settled(method, steps=2000):
    """The table after many steps on the same batch."""
    memory = method.initial_memory(DATA, None)
    memory["lam"] = memory["lam"].double()
    for _ in range(steps):
        before = memory["lam"].clone()
        method.remember(memory, logits=LOGITS, labels=LABELS, index=INDEX, count=6)
        if (memory["lam"] - before).abs().max() < 1e-14:
            break
    return memory


@pytest.mark.parametrize("alpha", [1.2, 3.0])
@pytest.mark.parametrize("lam", [0.1, 10.0])
def test_where_lam_stays_the_loss_is_largest_in_lam(alpha, lam):
    """max over lam of psi(lam) - (alpha log K / (2 lam_0)) (lam - lam_0)^2, on a grid."""
    method = ALDR(lam=lam, alpha=alpha)
    memory = settled(method)
    grid = lam * torch.linspace(0.02, 1.5, 3000, dtype=torch.float64)[:, None]
    psi = grid * ((delta()[:, None] / grid).logsumexp(-1, keepdim=True) - math.log(K))
    objective = psi.squeeze(-1) - alpha * math.log(K) / (2 * lam) * (grid.squeeze(-1) - lam) ** 2
    best, at = objective.max(-1)
    out = out_of(method, index=INDEX, memory=memory)
    close(out.loss, best.mean(), 1e-6)
    assert out.loss >= best.mean() - 1e-12
    close(memory["lam"][INDEX], grid[at, 0], 2e-3)


def test_a_step_is_the_papers():
    """p at the old lam; then lam_0 (1 - KL / (alpha log K)), and the loss at the new one."""
    method = ALDR(lam=1.0, alpha=2.0, margin=0.1)
    memory = method.initial_memory(DATA, None)
    memory["lam"][INDEX] = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    old = memory["lam"][INDEX].double()[:, None]
    p = (delta() / old).softmax(-1)
    new = 1 - (p * (K * p).log()).sum(-1) / (2 * math.log(K))
    rows = new * ((delta() / new[:, None]).logsumexp(-1) - math.log(K)) - math.log(K) * (new - 1) ** 2
    out = out_of(method, index=INDEX, memory=memory)
    close(out.loss, rows.mean(), 1e-7)
    close(out.metrics["lam"], new.mean(), 1e-7)
    assert torch.equal(memory["lam"][INDEX].double()[:, None], old)  # the loss writes nothing
    method.remember(memory, logits=LOGITS, labels=LABELS, index=INDEX)
    close(memory["lam"][INDEX].double(), new, 1e-6)
    assert (memory["lam"][[2, 4, 6, 8]] == 1).all()


@each_finite_divergence
def test_lam_is_between_its_ends_and_least_for_a_sure_example(divergence):
    method = ALDR(divergence, lam=2.0, alpha=4.0)
    memory = method.initial_memory(DATA, None)
    logits = torch.tensor([[0.0] * K, [1e4, 0, 0, 0, 0]])
    method.remember(memory, logits=logits + 0.1, labels=torch.tensor([0, 0]), index=torch.tensor([0, 1]))
    lam = memory["lam"]
    assert lam[0] > lam[1] >= 1.5 - 1e-6 and (lam <= 2.0).all()
    if divergence.is_smooth:
        assert lam[1] < 1.52


def test_the_gradient_does_not_pass_through_lam():
    method, memory = ALDR(), ALDR().initial_memory(DATA, None)
    logits = LOGITS.clone().requires_grad_()
    out = out_of(method, logits, index=INDEX, memory=memory)
    lam = method.step(LOGITS, LABELS, torch.ones(6, dtype=torch.float64))
    p = (delta() / lam[:, None]).softmax(-1)
    expected = (p - torch.eye(K, dtype=torch.float64)[LABELS]) / 6
    close(gradient(out.loss, logits), expected.flatten(), 1e-9)


def test_the_authors_p_is_without_the_margin():
    lam = torch.ones(6, dtype=torch.float64)
    plain = ALDR(margin=0.0).step(LOGITS, LABELS, lam)
    close(ALDR(margin=3.0, margin_in_p=False).step(LOGITS, LABELS, lam), plain, 1e-13)
    assert (ALDR(margin=3.0).step(LOGITS, LABELS, lam) != plain).any()


def test_examples_that_the_table_does_not_hold_have_the_initial_lam():
    method, memory = ALDR(), ALDR().initial_memory(DATA, None)
    fresh = out_of(method, index=INDEX, memory=memory).loss
    memory["lam"].fill_(0.6)
    close(out_of(method, index=torch.full((6,), -1), memory=memory).loss, fresh, 1e-12)


@pytest.mark.parametrize("divergence", [KL(), JS(0.5)], ids=repr)
def test_without_a_margin_aldrs_log_probabilities_are_the_truth_where_its_loss_is_least(divergence):
    """At scores whose p, at a lam that stays, is the truth: then the expected gradient is 0."""
    truth = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04], dtype=torch.float64)
    method = ALDR(divergence, lam=2.0, margin=0.0)
    lam = 2.0 * (1 - divergence(truth.log(), uniform(truth)).item() / (2 * method._most(K)))
    f = (lam * divergence.phi(truth.log() - uniform(truth))).requires_grad_()
    close(method.log_probs(f.detach()[None]).exp()[0], truth, 1e-6)
    memory = {"lam": torch.full((K,), lam, dtype=torch.float64)}
    out = method(logits=f.expand(K, K), labels=torch.arange(K), index=torch.arange(K), memory=memory)
    rows = torch.autograd.grad(out.loss, f)[0]  # of uniform labels; that of the truth has truth for 1/K
    close(rows, truth - 1 / K, 1e-9)


def test_a_large_alpha_is_ldr():
    method = ALDR(alpha=1e9)
    out = out_of(method, index=INDEX, memory=method.initial_memory(DATA, None))
    close(out.loss, out_of(LDR()).loss, 1e-7)


# -- extremes and refusals ----------------------------------------------------------------------------------


@each_divergence
@pytest.mark.parametrize("lam", [1e-3, 1e3])
def test_scores_that_are_worlds_apart_give_finite_values_and_gradients(divergence, lam):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [90.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 2])
    leaf = logits.clone().requires_grad_()
    out = LDR(divergence, lam)(logits=leaf, labels=labels)
    assert out.loss.isfinite() and gradient(out.loss, leaf).isfinite().all()


@pytest.mark.parametrize("scores", ["unit", "softplus"])
@pytest.mark.parametrize("top", [1, 2])
def test_the_other_scores_and_bounds_bear_them_too(scores, top):
    leaf = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    out = LDR(lam=1e-3, scores=scores, top=top)(logits=leaf, labels=torch.tensor([0, 0, 2]))
    assert out.loss.isfinite() and gradient(out.loss, leaf).isfinite().all()


@fewer(each_finite_divergence)
def test_aldr_bears_them_too(divergence):
    method = ALDR(divergence, alpha=1.01)
    memory = method.initial_memory(DATA, None)
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [90.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    given = {"labels": torch.tensor([0, 0, 1, 2]), "index": INDEX[:4], "memory": memory}
    method.remember(logits=logits, **given)
    leaf = logits.clone().requires_grad_()
    out = method(logits=leaf, **given)
    assert out.loss.isfinite() and gradient(out.loss, leaf).isfinite().all()
    assert memory["lam"].isfinite().all() and (memory["lam"] > 0).all()


def test_half_precision_is_computed_in_single():
    out = LDR(top=2)(logits=LOGITS.bfloat16(), labels=LABELS)
    close(out.loss, LDR(top=2)(logits=LOGITS.bfloat16().float(), labels=LABELS).loss)


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    for method in (LDR, ALDR):
        with pytest.raises(TypeError, match="takes an f-divergence"):
            method(other)


def test_wrong_settings_are_refused():
    for settings, message in (
        ({"lam": -1.0}, "lam is >= 0"),
        ({"lam": math.nan}, "lam is >= 0"),
        ({"margin": math.inf}, "margin is finite"),
        ({"top": 0}, "top is a number of classes"),
        ({"divergence": JS(0.5), "top": 2}, r"under KL\(\) alone"),
        ({"scores": "soft"}, "scores is 'plain', 'unit' or 'softplus'"),
    ):
        with pytest.raises(ValueError, match=message):
            LDR(**settings)
    for settings, message in (
        ({"lam": 0.0}, "lam is finite and > 0"),
        ({"alpha": 1.0}, "alpha is > 1"),
        ({"divergence": ReverseKL()}, r"ReverseKL\(\) is infinite between one class and all"),
    ):
        with pytest.raises(ValueError, match=message):
            ALDR(**settings)


def test_wrong_tensors_are_refused():
    with pytest.raises(ValueError, match="cannot share a weight"):
        out_of(LDR(top=6))
    with pytest.raises(ValueError, match="scores of all classes are finite"):
        margins(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]), 0.1)
    with pytest.raises(ValueError, match="labels are from 0 to 4"):
        out_of(LDR(), labels=LABELS + 1)


@pytest.mark.parametrize("method", [LDR(JS(0.3), lam=0.5), ALDR(TV(), margin_in_p=False)], ids=repr)
def test_the_object_is_its_recipe_and_keeps_the_contract(method):
    assert fdiv.parse(repr(method), ["fdiv.methods.supervise.ldr"]) == method
    assert isinstance(method, Method)
