"""GOLD: a divergence on shared tokens and sorted L1 on the others, over groups merged by the chain rule."""

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import GKD
from fdiv.methods._method import Method
from fdiv.methods.distill.gold import GOLD

# The student's 6 tokens and the teacher's 8 share three: 0-5, 2-0 and 3-1.
SHARED = {"q_shared": torch.tensor([0, 2, 3]), "p_shared": torch.tensor([5, 0, 1])}
Q_GROUP = torch.tensor([0, 0, 1, 2, -1, 3])
P_GROUP = torch.tensor([0, 1, 1, 1, 2, 3, 3])
Q_LABELS = torch.tensor([4, 0, 1, 2, 3, 5])
P_LABELS = torch.tensor([2, 3, 7, 5, 0, 1, 4])


def of(rows, labels):
    return rows.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def batch(seed=0, scale=1.5):
    logits = random_rows(6, 6, seed, scale).requires_grad_()
    log_q, log_p = logits.log_softmax(-1), random_rows(7, 8, seed + 1, scale)
    tensors = {"log_p": log_p, "log_q": log_q, "p_group": P_GROUP, "q_group": Q_GROUP}
    return logits, tensors | {"log_p_label": of(log_p, P_LABELS), "log_q_label": of(log_q, Q_LABELS)} | SHARED


def merged(rows, labels, group):
    """The unnormalised distributions of groups 0 to 3, by the definition."""
    p = rows.exp()
    out = []
    for g in range(4):
        *before, last = (group == g).nonzero().squeeze(-1).tolist()
        mass = torch.ones((), dtype=torch.float64)
        for row in before:
            mass = mass * p[row, labels[row]]
        out.append(mass * p[last])
    return torch.stack(out)


def sorted_l1(p, q):
    p, q = (torch.cat([t, torch.zeros(len(t), 9 - t.shape[1])], 1).sort(1).values for t in (p, q))
    return (p - q).abs().sum(1)


def without(rows, ids):
    return rows[:, [n for n in range(rows.shape[1]) if n not in ids.tolist()]]


@each_divergence
def test_the_loss_is_its_definition_by_hand(divergence):
    """The bucket makes both sides distributions: what is not on a shared token is 1 minus what is."""
    logits, tensors = batch()
    p, q = merged(tensors["log_p"], P_LABELS, P_GROUP), merged(tensors["log_q"], Q_LABELS, Q_GROUP)
    cells = [rows[:, ids] for rows, ids in ((p, SHARED["p_shared"]), (q, SHARED["q_shared"]))]
    cells = [torch.cat([c, 1 - c.sum(1, keepdim=True)], 1).log() for c in cells]
    others = sorted_l1(without(p, SHARED["p_shared"]), without(q, SHARED["q_shared"]))
    expected = (3 / 8 * divergence(*cells) + 5 / 8 * others).mean()
    loss = GOLD(divergence)(**tensors).loss
    close(loss, expected, 1e-12)
    close(gradient(loss, logits), gradient(expected, logits), 1e-10)


@each_divergence
def test_with_one_tokenizer_it_is_the_plain_divergence(divergence):
    log_p, logits = random_rows(5, 7, 0), random_rows(5, 7, 1).requires_grad_()
    log_q, own, labels = logits.log_softmax(-1), torch.arange(5), torch.tensor([0, 3, 2, 6, 1])
    every = {"p_shared": torch.arange(7), "q_shared": torch.arange(7), "p_group": own, "q_group": own}
    out = GOLD(divergence)(
        log_p=log_p, log_q=log_q, log_p_label=of(log_p, labels), log_q_label=of(log_q, labels), **every
    )
    plain = GKD(divergence)(log_p=log_p, log_q=log_q).loss
    close(out.loss, plain, 1e-13)
    close(gradient(out.loss, logits), gradient(plain, logits), 1e-12)


@each_divergence
def test_the_divergence_is_never_negative_and_0_for_equal_masses(divergence):
    for seed in range(20):
        _, tensors = batch(seed, scale=3.0)
        assert GOLD(divergence, weights=(1.0, 0.0))(**tensors).loss > 0
    same = {k.replace("q", "p"): v.detach() for k, v in tensors.items() if "q" in k}
    out = GOLD(divergence)(**tensors | same)
    assert out.metrics["shared"].abs() < 1e-14 and out.metrics["others"].abs() < 1e-14


def test_without_the_bucket_js_is_taken_of_the_bare_masses():
    _, tensors = batch()
    p, q = merged(tensors["log_p"], P_LABELS, P_GROUP), merged(tensors["log_q"], Q_LABELS, Q_GROUP)
    p, q = p[:, SHARED["p_shared"]], q[:, SHARED["q_shared"]]
    m = (p + q) / 2
    js = ((p * (p / m).log() + q * (q / m).log()) / 2).sum(1).mean()
    close(GOLD(weights=(1.0, 0.0), bucket=False)(**tensors).loss, js, 1e-12)
    close(GOLD(bucket=False)(**tensors).metrics["shared"], js.detach(), 1e-12)


