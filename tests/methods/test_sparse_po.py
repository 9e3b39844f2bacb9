"""SparsePO and MaPO: masks against their formulas, TDPO1 where they are 1, and what dead ones do."""

import math

import pytest
import torch
from tests.worlds import close, each_divergence, each_other_object, gradient, random_rows
from torch import nn
from torch.nn.functional import layer_norm, logsigmoid

import fdiv
from fdiv import Exact, FusedLinear, MonteCarlo
from fdiv.methods._method import Method
from fdiv.methods.prefer.masks import SparseMask, TokenMask, activation_mask
from fdiv.methods.prefer.sparse_po import MaPO, SparsePO
from fdiv.methods.prefer.tdpo import TDPO

PAIRS, VOCAB, LAYERS, WIDTH, HOOKS = 3, 5, 3, 6, 4
SEQUENCE = torch.tensor([0, 0, 2, 2, 2, 3, 4, 4])  # responses 1 and 5 are empty, 3 has one token
ROWS = len(SEQUENCE)
LABELS = torch.tensor([0, 3, 1, 4, 2, 2, 0, 1])


class Fixed(nn.Module):
    """Masks that are given, and trained."""

    def __init__(self, *masks):
        super().__init__()
        self.masks = nn.ParameterList(masks)

    def forward(self, states):
        return self.masks[0], self.masks[-1]


def models():
    return random_rows(ROWS, VOCAB), random_rows(ROWS, VOCAB, seed=1).requires_grad_()


def of_labels(log_probs):
    return log_probs.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)


def given(log_p, log_q):
    return {
        "log_p_label": of_labels(log_p),
        "log_q_label": of_labels(log_q),
        "sequence": SEQUENCE,
        "pairs": PAIRS,
        "pairs_in_batch": PAIRS,
        "log_p": log_p,
        "log_q": log_q,
    }


def states(seed=2):
    return random_rows(ROWS * LAYERS, WIDTH, seed).reshape(ROWS, LAYERS, WIDTH)


def activations(seed=3):
    return random_rows(ROWS, HOOKS, seed)


def masks():
    generator = torch.Generator().manual_seed(5)
    return torch.rand(2, ROWS, generator=generator, dtype=torch.float64).unbind()


def paper(log_p, logits, m_u, m_d, beta):
    """The loss as the authors write it, response by response; d is the masked sum of -KL."""
    losses, log_q = [], logits.log_softmax(-1)
    ratio = of_labels(log_q - log_p)
    minus_kl = (log_p.exp() * (log_q - log_p)).sum(-1)
    for pair in range(PAIRS):
        chosen, rejected = pair == SEQUENCE, PAIRS + pair == SEQUENCE
        u = (m_u * ratio)[chosen].sum() - (m_u * ratio)[rejected].sum()
        d = (m_d * minus_kl)[chosen].sum() - (m_d * minus_kl)[rejected].sum()
        losses.append(-logsigmoid(beta * (u - d)))
    return torch.stack(losses).mean()


# -- the loss ------------------------------------------------------------------------------------------


def test_it_is_the_authors_loss_and_gradient_in_logits_and_both_masks():
    log_p, logits = models()
    m_u, m_d = (nn.Parameter(mask) for mask in masks())
    method = SparsePO(estimator=Exact(), beta=0.8, l1=0.0, common=False)
    ours = method(**given(log_p, logits.log_softmax(-1)), p_states=states(), module=Fixed(m_u, m_d)).loss
    theirs = paper(log_p, logits, m_u, m_d, 0.8)
    close(ours, theirs)
    close(gradient(ours, logits, m_u, m_d), gradient(theirs, logits, m_u, m_d))


