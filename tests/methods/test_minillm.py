"""MiniLLM: its gradient, averaged over every text there is, against the divergence of whole texts."""

import math

import pytest
import torch
from tests.methods.two_tokens import ENDING, PAIRS, rows, table, whole
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import GKD, JS, KL, Exact, FusedLinear, Mix, MonteCarlo, Offline, ReverseKL, TeacherMixed, TopK
from fdiv.methods._method import READABLE, Method
from fdiv.methods.distill.minillm import MiniLLM, discounted

PLAIN = {"gamma": 1.0, "length_normalised": False, "clip": None, "reward_scale": 1.0, "reward_clip": None}
EXACT = PLAIN | {"importance": "sequence"}
each_texts = pytest.mark.parametrize("texts", [PAIRS, ENDING], ids=["pairs", "ending"])
each_alpha = pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7])


def mixture(log_p, log_q, alpha):
    return (alpha * log_p.exp() + (1 - alpha) * log_q.exp()).log().detach()


def tensors(p, q, texts, alpha=0.0):
    of_p, of_q = rows(p, texts), rows(q, texts)
    return {
        "log_p": of_p["full"],
        "log_q": of_q["full"],
        "log_p_label": of_p["label"],
        "log_q_label": of_q["label"],
        "log_behaviour": mixture(of_p["label"], of_q["label"], alpha),
        "sequence": of_p["sequence"],
    }


def expected(method, p, q, texts, alpha=0.0):
    """The loss of each text times the chance that it is drawn token by token from the mixture."""
    total = 0.0
    for text in texts:
        some = tensors(p, q, [text], alpha)
        total = total + some["log_behaviour"].sum().exp() * method(count=1, **some).loss
    return total


def models(seed=2):
    return table(seed), table(seed + 100).requires_grad_()


# -- the exact gradient --------------------------------------------------------------------------------------


@each_texts
@each_alpha
def test_the_expected_gradient_is_that_of_the_reverse_kl_of_whole_texts(alpha, texts):
    p, q = models()
    log_p, log_q = whole(p, texts), whole(q, texts)
    truth = gradient((log_q.exp() * (log_q - log_p)).sum(), q)
    close(gradient(expected(MiniLLM(**EXACT), p, q, texts, alpha), q), truth)


@each_texts
@each_divergence
def test_the_same_holds_for_every_f_divergence(divergence, texts):
    p, q = models()
    truth = gradient(divergence(whole(p, texts), whole(q, texts)), q)
    close(gradient(expected(MiniLLM(divergence, **EXACT), p, q, texts, 0.2), q), truth)


def test_without_later_rewards_two_of_three_logits_of_the_first_token_turn_their_sign():
    p, q = models()
    truth = gradient(ReverseKL()(whole(p, PAIRS), whole(q, PAIRS)), q).reshape(4, 3)
    single = gradient(expected(MiniLLM(**EXACT | {"gamma": 0.0}), p, q, PAIRS), q).reshape(4, 3)
    assert (truth[0].sign() != single[0].sign()).tolist() == [True, False, True]
    close(single[1:], truth[1:])  # the last token has nothing later


def test_weights_of_single_tokens_are_exact_on_the_students_own_text_and_biased_on_mixed_text():
    p, q = models()
    truth = gradient(ReverseKL()(whole(p, PAIRS), whole(q, PAIRS)), q)
    close(gradient(expected(MiniLLM(**PLAIN), p, q, PAIRS, 0.0), q), truth)
    error = (gradient(expected(MiniLLM(**PLAIN), p, q, PAIRS, 0.2), q) - truth).norm() / truth.norm()
    assert error > 0.05


@pytest.mark.parametrize(
    ("settings", "alpha", "median"),
    [(EXACT | {"gamma": 0.0}, 0.0, 0.28), (PLAIN, 0.2, 0.15), ({}, 0.2, 0.27)],
    ids=["without later rewards", "weights of single tokens", "defaults"],
)
def test_how_far_stabilised_gradients_are_from_the_exact_one(settings, alpha, median):
    """Median relative errors over 40 worlds, as the page says."""
    errors = []
    for seed in range(40):
        p, q = models(seed)
        truth = gradient(ReverseKL()(whole(p, PAIRS), whole(q, PAIRS)), q)
        found = gradient(expected(MiniLLM(**settings), p, q, PAIRS, alpha), q)
        errors.append(((found - truth).norm() / truth.norm()).item())
    assert sorted(errors)[19] == pytest.approx(median, abs=0.006)


@each_texts
def test_on_the_students_own_text_the_loss_is_the_divergence_itself(texts):
    p, q = models()
    truth = ReverseKL()(whole(p, texts), whole(q, texts))
    close(expected(MiniLLM(), p, q, texts), truth)
    close(expected(MiniLLM(**EXACT), p, q, texts, 0.2), truth)


