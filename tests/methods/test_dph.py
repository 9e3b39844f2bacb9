"""DPH-RL: the authors' per-token terms, and the exact gradient of what is rehearsed, by enumeration."""

import math

import pytest
import torch
from tests.worlds import (
    LOG_P,
    along_trajectories,
    close,
    each_divergence,
    gradient,
    of_tokens,
    prefix_table,
    six_symbols,
)

import fdiv
from fdiv import GRPO, MonteCarlo
from fdiv.methods._method import Method
from fdiv.methods.rl.dph import DPH, Rehearsal

LOG_U = torch.tensor([-6.0, -2.0, -0.3, 0.0, 0.4, 1.7, 5.0], dtype=torch.float64)  # of pi / pi_0


def terms(method, log_u=LOG_U):
    """(value, slope in log pi) of the rehearsed term at policy / initial policy = u."""
    log_policy = (log_u - 3.0).requires_grad_()
    mask = torch.ones_like(log_u, dtype=torch.bool)
    value = method.rehearsed(torch.full_like(log_u, -3.0), log_policy, mask)
    return value, torch.autograd.grad(value.sum(), log_policy)[0]


def written_out(function, log_u=LOG_U):
    log_u = log_u.clone().requires_grad_()
    value = function(log_u.exp())
    return value.detach(), torch.autograd.grad(value.sum(), log_u)[0]


def alpha_form(a):
    return lambda u: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))


@pytest.mark.parametrize(
    ("divergence", "papers"),
    [
        (fdiv.KL(), lambda u: u - 1 - u.log()),
        (2 * fdiv.JS(0.5), lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log()),
        (fdiv.Alpha(0.2), alpha_form(0.2)),
        (fdiv.Alpha(0.5), alpha_form(0.5)),
        (fdiv.Alpha(0.8), alpha_form(0.8)),
    ],
    ids=["KL", "2 JS", "Alpha(0.2)", "Alpha(0.5)", "Alpha(0.8)"],
)
def test_the_terms_are_the_papers_in_value_and_slope(divergence, papers):
    for ours, theirs in zip(terms(DPH(divergence)), written_out(papers), strict=True):
        close(ours, theirs, 1e-12)
    assert (terms(DPH(divergence))[0] >= 0).all()


def test_the_cap_is_the_authors_clamp_whose_exponent_bound_is_never_reached():
    log_u = torch.tensor([-300.0, -25.0, -15.0, -10.0, -3.0, 0.0, 2.0, 2.9, 4.0, 25.0, 300.0]).double()

    def clamped(u):  # the exponent to +-20, then the value to 10
        log_ratio = u.log().clamp(-20, 20)
        return (log_ratio.exp() - 1 - log_ratio).clamp(-10, 10)

    for ours, theirs in zip(terms(DPH(cap=10.0), log_u), written_out(clamped, log_u), strict=True):
        close(ours, theirs, 1e-12)
    lost = log_u < -11  # where the policy has all but lost the answer
    assert not terms(DPH(cap=10.0), log_u)[1][lost].any()
    assert (terms(DPH(), log_u)[1][lost] < -0.9).all()


@each_divergence
def test_the_rehearsals_own_gradient_is_the_divergences_for_every_f(divergence):
    theta, log_q = six_symbols()
    value = DPH(divergence).rehearsed(LOG_P, log_q, torch.ones(6, dtype=torch.bool))
    exact = divergence(LOG_P, log_q)
    close(LOG_P.exp() @ value, exact)
    close(gradient(LOG_P.exp() @ value, theta), gradient(exact, theta))


@each_divergence
def test_over_the_initial_policys_answers_it_is_the_sum_over_their_tokens(divergence):
    table = prefix_table(seed=2).requires_grad_()
    initial, conditionals = along_trajectories(prefix_table(seed=1)), along_trajectories(table)
    mask = torch.ones(27, 3, dtype=torch.bool)
    value = DPH(divergence).rehearsed(of_tokens(initial), of_tokens(conditionals), mask)
    chance = of_tokens(initial).sum(-1).exp()
    exact = chance @ divergence(initial, conditionals).sum(-1)
    close(chance @ value.sum(-1), exact)
    close(gradient(chance @ value.sum(-1), table), gradient(exact, table))


# -- a step --------------------------------------------------------------------------------------------


def step(dtype=torch.float64, rows=4, stored=3):
    """Rollouts and stored answers, of different widths; `leaf` is what has a gradient."""
    generator = torch.Generator().manual_seed(3)
    leaf = -torch.rand(rows * 3 + stored * 5, generator=generator, dtype=dtype) - 0.2
    leaf.requires_grad_()
    log_policy, stored_log_policy = leaf[: rows * 3].reshape(rows, 3), leaf[rows * 3 :].reshape(stored, 5)
    mask, stored_mask = torch.ones(rows, 3, dtype=torch.bool), torch.ones(stored, 5, dtype=torch.bool)
    mask[:1, 1:] = stored_mask[1:2, 2:] = False
    return leaf, {
        "log_policy": log_policy,
        "log_behaviour": log_policy.detach() - torch.linspace(-0.4, 0.4, 3).to(dtype),
        "mask": mask,
        "advantage": torch.linspace(-1, 1, rows).to(dtype),
        "stored_log_policy": stored_log_policy,
        "stored_log_initial": torch.full((stored, 5), -0.7, dtype=dtype),
        "stored_mask": stored_mask,
    }


def explored(given):
    return {name: tensor for name, tensor in given.items() if not name.startswith("stored")}