@each_divergence
def test_masks_of_ones_are_tdpo1_under_any_divergence(divergence):
    log_p, logits = models()
    arguments = given(log_p, logits.log_softmax(-1))
    tdpo1 = TDPO(divergence, Exact(), alpha=1.0, stop_gradient=False)(**arguments)
    ones = nn.Parameter(torch.ones(ROWS, dtype=torch.float64))
    learned = SparsePO(divergence, Exact(), l1=0.0)(**arguments, p_states=states(), module=Fixed(ones))
    flat = torch.full((ROWS, HOOKS), 0.3, dtype=torch.float64)
    activated = MaPO(divergence, Exact())(**arguments, p_activations=flat)
    for out in (learned, activated):
        close(out.loss, tdpo1.loss)
        close(gradient(out.loss, logits), gradient(tdpo1.loss, logits))
        for name in ("reward_chosen", "margin", "log_ratio_rejected", "divergence_chosen"):
            close(out.metrics[name], tdpo1.metrics[name])


def test_the_reward_that_is_logged_is_the_one_whose_difference_is_the_margin():
    log_p, logits = models()
    module = Fixed(*(nn.Parameter(mask) for mask in masks()))
    out = SparsePO(estimator=Exact())(
        **given(log_p, logits.log_softmax(-1)), p_states=states(), module=module
    )
    close(out.metrics["reward_chosen"] - out.metrics["reward_rejected"], out.metrics["margin"])


def test_heads_give_the_loss_and_gradient_of_logits():
    p = random_rows(ROWS, 4), random_rows(VOCAB, 4, seed=3)
    q = random_rows(ROWS, 3, seed=4).requires_grad_(), random_rows(VOCAB, 3, seed=5).requires_grad_()
    arguments = given((p[0] @ p[1].T).log_softmax(-1), (q[0] @ q[1].T).log_softmax(-1))
    m = [nn.Parameter(mask) for mask in masks()]
    more = {"p_states": states(), "module": Fixed(*m)}
    exact = SparsePO(estimator=Exact())(**arguments, **more).loss
    for name in ("log_p", "log_q"):
        del arguments[name]
    heads = {"p_hidden": p[0], "p_weight": p[1], "q_hidden": q[0], "q_weight": q[1]}
    fused = SparsePO(estimator=FusedLinear())(**arguments, **heads, **more).loss
    close(fused, exact)
    close(gradient(fused, *q, *m), gradient(exact, *q, *m))


def test_the_penalty_counts_two_masks_each_and_a_common_one_once():
    log_p, logits = models()
    arguments = given(log_p, logits.log_softmax(-1)) | {"p_states": states()}
    m_u, m_d = (nn.Parameter(mask) for mask in masks())

    def penalty(module, *parameters, **options):
        with_, without = (SparsePO(estimator=Exact(), l1=l1, **options) for l1 in (0.01, 0.0))
        with_, without = (method(**arguments, module=module) for method in (with_, without))
        gap = gradient(with_.loss, *parameters) - gradient(without.loss, *parameters)
        close(with_.metrics["l1"], (with_.loss - without.loss).detach() / 0.01)
        return with_.loss - without.loss, gap

    value, slope = penalty(Fixed(m_u, m_d), m_u, m_d, common=False)
    close(value, 0.01 * (m_u.sum() + m_d.sum()) / PAIRS)
    close(slope, torch.full((2 * ROWS,), 0.01 / PAIRS, dtype=torch.float64))
    value, slope = penalty(Fixed(m_u), m_u)
    close(value, 0.01 * m_u.sum() / PAIRS)
    close(slope, torch.full((ROWS,), 0.01 / PAIRS, dtype=torch.float64))


