"""SequenceMatch: telescoping flows, IQ-Learn's weights, and on a tree the divergence between visits."""

import math
from itertools import product

import pytest
import torch
from tests.thinned import thinned
from tests.worlds import close, each_divergence, each_other_object, gradient

import fdiv
from fdiv import Both, Mix, Offline
from fdiv.methods._method import Method, mean_over_sequences
from fdiv.methods.match.sequence_match import SequenceMatch, share_of_data
from fdiv.sample.replay import AdaptiveReplay

GAMMA = 0.8
WHOLE = {"gamma": GAMMA, "ramp": 0.0}  # no behaviour cloning

# -- a tree: two tokens of three symbols; the state is 0, then 1 + the first symbol -----------------------

PATHS = list(product(range(3), repeat=2))
DATA = [6, 1, 1, 2, 4, 2, 1, 2, 1]  # how often each path occurs in 20 texts
STUDENT = [2, 3, 1, 4, 2, 1, 3, 1, 3]


def rows(logits, texts, by_student=None):
    """A method's arguments: logits [4, 3] of the states at the tokens of texts, pairs of symbols."""
    paths = torch.tensor(texts)
    state = torch.stack([torch.zeros(len(paths), dtype=torch.long), 1 + paths[:, 0]], 1).flatten()
    sequence = torch.arange(len(paths)).repeat_interleave(2)
    by = torch.zeros(len(paths), dtype=torch.bool) if by_student is None else by_student
    return {
        "label_logit": logits[state, paths.flatten()],
        "state_value": logits.logsumexp(-1)[state],
        "sequence": sequence,
        "sequences": len(paths),
        "by_student": by[sequence],
        "progress": 0.5,
    }


def texts_of(counts):
    return [path for path, count in zip(PATHS, counts, strict=True) for _ in range(count)]


def both(logits, **more):
    """20 texts of data and 20 of the student."""
    by = torch.arange(40) >= 20
    return rows(logits, texts_of(DATA) + texts_of(STUDENT), by) | more


def visits(path_chances):
    """Discounted visits of the 12 pairs of state and action: three of the root, nine of the others."""
    p = torch.as_tensor(path_chances, dtype=torch.float64)
    first = p.reshape(3, 3).sum(1)
    return torch.cat([first, GAMMA * p])