def test_the_loss_is_grpo_without_a_penalty_plus_eta_times_the_token_mean_of_what_is_rehearsed():
    leaf, given = step()
    out = DPH(fdiv.JS(0.3), eta=0.2)(**given)
    grpo = GRPO(beta=0.0, clip=(0.2, 0.28))(**explored(given))
    value = MonteCarlo("p")(fdiv.JS(0.3), given["stored_log_initial"], given["stored_log_policy"])
    rehearsed = value[given["stored_mask"]].mean()
    close(out.loss, grpo.loss + 0.2 * rehearsed, 1e-13)
    close(gradient(out.loss, leaf), gradient(grpo.loss + 0.2 * rehearsed, leaf), 1e-13)
    close(out.metrics["divergence"], rehearsed.detach())
    for name in ("ratio", "clipped"):
        close(out.metrics[name], grpo.metrics[name])
    assert not any(value.requires_grad for value in out.metrics.values())


def test_micro_batches_hold_rollouts_or_stored_answers_and_add_up():
    leaf, given = step()
    method = DPH(fdiv.KL(), eta=0.3)
    counts = {"count": given["mask"].sum(), "stored_count": given["stored_mask"].sum()}
    whole = method(**given)
    parts, names = [], ("log_policy", "log_behaviour", "mask", "advantage")
    rollouts, stores = (slice(0, 2), slice(2, 4)), (slice(0, 1), slice(1, 3))
    for rows, stored in [(r, slice(0, 0)) for r in rollouts] + [(slice(0, 0), r) for r in stores]:
        some = {name: t[rows if name in names else stored] for name, t in given.items()}
        parts.append(method(**some, **counts))
    close(sum(part.loss for part in parts), whole.loss, 1e-13)
    close(gradient(sum(part.loss for part in parts), leaf), gradient(whole.loss, leaf), 1e-13)
    assert set(parts[0].metrics) == {"ratio", "clipped"} and set(parts[2].metrics) == {"divergence"}
    shares = [given["stored_mask"][rows].sum() / counts["stored_count"] for rows in stores]
    total = sum(s.double() * p.metrics["divergence"] for s, p in zip(shares, parts[2:], strict=True))
    close(total, whole.metrics["divergence"], 1e-7)


def test_neither_side_needs_the_other_nor_any_token():
    leaf, given = step()
    for name in ("mask", "stored_mask"):
        given[name] = torch.zeros_like(given[name])
    out = DPH()(**given)
    assert out.loss == 0 and not gradient(out.loss, leaf).any()
    out = DPH()(**{name: tensor[:0] for name, tensor in given.items()})
    assert out.loss == 0 and out.loss.requires_grad and not out.metrics


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_masked_tokens_are_not_looked_at(rubbish):
    leaf, given = step()
    clean = DPH()(**given)
    for name in ("log_policy", "log_behaviour", "stored_log_policy", "stored_log_initial"):
        mask = given["stored_mask" if name.startswith("stored") else "mask"]
        given[name] = torch.where(mask, given[name], rubbish)
    close(DPH()(**given).loss, clean.loss)
    close(gradient(DPH()(**given).loss, leaf), gradient(clean.loss, leaf))


def test_only_the_policy_receives_a_gradient():
    _, given = step()
    others = ("log_behaviour", "advantage", "stored_log_initial")
    for name in others:
        given[name] = given[name].clone().requires_grad_()
    loss = DPH()(**given).loss
    assert torch.autograd.grad(loss, [given[n] for n in others], allow_unused=True) == (None,) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", [fdiv.KL(), fdiv.JS(0.5), fdiv.Alpha(0.2), fdiv.ReverseKL()], ids=repr)
def test_enormous_ratios_and_impossible_answers_give_finite_losses_and_gradients(divergence, dtype):
    leaf, given = step(dtype)
    far = torch.tensor([1e4, -1e4, 100.0, -100.0, 0.0], dtype=dtype).expand(3, 5).clone()
    far[2] = -torch.inf  # the stored answer has no probability
    given["stored_log_initial"] = given["stored_log_policy"].detach() + far
    given["log_behaviour"] = given["log_policy"].detach() + far[:1, :3]
    out = DPH(divergence)(**given)
    assert out.loss.isfinite() and gradient(out.loss, leaf).isfinite().all()


# -- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"divergence": fdiv.Renyi(0.5)}, TypeError, "DPH takes an f-divergence"),
        ({"eta": 0.0}, ValueError, r"write GRPO\(beta=0.0\)"),
        ({"eta": math.nan}, ValueError, "eta must be > 0"),
        ({"clip": 1.0}, ValueError, "between 0 and 1"),
        ({"cap": 0.0}, ValueError, "None for no cap"),
        ({"rehearsal": 8}, TypeError, "rehearsal is a Rehearsal"),
    ],
    ids=repr,
)
def test_wrong_settings_are_refused(settings, error, reason):
    with pytest.raises(error, match=reason):
        DPH(**settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tries": 0}, "tries is at least 1"),
        ({"batch": 0}, "batch is at least 1"),
        ({"threshold": 6}, "write 6/8 as 0.75"),
        ({"threshold": 0.0}, r"share of the tries in \(0, 1\]"),
    ],
    ids=repr,
)
def test_a_rehearsal_that_cannot_be_is_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Rehearsal(**settings)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    for method in (DPH(), DPH(2 * fdiv.JS(0.5), 0.1, 0.2, 10.0, Rehearsal(4, 1.0, 256))):
        assert fdiv.parse(repr(method), ["fdiv.methods.rl.dph"]) == method
        assert isinstance(method, Method)