def test_without_later_rewards_it_is_gkd_under_the_reverse_kl():
    p, q = models()
    some = tensors(p, q, ENDING)
    loss = MiniLLM(gamma=0.0)(**some).loss
    gkd = GKD(ReverseKL())(log_p=some["log_p"], log_q=some["log_q"]).loss
    close(loss, gkd)
    close(gradient(loss, q), gradient(gkd, q))


def test_the_road_of_every_divergence_leads_where_that_of_reverse_kl_does():
    p, q = models()
    some = tensors(p, q, ENDING, 0.2)
    for settings in ({}, EXACT):
        short, long = (MiniLLM(d, **settings)(**some).loss for d in (ReverseKL(), 1.0 * ReverseKL()))
        close(long, short)
        close(gradient(long, q), gradient(short, q))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    p = table(1)
    q = p.clone().requires_grad_()
    for method in (MiniLLM(), MiniLLM(JS(0.5))):
        loss = method(**tensors(p, q, ENDING)).loss
        assert loss.abs() < 1e-14 and gradient(loss, q).abs().max() < 1e-14


# -- importance weights, discount, lengths, clipping ---------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5])
def test_a_tokens_weight_is_at_most_one_over_one_minus_alpha_and_one_on_average(alpha):
    log_p, log_q = random_rows(1, 20, scale=4.0), random_rows(1, 20, 1, scale=4.0)
    behaviour, average = mixture(log_p, log_q, alpha), 0.0
    for word in range(20):
        read = {
            "log_p_label": log_p[:, word],
            "log_q_label": log_q[:, word],
            "log_behaviour": behaviour[:, word],
        }
        out = MiniLLM()(log_p=log_p, log_q=log_q, sequence=torch.zeros(1, dtype=torch.long), **read)
        assert out.metrics["weight"] <= 1 / (1 - alpha) + 1e-12
        average += behaviour[0, word].exp() * out.metrics["weight"]
    close(average, torch.tensor(1.0, dtype=torch.float64))