def test_micro_batches_sum_to_the_batch():
    log_p, logits = models()
    module = SparsePO(dropout=0.0).module(WIDTH, LAYERS).double()
    arguments = given(log_p, logits.log_softmax(-1)) | {"p_states": states(), "p_activations": activations()}
    per_row = ("log_p_label", "log_q_label", "log_p", "log_q", "p_states", "p_activations")

    def part(pairs):
        ours = torch.tensor(pairs + [PAIRS + pair for pair in pairs])
        rows = (SEQUENCE.unsqueeze(-1) == ours).any(-1)
        place = (SEQUENCE[rows].unsqueeze(-1) == ours).long().argmax(-1)
        some = {name: arguments[name][rows] for name in per_row}
        return some | {"sequence": place, "pairs": len(pairs), "pairs_in_batch": PAIRS}

    for method in (SparsePO(estimator=Exact()), MaPO(estimator=Exact())):
        learned = {"module": module} if isinstance(method, SparsePO) else {}

        def loss(inputs, method=method, learned=learned):
            return method(
                **{n: inputs[n] for n in (*method.reads, "log_p", "log_q") if n != "module"}, **learned
            )

        whole = loss(arguments).loss
        total = loss(part([0])).loss + loss(part([1, 2])).loss
        close(total, whole)
        close(gradient(total, logits), gradient(whole, logits))


# -- learned masks -------------------------------------------------------------------------------------


def by_hand(network, hidden):
    """The mask network in arithmetic, without dropout."""
    rows = []
    for layer, head in enumerate(network.heads):
        state = layer_norm(hidden[:, layer], (WIDTH,), network.norm.weight, network.norm.bias, 1e-5)
        rows.append((state @ head.weight[0] + head.bias[0]).clamp(min=0))
    return sum(w * row for w, row in zip(network.mixer.weight[0], rows, strict=True)).clamp(min=0)


def test_the_mask_network_is_its_formula():
    torch.manual_seed(0)
    module = SparseMask(WIDTH, LAYERS, common=False).double().eval()
    nn.init.normal_(module.ratios.mixer.weight)
    nn.init.normal_(module.ratios.norm.weight)
    of_ratios, of_divergences = module(states())
    close(of_ratios, by_hand(module.ratios, states()))
    close(of_divergences, by_hand(module.divergences, states()))
    assert not torch.equal(of_ratios, of_divergences)


def test_a_common_mask_is_one_network():
    module = SparsePO().module(WIDTH, LAYERS)
    of_ratios, of_divergences = module(states().float())
    assert of_ratios is of_divergences
    assert sum(p.numel() for p in module.parameters()) == 2 * WIDTH + LAYERS * (WIDTH + 1) + LAYERS
    two = SparsePO(common=False).module(WIDTH, LAYERS)
    assert sum(p.numel() for p in two.parameters()) == 2 * sum(p.numel() for p in module.parameters())


def test_dropout_is_of_training_alone_and_before_and_after_the_mixer():
    module = SparsePO(dropout=0.5).module(WIDTH, 1).double()
    nn.init.constant_(module.ratios.heads[0].bias, 9.0)  # nothing else makes zeros
    hidden = states()[:, :1].repeat(500, 1, 1)
    assert (module(hidden)[0] == 0).double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert (module.eval()(hidden)[0] > 0).all()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_new_mask_is_alive_however_few_the_layers(layers):
    hidden = torch.randn(400, layers, 64, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        torch.manual_seed(seed)
        mask = TokenMask(64, layers, dropout=0.0)(hidden)
        assert (mask > 0).float().mean() > 0.1


def test_masks_are_trained_with_the_policy_and_the_reference_is_not():
    log_p, logits = models()
    hidden = states().requires_grad_()
    module = SparsePO().module(WIDTH, LAYERS).double().eval()
    arguments = given(log_p, logits.log_softmax(-1)) | {"p_states": hidden, "module": module}
    loss = SparsePO(estimator=Exact())(**arguments).loss
    loss.backward()
    assert hidden.grad is None and logits.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_a_dead_mask_is_counted_and_gives_the_policy_no_gradient():
    log_p, logits = models()
    arguments = given(log_p, logits.log_softmax(-1)) | {"p_states": states()}
    for options in ({"common": True}, {"common": False}):
        method = SparsePO(estimator=Exact(), l1=0.01, **options)
        module = method.module(WIDTH, LAYERS).double()
        for network in module.children():
            nn.init.constant_(network.mixer.weight, -1.0)
        out = method(**arguments, module=module)
        assert out.loss.item() == pytest.approx(math.log(2))
        assert (gradient(out.loss, logits) == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(out.loss, list(module.parameters())))
        assert out.metrics["dead"] == 1 and out.metrics["accuracy"] == 0
        assert out.metrics["sparsity_ratio"] == out.metrics["sparsity_divergence"] == 1


def test_sparsity_is_of_tokens_and_death_of_responses_that_have_some():
    log_p, logits = models()
    m_u = nn.Parameter(torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    m_d = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0], dtype=torch.float64))
    arguments = given(log_p, logits.log_softmax(-1)) | {"p_states": states(), "module": Fixed(m_u, m_d)}
    metrics = SparsePO(estimator=Exact(), common=False)(**arguments).metrics
    assert metrics["sparsity_ratio"] == 6 / 8 and metrics["sparsity_divergence"] == 7 / 8
    assert metrics["dead"] == 2 / 4  # responses 0 and 3 of 0, 2, 3, 4


