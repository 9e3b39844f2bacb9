"""FusedLinear: the numbers of Exact on the full logits, without the full logits."""

import pytest
import torch
from tests.worlds import DIVERGENCES, close, each_divergence, each_other_object, gradient
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fdiv
from fdiv import Exact, FusedLinear, SampledLogits, TopK
from fdiv.kernels.rows import Wants, rows

ROWS, VOCAB, P_WIDTH, Q_WIDTH = 11, 101, 5, 3  # a prime vocabulary, two widths


def heads(rows=ROWS, vocab=VOCAB, dtype=torch.float64, seed=0):
    """p_hidden, p_weight, q_hidden, q_weight, all asking for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, P_WIDTH), (vocab, P_WIDTH), (rows, Q_WIDTH), (vocab, Q_WIDTH))
    tensors = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return tuple(t.requires_grad_() for t in tensors)


def exact(divergence, p_hidden, p_weight, q_hidden, q_weight):
    log_p = (p_hidden @ p_weight.T).log_softmax(-1)
    return Exact()(divergence, log_p, (q_hidden @ q_weight.T).log_softmax(-1))


@each_divergence
def test_value_and_all_four_gradients_equal_exact_on_the_full_logits(divergence):
    tensors = heads()
    upstream = torch.linspace(-1, 2, ROWS, dtype=torch.float64)  # one weight a row
    fused, full = FusedLinear(chunk=4)(divergence, *tensors), exact(divergence, *tensors)
    close(fused, full)
    close(gradient(upstream @ fused, *tensors), gradient(upstream @ full, *tensors))


@pytest.mark.parametrize("chunk", [1, 2, 3, 11, 12, 1000])
def test_the_chunk_changes_nothing(chunk):
    tensors = heads()
    whole, chunked = FusedLinear()(fdiv.JS(0.1), *tensors), FusedLinear(chunk)(fdiv.JS(0.1), *tensors)
    close(chunked, whole, 1e-13)
    close(gradient(chunked.sum(), *tensors), gradient(whole.sum(), *tensors), 1e-13)


@pytest.mark.parametrize("distance", [1.0, 0.05])
@pytest.mark.parametrize("divergence", [fdiv.KL(), fdiv.ReverseKL(), fdiv.JS(0.5)], ids=repr)
def test_bfloat16_hidden_states_give_the_gradient_of_float64_on_the_same_values(divergence, distance):
    p_hidden, p_weight, q_hidden, q_weight = heads(dtype=torch.bfloat16)
    p_hidden, p_weight = p_hidden[:, :Q_WIDTH].detach(), q_weight.detach()  # near: one head, near states
    p_hidden = (q_hidden + distance * p_hidden).detach().to(torch.bfloat16)
    tensors = (p_hidden, p_weight, q_hidden, q_weight)
    doubles = tuple(t.detach().double().requires_grad_() for t in tensors)
    rows = FusedLinear(chunk=4)(divergence, *tensors)
    assert rows.dtype == torch.float32
    assert (rows >= 0).all()
    actual, expected = (
        gradient(rows.sum(), *tensors[2:]),
        gradient(exact(divergence, *doubles).sum(), *doubles[2:]),
    )
    # All that is left is the rounding of the gradient itself to bfloat16, half a unit in 2^-8.
    assert (actual.double() - expected).norm() < 2**-8 * expected.norm()


def test_autocast_does_not_round_the_logits():
    tensors = heads(dtype=torch.float32)
    plain = FusedLinear()(fdiv.KL(), *tensors)
    expected = gradient(plain.sum(), *tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = FusedLinear()(fdiv.KL(), *tensors)
    assert torch.equal(rows, plain)
    close(gradient(rows.sum(), *tensors), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_row_at_all_gives_an_empty_loss_with_its_graph(dtype):
    tensors = heads(rows=0, dtype=dtype)
    rows = FusedLinear()(fdiv.KL(), *tensors)
    assert rows.shape == (0,)
    assert rows.dtype == torch.promote_types(dtype, torch.float32)
    assert rows.sum() == 0
    for tensor, grad in zip(tensors, torch.autograd.grad(rows.sum(), tensors), strict=True):
        assert grad.shape == tensor.shape and not grad.any()


def test_a_teacher_without_gradient_gets_none():
    p_hidden, p_weight, q_hidden, q_weight = heads()
    rows = FusedLinear()(fdiv.KL(), p_hidden.detach(), p_weight.detach(), q_hidden, q_weight)
    rows.sum().backward()
    assert p_hidden.grad is None and p_weight.grad is None
    assert q_hidden.grad.any() and q_weight.grad.any()


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors of at least `floor` numbers, made inside the block, held at one time."""

    def __init__(self, floor: int):
        super().__init__()
        self.floor, self.alive, self.peak, self.largest = floor, {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.floor:
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.alive = {k: kept for k, kept in self.alive.items() if not kept[0].expired()}
                self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_rows_times_vocabulary_is_never_held_forward_or_backward():
    rows, vocab, chunk = 512, 1009, 8
    tensors = heads(rows, vocab, torch.float32)
    with PeakMemory(floor=chunk * vocab) as fused:
        FusedLinear(chunk)(fdiv.JS(0.5), *tensors).sum().backward()
    with PeakMemory(floor=chunk * vocab) as full:
        exact(fdiv.JS(0.5), *tensors).sum().backward()
    assert fused.largest == chunk * vocab
    assert full.largest == rows * vocab  # the measure sees what it should
    assert fused.peak < rows * vocab * 4 < full.peak


class Products(TorchDispatchMode):
    """The floating-point operations of all matrix products inside the block."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.total += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [True, False])
def test_a_call_costs_the_products_that_it_must(trained):
    """In units of rows x width x vocabulary: 4, and 3 with a frozen head, whatever the divergence."""
    p_hidden, p_weight, q_hidden, q_weight = heads()
    p_hidden, p_weight = p_hidden[:, :Q_WIDTH].detach(), p_weight[:, :Q_WIDTH].detach()
    q_weight = q_weight if trained else q_weight.detach()
    with Products() as counter:
        FusedLinear(chunk=4)(fdiv.JS(0.5), p_hidden, p_weight, q_hidden, q_weight).mean().backward()
    assert counter.total == (4 if trained else 3) * 2 * ROWS * VOCAB * Q_WIDTH


@pytest.mark.parametrize(("gradient", "trained", "units"), [
    ("forward", False, 3),  # a frozen head: each row's gradient is scaled
    ("forward", True, 8),  # made in vain, and again
    ("recompute", True, 6),
])  # fmt: skip
def test_rows_of_unequal_weight_cost_a_second_pass_for_a_trained_head_alone(gradient, trained, units):
    p_hidden, p_weight, q_hidden, q_weight = heads()
    p_hidden, p_weight = p_hidden[:, :Q_WIDTH].detach(), p_weight[:, :Q_WIDTH].detach()
    q_weight = q_weight if trained else q_weight.detach()
    weights = torch.linspace(0, 1, ROWS, dtype=torch.float64)
    with Products() as counter:
        rows = FusedLinear(gradient=gradient)(fdiv.KL(), p_hidden, p_weight, q_hidden, q_weight)
        (weights * rows).sum().backward()
    assert counter.total == units * 2 * ROWS * VOCAB * Q_WIDTH


def test_without_gradients_only_the_logits_are_made():
    p_hidden, p_weight, q_hidden, q_weight = (t.detach() for t in heads())
    with Products() as counter:
        FusedLinear()(fdiv.KL(), p_hidden[:, :Q_WIDTH], p_weight[:, :Q_WIDTH], q_hidden, q_weight)
    assert counter.total == 2 * 2 * ROWS * VOCAB * Q_WIDTH


def test_a_mean_a_weighted_sum_and_a_second_backward_pass_have_one_gradient():
    tensors = heads()
    expected = gradient(exact(fdiv.JS(0.3), *tensors).mean(), *tensors)
    for mode in ("forward", "recompute"):
        rows = FusedLinear(chunk=4, gradient=mode)(fdiv.JS(0.3), *tensors)
        for loss in (rows.mean(), (rows * torch.full_like(rows, 1 / ROWS)).sum(), rows.mean()):
            close(gradient(loss, *tensors), expected, 1e-12)


def test_a_second_derivative_is_refused():
    tensors = heads()
    value = FusedLinear()(fdiv.KL(), *tensors).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, tensors[2], create_graph=True)


# -- heads --------------------------------------------------------------------------------------------------


def test_bias_scale_softcap_and_temperature_are_those_of_the_formula():
    p_hidden, p_weight, q_hidden, q_weight = heads()
    p_bias, q_bias = torch.randn(2, VOCAB, dtype=torch.float64).mul(3).unbind()
    q_bias = q_bias.clone().requires_grad_()
    p_head = fdiv.Head(p_weight, p_bias, scale=0.7, temperature=2.0)
    q_head = fdiv.Head(q_weight, q_bias, scale=1.3, softcap=4.0, temperature=1.5)
    p_logits = 0.7 * (p_hidden @ p_weight.T + p_bias) / 2.0
    q_logits = 4.0 * torch.tanh(1.3 * (q_hidden @ q_weight.T + q_bias) / 4.0) / 1.5
    full = Exact()(fdiv.JS(0.2), p_logits.log_softmax(-1), q_logits.log_softmax(-1))
    rows = FusedLinear(chunk=4)(fdiv.JS(0.2), p_hidden, p_head, q_hidden, q_head)
    everything = (p_hidden, p_weight, q_hidden, q_weight, q_bias)
    close(rows, full)
    weights = torch.linspace(1, 2, ROWS, dtype=torch.float64)
    for weight in (torch.ones_like(weights), weights):
        close(gradient(weight @ rows, *everything), gradient(weight @ full, *everything))


@pytest.mark.parametrize("field", ["scale", "softcap", "temperature"])
def test_a_head_that_makes_no_sense_is_refused(field):
    p_hidden, p_weight, q_hidden, q_weight = heads()
    with pytest.raises(ValueError, match=f"{field} of q_weight is > 0"):
        FusedLinear()(fdiv.KL(), p_hidden, p_weight, q_hidden, fdiv.Head(q_weight, **{field: -1.0}))
    with pytest.raises(ValueError, match=r"bias of p_weight is \[vocab\]"):
        FusedLinear()(fdiv.KL(), p_hidden, fdiv.Head(p_weight, torch.zeros(3)), q_hidden, q_weight)


# -- masks, empty columns, extremes -------------------------------------------------------------------------


def test_masked_rows_are_skipped_and_their_infinities_stay_out_of_the_gradient():
    p_hidden, p_weight, q_hidden, q_weight = heads()
    mask = torch.arange(ROWS) % 3 != 0
    with torch.no_grad():
        p_hidden[~mask], q_hidden[~mask] = torch.inf, torch.nan
    tensors = (p_hidden, p_weight, q_hidden, q_weight)
    with Products() as counter:
        rows = FusedLinear(chunk=4)(fdiv.KL(), *tensors, mask=mask)
    full = exact(fdiv.KL(), p_hidden[mask], p_weight, q_hidden[mask], q_weight)
    close(rows[mask], full)
    assert not rows[~mask].any()
    close(gradient(rows.sum(), *tensors), gradient(full.sum(), *tensors))
    both_models_in_units_of_three = 3 * (P_WIDTH + Q_WIDTH)
    assert counter.total == both_models_in_units_of_three * 2 * 7 * VOCAB


def test_no_token_left_by_the_mask_gives_zero_with_its_graph():
    tensors = heads()
    rows = FusedLinear()(fdiv.KL(), *tensors, mask=torch.zeros(ROWS, dtype=torch.bool))
    assert rows.shape == (ROWS,) and not rows.any()
    assert not gradient(rows.sum(), *tensors).any()
    with pytest.raises(ValueError, match="mask is boolean"):
        FusedLinear()(fdiv.KL(), *tensors, mask=torch.ones(ROWS))


@each_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_models_have_value_exactly_0_and_gradient_exactly_0(divergence, dtype):
    _, _, hidden, weight = heads(dtype=dtype)
    bias = torch.zeros(VOCAB, dtype=dtype)
    bias[::7] = -torch.inf  # and columns that neither has
    head = fdiv.Head(weight.detach(), bias)
    rows = FusedLinear(chunk=4)(divergence, hidden.detach(), head, hidden, fdiv.Head(weight, bias))
    if isinstance(divergence, fdiv.Generator):  # its f(1) and f'(1) are subtracted
        assert rows.abs().max() < 20 * torch.finfo(dtype).eps
    else:
        assert not rows.any()
        assert not gradient(rows.sum(), hidden, weight).any()


@each_divergence
def test_columns_that_both_models_lack_are_columns_that_are_not_there(divergence):
    p_hidden, p_weight, q_hidden, q_weight = heads()
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[-20:] = -torch.inf
    tensors = (p_hidden, p_weight, q_hidden, q_weight)
    rows = FusedLinear()(divergence, p_hidden, fdiv.Head(p_weight, bias), q_hidden, fdiv.Head(q_weight, bias))
    full = exact(divergence, p_hidden, p_weight[:-20], q_hidden, q_weight[:-20])
    close(rows, full)
    close(gradient(rows.sum(), *tensors), gradient(full.sum(), *tensors))


@each_divergence
@pytest.mark.parametrize("lacking", ["teacher", "student"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_column_that_one_model_lacks_costs_its_price_and_never_nan(divergence, lacking, dtype):
    tensors = heads(dtype=dtype)
    p_hidden, p_weight, q_hidden, q_weight = tensors
    bias = torch.zeros(VOCAB, dtype=dtype)
    bias[5] = -torch.inf
    p_head, q_head = fdiv.Head(p_weight), fdiv.Head(q_weight)
    p_logits, q_logits = p_hidden @ p_weight.T, q_hidden @ q_weight.T
    if lacking == "teacher":
        p_head, p_logits = fdiv.Head(p_weight, bias), p_logits + bias
    else:
        q_head, q_logits = fdiv.Head(q_weight, bias), q_logits + bias
    rows = FusedLinear(chunk=4)(divergence, p_hidden, p_head, q_hidden, q_head)
    full = Exact()(divergence, p_logits.log_softmax(-1), q_logits.log_softmax(-1))
    forbidden = divergence.f_at_zero if lacking == "teacher" else divergence.slope_at_infinity
    assert rows.isinf().all() if forbidden == torch.inf else rows.isfinite().all()
    torch.testing.assert_close(rows, full, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-6)
    actual, expected = gradient(rows.sum(), *tensors), gradient(full.sum(), *tensors)
    assert actual.isfinite().all()
    close(actual, expected, 1e-4 if dtype == torch.float32 else 1e-10)


@each_divergence
@pytest.mark.parametrize("scale", [1e1, 1e3])
def test_extreme_logits_give_finite_gradients_where_the_value_is_finite(divergence, scale):
    p_hidden, p_weight, q_hidden, q_weight = heads(dtype=torch.float32)
    rows = FusedLinear()(divergence, p_hidden * scale, p_weight, q_hidden * scale, q_weight)
    assert not rows.isnan().any() and (rows >= 0).all()
    assert gradient(rows.sum(), p_hidden, p_weight, q_hidden, q_weight).isfinite().all()


def test_one_row_and_one_column():
    tensors = heads(rows=1, vocab=1)
    rows = FusedLinear()(fdiv.KL(), *tensors)
    assert rows.tolist() == [0.0]
    assert not gradient(rows.sum(), *tensors).any()


# -- other estimators of the same logits --------------------------------------------------------------------


@each_divergence
@pytest.mark.parametrize(
    "of", [TopK(7), TopK(7, "student"), TopK(7, "union"), TopK(VOCAB), TopK(VOCAB + 9)], ids=repr
)
def test_top_k_of_streamed_logits_is_top_k(divergence, of):
    tensors = heads()
    log_p = (tensors[0] @ tensors[1].T).log_softmax(-1)
    log_q = (tensors[2] @ tensors[3].T).log_softmax(-1)
    full = of.captured(divergence, log_p, log_q)
    fused = FusedLinear(chunk=4, of=of).measured(divergence, *tensors)
    for ours, theirs in zip(fused, full, strict=True):
        close(ours, theirs)
    weights = torch.linspace(1, 2, ROWS, dtype=torch.float64)
    for weight in (torch.ones_like(weights), weights):
        close(gradient(weight @ fused.value, *tensors), gradient(weight @ full.value, *tensors))


@pytest.mark.parametrize("proposal", ["teacher", "student", "mixture"])
def test_sampled_logits_of_streamed_logits_draw_the_same_atoms_again_for_the_gradient(proposal):
    tensors = heads()
    of = SampledLogits(6, proposal)
    log_p = (tensors[0] @ tensors[1].T).log_softmax(-1)
    log_q = (tensors[2] @ tensors[3].T).log_softmax(-1)
    torch.manual_seed(3)
    full = of(fdiv.JS(0.5), log_p, log_q)
    torch.manual_seed(3)
    fused = FusedLinear(chunk=ROWS, of=of)(fdiv.JS(0.5), *tensors)
    close(fused, full)
    weights = torch.linspace(1, 2, ROWS, dtype=torch.float64)
    close(gradient(weights @ fused, *tensors), gradient(weights @ full, *tensors))


def test_entropies_come_with_the_value():
    tensors = heads()
    measured = FusedLinear(chunk=4).measured(fdiv.KL(), *tensors)
    for entropy, hidden, weight in ((measured.p_entropy, *tensors[:2]), (measured.q_entropy, *tensors[2:])):
        log_density = (hidden @ weight.T).log_softmax(-1)
        close(entropy, -(log_density.exp() * log_density).sum(-1))
        assert not entropy.requires_grad
    close(measured.value, exact(fdiv.KL(), *tensors))
    with pytest.raises(TypeError, match="measures nothing"):
        FusedLinear(of=SampledLogits(3)).measured(fdiv.KL(), *tensors)


# -- accuracy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 4e-4])
@pytest.mark.parametrize(
    "divergence", [d for d in DIVERGENCES if not isinstance(d, fdiv.Generator)], ids=repr
)
def test_the_digits_survive_where_the_models_are_close(divergence, distance):
    """float32 logits a distance apart: D falls to 1e-7, and the error of its value does not rise."""
    generator = torch.Generator().manual_seed(0)
    p_logits = 3 * torch.randn(4, 5003, generator=generator)
    q_logits = p_logits + distance * torch.randn(4, 5003, generator=generator)
    q_double = q_logits.double().requires_grad_()
    exact = divergence(p_logits.double().log_softmax(-1), q_double.log_softmax(-1))
    expected = gradient(exact.sum(), q_double)
    done = rows(divergence, p_logits.clone(), q_logits.clone(), Wants(q_slope=True))
    assert ((done.value - exact).abs() / exact).max() < 1e-5
    assert (done.q_slope.double().flatten() - expected).norm() < 1e-6 * expected.norm()


def test_wrong_shapes_are_refused_with_what_to_do():
    p_hidden, p_weight, q_hidden, q_weight = heads()
    with pytest.raises(ValueError, match=r"hidden.flatten\(0, 1\)"):
        FusedLinear()(fdiv.KL(), p_hidden[:3], p_weight, q_hidden, q_weight)
    with pytest.raises(ValueError, match=r"hidden.flatten\(0, 1\)"):
        FusedLinear()(fdiv.KL(), p_hidden[None], p_weight, q_hidden[None], q_weight)
    with pytest.raises(ValueError, match="slice padded heads"):
        FusedLinear()(fdiv.KL(), p_hidden, p_weight[:-1], q_hidden, q_weight)
    with pytest.raises(ValueError, match="rows >= 1"):
        FusedLinear(chunk=0)


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="FusedLinear"):
        FusedLinear().check(other)