def test_a_sure_group_has_an_empty_rest_and_a_finite_gradient():
    """float32 rounds log-probabilities of sure tokens to 0; the mass that went elsewhere is then 0."""
    logits = torch.tensor([[200.0, 0, 0], [0, 1, 0]], requires_grad=True)
    log_q, every = logits.log_softmax(-1), torch.arange(3)
    out = GOLD(fdiv.KL())(
        log_p=log_q.detach()[1:],
        log_q=log_q,
        log_p_label=log_q.detach()[1:, 1],
        log_q_label=log_q[[0, 1], [0, 1]],
        p_group=torch.tensor([0]),
        q_group=torch.tensor([0, 0]),
        p_shared=every,
        q_shared=every,
    )
    assert out.loss == 0
    assert gradient(out.loss, logits).isfinite().all()


def test_tokens_without_mass_do_no_harm():
    logits, tensors = batch()
    log_q = logits.log_softmax(-1).masked_fill(torch.tensor([0, 0, 1, 0, 1, 0]).bool(), -torch.inf)
    loss = GOLD()(**tensors | {"log_q": log_q}).loss
    assert loss.isfinite() and gradient(loss, logits).isfinite().all()


def test_vocabularies_that_share_nothing_leave_the_sorted_distance():
    _, tensors = batch()
    none = torch.empty(0, dtype=torch.long)
    p, q = merged(tensors["log_p"], P_LABELS, P_GROUP), merged(tensors["log_q"], Q_LABELS, Q_GROUP)
    out = GOLD()(**tensors | {"p_shared": none, "q_shared": none})
    close(out.loss, sorted_l1(p, q).mean(), 1e-13)


def test_rows_of_no_common_group_have_no_part_in_it():
    logits, tensors = batch()
    tensors["p_group"] = torch.tensor([0, 1, 1, 1, 4, 4, -1])
    loss = GOLD()(**tensors).loss
    grad = gradient(loss, logits).reshape(6, 6)
    assert grad[:3].abs().sum(1).min() > 0 and not grad[3:].any()


def test_micro_batches_add_up_to_the_whole():
    logits, tensors = batch()
    whole = GOLD(cross_entropy=0.5)(**tensors).loss
    parts = 0
    for q_rows, p_rows in ((slice(0, 3), slice(0, 4)), (slice(3, 6), slice(4, 7))):
        rows = {k: q_rows if "q" in k else p_rows for k in tensors if "shared" not in k}
        mine = tensors | {k: tensors[k][r] for k, r in rows.items()}
        parts = parts + GOLD(cross_entropy=0.5)(**mine, groups=4, count=6).loss
    close(parts, whole, 1e-14)
    close(gradient(parts, logits), gradient(whole, logits), 1e-13)


def test_no_common_group_at_all_is_loss_0_with_a_graph():
    logits, tensors = batch()
    out = GOLD()(**tensors | {"p_group": torch.full((7,), -1)})
    assert out.loss == 0
    assert not gradient(out.loss, logits).any()


def test_labels_are_averaged_over_tokens():
    _, tensors = batch()
    plain, labelled = GOLD()(**tensors).loss, GOLD(cross_entropy=2.0)(**tensors).loss
    close(labelled - plain, -2 * tensors["log_q_label"].mean(), 1e-13)


def test_the_teacher_gets_no_gradient():
    _, tensors = batch()
    teacher = [tensors[n].requires_grad_() for n in ("log_p", "log_p_label")]
    assert torch.autograd.grad(GOLD()(**tensors).loss, teacher, allow_unused=True) == (None, None)


def test_wrong_settings_and_arguments_are_refused():
    with pytest.raises(TypeError, match=r"write KL\(\), not 'KL'"):
        GOLD("KL")
    with pytest.raises(TypeError, match="masses do not sum to one, takes an f-divergence"):
        GOLD(fdiv.Renyi(0.5), bucket=False)
    with pytest.raises(ValueError, match=r"both >= 0 and not both 0, or None; got \(0.0, 0.0\)"):
        GOLD(weights=(0.0, 0.0))
    with pytest.raises(ValueError, match="cross_entropy is a weight >= 0"):
        GOLD(cross_entropy=-0.1)
    with pytest.raises(TypeError, match=r"who writes, got 0.5; write Mix\(lmbda\)"):
        GOLD(sampler=0.5)
    _, tensors = batch()
    with pytest.raises(ValueError, match="shared tokens come in pairs, got 2 and 3"):
        GOLD()(**tensors | {"p_shared": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match="must ascend row by row"):
        GOLD()(**tensors | {"q_group": Q_GROUP.flip(0)})


def test_it_keeps_the_contract_and_its_repr_is_its_recipe():
    method = GOLD(fdiv.JS(0.1), weights=(1.0, 0.5))
    assert isinstance(method, Method) and hash(method) == hash(GOLD(fdiv.JS(0.1), weights=(1.0, 0.5)))
    assert method.sampler == fdiv.Mix(0.5, fdiv.Decoding(temperature=0.9, top_p=0.95))
