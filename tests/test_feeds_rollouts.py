"""Rollouts: used again, rehearsed, surveyed and scored by a target."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from fdiv import FDPO, GRPO, JS, KL, Exact
from fdiv.adapters.transformers import CausalLM
from fdiv.feeds import Counts, Part, feed_of
from fdiv.methods._method import READABLE_IN_ROLLOUTS, Out
from fdiv.methods.match.fdpg import FDPG
from fdiv.methods.match.target import Accept, Target, Tilt
from fdiv.methods.rl.apo import APO
from fdiv.methods.rl.disco import DisCO
from fdiv.methods.rl.dph import DPH, Rehearsal
from fdiv.methods.rl.occupancy import OccupancyPO
from fdiv.methods.rl.rose import ROSE
from fdiv.parallel import World
from fdiv.recipe import TrainSpec
from fdiv.tasks._task import Text
from fdiv.tasks.grammar import Grammar
from fdiv.tasks.padding import NOTHING

TASK = Grammar(symbols=4, successors=2, length=2, questions=6, trained_on=5)
ALWAYS = {"log_policy", "log_behaviour", "mask", "count"}


@dataclass(frozen=True)
class Asks:
    """A method that asks for all that can be had without a target, and keeps what it was given."""

    consumes: ClassVar[str] = "rollouts"

    reads: tuple[str, ...] = tuple(
        name
        for names in READABLE_IN_ROLLOUTS
        for name in names.split(", ")
        if not {"target", "partition", "parent", "branch"} & set(name.split("_"))
    )
    rehearsal: Rehearsal | None = Rehearsal(tries=8, threshold=0.25, batch=2)
    divergence: Any = KL()
    seen: list[dict] = field(default_factory=list)

    def survey(self, log_policy: Tensor, log_behaviour: Tensor) -> Tensor:
        return (log_policy - log_behaviour).square() + 1.0

    def __call__(self, **tensors) -> Out:
        self.seen.append(tensors)
        return Out(tensors["log_policy"].sum() + tensors.get("stored_log_policy", torch.zeros(0)).sum(), {})


def models():
    """A reference that answers about half of all prompts right, and a policy that begins as it."""
    made = [CausalLM.fresh(TASK.vocab_size, 8, 1, 2, seed) for seed in (3, 3)]
    made[0].model.requires_grad_(False)
    return made


def feed(method, task=TASK, reference=None, **train):
    spec = TrainSpec(**{"batch_size": 8, "group_size": 4, "examples": 32} | train)
    return feed_of(method)(method, task, reference or models()[0], spec, 0, World(device="cpu"))


def moved(model: CausalLM) -> None:
    with torch.no_grad():
        for weight in model.model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


def test_a_method_is_handed_what_it_reads_and_nothing_else():
    method, (reference, policy) = Asks(), models()
    own = feed(method, reference=reference)
    parts = own.parts(policy, 0)
    batch = Counts(*(sum(column) for column in zip(*(p.counts for p in parts), strict=True)))
    for part in parts:
        own.loss(policy, part, batch)
    rollouts, stored = method.seen
    assert rollouts.keys() == stored.keys() == {*method.reads} | ALWAYS
    assert rollouts["log_policy"].shape == rollouts["log_p"].shape == (8, 4)
    assert rollouts["group"].tolist() == [0] * 4 + [1] * 4
    assert (rollouts["sequences"], rollouts["groups"], rollouts["count"]) == (8, 2, 16)
    assert (
        rollouts["stored_log_policy"].shape[0] == 0 == stored["log_policy"].shape[0] == len(stored["reward"])
    )
    held = len(own.memory["stored_ids"][:2])
    assert stored["stored_count"] == int(stored["stored_mask"].sum()) == held * TASK.length > 0
    torch.testing.assert_close(stored["stored_log_policy"].detach(), stored["stored_log_initial"])
    torch.testing.assert_close(rollouts["log_p"], rollouts["log_policy"].detach())


def test_what_is_rehearsed_are_right_answers_to_prompts_that_are_not_explored():
    own = feed(Asks())
    own.parts(models()[1], 0)
    memory = own.memory
    assert TASK.verify(memory["stored_ids"]).all()
    prompts = {tuple(row[:3].tolist()) for row in memory["stored_ids"]}
    explored = {tuple(row.tolist()) for row in memory["explored"]}
    assert prompts and explored and not prompts & explored
    assert len(prompts | explored) == TASK.trained_on
    drawn = own.rehearsed.explored(50, torch.Generator().manual_seed(0)).ids
    assert {tuple(row.tolist()) for row in drawn} == explored


def test_what_is_rehearsed_is_the_policys_own_or_is_refused():
    other = CausalLM.fresh(TASK.vocab_size, 8, 1, 2, 9)
    with pytest.raises(ValueError, match="student: reference"):
        feed(DPH()).attend(other)


def test_a_policy_that_solves_everything_leaves_nothing_to_explore():
    with pytest.raises(ValueError, match="raise the threshold"):
        feed(DPH(rehearsal=Rehearsal(tries=1, threshold=0.5)), Solved()).parts(models()[1], 0)


@dataclass(frozen=True)
class Solved:
    """Every answer is right."""

    answer_length: int = 1

    def prompts(self, count, generator):
        ids = torch.arange(1, 4).repeat(count)[:count].reshape(-1, 1)
        return Text(ids, torch.zeros_like(ids).bool())

    def answer(self, model, prompts, draws, decoding):
        ids = torch.cat([prompts.ids, torch.ones_like(prompts.ids)], 1)
        return Text(ids, torch.tensor([False, True]).expand_as(ids))

    def verify(self, ids, mask):
        return torch.ones(len(ids))


@pytest.mark.parametrize("reuse", [1, 3])
def test_rollouts_serve_as_many_steps_as_they_are_to(reuse):
    own, policy = feed(GRPO(), reuse=reuse), models()[1]
    texts = [own.parts(policy, step)[0].text.ids for step in range(4)]
    same = [torch.equal(texts[0], other) for other in texts]
    assert same == [step < reuse for step in range(4)]


def test_on_later_steps_the_answers_are_those_of_an_older_policy():
    reads = tuple(name for name in Asks().reads if not name.startswith("stored"))
    method, policy = Asks(reads, rehearsal=None), models()[1]
    own = feed(method, reuse=2)
    for step in range(2):
        for part in own.parts(policy, step):
            own.loss(policy, part, part.counts)
        moved(policy)
    first, second = method.seen
    assert torch.equal(first["log_behaviour"], second["log_behaviour"])
    torch.testing.assert_close(first["log_policy"].detach(), first["log_behaviour"])
    assert (second["log_policy"] - second["log_behaviour"]).abs().max() > 1e-3
    assert first["batch_value"] == pytest.approx(1.0)
    expected = (second["log_policy"] - second["log_behaviour"]).square()[second["mask"]].mean() + 1
    assert second["batch_value"] == pytest.approx(expected.item(), rel=1e-5)


def test_answers_that_are_kept_are_kept_by_a_checkpoint():
    policy = models()[1]
    one, two = feed(GRPO(), reuse=4), feed(GRPO(), reuse=4)
    first = one.parts(policy, 0)[0]
    two.restore(one.state, {name: tensor.clone() for name, tensor in one.memory.items()})
    again = two.parts(policy, 2)[0]
    assert torch.equal(first.text.ids, again.text.ids)
    assert all(torch.equal(tensor, again.more[name]) for name, tensor in first.more.items())


@pytest.mark.parametrize("method", [DisCO(), APO()], ids=repr)
def test_groups_stay_whole_or_a_micro_batch_is_refused(method):
    with pytest.raises(ValueError, match="multiple of group_size"):
        feed(method, micro_batch=2)
    parts = feed(method, micro_batch=4).parts(models()[1], 0)
    assert [len(part.more["group"].unique()) for part in parts] == [1, 1]


def test_a_fixed_text_is_not_reused():
    with pytest.raises(ValueError, match=r"leave it out"):
        feed(FDPO(), reuse=2)


METHODS = (
    GRPO(),
    GRPO(estimator=Exact(), aggregate="sequences"),
    DPH(rehearsal=Rehearsal(tries=4, threshold=0.5, batch=2)),
    DPH(JS(0.5), rehearsal=Rehearsal(tries=4, threshold=0.5, batch=2)),
    DisCO(),
    APO(),
    OccupancyPO(),
    ROSE(),
    FDPG(JS(0.5), Target() * Tilt(0.5)),
    FDPG(KL(), Target() * Accept(), proposal="lagged", every=1),
)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_micro_batches_add_up_to_the_batch(method):
    found = []
    for size in (None, 4):
        reference, policy = models()
        own = feed(method, reference=reference, micro_batch=size, reuse=2)
        for step in range(2):  # on the second the policy is not the one that wrote
            parts = own.parts(policy, step)
            batch = Counts(*(sum(column) for column in zip(*(p.counts for p in parts), strict=True)))
            policy.model.zero_grad()
            total = sum(own.loss(policy, part, batch).loss for part in parts)
            total.backward()
            grad = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
            moved(policy)
        found.append((total.detach(), grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert found[0][1].any()


def test_the_partition_of_a_target_is_learnt_prompt_by_prompt():
    own, (reference, policy) = feed(FDPG(target=Target() * Accept()), batch_size=512), models()
    for step in range(6):
        part = own.parts(policy, step)[0]
    prompts = TASK.prompt_ids()[: TASK.trained_on]
    valid = TASK.log_truth(prompts).isfinite()
    exact = torch.where(valid, TASK.log_answers(reference, prompts).exp(), 0.0).sum(1)
    for prompt, mass in zip(prompts, exact, strict=True):
        rows = (part.text.ids[:, :3] == prompt).all(1)
        assert rows.any() and NOTHING not in part.text.ids
        assert part.more["log_partition"][rows].exp()[0].item() == pytest.approx(mass.item(), abs=0.1)


def test_a_lagged_proposal_writes_until_it_is_renewed():
    own, (_, policy) = feed(FDPG(JS(0.5), Target() * Tilt(0.5), proposal="lagged", every=1)), models()
    moved(policy)
    first = own.parts(policy, 0)[0]
    before = own.proposal.model.token_log_probs(*first.text)
    assert (before - policy.token_log_probs(*first.text)).abs().max() > 1e-3
    torch.testing.assert_close(first.more["log_behaviour"][first.text.mask[:, 1:]], before)
    own.after_step(policy, {"pseudo_reward": 0.0, "gain": 1.0}, 0.5)
    second = own.parts(policy, 1)[0]
    log_q = policy.token_log_probs(*second.text)
    torch.testing.assert_close(second.more["log_behaviour"][second.text.mask[:, 1:]], log_q)


# -- what a step is told of ---------------------------------------------------------------------------------


def test_the_entropy_that_is_logged_is_that_of_rollouts_alone():
    own, policy = feed(DPH(rehearsal=Rehearsal(tries=8, threshold=0.25, batch=2))), models()[1]
    parts = own.parts(policy, 0)
    batch = Counts(*(sum(column) for column in zip(*(p.counts for p in parts), strict=True)))
    outs = [own.loss(policy, part, batch).metrics for part in parts]
    shares = [own.share(part, batch) for part in parts]
    logged = sum(float(out.get("entropy", 0.0)) * s for s, out in zip(shares, outs, strict=True))
    assert len(parts) == 2
    assert logged == pytest.approx(policy.scored(*parts[0].text).entropy.mean().item(), rel=1e-5)


def test_a_micro_batch_without_a_token_has_the_metrics_of_every_other():
    """Processes add up their numbers one by one, so that all of them have the same."""
    own, policy = feed(GRPO()), models()[1]
    part = own.parts(policy, 0)[0]
    none = Part(Text(part.text.ids, torch.zeros_like(part.text.mask)), part.more)
    told, silent = (own.loss(policy, some, part.counts) for some in (part, none))
    assert list(told.metrics) == list(silent.metrics)
    assert silent.loss.item() == 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("method", [GRPO(), FDPG(JS(0.5), Target() * Tilt(0.5), proposal="lagged")], ids=repr)
def test_answers_are_scored_as_they_were_written_and_in_the_precision_of_the_loss(method, dropout):
    """Without dropout, of which the sampler has none; then the first step's importance ratios are 1."""
    reference, policy = models()
    own = feed(method, reference=reference, reuse=2, precision="bfloat16")
    for model in (reference, policy):
        model.model.train(model is policy)
        for layer in model.model.model.layers:
            layer.self_attn.attention_dropout = dropout
    part = own.parts(policy, 0)[0]
    assert policy.model.training
    policy.model.eval()
    with own.precision():
        out = own.loss(policy, part, part.counts)
        log_q = policy.token_log_probs(*part.text)
    assert torch.equal(part.more["log_behaviour"][part.text.mask[:, 1:]], log_q)
    assert out.metrics["ratio"].item() == 1.0