def table(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()


def rewards(logits):
    """r at the 12 pairs."""
    value = logits.logsumexp(-1)
    return torch.cat([logits[0] - GAMMA * value[1:], logits[1:].flatten()])


def logits_of(reward):
    """The soft Q-values of a reward at the 12 pairs."""
    last = reward[3:].reshape(3, 3)
    return torch.cat([(reward[:3] + GAMMA * last.logsumexp(-1))[None], last])


def minimised(function, start):
    """(the minimum, where it is)"""
    at = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [at], max_iter=300, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = function(at)
        value.backward()
        return value

    optimiser.step(closure)
    return function(at).detach(), at.detach()


# -- flows ----------------------------------------------------------------------------------------------


def random_texts(seed=1):
    """Texts of 4, 1, 3 and 2 tokens with random logits, and a value behind each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([4, 1, 3, 2])
    draw = {
        "label_logit": torch.randn(10, generator=generator, dtype=torch.float64),
        "state_value": torch.randn(10, generator=generator, dtype=torch.float64).requires_grad_(),
        "sequence": torch.arange(4).repeat_interleave(lengths),
        "by_student": torch.tensor([False, True, False, True]).repeat_interleave(lengths),
    }
    return draw, torch.randn(4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("with_end", [False, True])
def test_the_flows_of_a_text_telescope_to_the_value_of_its_prompt(with_end):
    """Whoever wrote it, and whatever the state behind its end, which stays for ever."""
    drawn, end = random_texts()
    visit = SequenceMatch(gamma=GAMMA).visits(**drawn, end_value=end if with_end else None)
    sequence = torch.cat([drawn["sequence"], torch.arange(4)]) if with_end else drawn["sequence"]
    total = torch.zeros(4, dtype=torch.float64).index_add(0, sequence, visit.weight * visit.flow)
    starts = torch.tensor([0, 4, 5, 8])
    close(total.detach(), drawn["state_value"][starts].detach(), 1e-12)


def test_a_held_end_is_an_end_of_value_nought():
    drawn, end = random_texts()
    method = SequenceMatch(**WHOLE)
    one = method(**drawn, sequences=4, progress=1.0)
    two = method(**drawn, sequences=4, progress=1.0, end_value=torch.zeros_like(end))
    close(one.loss, two.loss, 1e-13)
    assert method(**drawn, sequences=4, progress=1.0, end_value=end).loss != one.loss


def test_the_tail_of_an_end_is_the_sum_of_its_discounted_stays():
    drawn, end = random_texts()
    method = SequenceMatch(fdiv.Neyman(), penalty="expert", gamma=GAMMA)
    visit = method.visits(**drawn, end_value=end)
    n, stay = 3, (1 - GAMMA) * end[2]
    series = method.phi(stay) * sum(GAMMA**i for i in range(n, 400))
    close(visit.weight[12] * method.phi(visit.reward[12]), series, 1e-10)


def test_undiscounted_all_tokens_weigh_the_same():
    drawn, _ = random_texts()
    visit = SequenceMatch(gamma=GAMMA, discounted=False).visits(**drawn)
    assert (visit.weight == 1).all()
    value, sequence = drawn["state_value"].tolist(), [*drawn["sequence"].tolist(), None]
    following = [value[i + 1] if sequence[i + 1] == sequence[i] else 0.0 for i in range(10)]
    flow = [here - GAMMA * then for here, then in zip(value, following, strict=True)]
    close(visit.flow.detach(), torch.tensor(flow, dtype=torch.float64), 1e-13)


def test_discounted_the_students_text_says_only_the_value_of_its_prompt():
    """Under the expert's penalty; the mixture's pulls at every token."""
    logits = table()
    for penalty, moves in (("expert", False), ("mixture", True)):
        divergence = fdiv.Neyman() if penalty == "expert" else fdiv.Triangular()
        method = SequenceMatch(divergence, penalty=penalty, **WHOLE)
        given = rows(logits, texts_of(STUDENT), torch.ones(20, dtype=torch.bool))
        slope = gradient(method(**given).loss, logits).reshape(4, 3)
        assert slope[0].any() and bool(slope[1:].abs().max() > 1e-12) == moves


# -- the gradient that IQ-Learn writes down -----------------------------------------------------------------

REWARDS = torch.linspace(-0.9, 3, 14, dtype=torch.float64)
WEIGHTS = [
    (fdiv.Neyman(), lambda r: 1 - r / 2, REWARDS[REWARDS < 2]),
    (fdiv.ReverseKL(), lambda r: (-r).exp(), REWARDS),
    (2 * fdiv.JS(0.5), lambda r: (-r).exp() / (2 - (-r).exp()), REWARDS[REWARDS.neg() < math.log(2)]),
    (2 * fdiv.SquaredHellinger(), lambda r: (1 + r) ** -2, REWARDS),
]
names = [repr(row[0]) for row in WEIGHTS]


@pytest.mark.parametrize(("divergence", "weight", "r"), WEIGHTS, ids=names)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_weights_of_rewards_are_iq_learns(divergence, weight, r, alpha):
    """alpha scales the divergence: alpha f has the conjugate alpha f*(y / alpha)."""
    reward = (alpha * r).requires_grad_()
    method = SequenceMatch(divergence, penalty="expert", alpha=alpha)
    close(gradient(method.phi(reward).sum(), reward), weight(r), 1e-9)


def test_phi_of_chi_square_is_the_quadratic():
    r = torch.linspace(-50, 1.9, 20, dtype=torch.float64)
    close(SequenceMatch(fdiv.Neyman(), penalty="expert").phi(r), r - r**2 / 4, 1e-12)
    close(SequenceMatch(fdiv.Neyman(), penalty="expert", alpha=0.5).phi(r / 2), (r - r**2 / 4) / 2, 1e-12)


@each_divergence
def test_phi_is_concave_and_its_slope_a_density_ratio_up_to_the_ceiling(divergence):
    r = torch.linspace(-20, 20, 201, dtype=torch.float64).requires_grad_()
    method = SequenceMatch(divergence, penalty="expert", ceiling=50.0)
    value = method.phi(r)
    (slope,) = torch.autograd.grad(value.sum(), r)
    assert slope.isfinite().all() and (slope >= 0).all() and (slope <= 50 * (1 + 1e-9)).all()
    assert (slope.diff() <= 1e-7).all()
    step = (value[1:] - value[:-1]) / 0.2
    assert (step <= slope[:-1] + 1e-7).all() and (step >= slope[1:] - 1e-7).all()
    assert method.phi(torch.zeros(1, dtype=torch.float64)).abs() < 1e-12


# -- optima -----------------------------------------------------------------------------------------------


def log_paths(policy):
    """log pi of the nine paths, from the table of a policy."""
    log_pi = policy.log_softmax(-1)
    return (log_pi[0][:, None] + log_pi[1:]).flatten()


def entropy(policy):
    """Discounted, of the policy along its own paths."""
    log_pi = policy.log_softmax(-1)
    each = -(log_pi.exp() * log_pi).sum(-1)
    return each[0] + GAMMA * (log_pi[0].exp() * each[1:]).sum()


DUALS = [fdiv.Neyman(), fdiv.ReverseKL(), 2 * fdiv.JS(0.5), 2 * fdiv.SquaredHellinger(), fdiv.KL()]


@pytest.mark.parametrize("alpha", thinned([2.5, 1.0]))
@pytest.mark.parametrize("divergence", DUALS, ids=repr)
def test_the_least_loss_is_the_best_policys_divergence_less_its_entropy(divergence, alpha):
    """Both sides by their own optimiser, over logits and over policies; the minimisers are one policy."""
    method = SequenceMatch(divergence, penalty="expert", alpha=alpha, ceiling=1e6, **WHOLE)
    data = visits(DATA) / 20

    def primal(policy):
        between = divergence(data.log(), visits(log_paths(policy).exp()).log())
        return alpha * between - entropy(policy)

    loss, logits = minimised(lambda logits: method(**both(logits)).loss, logits_of(torch.zeros(12).double()))
    best, policy = minimised(primal, table(2))
    close(-loss, best, 1e-7)
    close(log_paths(logits).exp(), log_paths(policy).exp(), 1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_under_the_mixture_the_best_reward_finds_le_cams_divergence(alpha):
    """2 alpha Triangular() = 4 alpha chi^2(data, mixture)."""
    data, student = visits(DATA) / 20, visits(STUDENT) / 20
    mixture = (data + student) / 2
    reward = 4 * alpha * (data - student) / (data + student)
    method = SequenceMatch(alpha=alpha, **WHOLE)

    def value(reward):  # of E_data[r] - E_student[r] - E_mix[r^2] / (4 alpha), by way of the loss
        logits = logits_of(reward)
        return logits[0].logsumexp(-1) - method(**both(logits)).loss - (student * reward).sum()

    found = value(reward)
    close(found, 2 * alpha * fdiv.Triangular()(data.log(), student.log()), 1e-12)
    close(found, 4 * alpha * ((data - mixture) ** 2 / mixture).sum(), 1e-12)
    at = reward.clone().requires_grad_()
    assert gradient(value(at), at).abs().max() < 1e-12


def test_the_rewards_of_logits_are_those_of_their_visits():
    logits = table()
    given = rows(logits, PATHS)
    names = ("label_logit", "state_value", "sequence", "by_student")
    visit = SequenceMatch(gamma=GAMMA).visits(**{name: given[name] for name in names})
    pairs = torch.tensor([k for a, b in PATHS for k in (a, 3 + 3 * a + b)])
    close(visit.reward, rewards(logits)[pairs], 1e-13)


# -- behaviour cloning ----------------------------------------------------------------------------------


def test_behind_one_prompt_it_is_discounted_cloning_and_a_price_on_rewards():
    """By the telescoping; the price is r - phi(r) on data, or r^2 / (4 alpha) on both texts."""
    logits, data, student = table(), visits(DATA) / 20, visits(STUDENT) / 20
    r = rewards(logits)
    log_q = torch.cat([logits[0].log_softmax(-1), logits[1:].log_softmax(-1).flatten()])
    cloned = -(data * log_q).sum()
    for divergence in (fdiv.Neyman(), fdiv.KL(), 2 * fdiv.JS(0.5)):
        method = SequenceMatch(divergence, penalty="expert", alpha=2.0, **WHOLE)
        close(method(**both(logits)).loss, cloned + (data * (r - method.phi(r))).sum(), 1e-11)
    price = ((data + student) / 2 * r.square()).sum() / 8
    close(SequenceMatch(alpha=2.0, **WHOLE)(**both(logits)).loss, cloned + price, 1e-12)


def test_training_starts_as_behaviour_cloning_and_ends_as_matching():
    logits = table()
    given = both(logits)
    paths = torch.tensor(texts_of(DATA))
    log_q = log_paths(logits)[3 * paths[:, 0] + paths[:, 1]]
    cloned, matched = -log_q.mean(), SequenceMatch(**WHOLE)(**given).loss
    for progress, weight in ((0.0, 0.0), (0.1, 0.25), (0.2, 0.5), (0.4, 1.0), (0.9, 1.0)):
        out = SequenceMatch(gamma=GAMMA, ramp=0.4)(**given | {"progress": progress})
        close(out.loss, weight * matched + (1 - weight) * cloned, 1e-12)
        assert out.metrics["matching"].item() == pytest.approx(weight)
    kept = SequenceMatch(gamma=GAMMA, ramp=0.0, cloning=0.3)(**given)
    close(kept.loss, 0.7 * matched + 0.3 * cloned, 1e-12)


def test_cloning_whole_texts_learns_when_to_stop_and_a_mean_over_their_lengths_does_not():
    """A source that stops with chance 1/2: means over length stop with chance E[1/n] = log 2 instead."""
    lengths = [n for n in range(1, 13) for _ in range(2 ** (12 - n))]
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    stops = torch.cat([sequence[1:] != sequence[:-1], torch.ones(1, dtype=torch.bool)])

    def slopes(chance):
        """Of both losses in the logit of a stop, at this chance."""
        logit = torch.tensor(chance / (1 - chance), dtype=torch.float64).log().requires_grad_()
        label = torch.where(stops, logit, 0.0)
        value = torch.logaddexp(logit, torch.zeros_like(logit)).expand(len(sequence))
        out = SequenceMatch(gamma=GAMMA)(
            label_logit=label, state_value=value, sequence=sequence, sequences=2 * len(lengths),
            by_student=torch.zeros(len(sequence), dtype=torch.bool), progress=0.0,
        )  # fmt: skip
        averaged = mean_over_sequences(value - label, sequence)
        return [gradient(loss, logit).item() for loss in (out.loss, averaged)]

    half, log2 = slopes(0.5), slopes(math.log(2))
    assert abs(half[0]) < 2e-3 and half[1] < -0.1
    assert abs(log2[1]) < 2e-3 and log2[0] > 0.1


# -- the global batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["expert", "mixture"])
@pytest.mark.parametrize("discounted", [True, False])
def test_micro_batches_add_up_to_the_global_batch(penalty, discounted):
    divergence = 2 * fdiv.JS(0.5) if penalty == "expert" else fdiv.Triangular()
    method = SequenceMatch(divergence, penalty=penalty, gamma=GAMMA, discounted=discounted, ramp=1.0)
    logits = table()
    whole = method(**both(logits))
    texts = texts_of(DATA) + texts_of(STUDENT)
    by = torch.arange(40) >= 20
    parts = [slice(0, 7), slice(7, 25), slice(25, 40)]
    losses = [method(**rows(logits, texts[part], by[part]) | {"sequences": 40}).loss for part in parts]
    close(sum(losses), whole.loss, 1e-12)
    close(gradient(sum(losses), logits), gradient(whole.loss, logits), 1e-11)


def test_the_metrics_are_of_either_text():
    logits = table()
    metrics = SequenceMatch(**WHOLE)(**both(logits)).metrics
    for name, counts in (("reward_data", DATA), ("reward_student", STUDENT)):
        r = rewards(logits).detach()
        per_path = torch.tensor([(r[a] + r[3 + 3 * a + b]).item() / 2 for a, b in PATHS])
        close(metrics[name], (per_path.double() * torch.tensor(counts)).sum() / 20, 1e-7)
    paths = torch.tensor(texts_of(DATA))
    close(metrics["nll"], -log_paths(logits).detach()[3 * paths[:, 0] + paths[:, 1]].mean() / 2)
    assert not any(number.requires_grad for number in metrics.values())


# -- far from the ordinary --------------------------------------------------------------------------------


@each_divergence
def test_logits_far_beyond_the_range_of_exp_give_finite_values_and_gradients(divergence):
    logit = torch.tensor([1e4, -1e4, 0.0, 300.0, -300.0, 1e4], requires_grad=True)
    value = torch.tensor([1e4, 1e4, 0.0, -1e4, -1e4, 1e4], requires_grad=True)
    given = {
        "sequence": torch.tensor([0, 0, 1, 2, 2, 3]),
        "sequences": 4,
        "by_student": torch.tensor([False, False, True, False, False, True]),
        "progress": 0.7,
    }
    out = SequenceMatch(divergence, penalty="expert", ramp=1.0)(label_logit=logit, state_value=value, **given)
    assert out.loss.isfinite() and gradient(out.loss, logit, value).isfinite().all()
    assert all(number.isfinite() for number in out.metrics.values())
    mixed = SequenceMatch(ramp=1.0)(label_logit=logit, state_value=value, **given)
    assert mixed.loss.isfinite() and gradient(mixed.loss, logit, value).isfinite().all()


def test_rewards_beyond_the_ceiling_are_counted():
    given = rows(table(), PATHS) | {"label_logit": torch.tensor([-1e4, 0.0] * 9)}
    out = SequenceMatch(fdiv.Neyman(), penalty="expert", **WHOLE)(**given)
    assert out.metrics["linearised"] == 0.5


@pytest.mark.parametrize("student", [True, False])
def test_texts_of_one_writer_and_none_at_all_are_finite(student):
    method, logits = SequenceMatch(ramp=0.7), table()
    out = method(**rows(logits, PATHS, torch.full((9,), student)))
    assert out.loss.isfinite() and all(number.isfinite() for number in out.metrics.values())
    none = {name: t[:0] if isinstance(t, torch.Tensor) else t for name, t in rows(logits, PATHS).items()}
    empty = method(**none)
    assert empty.loss == 0 and not gradient(empty.loss, logits).any()


# -- what is refused --------------------------------------------------------------------------------------


def test_who_writes_has_to_leave_half_to_the_data():
    for sampler in (Both(), Mix(0.5), AdaptiveReplay(start=0.5, step=0.0)):
        assert share_of_data(sampler) == 0.5
        SequenceMatch(sampler=sampler)
    for sampler in (Mix(1.0), Offline(), Mix(0.3), AdaptiveReplay(start=0.5), AdaptiveReplay(step=0.0)):
        with pytest.raises(ValueError, match="half of the sequences are to be the data's"):
            SequenceMatch(sampler=sampler)


def test_the_mixtures_penalty_is_one_divergence():
    with pytest.raises(TypeError, match="write penalty='expert'"):
        SequenceMatch(fdiv.KL())


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="SequenceMatch takes an f-divergence"):
        SequenceMatch(other, penalty="expert")


def test_wrong_settings_are_refused():
    for settings, message in (
        ({"penalty": "chi2"}, "'mixture' or 'expert'"),
        ({"alpha": 0.0}, "alpha is finite and > 0"),
        ({"alpha": math.inf}, "alpha is finite and > 0"),
        ({"gamma": 1.0}, "gamma is between 0 and 1"),
        ({"ramp": 1.5}, "ramp is a fraction"),
        ({"cloning": -0.1}, "cloning is a fraction"),
        ({"ceiling": 1.0}, "ceiling is a density ratio > 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SequenceMatch(**settings)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = SequenceMatch(fdiv.Neyman(), penalty="expert", gamma=0.9, sampler=Both())
    assert fdiv.parse(repr(method), ["fdiv.methods.match.sequence_match"]) == method
    assert isinstance(method, Method) and SequenceMatch().divergence == fdiv.Triangular()