def gains(method, rewards, lengths, ratio=1.0):
    """- d loss / d log_q_label [R], for given log p/q of the tokens and q/behaviour of all of them."""
    log_q = torch.full((len(rewards),), -1.0, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor(rewards, dtype=torch.float64)
    row = random_rows(1, 3).expand(len(rewards), 3)
    out = method(
        log_p=row, log_q=row, log_q_label=log_q, log_p_label=log_q.detach() + rewards, count=1,
        sequence=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        log_behaviour=log_q.detach() - math.log(ratio),
    )  # fmt: skip
    return -gradient(out.loss, log_q)


def test_rewards_are_scaled_clipped_discounted_and_divided_by_the_tokens_that_follow():
    """Three tokens, then one, then two; the token's own reward is not among what follows it."""
    rewards, lengths = [5.0, 1.0, -2.0, 3.0, 7.0, 4.0], [3, 1, 2]
    cases = [
        (PLAIN, [-1.0, -2.0, 0.0, 0.0, 4.0, 0.0]),
        (PLAIN | {"gamma": 0.5}, [0.5 - 0.5, -1.0, 0.0, 0.0, 2.0, 0.0]),
        (PLAIN | {"length_normalised": True}, [-0.5, -2.0, 0.0, 0.0, 4.0, 0.0]),
        (PLAIN | {"gamma": 0.5, "reward_scale": 0.5}, [0.0, -2.0, 0.0, 0.0, 4.0, 0.0]),
        (PLAIN | {"reward_scale": 0.5, "reward_clip": 3.0}, [2.0 - 3.0, -3.0, 0.0, 0.0, 3.0, 0.0]),
    ]
    for settings, following in cases:
        close(gains(MiniLLM(**settings), rewards, lengths), torch.tensor(following, dtype=torch.float64))


def test_the_ratio_is_clipped_where_that_keeps_a_step_small_and_nowhere_else():
    settings = PLAIN | {"clip": 0.2}
    for ratio, inside in ((1.25, [0.0, 1.0]), (1.1, [1.0, 1.0]), (0.7, [1.0, 0.0])):
        for reward, factor in zip((2.0, -2.0), inside, strict=True):
            found = gains(MiniLLM(**settings), [0.0, reward], [2], ratio)
            close(found, torch.tensor([factor * ratio * reward, 0.0], dtype=torch.float64))
    close(gains(MiniLLM(**PLAIN), [0.0, 2.0], [2], 1.25), torch.tensor([2.5, 0.0], dtype=torch.float64))


def test_the_defaults_are_the_authors_in_one_worked_sequence():
    """gamma .95, rewards doubled, divided by 2, 1 and 0 tokens that follow, ratio 1.1."""
    found = gains(MiniLLM(), [5.0, 1.0, -2.0], [3], 1.1)
    first, second = 2 * (0.95 * 1 - 0.95**2 * 2) / 2, 2 * 0.95 * -2
    close(found, torch.tensor([1.1 * first, 1.1 * second, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounting_is_the_recursion_within_each_sequence(gamma):
    lengths = torch.tensor([1, 7, 2, 1, 30, 4])
    sequence = torch.arange(6).repeat_interleave(lengths)
    numbers = torch.randn(45, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, total = [], 0.0
    for n in reversed(range(45)):
        total = numbers[n].item() + (gamma * total if n < 44 and sequence[n] == sequence[n + 1] else 0.0)
        expected.append(total)
    close(discounted(numbers, sequence, gamma), torch.tensor(expected[::-1], dtype=torch.float64))


# -- batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [MiniLLM(), MiniLLM(JS(0.5), **EXACT)], ids=repr)
def test_micro_batches_add_up_and_an_empty_one_has_loss_zero_and_a_graph(method):
    p, q = models()
    total = method(**tensors(p, q, ENDING, 0.2)).loss
    pieces = [
        method(count=13, **tensors(p, q, ENDING[part], 0.2)).loss
        for part in (slice(0, 1), slice(1, 4), slice(4, 7), slice(7, 7))
    ]
    close(sum(pieces), total, 1e-13)
    close(gradient(sum(pieces), q), gradient(total, q), 1e-12)
    assert pieces[3] == 0 and not gradient(pieces[3], q).any()


def test_heads_and_logits_train_the_same_objective():
    p_heads = {"p_hidden": random_rows(13, 4), "p_weight": random_rows(3, 4, 1)}
    q_heads = {
        "q_hidden": random_rows(13, 2, 2).requires_grad_(),
        "q_weight": random_rows(3, 2, 3).requires_grad_(),
    }
    log_p = (p_heads["p_hidden"] @ p_heads["p_weight"].T).log_softmax(-1)
    log_q = (q_heads["q_hidden"] @ q_heads["q_weight"].T).log_softmax(-1)
    read = {
        "sequence": rows(table(0), ENDING)["sequence"],
        "log_p_label": log_p[:, 0],
        "log_q_label": log_q[:, 0],
    }
    read["log_behaviour"] = mixture(log_p[:, 0], log_q[:, 0], 0.2)
    plain = MiniLLM()(log_p=log_p, log_q=log_q, **read).loss
    fused = MiniLLM(estimator=FusedLinear(chunk=2))(**p_heads, **q_heads, **read).loss
    close(fused, plain)
    close(gradient(fused, *q_heads.values()), gradient(plain, *q_heads.values()))


def test_a_word_that_neither_model_allows_changes_nothing():
    p, q = models()
    some = tensors(p, q, ENDING, 0.2)
    wide = {name: torch.nn.functional.pad(some[name], (0, 1), value=-math.inf) for name in ("log_p", "log_q")}
    for method in (MiniLLM(), MiniLLM(JS(0.5))):
        loss, padded = method(**some).loss, method(**some | wide).loss
        close(padded, loss)
        close(gradient(padded, q), gradient(loss, q))


# -- what is refused -----------------------------------------------------------------------------------------


def test_text_that_the_student_does_not_write_is_refused():
    for sampler in (Offline(), Mix(0.5), fdiv.Both(), fdiv.AdaptiveReplay(), "student"):
        with pytest.raises(TypeError, match=r"write TeacherMixed\(alpha\), or Mix\(1\)"):
            MiniLLM(sampler=sampler)
    MiniLLM(sampler=Mix(1))


def test_an_estimator_that_does_not_see_enough_is_refused():
    with pytest.raises(TypeError, match=r"write Exact\(\), or ReverseKL\(\)"):
        MiniLLM(JS(0.5), TopK(3))
    with pytest.raises(TypeError, match=r"write Exact\(\), FusedLinear\(\)"):
        MiniLLM(estimator=MonteCarlo())
    with pytest.raises(TypeError, match="f-divergence"):
        MiniLLM(fdiv.Renyi(2.0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"importance": "none"}, "'token' or 'sequence'"), ({"importance": "sequence"}, "write clip=None"),
        ({"gamma": 1.1}, r"\[0, 1\]"), ({"clip": 0.0}, "or None"), ({"reward_scale": 0.0}, "> 0"),
        ({"reward_clip": -1.0}, "or None"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_with_what_to_write_instead(settings, said):
    with pytest.raises(ValueError, match=said):
        MiniLLM(**settings)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = MiniLLM(KL(), Exact(), TeacherMixed(0.1), **EXACT)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.minillm"]) == method
    assert isinstance(method, Method) and set(method.reads) <= READABLE.keys()
    with pytest.raises(TypeError, match="reads log_p, log_q; got log_p"):
        MiniLLM()(**{k: v for k, v in tensors(*models(), ENDING).items() if k != "log_q"})