@pytest.mark.parametrize("processes", [2, 3])
def test_what_is_rehearsed_does_not_depend_on_how_many_processes_share_it(processes):
    own, policy = feed(DPH(rehearsal=Rehearsal(tries=8, threshold=0.25, batch=1))), models()[1]
    own.parts(policy, 0)
    generator = torch.Generator().manual_seed
    (alone, log_p), (shared, log_p_shared) = (own.rehearsed.drawn(generator(0), n) for n in (1, processes))
    assert len(alone.ids) == 1 and len(shared.ids) == processes
    assert not shared.mask[1:].any() and torch.equal(shared.ids[:1], alone.ids)
    assert torch.equal(shared.mask[:1], alone.mask) and torch.equal(log_p_shared[:1], log_p)
    losses = []
    for text, told in ((alone, log_p), (shared, log_p_shared)):
        parts = Part(text, {"log_initial": told}).split(1)
        batch = Counts(*(sum(column) for column in zip(*(p.counts for p in parts), strict=True)))
        policy.model.zero_grad()
        moved(policy)
        total = sum(own.loss(policy, part, batch).loss for part in parts)
        total.backward()
        losses.append(total.detach())
        policy = models()[1]
    torch.testing.assert_close(*losses)
    assert losses[0] > 0


def test_a_proposal_that_cannot_be_renewed_is_refused_before_the_first_step():
    method, other = FDPG(proposal="lagged"), CausalLM.fresh(TASK.vocab_size, 16, 1, 2, 0)
    with pytest.raises(ValueError, match="lagged proposal"):
        feed(method).attend(other)
    with pytest.raises(ValueError, match="no LoRA"):
        feed(method, lora={"rank": 2}).attend(models()[1])
    feed(method).attend(models()[1])


def test_groups_that_processes_cannot_share_are_called_groups():
    spec = TrainSpec(batch_size=8, group_size=4)
    with pytest.raises(ValueError, match=r"2 groups .* 3 processes"):
        feed_of(GRPO())(GRPO(), TASK, models()[0], spec, 0, World(0, 3, "cpu"))
