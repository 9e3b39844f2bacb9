"""FusedLinear: the numbers of Exact on the full logits, without the full logits."""

import pytest
import torch
from tests.worlds import close, each_divergence, each_other_object, gradient
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fdiv
from fdiv import Exact, FusedLinear

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


def test_wrong_shapes_are_refused_with_what_to_do():
    p_hidden, p_weight, q_hidden, q_weight = heads()
    with pytest.raises(ValueError, match=r"hidden\[mask\]"):
        FusedLinear()(fdiv.KL(), p_hidden[:3], p_weight, q_hidden, q_weight)
    with pytest.raises(ValueError, match=r"hidden\[mask\]"):
        FusedLinear()(fdiv.KL(), p_hidden[None], p_weight, q_hidden[None], q_weight)
    with pytest.raises(ValueError, match="slice padded heads"):
        FusedLinear()(fdiv.KL(), p_hidden, p_weight[:-1], q_hidden, q_weight)
    with pytest.raises(ValueError, match="rows >= 1"):
        FusedLinear(chunk=0)


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="FusedLinear"):
        FusedLinear().check(other)
