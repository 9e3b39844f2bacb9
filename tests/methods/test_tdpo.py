"""TDPO: the paper's formula on padded logits, which side its divergences move, and its limits."""

import math
from dataclasses import dataclass

import pytest
import torch
from tests.worlds import close, each_divergence, each_other_object, gradient, random_rows
from torch.nn.functional import logsigmoid

import fdiv
from fdiv import FDPO, Exact, FusedLinear, MonteCarlo, TopK
from fdiv.methods._method import Method
from fdiv.methods.prefer.tdpo import TDPO

PAIRS, VOCAB = 3, 5
CHOSEN, REJECTED = (2, 0, 3), (1, 2, 0)  # tokens of each response, some of them empty
LENGTHS = torch.tensor(CHOSEN + REJECTED)
SEQUENCE = torch.arange(2 * PAIRS).repeat_interleave(LENGTHS)
ROWS = len(SEQUENCE)
LABELS = torch.tensor([0, 3, 1, 4, 2, 2, 0, 1])
PAPER = {"TDPO1": TDPO(estimator=Exact(), alpha=1.0, stop_gradient=False), "TDPO2": TDPO(estimator=Exact())}


def models():
    """log_p [R, vocab], and the policy's logits."""
    return random_rows(ROWS, VOCAB), random_rows(ROWS, VOCAB, seed=1).requires_grad_()


def of_labels(log_probs):
    return log_probs.gather(-1, LABELS[: len(log_probs)].unsqueeze(-1)).squeeze(-1)


def tokens(log_p, log_q, sequence=SEQUENCE, pairs=PAIRS):
    return {
        "log_p_label": of_labels(log_p),
        "log_q_label": of_labels(log_q),
        "sequence": sequence,
        "pairs": pairs,
        "pairs_in_batch": pairs,
    }


def loss_of(method, log_p, logits):
    log_q = logits.log_softmax(-1)
    return method(**tokens(log_p, log_q), log_p=log_p, log_q=log_q).loss


def padded(rows):
    """[2 pairs, longest, ...] with zeros behind the end of a response."""
    box = rows.new_zeros(2 * PAIRS, int(LENGTHS.max()), *rows.shape[1:])
    place = torch.cat([torch.arange(n) for n in LENGTHS])
    return box.index_put((SEQUENCE, place), rows)


def paper(log_p, logits, beta, alpha, second):
    """The paper's loss, written down on padded log-softmaxes with a mask."""
    mask = padded(torch.ones(ROWS, dtype=torch.float64))
    labels = padded(LABELS).unsqueeze(-1)
    p, q = padded(log_p).log_softmax(-1), padded(logits).log_softmax(-1)
    u = ((q - p).gather(-1, labels).squeeze(-1) * mask).sum(-1)
    kl = ((p.exp() * (p - q)).sum(-1) * mask).sum(-1)
    kl_chosen, kl_rejected = kl.split(PAIRS)
    difference = (kl_rejected - kl_chosen.detach()) * alpha if second else kl_rejected - kl_chosen
    return -logsigmoid(beta * (u[:PAIRS] - u[PAIRS:] - difference)).mean()


@dataclass(frozen=True)
class Given:
    """An estimator whose evidence is the divergences themselves."""

    sees = "logits"
    evidence = ("rows",)
    guarantee = Exact.guarantee

    def check(self, divergence):
        pass

    def __call__(self, divergence, rows):
        return rows


# -- against the paper ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 0.5), (1.3, 0.0), (0.7, 2.0)])
def test_tdpo2_is_the_papers_loss_and_gradient_in_the_logits(beta, alpha):
    log_p, logits = models()
    ours = loss_of(TDPO(estimator=Exact(), beta=beta, alpha=alpha), log_p, logits)
    theirs = paper(log_p, logits, beta, alpha, second=True)
    close(ours, theirs)
    close(gradient(ours, logits), gradient(theirs, logits))


def test_tdpo1_is_the_papers_loss_and_gradient_in_the_logits():
    log_p, logits = models()
    ours = loss_of(PAPER["TDPO1"], log_p, logits)
    theirs = paper(log_p, logits, 0.1, 1.0, second=False)
    close(ours, theirs)
    close(gradient(ours, logits), gradient(theirs, logits))