# -- masks of activations ------------------------------------------------------------------------------


def normalised(rows):
    """z-normalised, then brought to [0, 1]: as the authors do it, without their float16."""
    z = (rows - rows.mean(0)) / rows.std(0)
    return ((z - z.min(0).values) / (z.max(0).values - z.min(0).values)).mean(-1)


def test_the_activation_mask_is_the_papers_z_normalisation_and_rescaling():
    mask = activation_mask(activations(), SEQUENCE, 2 * PAIRS)
    for response in (0, 2, 4):
        own = response == SEQUENCE
        close(mask[own], normalised(activations()[own]))
    assert ((mask >= 0) & (mask <= 1)).all()


def test_a_worked_activation_mask():
    rows = torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0], [7.0, 8.0]], dtype=torch.float64)
    mask = activation_mask(rows, torch.tensor([0, 0, 0, 1]), 2)
    # Hook 0 is 0, 1, 1/2 and hook 1 constant, hence 1; a response of one token has nothing but constants.
    close(mask, torch.tensor([0.5, 1.0, 0.75, 1.0], dtype=torch.float64))


def test_a_mask_does_not_depend_on_the_scale_of_a_hook_or_on_other_responses():
    scaled = activations() * torch.tensor([1.0, 1e-6, 1e6, 3.0], dtype=torch.float64) - 5.0
    close(activation_mask(scaled, SEQUENCE, 6), activation_mask(activations(), SEQUENCE, 6), 1e-8)
    own = SEQUENCE == 2
    alone = activation_mask(activations()[own], torch.zeros(3, dtype=torch.long), 1)
    close(activation_mask(activations(), SEQUENCE, 6)[own], alone)


def test_half_precision_activations_are_placed_in_float32():
    rows = torch.tensor([[-6e4], [0.0], [6e4]], dtype=torch.float16)  # their range overflows float16
    mask = activation_mask(rows, torch.zeros(3, dtype=torch.long), 1)
    assert mask.dtype == torch.float32 and mask.tolist() == [0.0, 0.5, 1.0]


def test_mapo_weighs_both_sums_by_the_activation_mask():
    log_p, logits = models()
    ours = MaPO(estimator=Exact(), beta=0.8)(
        **given(log_p, logits.log_softmax(-1)), p_activations=activations()
    )
    mask = activation_mask(activations(), SEQUENCE, 2 * PAIRS)
    theirs = paper(log_p, logits, mask, mask, 0.8)
    close(ours.loss, theirs)
    close(gradient(ours.loss, logits), gradient(theirs, logits))
    assert ours.metrics["dead"] == 0


def test_activations_that_are_not_finite_or_of_no_hook_are_refused():
    log_p, logits = models()
    arguments = given(log_p, logits.log_softmax(-1))
    for bad in (activations() / 0.0, torch.zeros(ROWS, 0), torch.zeros(ROWS)):
        with pytest.raises(ValueError, match="activation"):
            MaPO(estimator=Exact())(**arguments, p_activations=bad)


