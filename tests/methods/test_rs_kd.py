"""RS-KD: right on average over every draw there is, with the paper's gradient in each."""

from itertools import product

import pytest
import torch
from tests.worlds import close, gradient, random_rows

import fdiv
from fdiv import GKD, JS, KL, TV, FusedAtoms, Offline, ReverseKL, SampledLogits
from fdiv.methods._method import Method
from fdiv.methods.distill.rs_kd import RSKD

P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def every_draw(monkeypatch, n, proposal):
    """(probability, index) of each draw of n tokens, which the next call of the code under test will make."""
    for tokens in product(range(len(proposal)), repeat=n):
        index = torch.tensor([tokens])
        monkeypatch.setattr(torch.Tensor, "multinomial", lambda self, n, replacement, i=index: i)
        yield proposal[index].prod().item(), index


def moments(monkeypatch, method, proposal=P, p=P, q=Q):
    """Mean value, mean gradient in the logits and each gradient's deviation, over every draw."""
    values, slopes, chances = [], [], []
    for chance, _ in every_draw(monkeypatch, method.n, proposal):
        logits = q.log().clone().requires_grad_()
        loss = method(log_p=p.log()[None], log_q=logits.log_softmax(-1)[None]).loss
        values.append(loss.detach())
        slopes.append(gradient(loss, logits))
        chances.append(chance)
    chances = torch.tensor(chances, dtype=torch.float64)
    close(chances.sum(), torch.tensor(1.0).double(), 1e-14)
    slopes = torch.stack(slopes)
    mean = chances @ slopes
    return chances @ torch.stack(values), mean, chances @ (slopes - mean) ** 2


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize(("n", "tau"), [(1, 1.0), (2, 1.0), (4, 1.0), (3, 0.8), (3, 1.2)])
def test_value_and_gradient_are_those_of_kl_on_average(monkeypatch, n, tau, control_variate):
    proposal = P**tau / (P**tau).sum()
    method = RSKD(n, tau, control_variate)
    value, slope, _ = moments(monkeypatch, method, proposal)
    close(value, KL()(P.log(), Q.log()), 1e-13)
    close(slope, Q - P, 1e-13)


@pytest.mark.parametrize("divergence", [ReverseKL(), JS(0.5), TV()], ids=repr)
def test_with_the_control_variate_so_are_those_of_any_divergence(monkeypatch, divergence):
    value, slope, _ = moments(monkeypatch, RSKD(3, control_variate=True, divergence=divergence))
    logits = Q.log().requires_grad_()
    expected = divergence(P.log(), logits.log_softmax(-1))
    close(value, expected.detach(), 1e-13)
    close(slope, gradient(expected, logits), 1e-13)


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_each_draw_has_the_papers_gradient_and_value_but_for_a_constant(monkeypatch, tau):
    """(sum t) q - t and -sum t log q + sum t log p, t not normalised."""
    proposal = P**tau / (P**tau).sum()
    for _, index in every_draw(monkeypatch, 3, proposal):
        t = torch.zeros(3, dtype=torch.float64)
        for token in index[0]:
            t[token] += P[token] / (3 * proposal[token])
        logits = Q.log().requires_grad_()
        loss = RSKD(3, tau)(log_p=P.log()[None], log_q=logits.log_softmax(-1)[None]).loss
        close(loss.detach(), -(t * Q.log()).sum() + (t * P.log()).sum(), 1e-13)
        close(gradient(loss, logits), t.sum() * Q - t, 1e-13)
        assert tau != 1 or t.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_gradient_has_the_variance_of_frequencies(monkeypatch, n):
    _, _, variance = moments(monkeypatch, RSKD(n))
    close(variance, P * (1 - P) / n, 1e-12)


def test_normalising_a_tempered_draw_would_be_a_bias(monkeypatch):
    """Which is why sum t is kept: the mean of t / sum t is not p."""
    proposal, mean = P**0.5 / (P**0.5).sum(), torch.zeros(3, dtype=torch.float64)
    for chance, index in every_draw(monkeypatch, 3, proposal):
        t = torch.zeros(3, dtype=torch.float64).index_add_(0, index[0], (P / proposal)[index[0]])
        mean += chance * t / t.sum()
    assert (mean - P).abs().max() > 1e-2


def test_the_control_variate_takes_the_noise_where_the_models_agree_and_adds_some_where_they_do_not(
    monkeypatch,
):
    near = torch.tensor([0.58, 0.31, 0.11], dtype=torch.float64)
    noise = {
        (name, control): moments(monkeypatch, RSKD(2, control_variate=control), q=q)[2].sum().item()
        for name, q in (("equal", P), ("near", near), ("far", Q))
        for control in (False, True)
    }
    assert noise["equal", True] < 1e-30 < noise["equal", False]
    assert noise["near", True] < 0.02 * noise["near", False]
    assert noise["far", True] > noise["far", False]


def test_the_control_variate_is_gkd_with_sampled_logits():
    log_p, logits = random_rows(4, 7), random_rows(4, 7, seed=1).requires_grad_()
    evidence = {"log_p": log_p, "log_q": logits.log_softmax(-1)}
    torch.manual_seed(0)
    one = RSKD(6, control_variate=True)(**evidence).loss
    torch.manual_seed(0)
    other = GKD(KL(), SampledLogits(6, "teacher"))(**evidence).loss
    close(one, other, 1e-14)
    close(gradient(one, logits), gradient(other, logits), 1e-14)