def test_a_worked_pair():
    # Chosen: two tokens with log-ratios 1 and -0.5, D .2 and .1. Rejected: one with -1, D .6.
    given = {
        "log_p_label": torch.tensor([-2.0, -1.0, -1.0], dtype=torch.float64),
        "log_q_label": torch.tensor([-1.0, -1.5, -2.0], dtype=torch.float64),
        "sequence": torch.tensor([0, 0, 1]),
        "pairs": 1,
        "rows": torch.tensor([0.2, 0.1, 0.6], dtype=torch.float64),
    }
    first = TDPO(estimator=Given(), beta=2.0, alpha=1.0, stop_gradient=False)(**given)
    second = TDPO(estimator=Given(), beta=2.0, alpha=0.5)(**given)
    # u = .5 + 1 = 1.5; TDPO1: 2 (1.5 - .3) = 2.4, TDPO2: 2 (1.5 - .15) = 2.7
    assert first.loss.item() == pytest.approx(math.log1p(math.exp(-2.4)), rel=1e-12)
    assert second.loss.item() == pytest.approx(math.log1p(math.exp(-2.7)), rel=1e-12)
    assert second.metrics["margin"].item() == pytest.approx(2.7)
    assert second.metrics["reward_chosen"].item() == pytest.approx(2 * (0.5 + 0.5 * 0.3))
    assert second.metrics["reward_rejected"].item() == pytest.approx(2 * (-1 + 0.5 * 0.6))
    assert second.metrics["divergence_chosen"].item() == pytest.approx(0.3)
    assert second.metrics["divergence_rejected"].item() == pytest.approx(0.6)
    assert second.metrics["log_ratio_chosen"].item() == pytest.approx(0.5)
    assert second.metrics["accuracy"] == 1


@pytest.mark.parametrize("method", PAPER.values(), ids=PAPER)
def test_heads_give_the_loss_and_gradient_of_logits(method):
    p = random_rows(ROWS, 4), random_rows(VOCAB, 4, seed=3)
    q = random_rows(ROWS, 3, seed=4).requires_grad_(), random_rows(VOCAB, 3, seed=5).requires_grad_()
    log_p, log_q = (p[0] @ p[1].T).log_softmax(-1), (q[0] @ q[1].T).log_softmax(-1)
    exact = method(**tokens(log_p, log_q), log_p=log_p, log_q=log_q).loss
    fused = TDPO(estimator=FusedLinear(), alpha=method.alpha, stop_gradient=method.stop_gradient)
    heads = {"p_hidden": p[0], "p_weight": p[1], "q_hidden": q[0], "q_weight": q[1]}
    streamed = fused(**tokens(log_p, log_q), **heads).loss
    close(streamed, exact)
    close(gradient(streamed, *q), gradient(exact, *q))


# -- which side moves ----------------------------------------------------------------------------------


def slopes(method):
    """(d loss / d D of each token, beta sigmoid(-margin) of each token's pair)."""
    log_p, logits = models()
    log_q = logits.log_softmax(-1).detach()
    rows = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given = TDPO(estimator=Given(), beta=0.7, alpha=method.alpha, stop_gradient=method.stop_gradient)
    out = given(**tokens(log_p, log_q), rows=rows)
    u = torch.zeros(2 * PAIRS, dtype=torch.float64).index_add(0, SEQUENCE, of_labels(log_q - log_p))
    spent = torch.zeros(2 * PAIRS, dtype=torch.float64).index_add(0, SEQUENCE, rows.detach())
    logits = u[:PAIRS] - u[PAIRS:] - given.alpha * (spent[PAIRS:] - spent[:PAIRS])
    pull = 0.7 * torch.sigmoid(-0.7 * logits) / PAIRS
    return gradient(out.loss, rows), torch.cat([pull, pull])[SEQUENCE]


def test_tdpo2_moves_the_rejected_sides_divergence_alone_and_down():
    slope, pull = slopes(PAPER["TDPO2"])
    rejected = SEQUENCE >= PAIRS
    assert rejected.any() and (slope[~rejected] == 0).all()
    close(slope[rejected], 0.5 * pull[rejected])


def test_tdpo1_raises_the_chosen_sides_divergence_as_it_lowers_the_other():
    slope, pull = slopes(PAPER["TDPO1"])
    close(slope, torch.where(SEQUENCE >= PAIRS, pull, -pull))


