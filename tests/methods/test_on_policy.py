"""On-policy distillation from sampled tokens: its gradient summed over all that the student can write."""

import pytest
import torch
from tests.thinned import fewer
from tests.worlds import (
    TRAJECTORIES,
    along_trajectories,
    close,
    each_divergence,
    gradient,
    of_tokens,
    prefix_table,
    random_rows,
)

import fdiv
from fdiv import GKD, Decoding, Exact, Mix, MonteCarlo, Offline, TopK
from fdiv.methods._method import Method
from fdiv.methods.distill.on_policy import OnPolicyDistillation, discounted

FULL_P = along_trajectories(prefix_table(seed=1))  # the teacher, [27, 3, 3]
LOG_P = of_tokens(FULL_P)
ALL = torch.ones(27, 3, dtype=torch.bool)
# A response ends with its first symbol 2, which is a token like any other.
UNTIL_STOP = torch.cat([torch.ones(27, 1), (TRAJECTORIES[:, :2] != 2).cumprod(1)], dim=1).bool()
SEQUENCE = torch.arange(27).unsqueeze(1).expand(27, 3)

each_way = pytest.mark.parametrize("estimator", [MonteCarlo(), MonteCarlo(gradient="importance")], ids=repr)
each_length = pytest.mark.parametrize("mask", [ALL, UNTIL_STOP], ids=["fixed", "until-stop"])


def student(seed=2):
    """(table, conditionals [27, 3, 3])."""
    table = prefix_table(seed).requires_grad_()
    return table, along_trajectories(table)


def rows_of(tokens, mask):
    """What the method is called with, of all trajectories as one batch."""
    return {"log_p": LOG_P[mask], "log_q": tokens[mask], "sequence": SEQUENCE[mask]}


def expected_gradient(method, mask=ALL, behaviour=None):
    """The method's gradient in the student's table on one trajectory, averaged over whoever writes them."""
    table, conditionals = student()
    leaf = of_tokens(conditionals).detach().requires_grad_()
    given = rows_of(leaf, mask)
    if behaviour is not None:
        given["log_behaviour"] = behaviour[mask]
    (each,) = torch.autograd.grad(method(**given, count=1).loss, leaf)
    chance = (leaf.detach() if behaviour is None else behaviour).sum(-1).exp()
    return gradient((chance[:, None] * each * of_tokens(conditionals)).sum(), table)


def total(divergence, conditionals, chance, mask=ALL):
    """The mean over trajectories of sum_t D(p, q)(.|y_<t)."""
    return chance @ torch.where(mask, divergence(FULL_P, conditionals), 0.0).sum(-1)


def by_hand(divergence, discount, behaviour):
    """sum_t w_t (psi_t + sum_j discount^(j - t) f_j) grad log q_t, token by token, over all texts."""
    table, conditionals = student()
    tokens = of_tokens(conditionals)
    f, psi = (function((LOG_P - tokens).detach()) for function in (divergence.f, divergence.psi))
    weight = (tokens.detach() - behaviour).exp()
    objective = 0.0
    for t in range(3):
        ahead = sum(discount ** (j - t) * f[:, j] for j in range(t + 1, 3))
        objective = objective + weight[:, t] * (psi[:, t] + ahead) * tokens[:, t]
    return gradient((behaviour.sum(-1).exp() * objective).sum(), table)


# -- the gradient ----------------------------------------------------------------------------------------


@each_length
@each_way
@each_divergence
def test_with_discount_one_the_gradient_is_that_of_the_expected_sum_through_sampling(
    divergence, estimator, mask
):
    table, conditionals = student()
    chance = of_tokens(conditionals).sum(-1).exp()
    expected = gradient(total(divergence, conditionals, chance, mask), table)
    close(expected_gradient(OnPolicyDistillation(divergence, estimator, discount=1.0), mask), expected)


@each_length
@each_way
@each_divergence
def test_with_discount_zero_the_text_is_taken_as_given_as_in_gkd(divergence, estimator, mask):
    table, conditionals = student()
    chance = of_tokens(conditionals).sum(-1).exp().detach()
    expected = gradient(total(divergence, conditionals, chance, mask), table)
    close(expected_gradient(OnPolicyDistillation(divergence, estimator), mask), expected)