def test_a_draw_has_so_many_different_tokens(monkeypatch):
    assert RSKD(5).distinct(P.log()).item() == pytest.approx(2.2312, abs=5e-5)
    found = sum(chance * len(set(index[0].tolist())) for chance, index in every_draw(monkeypatch, 5, P))
    assert RSKD(5).distinct(P.log()).item() == pytest.approx(found, abs=1e-12)
    assert RSKD(1, tau=3.0).distinct(P.log()).item() == pytest.approx(1, abs=1e-12)
    assert RSKD(5).distinct(torch.tensor([0.0, -torch.inf])).item() == 1  # one token has it all


# -- a cache -----------------------------------------------------------------------------------------------


def head(rows=4, vocab=7, width=3):
    hidden, weight = random_rows(rows, width, 3).requires_grad_(), random_rows(vocab, width, 4)
    return {"q_hidden": hidden, "q_weight": weight.requires_grad_()}


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.8])
def test_a_cache_of_draws_trains_as_the_draws_did(tau, control_variate):
    log_p, given = random_rows(4, 7), head()
    student = tuple(given.values())
    log_q = (given["q_hidden"] @ given["q_weight"].T).log_softmax(-1)
    torch.manual_seed(0)
    one = RSKD(6, tau, control_variate)(log_p=log_p, log_q=log_q).loss
    torch.manual_seed(0)
    index, log_atoms, log_weight = RSKD(6, tau).draw(log_p)
    stored = {"index": index, "log_p": log_atoms, "log_weight": log_weight}
    other = RSKD(6, control_variate=control_variate, cached=True)(**stored, **given).loss
    close(one, other, 1e-12)
    close(gradient(one, *student), gradient(other, *student), 1e-12)


def test_counts_alone_give_the_papers_gradient():
    """Three bytes a token: no log-probability of the teacher is kept, and repeats are one entry."""
    log_p, given = random_rows(1, 7), head(1)
    student = tuple(given.values())
    index, log_atoms, log_weight = RSKD(20).draw(log_p)
    drawn, counts = index[0].unique(return_counts=True)
    full = RSKD(20, cached=True)(index=index, log_p=log_atoms, log_weight=log_weight, **given).loss
    frequencies = (counts.double() / 20).log()[None]
    short = RSKD(20, cached=True)(
        index=drawn[None], log_p=frequencies, log_weight=torch.zeros_like(frequencies), **given
    ).loss
    assert len(drawn) < 20
    close(gradient(short, *student), gradient(full, *student), 1e-12)


# -- the contract ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rubbish", [torch.inf, -torch.inf, torch.nan])
def test_masked_rows_do_no_harm_and_count_is_that_of_the_global_batch(rubbish):
    mask = torch.tensor([True, False, True, True])
    log_p, log_q = random_rows(4, 7), random_rows(4, 7, seed=1)
    log_p[~mask], log_q[~mask] = rubbish, rubbish
    torch.manual_seed(0)
    out = RSKD(6)(log_p=log_p, log_q=log_q.requires_grad_(), mask=mask, count=5)
    torch.manual_seed(0)
    alone = RSKD(6)(log_p=log_p[mask], log_q=log_q[mask])
    close(out.loss, alone.loss * 3 / 5, 1e-14)
    slope = torch.autograd.grad(out.loss, log_q)[0]
    assert slope.isfinite().all() and not slope[~mask].any()


def test_tokens_without_mass_are_never_drawn_and_cost_nothing():
    log_p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    logits = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64, requires_grad=True)
    loss = RSKD(10, tau=0.8)(log_p=log_p, log_q=logits.log_softmax(-1)).loss
    assert loss.isfinite() and gradient(loss, logits).isfinite().all()


def test_what_would_be_biased_or_ignored_is_refused():
    with pytest.raises(TypeError, match="write control_variate=True"):
        RSKD(divergence=JS(0.5))
    with pytest.raises(ValueError, match="leave it out"):
        RSKD(tau=0.8, cached=True)
    with pytest.raises(ValueError, match="tau > 0"):
        RSKD(tau=0.0)
    with pytest.raises(ValueError, match="n >= 1"):
        RSKD(n=0)
    with pytest.raises(TypeError, match="takes an f-divergence"):
        RSKD(divergence=fdiv.Renyi(0.5), control_variate=True)
    with pytest.raises(TypeError, match="reads log_p, log_q"):
        RSKD()(log_p=P.log()[None])


def test_the_estimator_follows_and_the_object_is_its_recipe():
    assert RSKD(20).estimator == SampledLogits(20, "teacher")
    assert RSKD(20, cached=True).estimator == FusedAtoms(SampledLogits(20, "teacher"))
    assert RSKD().sampler == Offline()
    method = RSKD(20, 0.9, control_variate=True, divergence=JS(0.1))
    assert fdiv.parse(repr(method)) == method
    assert hash(method) == hash(fdiv.parse(repr(method)))
    assert isinstance(method, Method)