def test_without_weight_on_divergences_it_is_dpo_whatever_the_divergence():
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    log_ps, log_qs = (
        torch.zeros(2 * PAIRS, dtype=torch.float64).index_add(0, SEQUENCE, of_labels(rows))
        for rows in (log_p, log_q)
    )
    dpo = FDPO(fdiv.ReverseKL(), beta=0.3)(
        log_p_chosen=log_ps[:PAIRS],
        log_p_rejected=log_ps[PAIRS:],
        log_q_chosen=log_qs[:PAIRS],
        log_q_rejected=log_qs[PAIRS:],
    )
    for divergence in (fdiv.KL(), fdiv.Pearson(), fdiv.TV()):
        method = TDPO(divergence, Exact(), beta=0.3, alpha=0.0)
        ours = method(**tokens(log_p, log_q), log_p=log_p, log_q=log_q)
        close(ours.loss, dpo.loss)
        close(gradient(ours.loss, logits), gradient(dpo.loss, logits))
        for name in ("reward_chosen", "reward_rejected", "accuracy", "margin", "log_ratio_chosen"):
            close(ours.metrics[name].double(), dpo.metrics[name].double(), 1e-7)  # a share is float32


@pytest.mark.parametrize("name", PAPER)
def test_of_labels_that_follow_a_policy_tdpo1_is_still_there_and_tdpo2_also_lowers_divergences(name):
    """A gradient summed over both orders of a pair, each as likely as that policy's margin says."""
    method = PAPER[name]
    log_p, logits = random_rows(4, VOCAB), random_rows(4, VOCAB, seed=1).requires_grad_()
    log_q = logits.log_softmax(-1)
    ways = []
    for sequence in (torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0])):
        ways.append(method(**tokens(log_p, log_q, sequence, 1), log_p=log_p, log_q=log_q))
    margin = ways[0].metrics["margin"].detach()
    chance = torch.sigmoid(torch.stack([margin, -margin]))
    expected = gradient(sum(c * way.loss for c, way in zip(chance, ways, strict=True)), logits)
    if name == "TDPO1":
        assert expected.abs().max() < 1e-12
    else:
        weight = method.beta * method.alpha * chance.prod()
        close(expected, gradient(weight * fdiv.KL()(log_p, log_q).sum(), logits))


# -- other divergences ---------------------------------------------------------------------------------


@each_divergence
def test_every_divergence_sums_its_own_rows(divergence):
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    out = TDPO(divergence, Exact())(**tokens(log_p, log_q), log_p=log_p, log_q=log_q)
    rows = divergence(log_p, log_q)
    close(out.metrics["divergence_chosen"], rows[SEQUENCE < PAIRS].sum() / PAIRS)
    close(out.metrics["divergence_rejected"], rows[SEQUENCE >= PAIRS].sum() / PAIRS)
    assert gradient(out.loss, logits).isfinite().all()


@pytest.mark.parametrize(
    "divergence", [fdiv.ReverseKL(), fdiv.JS(0.5), fdiv.Alpha(0.3), fdiv.Pearson()], ids=repr
)
def test_near_the_reference_a_divergence_over_its_curvature_is_the_papers(divergence):
    log_p = random_rows(ROWS, VOCAB)
    errors = []
    for step in (1e-2, 1e-3):
        log_q = (log_p + step * random_rows(ROWS, VOCAB, seed=1)).log_softmax(-1)
        scaled = (1 / divergence.curvature_at_one) * divergence
        given = {**tokens(log_p, log_q), "log_p": log_p, "log_q": log_q}
        theirs = TDPO(estimator=Exact())(**given).metrics["divergence_chosen"]
        errors.append((TDPO(scaled, Exact())(**given).metrics["divergence_chosen"] / theirs - 1).abs())
    assert errors[0] < 0.1 and errors[1] < 0.2 * errors[0]


# -- batches and what is not a number ------------------------------------------------------------------


def test_micro_batches_sum_to_the_batch():
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    whole = PAPER["TDPO2"](**tokens(log_p, log_q), log_p=log_p, log_q=log_q).loss
    total = 0.0
    for pairs in ([0], [1, 2]):
        ours = torch.tensor(pairs + [PAIRS + pair for pair in pairs])
        rows = (SEQUENCE.unsqueeze(-1) == ours).any(-1)
        place = (SEQUENCE[rows].unsqueeze(-1) == ours).long().argmax(-1)
        total = (
            total
            + PAPER["TDPO2"](
                log_p_label=of_labels(log_p)[rows],
                log_q_label=of_labels(log_q)[rows],
                sequence=place,
                pairs=len(pairs),
                pairs_in_batch=PAIRS,
                log_p=log_p[rows],
                log_q=log_q[rows],
            ).loss
        )
    close(total, whole)
    close(gradient(total, logits), gradient(whole, logits))