def test_the_sampled_tokens_gradient_is_on_average_that_of_gkd_on_the_same_text():
    table, conditionals = student()
    chance = of_tokens(conditionals).sum(-1).exp().detach()
    losses = [GKD(fdiv.KL(), lmbda=1.0)(log_p=FULL_P[i], log_q=conditionals[i]).loss for i in range(27)]
    expected = gradient(3 * (chance @ torch.stack(losses)), table)
    close(expected_gradient(OnPolicyDistillation(fdiv.KL())), expected)


@pytest.mark.parametrize(("divergence", "error"), [(fdiv.ReverseKL(), 0.194), (fdiv.KL(), 0.132)], ids=repr)
def test_with_discount_zero_a_known_part_of_the_gradient_is_missing(divergence, error):
    """The figures of the page; found for GRPO's penalty, in the same world, by differentiating the sum."""
    whole, part = (expected_gradient(OnPolicyDistillation(divergence, discount=d)) for d in (1.0, 0.0))
    assert ((part - whole).norm() / whole.norm()).item() == pytest.approx(error, abs=0.001)


def deviation(method, evidence):
    """The standard deviation of the gradient from one response, in units of the mean gradient's norm."""
    table, conditionals = student()
    chance = of_tokens(conditionals).sum(-1).exp().detach()
    each = torch.stack([gradient(method(**evidence(conditionals, i)).loss, table) for i in range(27)])
    mean = chance @ each
    return ((chance @ (each - mean).square().sum(-1)).sqrt() / mean.norm()).item()


@pytest.mark.parametrize(
    ("divergence", "seen", "sampled"),
    [(fdiv.ReverseKL(), 0.66, 1.69), (fdiv.KL(), 0.60, 2.72), (fdiv.JS(0.5), 0.62, 2.10)],
    ids=repr,
)
def test_to_see_the_vocabulary_takes_noise_away(divergence, seen, sampled):
    """GKD averages the sampled token out, which never adds variance (Rao and Blackwell)."""
    plain = deviation(GKD(divergence), lambda q, i: {"log_p": FULL_P[i], "log_q": q[i]})
    tokens = deviation(OnPolicyDistillation(divergence), lambda q, i: rows_of(of_tokens(q), i == SEQUENCE))
    assert plain < tokens
    assert (plain, tokens) == (pytest.approx(seen, abs=0.01), pytest.approx(sampled, abs=0.01))


def test_for_reverse_kl_discount_one_is_the_divergence_of_whole_responses():
    table, conditionals = student()
    whole = of_tokens(conditionals).sum(-1)
    expected = gradient(fdiv.ReverseKL()(LOG_P.sum(-1), whole), table)
    close(expected_gradient(OnPolicyDistillation(discount=1.0)), expected)


def test_for_reverse_kl_the_recipes_log_ratios_have_the_same_expected_gradient():
    """tinker-cookbook sums log q - log p where fdiv sums values f: they differ by a term of mean zero."""
    table, conditionals = student()
    tokens = of_tokens(conditionals)
    chance, advantage = tokens.sum(-1).exp().detach(), (LOG_P - tokens).detach()
    for discount in (0.0, 0.7, 1.0):
        reached = advantage.clone()
        for t in (1, 0):
            reached[:, t] += discount * reached[:, t + 1]
        expected = gradient(-(chance[:, None] * reached * tokens).sum(), table)
        close(expected_gradient(OnPolicyDistillation(discount=discount)), expected)


