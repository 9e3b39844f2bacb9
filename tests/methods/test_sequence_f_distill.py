"""f-DISTILL: sums over steps against the divergence of every text there is."""

import pytest
import torch
from tests.methods.two_tokens import ENDING, PAIRS, rows, table, whole
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import GKD, JS, KL, TV, Both, Decoding, Exact, FusedLinear, Jeffreys, Mix, ReverseKL, SkewKL, TopK
from fdiv.methods._method import READABLE, Method
from fdiv.methods.distill.sequence_f_distill import SequenceFDistill

each_texts = pytest.mark.parametrize("texts", [PAIRS, ENDING], ids=["pairs", "ending"])
# The first word's probabilities, and the second's after each first.
TEACHER = torch.tensor(
    [[0.7, 0.2, 0.1], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64
).log()
STUDENT = torch.tensor(
    [[0.2, 0.2, 0.6], [0.1, 0.3, 0.6], [0.6, 0.3, 0.1], [0.3, 0.6, 0.1]], dtype=torch.float64
).log()


def tensors(p, q, texts, by_student):
    """What the method reads of these texts; by_student: one for all, or one each."""
    of_p, of_q = rows(p, texts), rows(q, texts)
    writer = torch.as_tensor(by_student).expand(len(texts))[of_p["sequence"]]
    labels = {"log_p_label": of_p["label"], "log_q_label": of_q["label"]}
    return {
        "log_p": of_p["full"],
        "log_q": of_q["full"],
        "by_student": writer,
        "sequence": of_p["sequence"],
    } | labels


def asked(method, some):
    names = {*method.reads, *method.estimator.evidence} - {"sequences"}
    return {name: some[name] for name in names}


def expected(method, p, q, texts, writers=(False, True)):
    """The loss of one text of each writer, averaged over all that they write; writing has no gradient."""
    total = 0.0
    for by_student in writers:
        chance = whole(q if by_student else p, texts).exp().detach()
        for n, text in enumerate(texts):
            some = asked(method, tensors(p, q, [text], by_student))
            total = total + chance[n] * method(sequences=2, **some).loss
    return total


def models(seed=2):
    return table(seed), table(seed + 100).requires_grad_()


# -- values --------------------------------------------------------------------------------------------------


@each_texts
@pytest.mark.parametrize("mixture", ["half", "posterior"])
@pytest.mark.parametrize(
    "divergence", [KL(), ReverseKL(), Jeffreys(), 0.5 * KL() + 2 * ReverseKL()], ids=repr
)
def test_both_kls_and_their_sums_are_equal_to_their_steps(divergence, mixture, texts):
    p, q = models()
    close(
        expected(SequenceFDistill(divergence, mixture=mixture), p, q, texts),
        divergence(whole(p, texts), whole(q, texts)),
    )


@each_texts
@each_divergence
def test_with_the_posterior_mixture_every_f_divergence_is_equal_to_its_steps(divergence, texts):
    p, q = models()
    method = SequenceFDistill(divergence, mixture="posterior")
    close(expected(method, p, q, texts), divergence(whole(p, texts), whole(q, texts)))


@pytest.mark.parametrize(
    ("divergence", "half", "exact"), [(JS(0.5), 0.428344803, 0.344862044), (TV(), 1.16, 0.67)]
)
def test_a_worked_example(divergence, half, exact):
    """Nine texts. TV by hand: .5 at first, then .7, .5 or .7 after each word."""
    assert expected(SequenceFDistill(divergence), TEACHER, STUDENT, PAIRS).item() == pytest.approx(
        half, abs=1e-9
    )
    posterior = SequenceFDistill(divergence, mixture="posterior")
    assert expected(posterior, TEACHER, STUDENT, PAIRS).item() == pytest.approx(exact, abs=1e-9)


@each_texts
@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_half_js_is_the_papers_sum_and_never_below_the_truth(beta, texts):
    for p, q in ((TEACHER, STUDENT), *(models(seed) for seed in range(2))):
        of_p, of_q = rows(p, texts), rows(q, texts)
        mixed = torch.logaddexp(
            of_p["full"] + torch.tensor(beta, dtype=torch.float64).log(),
            of_q["full"] + torch.tensor(1 - beta, dtype=torch.float64).log(),
        )
        steps = [whole_sum(KL()(a, mixed), of_p, texts) for a in (of_p["full"], of_q["full"])]
        by_hand = beta * whole(p, texts).exp() @ steps[0] + (1 - beta) * whole(q, texts).exp() @ steps[1]
        half = expected(SequenceFDistill(JS(beta)), p, q, texts)
        close(half, by_hand)
        assert half > JS(beta)(whole(p, texts), whole(q, texts)) + 1e-3


@each_texts
def test_half_tv_is_the_papers_sum_and_an_upper_bound_with_either_writer(texts):
    for p, q in ((TEACHER, STUDENT), *(models(seed) for seed in range(2))):
        steps = whole_sum(TV()(rows(p, texts)["full"], rows(q, texts)["full"]), rows(p, texts), texts)
        by_writer = [whole(logits, texts).exp() @ steps for logits in (p, q)]
        close(expected(SequenceFDistill(TV()), p, q, texts), sum(by_writer) / 2)
        truth = TV()(whole(p, texts), whole(q, texts))
        assert all(value > truth + 1e-3 for value in by_writer)


def whole_sum(steps, of, texts):
    """The sum of a number of each token, [texts]."""
    return torch.zeros(len(texts), dtype=torch.float64).index_add(0, of["sequence"], steps)


def test_the_posterior_js_mixes_by_the_chance_that_the_teacher_wrote_so_far():
    """The same sum with m_t = w p_t + (1 - w) q_t, KL(p_t, m_t) after P and KL(q_t, m_t) after Q."""
    total = 0.0
    of_p, of_q = rows(TEACHER, PAIRS), rows(STUDENT, PAIRS)
    before = [
        torch.stack([torch.zeros(9).double(), of["label"].reshape(9, 2)[:, 0]], 1) for of in (of_p, of_q)
    ]
    w = (before[0] - before[1]).sigmoid().reshape(-1, 1)
    mixed = (w * of_p["full"].exp() + (1 - w) * of_q["full"].exp()).log()
    for logits, of in ((TEACHER, of_p), (STUDENT, of_q)):
        total = total + whole(logits, PAIRS).exp() @ whole_sum(KL()(of["full"], mixed), of, PAIRS) / 2
    close(total, expected(SequenceFDistill(mixture="posterior"), TEACHER, STUDENT, PAIRS))


# -- gradients -----------------------------------------------------------------------------------------------


@each_texts
@pytest.mark.parametrize("mixture", ["half", "posterior"])
def test_the_gradient_of_kl_is_exact(mixture, texts):
    p, q = models()
    truth = gradient(KL()(whole(p, texts), whole(q, texts)), q)
    close(gradient(expected(SequenceFDistill(KL(), mixture=mixture), p, q, texts), q), truth)


@pytest.mark.parametrize("divergence", [ReverseKL(), JS(0.5)], ids=repr)
def test_other_gradients_leave_out_what_a_token_does_to_later_ones(divergence):
    """The last token has none: its gradient is exact under the posterior mixture. MiniLLM has the rest."""
    p, q = models()
    truth = gradient(divergence(whole(p, PAIRS), whole(q, PAIRS)), q).reshape(4, 3)
    ours = gradient(expected(SequenceFDistill(divergence, mixture="posterior"), p, q, PAIRS), q).reshape(4, 3)
    close(ours[1:], truth[1:])
    assert (ours[0] - truth[0]).norm() > 0.1 * truth[0].norm()


@pytest.mark.parametrize("mixture", ["half", "posterior"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(mixture):
    p = table(1)
    q = p.clone().requires_grad_()
    loss = expected(SequenceFDistill(mixture=mixture), p, q, PAIRS)
    assert loss.abs() < 1e-14 and gradient(loss, q).abs().max() < 1e-14


# -- batches -------------------------------------------------------------------------------------------------


def test_on_one_writers_text_it_is_gkd_a_sequence_in_place_of_a_token():
    p, q = models()
    for divergence, by_student in ((KL(), False), (ReverseKL(), True)):
        some = tensors(p, q, ENDING, by_student)
        method = SequenceFDistill(divergence)
        loss = method(sequences=14, **asked(method, some)).loss
        close(loss, GKD(divergence)(log_p=some["log_p"], log_q=some["log_q"], count=7).loss)
        other = asked(method, tensors(p, q, ENDING, not by_student))
        assert method(sequences=14, **other).loss == 0


@pytest.mark.parametrize("mixture", ["half", "posterior"])
def test_micro_batches_add_up_and_an_empty_one_has_loss_zero_and_a_graph(mixture):
    p, q = models()
    writers = torch.tensor([False, True, True, False, True, False, True])
    method = SequenceFDistill(mixture=mixture)
    total = method(**asked(method, tensors(p, q, ENDING, writers))).loss
    pieces = [
        method(sequences=7, count=13, **asked(method, tensors(p, q, ENDING[part], writers[part]))).loss
        for part in (slice(0, 1), slice(1, 4), slice(4, 7), slice(7, 7))
    ]
    close(sum(pieces), total, 1e-13)
    close(gradient(sum(pieces), q), gradient(total, q), 1e-12)
    assert pieces[3] == 0 and not gradient(pieces[3], q).any()


def test_heads_and_logits_train_the_same_objective():
    heads = {"p_hidden": random_rows(13, 4), "p_weight": random_rows(3, 4, 1)}
    student = {
        "q_hidden": random_rows(13, 2, 2).requires_grad_(),
        "q_weight": random_rows(3, 2, 3).requires_grad_(),
    }
    of = rows(table(0), ENDING)
    read = {"sequence": of["sequence"], "by_student": of["sequence"] % 2 == 1, "sequences": 7}
    log_p = (heads["p_hidden"] @ heads["p_weight"].T).log_softmax(-1)
    log_q = (student["q_hidden"] @ student["q_weight"].T).log_softmax(-1)
    plain = SequenceFDistill()(log_p=log_p, log_q=log_q, **read).loss
    fused = SequenceFDistill(estimator=FusedLinear(chunk=2))(**heads, **student, **read).loss
    close(fused, plain)
    close(gradient(fused, *student.values()), gradient(plain, *student.values()))


def test_float32_text_of_many_tokens_has_finite_steps_whoever_is_sure_to_have_written_it():
    log_p, log_q = (random_rows(300, 20, seed, scale=3.0).float().requires_grad_() for seed in (0, 1))
    words = log_p.argmax(-1, keepdim=True)
    labels = {
        name: t.gather(1, words).squeeze(1).detach()
        for name, t in (("log_p_label", log_p), ("log_q_label", log_q))
    }
    read = {"sequence": torch.zeros(300, dtype=torch.long), "by_student": torch.zeros(300, dtype=torch.bool)}
    for divergence in (JS(), TV(), KL()):
        out = SequenceFDistill(divergence, mixture="posterior")(
            log_p=log_p, log_q=log_q, sequences=2, **labels, **read
        )
        assert out.loss.isfinite() and gradient(out.loss, log_q).isfinite().all()
        assert out.metrics["told_apart"] > 0.95


# -- what is refused -----------------------------------------------------------------------------------------


def test_a_divergence_without_a_sum_over_steps_is_refused_for_half():
    for divergence in (SkewKL(0.1), fdiv.Alpha(0.5), KL() + fdiv.Alpha(0.5)):
        with pytest.raises(TypeError, match="write mixture='posterior'"):
            SequenceFDistill(divergence)
        SequenceFDistill(divergence, mixture="posterior")
    with pytest.raises(TypeError, match="f-divergence"):
        SequenceFDistill(fdiv.AlphaBeta(0.2, 0.7))


def test_wrong_settings_are_refused_with_what_to_write_instead():
    with pytest.raises(ValueError, match="'half' or 'posterior'"):
        SequenceFDistill(mixture="whole")
    with pytest.raises(TypeError, match=r"write Exact\(\)"):
        SequenceFDistill(estimator=TopK(3), mixture="posterior")
    with pytest.raises(TypeError, match=r"write Both\(\)"):
        SequenceFDistill(sampler=Mix(1))
    with pytest.raises(TypeError, match=r"write Exact\(\), FusedLinear\(\)"):
        SequenceFDistill(estimator=fdiv.MonteCarlo())


def test_a_mean_over_sequences_is_not_taken_over_those_of_a_micro_batch_alone():
    method, (p, q) = SequenceFDistill(), models()
    some = asked(method, tensors(p, q, ENDING, False))
    with pytest.raises(TypeError, match="give sequences="):
        method(count=13, **some)
    with pytest.raises(TypeError, match="reads log_p, log_q; got"):
        method(**some, log_p_label=some["log_p"][:, 0])
    posterior = SequenceFDistill(mixture="posterior")
    with pytest.raises(TypeError, match="reads log_p, log_q, log_p_label, log_q_label; got log"):
        posterior(**some)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = SequenceFDistill(4.0 * JS(0.5), Exact(), Both(Decoding(top_k=30)), "posterior")
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.sequence_f_distill"]) == method
    assert isinstance(method, Method) and set(method.reads) <= READABLE.keys()
    assert SequenceFDistill().reads == ("by_student", "sequence", "sequences")