def test_a_pair_of_empty_responses_costs_log_two_and_no_pair_nothing():
    empty = torch.zeros(0, VOCAB, dtype=torch.float64, requires_grad=True)
    sequence = torch.zeros(0, dtype=torch.long)
    for pairs, loss in ((2, math.log(2)), (0, 0.0)):
        given = tokens(empty.detach(), empty, sequence, pairs)
        out = PAPER["TDPO2"](**given, log_p=empty.detach(), log_q=empty)
        assert out.loss.item() == pytest.approx(loss)
        assert gradient(out.loss, empty).shape == (0,)
        assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("size", [95.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", PAPER.values(), ids=PAPER)
def test_it_is_finite_however_far_the_policy_is_in_float32(method, sign, size):
    log_p = random_rows(ROWS, VOCAB).float()
    # The label's logit is raised or lowered, on both sides and on one side alone.
    for where in (torch.ones(ROWS), (SEQUENCE >= PAIRS).float(), (SEQUENCE < PAIRS).float()):
        logits = (log_p + sign * size * where.unsqueeze(-1) * torch.eye(VOCAB)[LABELS]).requires_grad_()
        out = method(**tokens(log_p, logits.log_softmax(-1)), log_p=log_p, log_q=logits.log_softmax(-1))
        assert out.loss.isfinite() and gradient(out.loss, logits).isfinite().all()
        assert all(value.isfinite() for value in out.metrics.values())


def test_a_reference_without_mass_somewhere_is_finite():
    log_p, logits = models()
    gaps = log_p.clone()
    gaps[torch.arange(ROWS), (LABELS + 1) % VOCAB] = -math.inf
    gaps = gaps.log_softmax(-1)
    for divergence in (fdiv.KL(), fdiv.JS(0.5)):
        log_q = logits.log_softmax(-1)
        out = TDPO(divergence, Exact())(**tokens(gaps, log_q), log_p=gaps, log_q=log_q)
        assert out.loss.isfinite() and gradient(out.loss, logits).isfinite().all()
    with pytest.raises(ValueError, match="write a bounded divergence"):
        TDPO(fdiv.ReverseKL(), Exact())(**tokens(gaps, log_q), log_p=gaps, log_q=log_q)


def test_a_response_that_a_model_cannot_write_is_refused():
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    for name, who in (("log_p_label", "reference"), ("log_q_label", "policy")):
        given = tokens(log_p, log_q)
        given[name] = torch.where(SEQUENCE == 3, -math.inf, given[name])
        with pytest.raises(ValueError, match=f"no finite log-probability under the {who}"):
            PAPER["TDPO2"](**given, log_p=log_p, log_q=log_q)


def test_half_precision_is_summed_in_float32():
    log_p, log_q = (random_rows(300, VOCAB, seed).bfloat16() for seed in (0, 1))
    given = {
        "log_p_label": log_p[:, 0],
        "log_q_label": log_q[:, 0],
        "sequence": torch.arange(2).repeat_interleave(150),
        "pairs": 1,
    }
    out = PAPER["TDPO2"](**given, log_p=log_p, log_q=log_q)
    assert out.loss.dtype == torch.float32
    exact = (log_q[:150, 0].double() - log_p[:150, 0].double()).sum()
    assert out.metrics["log_ratio_chosen"].item() == pytest.approx(exact.item(), rel=1e-5)


def test_the_reference_gets_no_gradient():
    log_p, logits = models()
    log_p_label = of_labels(log_p).requires_grad_()
    log_q = logits.log_softmax(-1)
    given = tokens(log_p, log_q) | {"log_p_label": log_p_label}
    loss = PAPER["TDPO2"](**given, log_p=log_p, log_q=log_q).loss
    assert torch.autograd.grad(loss, log_p_label, allow_unused=True)[0] is None


# -- the object ----------------------------------------------------------------------------------------


def test_it_is_a_method_that_prints_as_its_recipe():
    assert isinstance(TDPO(), Method) and TDPO.consumes == "pairs"
    assert eval(repr(TDPO()), vars(fdiv) | {"TDPO": TDPO}) == TDPO()


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError):
        TDPO(other)


def test_an_estimator_that_sees_the_texts_own_token_is_refused():
    with pytest.raises(TypeError, match=r"write FusedLinear\(\) or Exact\(\)"):
        TDPO(estimator=MonteCarlo())
    assert TDPO(estimator=FusedLinear(of=TopK(3))).estimator.of == TopK(3)


def test_bad_numbers_are_refused():
    for bad in ({"beta": 0.0}, {"beta": math.nan}, {"alpha": -0.1}, {"alpha": math.nan}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TDPO(**bad)
    with pytest.raises(TypeError, match="the estimator reads"):
        TDPO()(**tokens(*(rows.detach() for rows in models())))
