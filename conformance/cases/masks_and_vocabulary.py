"""Masks, shifts, normalisation and vocabulary: C34 to C51."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from conformance import oracle, world
from conformance.case import Verdict, at_least, at_most, case, refused, worst
from conformance.system import System


def _true_rows(teacher, student, ids: Tensor, mask: Tensor) -> Tensor:
    """KL of the models at every position that predicts a token of the mask: [tokens], float64."""
    with torch.no_grad():
        logits = [model(input_ids=ids).logits[:, :-1][mask[:, 1:]] for model in (teacher, student)]
    return oracle.value("forward KL", *logits)


def _models():
    return world.language_model(1), world.language_model(2)


@case(
    "C34",
    "The mask is shifted with the labels: position t is judged by the token that follows it.",
    "modelscope/ms-swift/pull/8436",
    "MakazhanAlpamys/Soup/issues/682",
    "huggingface/trl/pull/5905",
    "huggingface/trl/pull/6126",
)
def c34(system: System) -> Verdict:
    teacher, student = _models()
    ids, mask = world.batch()
    expected = _true_rows(teacher, student, ids, mask).mean()
    error = oracle.difference(system.distil(teacher, student, ids, mask), expected)
    return at_most(1e-4, error, "relative error of the loss of two language models")


@case(
    "C35",
    "Positions that predict the prompt have a gradient of exactly 0.",
    "huggingface/trl/pull/6006",
    "huggingface/trl/pull/2058",
)
def c35(system: System) -> Verdict:
    ids, mask = world.batch()
    teacher, student = _models()
    gradient = world.gradient_at_positions(
        student, lambda: system.distil(teacher, student, ids, mask), ids.shape
    )
    predicts = torch.cat([mask[:, 1:], torch.zeros(len(ids), 1, dtype=torch.bool)], 1)
    alive = at_least(1e-6, gradient[predicts].min().item(), "smallest gradient in a response")
    return worst(
        [alive, at_most(0.0, gradient[~predicts].max().item(), "largest gradient outside responses")]
    )


@case(
    "C36",
    "The end-of-text token of a response is learned, though padding uses the same id.",
    "huggingface/trl/pull/6357",
)
def c36(system: System) -> Verdict:
    eos = 0
    rollout = torch.tensor([[3, 4, 5, 6, eos, eos, eos], [3, 4, 5, 6, 7, 8, eos]])
    expected = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    found = system.stop_token_mask(rollout, 2, eos)
    return at_most(0, int((found != expected).sum()), "tokens wrongly in or out of the loss")


@case(
    "C37",
    "Padding on the right changes nothing.",
    "peremartra/optipfair/issues/34",
    "huggingface/trl/issues/7024",
)
def c37(system: System) -> Verdict:
    teacher, student = _models()
    ids, mask = world.batch()
    plain = system.distil(teacher, student, ids, mask)
    padded = system.distil(teacher, student, *world.padded(ids, mask, 4, 0))
    return at_most(1e-5, oracle.difference(padded, plain), "relative change of the loss by padding")


@case(
    "C38",
    "The fused path leaves masked rows out, of value and of gradient, whatever they hold.",
    "linkedin/Liger-Kernel/pull/974",
    "huggingface/trl/pull/3346",
)
def c38(system: System) -> Verdict:
    teacher, student = world.heads(10, 8, 30, torch.float32)
    mask = torch.arange(10) % 3 > 0
    masked = system.fused_jsd(teacher, student, 0.5, mask=mask)
    gradient = torch.autograd.grad(masked, student[0])[0]
    selected = (teacher[0][mask], teacher[1]), (student[0][mask], student[1])
    alone = system.fused_jsd(*selected, 0.5)
    leak = gradient[~mask].abs().max().item()
    error = max(oracle.difference(masked, alone), leak)
    return at_most(1e-5, error, "relative error of the loss, or gradient of a masked row")


@case(
    "C39",
    "A batch cut into micro-batches has the same loss and gradient: the mean is over the global tokens.",
    "huggingface/trl/issues/4719",
    "huggingface/trl/pull/6006",
    "modelscope/ms-swift/pull/10165",
)
def c39(system: System) -> Verdict:
    teacher, student = world.pair(rows=12)
    mask = torch.tensor([True] * 5 + [False] * 5 + [True] * 2)
    count = int(mask.sum())
    whole = system.token_mean(teacher, student, mask)
    parts = [system.token_mean(teacher[s], student[s], mask[s], count) for s in (slice(0, 4), slice(4, 12))]
    total = torch.stack(parts).sum()
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (whole, total)]
    error = max(oracle.difference(total, whole), oracle.difference(gradients[1], gradients[0]))
    return at_most(1e-6, error, "relative change of loss and gradient by the cut")


@case(
    "C40",
    "Training on the student's own text divides by the tokens of that text.",
    "huggingface/trl/pull/6452",
)
def c40(system: System) -> Verdict:
    summed, divided = system.on_policy_denominator()
    ratio = summed / divided
    return Verdict(
        abs(ratio - 1) < 1e-4, ratio, f"tokens summed ({summed:g}) over the denominator, which is 1"
    )


@case(
    "C41",
    "A batch repeated four times has the same mean.",
    "modelscope/easydistill/pull/16",
)
def c41(system: System) -> Verdict:
    teacher, student = world.pair()
    mask = torch.arange(8) % 3 > 0
    once = system.token_mean(teacher, student, mask)
    four = system.token_mean(teacher.repeat(4, 1), student.repeat(4, 1), mask.repeat(4))
    return at_most(1e-6, oracle.difference(four, once), "relative change of the loss")


@case(
    "C42",
    "The size of a chunk changes nothing.",
    "meta-pytorch/torchtune/pull/1885",
)
def c42(system: System) -> Verdict:
    teacher, student = world.heads(23, 8, 30, torch.float32)
    mask = torch.arange(23) % 4 != 1
    losses = [system.fused_jsd(teacher, student, 0.0, mask=mask, chunk=chunk) for chunk in (4, 7, 23)]
    return at_most(
        1e-5, max(oracle.difference(loss, losses[-1]) for loss in losses), "relative change of the loss"
    )


@case(
    "C43",
    "A micro-batch without a token gives loss 0, gradient 0 and a graph to go backward through.",
    "microsoft/LMOps/issues/38",
)
def c43(system: System) -> Verdict:
    losses = system.reductions()
    return worst([_empty(name, loss) for name, loss in losses.items()])


def _empty(name: str, reduced: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Verdict:
    teacher, student = world.pair(dtype=torch.float32)
    loss = reduced(teacher, student, torch.zeros(8, dtype=torch.bool))
    value = abs(loss.nan_to_num(nan=math.inf).item())
    if value > 0:
        return Verdict(False, loss.item(), f"loss of {name} = 0")
    if not loss.requires_grad:
        return Verdict(False, value, f"loss of {name}, which has no graph")
    (gradient,) = torch.autograd.grad(loss, student, allow_unused=True)
    size = 0.0 if gradient is None else gradient.abs().max().nan_to_num(nan=math.inf).item()
    return at_most(0.0, size, "largest entry of the gradient")


def _padded_heads(mass: float) -> tuple[Tensor, Tensor, int]:
    """Logits of a teacher with four columns of padding, of its student without, and the true size."""
    student = world.logits(6, 20, 0)
    padding = torch.full((6, 4), mass, dtype=torch.float64)
    return torch.cat([student, padding], 1), student.clone().requires_grad_(), 20


@case(
    "C44",
    "Columns that only pad a vocabulary are removed: the result is that of the unpadded model.",
    "huggingface/trl/issues/2215",
    "huggingface/trl/issues/3028",
    "huggingface/trl/pull/6252",
    "meta-pytorch/torchtune/issues/2119",
    "microsoft/LMOps/pull/331",
    "NVIDIA/Model-Optimizer/issues/2489",
)
def c44(system: System) -> Verdict:
    teacher, student, size = _padded_heads(-30.0)  # as trained models have them: next to no mass
    try:
        value = system.padded_vocabulary(teacher, student, size)
    except (ValueError, RuntimeError, IndexError):
        return refused(0.0, "logits of two widths are refused")
    return at_most(1e-4, value.abs().max().item(), "reverse KL of a model from itself with padding")


@case("C45", "Padding is not filled in from nothing: mass in it is seen, or the logits refused.")
def c45(system: System) -> Verdict:
    teacher, student, size = _padded_heads(3.0)
    try:
        value = system.mismatched_vocabulary(teacher, student)
    except (ValueError, RuntimeError, IndexError):
        return refused(0.0, "logits of two widths are refused")
    lost = -teacher.log_softmax(-1)[:, :size].logsumexp(-1)
    error = oracle.difference(value, lost)
    return at_most(1e-3, error, "relative error of the reverse KL, -log(mass of the teacher outside padding)")


@case(
    "C46",
    "Teacher and student are known to share a tokenizer, not only a vocabulary size.",
    "huggingface/trl/issues/4562",
    "arcee-ai/DistillKit/issues/7",
)
def c46(system: System) -> Verdict:
    system.lacks("check of tokenizers that can be called alone")


@case(
    "C47",
    "The fused and the plain path are one objective, in value and gradient.",
    "huggingface/trl/pull/5731",
)
def c47(system: System) -> Verdict:
    teacher, student = world.heads(12, 8, 40, torch.float32)
    plain_hidden = student[0].detach().clone().requires_grad_()
    logits = teacher[0] @ teacher[1].T, plain_hidden @ student[1].detach().T
    plain, fused = system.jsd(*logits, 0.3).mean(), system.fused_jsd(teacher, student, 0.3)
    gradients = torch.autograd.grad(fused, student[0])[0], torch.autograd.grad(plain, plain_hidden)[0]
    error = max(oracle.difference(fused, plain), oracle.difference(*gradients))
    return at_most(1e-4, error, "relative difference of value and gradient")


@case(
    "C48",
    "An option that does not exist is refused.",
    "huggingface/trl/pull/5883",
)
def c48(system: System) -> Verdict:
    swallowed = []
    for name, call in system.unknown_options().items():
        try:
            call()
        except (TypeError, ValueError, KeyError, AttributeError):
            continue
        swallowed.append(name)
    what = f" ({', '.join(swallowed)})" if swallowed else ""
    return at_most(0, len(swallowed), f"unknown options that were accepted{what}")


@case("C49", "A cached signal belongs to its sample, in whatever order samples come.")
def c49(system: System) -> Verdict:
    computed, cached = system.cached_signal()
    return at_most(1e-6, oracle.difference(cached, computed), "relative error of what the cache returns")


@case(
    "C50",
    "A served teacher's tokens are aligned with the prompt: ids come back and are compared.",
    "modelscope/ms-swift/issues/9429",
    "modelscope/ms-swift/issues/9671",
)
def c50(system: System) -> Verdict:
    system.lacks("client of served teachers that can be called alone")


@case(
    "C51",
    "The distillation loss reaches the optimiser: the divergence to a toy teacher falls.",
    "NousResearch/atropos/issues/456",
)
def c51(system: System) -> Verdict:
    teacher, student = _models()
    ids, mask = world.batch()
    before = _true_rows(teacher, student, ids, mask).mean()
    optimiser = torch.optim.Adam(student.parameters(), lr=0.03)
    for _ in range(15):
        optimiser.zero_grad()
        system.distil(teacher, student, ids, mask).backward()
        optimiser.step()
    after = _true_rows(teacher, student, ids, mask).mean()
    return at_most(0.5, (after / before).item(), "KL after 15 steps over KL before")
