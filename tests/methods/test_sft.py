"""SFT: the mean negative log-likelihood, which is KL from one-hot labels."""

import pytest
import torch
from tests.worlds import close, gradient, random_rows

import fdiv
from fdiv import SFT

LABELS = torch.tensor([2, 0, 6, 6])


def test_the_loss_is_cross_entropy_and_kl_from_one_hot_labels():
    logits = random_rows(4, 7).requires_grad_()
    log_q = logits.log_softmax(-1)
    loss = SFT()(log_q=log_q[range(4), LABELS]).loss
    close(loss, torch.nn.functional.cross_entropy(logits, LABELS), 1e-14)
    one_hot = torch.nn.functional.one_hot(LABELS, 7).double().log()
    close(loss, fdiv.KL()(one_hot, log_q).mean(), 1e-14)
    close(gradient(loss, logits), gradient(fdiv.KL()(one_hot, log_q).mean(), logits), 1e-13)


@pytest.mark.parametrize("rubbish", [torch.inf, -torch.inf, torch.nan])
def test_masked_labels_do_no_harm_and_count_is_global(rubbish):
    log_q = torch.tensor([-1.0, rubbish, -3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    loss = SFT()(log_q=log_q, mask=mask).loss
    assert loss == 2
    assert torch.equal(gradient(loss, log_q), torch.tensor([-0.5, 0, -0.5]))
    assert SFT()(log_q=log_q, mask=mask, count=8).loss == 0.5


def test_with_every_label_masked_the_loss_is_zero_and_keeps_its_graph():
    log_q = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = SFT()(log_q=log_q, mask=torch.zeros(2, dtype=torch.bool)).loss
    assert loss == 0 and not gradient(loss, log_q).any()


def test_no_other_divergence_is_called_sft():
    with pytest.raises(TypeError, match="write GKD"):
        SFT(fdiv.ReverseKL())
    assert fdiv.parse("SFT()") == SFT()
