"""SeqKD: likelihood of the teacher's samples is KL between whole responses."""

import pytest
import torch
from tests.worlds import along_trajectories, close, gradient, of_tokens, prefix_table

import fdiv
from fdiv import SFT, Decoding, Offline, TeacherWritten
from fdiv.methods._method import Method
from fdiv.methods.distill.seq_kd import SeqKD


def models():
    """The teacher's log-probabilities of 27 responses' tokens [27, 3], the student's table and its own."""
    table = prefix_table(1).requires_grad_()
    return of_tokens(along_trajectories(prefix_table(0))), table, of_tokens(along_trajectories(table))


def test_its_expectation_is_the_sequence_kl_and_the_teachers_entropy():
    log_p, table, log_q = models()
    p = log_p.sum(1).exp()
    # 3 tokens a response, over which the loss is a mean.
    loss = 3 * sum(weight * SeqKD()(log_q_label=rows).loss for weight, rows in zip(p, log_q, strict=True))
    divergence = fdiv.KL()(log_p.sum(1), log_q.sum(1))
    close(loss, divergence - (p * log_p.sum(1)).sum(), 1e-12)
    close(gradient(loss, table), gradient(divergence, table), 1e-12)


def test_its_expected_gradient_is_that_of_the_tokens_kl_along_the_teachers_text():
    """The chain rule: the sequence KL is the sum of the tokens' KLs at the teacher's prefixes."""
    log_p, table, log_q = models()
    p = log_p.sum(1).exp()
    tokens = fdiv.KL()(along_trajectories(prefix_table(0)), along_trajectories(table))  # [27, 3]
    loss = 3 * sum(weight * SeqKD()(log_q_label=rows).loss for weight, rows in zip(p, log_q, strict=True))
    close(gradient(loss, table), gradient((p.unsqueeze(1) * tokens).sum(), table), 1e-12)


def test_on_the_same_text_it_is_sft():
    _, table, log_q = models()
    loss, expected = SeqKD()(log_q_label=log_q.flatten()).loss, SFT()(log_q=log_q.flatten()).loss
    assert loss == expected
    assert torch.equal(gradient(loss, table), gradient(expected, table))


def test_on_one_response_to_a_prompt_the_optimum_is_that_response_and_not_the_teacher():
    """As with the teacher's mode, or its greedy answer."""
    log_p, _, log_q = models()
    best = log_p.sum(1).argmax()
    table = prefix_table(1).requires_grad_()
    descent = torch.optim.SGD([table], lr=20.0)
    for _ in range(300):
        descent.zero_grad()
        SeqKD()(log_q_label=of_tokens(along_trajectories(table))[best]).loss.backward()
        descent.step()
    assert log_q.sum(1).exp()[best] < 0.5
    assert of_tokens(along_trajectories(table))[best].sum().exp() > 0.99


@pytest.mark.parametrize("rubbish", [torch.inf, -torch.inf, torch.nan])
def test_masked_tokens_do_no_harm_and_micro_batches_add_up(rubbish):
    log_q = torch.tensor([-1.0, rubbish, -3.0, -5.0], requires_grad=True)
    mask = torch.tensor([True, False, True, True])
    whole = SeqKD()(log_q_label=log_q, mask=mask).loss
    parts = [SeqKD()(log_q_label=log_q[r], mask=mask[r], count=3).loss for r in (slice(0, 2), slice(2, 4))]
    assert whole == 3 and sum(parts) == 3
    assert torch.equal(gradient(sum(parts), log_q), gradient(whole, log_q))
    close(gradient(whole, log_q), torch.tensor([-1 / 3, 0, -1 / 3, -1 / 3]), 1e-6)


def test_no_token_at_all_has_loss_zero_and_a_graph():
    log_q = torch.tensor([-1.0, -2.0], requires_grad=True)
    for rows, mask in ((slice(0, 0), None), (slice(0, 2), torch.zeros(2, dtype=torch.bool))):
        loss = SeqKD()(log_q_label=log_q[rows], mask=mask).loss
        assert loss == 0 and not gradient(loss, log_q).any()


def test_another_divergence_or_text_is_refused():
    with pytest.raises(TypeError, match="write GKD"):
        SeqKD(fdiv.ReverseKL())
    with pytest.raises(TypeError, match=r"write TeacherWritten\(\)"):
        SeqKD(sampler=Offline())
    with pytest.raises(TypeError, match="log_p"):
        SeqKD()(log_q_label=torch.zeros(2), log_p=torch.zeros(2))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = SeqKD(sampler=TeacherWritten(Decoding(temperature=0.0)))
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.seq_kd"]) == method
    assert isinstance(method, Method) and method.estimator is None and method.reads == ("log_q_label",)
    assert SeqKD().sampler.writer(0.5, 0.5, {}) == "teacher"
