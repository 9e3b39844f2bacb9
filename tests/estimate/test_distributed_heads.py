"""Heads spread over processes: a vocabulary split between two ranks, and a head sharded by FSDP2."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.worlds import close, gradient
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fdiv
from fdiv import FusedLinear, FusedLogProb, Head

ROWS, VOCAB, WIDTH = 7, 101, 5
SPLIT = 60  # the columns of rank 0; rank 1 has fewer


def problem():
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, WIDTH), (VOCAB, WIDTH), (ROWS, WIDTH), (VOCAB, WIDTH))
    tensors = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple(t.requires_grad_() for t in tensors)


def columns(rank):
    return slice(0, SPLIT) if rank == 0 else slice(SPLIT, VOCAB)


def a_split_vocabulary_has_the_value_and_gradients_of_the_whole(rank):
    p_hidden, p_weight, q_hidden, q_weight = whole = problem()
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    for divergence in (fdiv.KL(), fdiv.JS(0.3), fdiv.Alpha(1.5), fdiv.TV()):
        expected = FusedLinear()(divergence, *whole)
        p_part, q_part = (w[columns(rank)].detach().requires_grad_() for w in (p_weight, q_weight))
        group = dist.group.WORLD
        rows = FusedLinear(chunk=3)(
            divergence, p_hidden, Head(p_part, group=group), q_hidden, Head(q_part, group=group)
        )
        close(rows, expected)
        for upstream in (torch.ones_like(weights), weights):
            close(
                gradient(upstream @ rows, p_hidden, q_hidden),
                gradient(upstream @ expected, p_hidden, q_hidden),
            )
            ours = torch.autograd.grad(upstream @ rows, (p_part, q_part), retain_graph=True)
            theirs = torch.autograd.grad(upstream @ expected, (p_weight, q_weight), retain_graph=True)
            for part, full in zip(ours, theirs, strict=True):
                close(part, full[columns(rank)])


def a_split_vocabulary_has_the_log_probs_of_the_whole(rank):
    _, _, hidden, weight = problem()
    index = torch.tensor([0, 59, 60, 100, 30, 70, 61])
    part = weight[columns(rank)].detach().requires_grad_()
    fused = FusedLogProb(chunk=3)(hidden, Head(part, group=dist.group.WORLD), index)
    whole = FusedLogProb()(hidden, weight, index)
    for ours, theirs in zip(fused, whole, strict=True):
        close(ours, theirs)
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    ours, theirs = ((weights @ a + 0.1 * b.sum()) for a, b in (fused, whole))
    close(gradient(ours, hidden), gradient(theirs, hidden))
    close(gradient(ours, part), torch.autograd.grad(theirs, weight)[0][columns(rank)].flatten())


def a_head_sharded_by_fsdp_gets_the_average_of_the_ranks_gradients(rank):
    p_hidden, p_weight, _, q_weight = (t.detach() for t in problem())
    generator = torch.Generator().manual_seed(10)
    hidden = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64)  # of both ranks
    head = torch.nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float64)
    head.load_state_dict({"weight": q_weight})
    fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    FusedLinear()(fdiv.JS(0.3), p_hidden, p_weight, hidden[rank], head.weight).mean().backward()
    whole = q_weight.clone().requires_grad_()
    for states in hidden:
        (FusedLinear()(fdiv.JS(0.3), p_hidden, p_weight, states, whole).mean() / 2).backward()
    close(head.weight.grad.full_tensor(), whole.grad)


def on_rank(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    try:
        a_split_vocabulary_has_the_value_and_gradients_of_the_whole(rank)
        a_split_vocabulary_has_the_log_probs_of_the_whole(rank)
        a_head_sharded_by_fsdp_gets_the_average_of_the_ranks_gradients(rank)
    finally:
        dist.destroy_process_group()


def test_heads_on_two_ranks_give_the_numbers_of_one(tmp_path):
    """All three at once, for most of the time is two processes starting; the traceback names the one."""
    mp.spawn(on_rank, (f"file://{tmp_path}/rendezvous",), nprocs=2)


def test_estimators_that_need_the_whole_vocabulary_refuse_a_split_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        p_hidden, p_weight, q_hidden, q_weight = problem()
        heads = [Head(w, group=dist.group.WORLD) for w in (p_weight, q_weight)]
        with pytest.raises(TypeError, match=r"of=Exact\(\)"):
            FusedLinear(of=fdiv.TopK(3))(fdiv.KL(), p_hidden, heads[0], q_hidden, heads[1])
        with pytest.raises(ValueError, match="one group of ranks"):
            FusedLinear()(fdiv.KL(), p_hidden, p_weight, q_hidden, heads[1])
    finally:
        dist.destroy_process_group()