@pytest.mark.parametrize("discount", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("divergence", [fdiv.ReverseKL(), fdiv.JS(0.1), fdiv.Pearson()], ids=repr)
def test_any_discount_and_any_writer_give_the_sum_of_the_formula(divergence, discount):
    behaviour = of_tokens(along_trajectories(prefix_table(seed=5)))
    method = OnPolicyDistillation(divergence, MonteCarlo("behaviour"), discount)
    close(expected_gradient(method, behaviour=behaviour), by_hand(divergence, discount, behaviour))


def test_a_token_of_another_writer_is_weighted_exactly_where_its_prefixes_are_the_students():
    """The writer differs at the last token alone, so that no ratio of an earlier token is missing."""
    table, conditionals = student()
    tokens = of_tokens(conditionals).detach()
    other = of_tokens(along_trajectories(prefix_table(seed=5)))
    behaviour = torch.cat([tokens[:, :2], other[:, 2:]], dim=1)
    for divergence in (fdiv.ReverseKL(), fdiv.KL()):
        expected = gradient(total(divergence, conditionals, tokens.sum(-1).exp()), table)
        method = OnPolicyDistillation(divergence, MonteCarlo("behaviour"))
        close(expected_gradient(method, behaviour=behaviour), expected)


@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_a_writer_that_is_the_student_needs_no_weight(discount):
    tokens = of_tokens(student()[1]).detach()
    plain = expected_gradient(OnPolicyDistillation(discount=discount))
    weighted = OnPolicyDistillation(estimator=MonteCarlo("behaviour"), discount=discount)
    close(expected_gradient(weighted, behaviour=tokens), plain)


@fewer(each_divergence)
def test_the_expected_loss_is_the_expected_divergence_whatever_the_discount(divergence):
    _, conditionals = student()
    tokens = of_tokens(conditionals)
    chance = tokens.sum(-1).exp()
    for discount in (0.0, 1.0):
        method = OnPolicyDistillation(divergence, discount=discount)
        losses = [method(log_p=LOG_P[i], log_q=tokens[i], sequence=SEQUENCE[i]).loss for i in range(27)]
        close(chance @ torch.stack(losses), total(divergence, conditionals, chance) / 3)


# -- sums over later tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("discount", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("lengths", [[1], [2], [7], [5, 1, 13, 2, 1], [1, 1, 1, 1]], ids=repr)
def test_later_rows_are_summed_within_their_own_sequence(lengths, discount):
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rows = random_rows(1, len(sequence)).squeeze(0)
    expected = [
        sum(discount ** (j - t) * rows[j] for j in range(t + 1, len(rows)) if sequence[j] == sequence[t])
        for t in range(len(rows))
    ]
    close(discounted(rows, sequence, discount), torch.tensor(expected, dtype=torch.float64))


def test_what_follows_is_summed_without_cancellation():
    """The sum of all rows less the earlier ones would keep no digit of what follows the first."""
    rows = torch.tensor([1e8, 1e-3, 2e-3])
    sums = discounted(rows, torch.zeros(3, dtype=torch.long), 1.0)
    torch.testing.assert_close(sums, torch.tensor([3e-3, 2e-3, 0.0]), rtol=1e-6, atol=0)


def test_the_stop_token_teaches_and_counts_for_those_before_it():
    log_p, log_q = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-0.7, -1.0, -3.0]).requires_grad_()
    method = OnPolicyDistillation(discount=1.0)
    whole = method(log_p=log_p, log_q=log_q, sequence=torch.zeros(3, dtype=torch.long), count=1).loss
    without = method(log_p=log_p[:2], log_q=log_q[:2], sequence=torch.zeros(2, dtype=torch.long), count=1)
    last, missing = gradient(whole, log_q), gradient(without.loss, log_q)
    value = fdiv.ReverseKL().f((log_p - log_q).detach())[2]
    close((last - missing)[:2], value.expand(2), 1e-6)
    close(last[2], (log_q - log_p).detach()[2], 1e-6)