# -- what is not a number ------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_it_is_finite_however_far_the_policy_is_in_float32(sign):
    log_p = random_rows(ROWS, VOCAB).float()
    for where in (torch.ones(ROWS), (SEQUENCE >= PAIRS).float(), (SEQUENCE < PAIRS).float()):
        logits = (log_p + sign * 1e4 * where.unsqueeze(-1) * torch.eye(VOCAB)[LABELS]).requires_grad_()
        module = SparsePO().module(WIDTH, LAYERS)
        arguments = given(log_p, logits.log_softmax(-1))
        learned = SparsePO(estimator=Exact())(**arguments, p_states=states().float(), module=module)
        activated = MaPO(estimator=Exact())(**arguments, p_activations=activations().float())
        for out in (learned, activated):
            assert out.loss.isfinite() and gradient(out.loss, logits).isfinite().all()
            assert all(value.isfinite() for value in out.metrics.values())
        assert all(g.isfinite().all() for g in torch.autograd.grad(learned.loss, list(module.parameters())))


def test_no_tokens_cost_log_two_a_pair_and_no_pair_nothing():
    rows = torch.zeros(0, VOCAB, requires_grad=True)
    module = SparsePO().module(WIDTH, LAYERS)
    for pairs, loss in ((2, math.log(2)), (0, 0.0)):
        arguments = {"log_p_label": rows[:, 0].detach(), "log_q_label": rows[:, 0], "pairs": pairs}
        arguments |= {"sequence": torch.zeros(0, dtype=torch.long), "log_p": rows.detach(), "log_q": rows}
        learned = SparsePO(estimator=Exact())(
            **arguments, p_states=torch.zeros(0, LAYERS, WIDTH), module=module
        )
        activated = MaPO(estimator=Exact())(**arguments, p_activations=torch.zeros(0, HOOKS))
        for out in (learned, activated):
            assert out.loss.item() == pytest.approx(loss)
            assert gradient(out.loss, rows).shape == (0,)
            assert all(value.isfinite() for value in out.metrics.values())


def test_a_reference_without_mass_is_finite_or_refused():
    log_p, logits = models()
    gaps = log_p.clone()
    gaps[torch.arange(ROWS), (LABELS + 1) % VOCAB] = -math.inf
    arguments = given(gaps.log_softmax(-1), logits.log_softmax(-1)) | {"p_activations": activations()}
    assert gradient(MaPO(estimator=Exact())(**arguments).loss, logits).isfinite().all()
    with pytest.raises(ValueError, match="write a bounded divergence"):
        MaPO(fdiv.ReverseKL(), Exact())(**arguments)
    arguments["log_p_label"] = torch.full((ROWS,), -math.inf)
    with pytest.raises(ValueError, match="no finite log-probability under the reference"):
        MaPO(estimator=Exact())(**arguments)


# -- the objects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SparsePO(), MaPO()], ids=repr)
def test_it_is_a_method_that_prints_as_its_recipe(method):
    assert isinstance(method, Method) and method.consumes == "pairs"
    assert eval(repr(method), vars(fdiv) | {"SparsePO": SparsePO, "MaPO": MaPO}) == method


@each_other_object
@pytest.mark.parametrize("kind", [SparsePO, MaPO])
def test_what_is_no_f_divergence_is_refused(kind, other):
    with pytest.raises(TypeError):
        kind(other)


@pytest.mark.parametrize("kind", [SparsePO, MaPO])
def test_an_estimator_that_sees_the_texts_own_token_is_refused(kind):
    with pytest.raises(TypeError, match=r"write FusedLinear\(\) or Exact\(\)"):
        kind(estimator=MonteCarlo())


def test_bad_numbers_are_refused():
    for kind, bad in (
        (SparsePO, {"beta": 0.0}),
        (MaPO, {"beta": math.nan}),
        (SparsePO, {"l1": -0.1}),
        (SparsePO, {"dropout": 1.0}),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            kind(**bad)
