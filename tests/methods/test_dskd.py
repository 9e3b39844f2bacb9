"""DSKD: cross-entropies and divergences in both models' spaces, aligned by attention or row by row."""

import math

import pytest
import torch
from tests.worlds import close, each_divergence, gradient

import fdiv
from fdiv import KL, Head
from fdiv.methods._method import Method
from fdiv.methods.distill.dskd import DSKD, DualSpace

Q_SEQUENCE, P_SEQUENCE = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 1])


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projectors(student=3, teacher=4, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DualSpace(student, teacher).double()


def batch(seed=0):
    """A student of width 3 and 6 tokens, a teacher of width 4 and 7 tokens."""
    return {
        "q_hidden": normal(5, 3, seed=seed).requires_grad_(),
        "q_weight": normal(6, 3, seed=seed + 1).requires_grad_(),
        "q_labels": torch.tensor([0, 5, 2, 2, 3]),
        "q_inputs": torch.tensor([1, 0, 4, 2, 2]),
        "q_embedding": normal(6, 3, seed=seed + 2).requires_grad_(),
        "q_sequence": Q_SEQUENCE,
        "p_hidden": normal(4, 4, seed=seed + 3).requires_grad_(),
        "p_weight": normal(7, 4, seed=seed + 4).requires_grad_(),
        "p_labels": torch.tensor([6, 1, 0, 3]),
        "p_inputs": torch.tensor([2, 6, 1, 5]),
        "p_embedding": normal(7, 4, seed=seed + 5).requires_grad_(),
        "p_sequence": P_SEQUENCE,
    }


def shared_batch():
    """Two models of one tokenizer and one width, as identity projectors let them be compared directly."""
    tensors = {
        "q_hidden": normal(5, 4, seed=0).requires_grad_(),
        "q_weight": normal(6, 4, seed=1).requires_grad_(),
    }
    tensors |= {"p_hidden": normal(5, 4, seed=2), "p_weight": tensors["q_weight"].detach()}
    labels = torch.tensor([0, 5, 2, 2, 3])
    space = projectors(4, 4)
    with torch.no_grad():
        for layer in (space.to_student, space.to_teacher):
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    return tensors | {"q_labels": labels, "p_labels": labels, "projectors": space}


def cross_entropy(logits, labels):
    return -logits.log_softmax(-1)[range(len(labels)), labels].mean()


@each_divergence
def test_with_identity_projectors_and_one_head_it_is_plain_distillation(divergence):
    """h' is the teacher's own state: D in the student's space and KL in the teacher's, at tau, and labels."""
    tensors = shared_batch()
    head = tensors["q_weight"]
    student, teacher = tensors["q_hidden"] @ head.T, tensors["p_hidden"] @ head.T.detach()
    soft = [(logits / 3.0).log_softmax(-1) for logits in (teacher, student)]
    frozen = (tensors["q_hidden"] @ head.T.detach() / 3.0).log_softmax(-1)
    expected = 0.4 * cross_entropy(student, tensors["q_labels"]) + 0.6 * (
        cross_entropy(teacher, tensors["q_labels"]) + divergence(*soft).mean() + KL()(soft[0], frozen).mean()
    )
    loss = DSKD(divergence, weight=0.6, tau=3.0, attention=False)(**tensors).loss
    close(loss, expected, 1e-12)
    moved = (tensors["q_hidden"], head)
    close(gradient(loss, *moved), gradient(expected, *moved), 1e-10)


def by_hand(tensors, space, divergence, weight, tau):
    """The head of the module, sequence by sequence, with the standard deviations of torch."""
    totals = torch.zeros(4, dtype=torch.float64)
    for n in (0, 1):
        i, j = (n == Q_SEQUENCE).nonzero().squeeze(-1), (n == P_SEQUENCE).nonzero().squeeze(-1)
        e = torch.cat([tensors["q_embedding"][tensors[k][i]] for k in ("q_inputs", "q_labels")], 1)
        target = tensors["p_embedding"][tensors["p_labels"][j]]
        key = torch.cat([tensors["p_embedding"][tensors["p_inputs"][j]], target], 1)
        scores = space.query(e) @ (key / key.std()).T / math.sqrt(8)
        state = tensors["p_hidden"][j]
        projected = scores.softmax(1) @ space.to_student(state / state.std() + target / target.std())
        reached = scores.T.softmax(1) @ space.to_teacher(tensors["q_hidden"][i])
        logits = [
            tensors["q_hidden"][i] @ tensors["q_weight"].T,
            projected @ tensors["q_weight"].T,
            state @ tensors["p_weight"].T,
            reached @ tensors["p_weight"].T,
        ]
        student, projected, teacher, reached = ((t / tau).log_softmax(-1) for t in logits)
        labels = tensors["q_labels"][i]
        right = logits[1].argmax(-1) == labels
        totals = totals + torch.stack(
            [
                cross_entropy(logits[0], labels) * len(i) / 5,
                cross_entropy(logits[1], labels) * len(i) / 5,
                (divergence(projected, student) * right).sum() / 5,
                KL()(teacher, reached).sum() / 4,
            ]
        )
    return (1 - weight) * totals[0] + weight * totals[1:].sum(), totals


LUCKY = 24  # the projected teacher is right about some tokens


@pytest.mark.parametrize("seed", [0, LUCKY])
def test_the_loss_is_its_definition_by_hand(seed):
    tensors, space = batch(seed), projectors()
    out = DSKD(fdiv.JS(0.5), weight=0.3)(**tensors, projectors=space)
    loss, totals = by_hand(tensors, space, fdiv.JS(0.5), 0.3, 2.0)
    close(out.loss, loss, 1e-12)
    names = "cross_entropy", "projected_cross_entropy", "student_space", "teacher_space"
    close(torch.stack([out.metrics[name] for name in names]), totals.detach(), 1e-12)


def test_in_the_students_space_only_rows_count_where_the_projected_teacher_is_right():
    right = []
    for label in range(6):
        tensors = batch(LUCKY) | {"q_labels": torch.full((5,), label)}
        metrics = DSKD()(**tensors, projectors=projectors()).metrics
        assert (metrics["student_space"] > 0) == (metrics["projected_accuracy"] > 0)
        right.append(metrics["projected_accuracy"] > 0)
    assert any(right) and not all(right)


def test_what_is_not_trained_gets_no_gradient():
    tensors, space = batch(), projectors()
    loss = DSKD()(**tensors, projectors=space).loss
    still = [tensors[n] for n in ("p_hidden", "p_weight", "q_embedding", "p_embedding")]
    assert torch.autograd.grad(loss, still, retain_graph=True, allow_unused=True) == (None,) * 4
    trained = [tensors["q_hidden"], tensors["q_weight"], *space.parameters()]
    assert all(g.any() for g in torch.autograd.grad(loss, trained))


def test_the_projectors_learn_the_labels_and_the_student_learns_from_them():
    """In the student's space the projected teacher is a target, and the head it is read through is fixed."""
    tensors, space = batch(LUCKY), projectors()
    assert DSKD()(**tensors, projectors=space).metrics["student_space"] > 0
    loss = DSKD(weight=1.0)(**tensors, projectors=space).loss
    alone = DSKD(2 * KL(), weight=1.0)(**tensors, projectors=space).loss  # its projectors' share is the same
    close(gradient(loss, space.to_student.weight), gradient(alone, space.to_student.weight), 1e-14)
    assert (gradient(loss, tensors["q_weight"]) - gradient(alone, tensors["q_weight"])).abs().max() > 1e-4


def test_micro_batches_add_up_to_the_whole():
    tensors, space = batch(), projectors()
    whole = DSKD()(**tensors, projectors=space).loss
    parts = 0
    for n in (0, 1):
        mine = dict(tensors)
        for name, tensor in tensors.items():
            if name.endswith(("hidden", "labels", "inputs", "sequence")):
                mine[name] = tensor[(Q_SEQUENCE if name[0] == "q" else P_SEQUENCE) == n]
        mine |= {name: torch.zeros_like(mine[name]) for name in ("q_sequence", "p_sequence")}
        parts = parts + DSKD()(**mine, projectors=space, count=5, p_count=4).loss
    moved = (tensors["q_hidden"], tensors["q_weight"], space.query.weight)
    close(parts, whole, 1e-13)
    close(gradient(parts, *moved), gradient(whole, *moved), 1e-12)


def test_heads_with_a_bias_a_scale_and_a_cap_are_read_as_models_have_them():
    tensors, bias = shared_batch(), normal(6, seed=9)
    head = Head(tensors["q_weight"].detach(), bias, scale=0.5, softcap=2.0)

    def logits(hidden):
        return 2 * ((hidden @ head.weight.T + bias) * 0.5 / 2).tanh()

    out = DSKD(attention=False)(**tensors | {"q_weight": head, "p_weight": head})
    soft = [(logits(tensors[n]) / 2).log_softmax(-1) for n in ("p_hidden", "q_hidden")]
    close(out.metrics["teacher_space"], KL()(*soft).mean().detach(), 1e-12)
    close(out.metrics["student_space"], KL()(*soft).mean().detach(), 1e-12)


def test_no_token_at_all_is_loss_0_with_a_graph():
    tensors = batch()
    for name in tensors:
        if name.endswith(("hidden", "labels", "inputs", "sequence")):
            tensors[name] = tensors[name][:0]
    loss = DSKD()(**tensors, projectors=projectors()).loss
    assert loss == 0
    assert not gradient(loss, tensors["q_weight"]).any()


def test_wrong_settings_and_arguments_are_refused():
    with pytest.raises(ValueError, match=r"weight is in \(0, 1\], got 0"):
        DSKD(weight=0)
    with pytest.raises(ValueError, match="tau is a temperature > 0"):
        DSKD(tau=-1.0)
    with pytest.raises(TypeError, match=r"write KL\(\), not 'KL'"):
        DSKD("KL")
    with pytest.raises(TypeError, match=r"who writes, got 0.5; write Offline\(\)"):
        DSKD(sampler=0.5)
    tensors, space = batch(), projectors()
    without = {k: v for k, v in tensors.items() if not k.endswith(("inputs", "embedding", "sequence"))}
    with pytest.raises(ValueError, match=r"labels differ; write DSKD\(attention=True\)"):
        DSKD(attention=False)(**without, projectors=space)
    with pytest.raises(TypeError, match="also reads nothing; got q_inputs"):
        DSKD(attention=False)(**tensors, projectors=space)
    with pytest.raises(ValueError, match="tokens on one side only"):
        DSKD()(**tensors | {"p_sequence": torch.tensor([0, 0, 0, 2])}, projectors=space)


def test_it_keeps_the_contract_and_reads_no_more_than_it_needs():
    method = DSKD(fdiv.JS(0.5))
    assert isinstance(method, Method) and hash(method) == hash(DSKD(fdiv.JS(0.5)))
    assert set(DSKD().reads) - set(DSKD(attention=False).reads) == {
        f"{side}_{name}" for side in "qp" for name in ("inputs", "embedding", "sequence")
    }