# -- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discount", [0.0, 0.6])
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(discount):
    """Two whole responses and one, of five tokens and one: a mean of means would differ."""
    log_p, leaf = random_rows(1, 6)[0], random_rows(1, 6, seed=1)[0].requires_grad_()
    sequence = torch.tensor([0, 0, 0, 1, 1, 2])
    method = OnPolicyDistillation(fdiv.JS(0.3), MonteCarlo("behaviour"), discount)
    given = {"log_p": log_p, "log_q": leaf, "sequence": sequence, "log_behaviour": log_p}
    whole = method(**given)
    split = (slice(0, 5), slice(5, 6))
    parts = [method(**{n: t[rows] for n, t in given.items()}, count=6) for rows in split]
    close(sum(part.loss for part in parts), whole.loss, 1e-13)
    close(gradient(sum(part.loss for part in parts), leaf), gradient(whole.loss, leaf), 1e-12)
    close((5 * parts[0].metrics["ratio"] + parts[1].metrics["ratio"]) / 6, whole.metrics["ratio"], 1e-13)
    close(whole.metrics["ratio"], (leaf - log_p).exp().mean().detach())


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_without_a_token_the_loss_is_zero_and_has_a_graph(discount):
    log_q = torch.zeros(0, requires_grad=True)
    sequence = torch.zeros(0, dtype=torch.long)
    out = OnPolicyDistillation(discount=discount)(log_p=torch.zeros(0), log_q=log_q, sequence=sequence)
    assert out.loss == 0 and out.metrics["ratio"] == 0
    assert gradient(out.loss, log_q).shape == (0,)


def test_the_teacher_and_the_writer_get_no_gradient():
    given = {
        name: random_rows(1, 4, seed)[0].requires_grad_() for seed, name in enumerate(("log_p", "log_q"))
    }
    given["log_behaviour"] = random_rows(1, 4, 7)[0].requires_grad_()
    method = OnPolicyDistillation(fdiv.KL(), MonteCarlo("behaviour"), 0.5)
    loss = method(**given, sequence=torch.zeros(4, dtype=torch.long)).loss
    grads = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    assert grads[1].any() and not any(g is not None and g.any() for g in (grads[0], grads[2]))


# -- what is refused ---------------------------------------------------------------------------------------


def test_the_writer_of_the_text_has_to_be_the_student_and_its_whole_distribution():
    for sampler in (Offline(), Mix(0.5)):
        with pytest.raises(ValueError, match=r"write Mix\(1\.0\)"):
            OnPolicyDistillation(sampler=sampler)
    for decoding in (Decoding(top_k=20), Decoding(top_p=0.9), Decoding(0.0)):
        with pytest.raises(ValueError, match="never draws some tokens"):
            OnPolicyDistillation(estimator=MonteCarlo("behaviour"), sampler=Mix(1.0, decoding))
    warm = Mix(1.0, Decoding(1.5))
    with pytest.raises(ValueError, match=r"write MonteCarlo\('behaviour'\)"):
        OnPolicyDistillation(sampler=warm)
    OnPolicyDistillation(estimator=MonteCarlo("behaviour"), sampler=warm)


@pytest.mark.parametrize("estimator", [Exact(), TopK(3), MonteCarlo("p")], ids=repr)
def test_estimators_that_do_not_see_the_students_samples_are_refused(estimator):
    with pytest.raises(TypeError, match=r"write MonteCarlo\(\) or MonteCarlo\('behaviour'\), or GKD"):
        OnPolicyDistillation(estimator=estimator)


def test_wrong_settings_and_wrong_tensors_are_refused():
    for discount in (-0.1, 1.1):
        with pytest.raises(ValueError, match="discount is between 0 and 1"):
            OnPolicyDistillation(discount=discount)
    with pytest.raises(TypeError, match="takes an f-divergence"):
        OnPolicyDistillation(fdiv.Renyi(2.0))
    sequence = torch.zeros(3, dtype=torch.long)
    with pytest.raises(TypeError, match="reads log_p, log_q; got log_p"):
        OnPolicyDistillation()(log_p=torch.zeros(3), sequence=sequence)
    with pytest.raises(ValueError, match="one number a token"):
        OnPolicyDistillation()(log_p=torch.zeros(3, 5), log_q=torch.zeros(3, 5), sequence=sequence)


def test_it_says_what_the_trainer_has_to_hand_over():
    assert OnPolicyDistillation().reads == ("sequence",)
    weighted = OnPolicyDistillation(estimator=MonteCarlo("behaviour"))
    assert weighted.reads == ("sequence", "log_behaviour")
    assert isinstance(weighted, Method)


def test_the_object_is_its_recipe():
    method = OnPolicyDistillation(fdiv.JS(0.1), MonteCarlo("behaviour"), 0.5, Mix(1.0, Decoding(0.8)))
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.on_policy"]) == method
