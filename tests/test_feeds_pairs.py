"""What a method that consumes pairs is handed, and what the loss of a step does not depend on."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from tests.estimate.test_fused_linear import PeakMemory
from torch import Tensor, nn

pytest.importorskip("transformers")
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from fdiv import FDPO, KL, KTO, TDPO, Exact, FusedLinear, ReverseKL
from fdiv.adapters.transformers import CausalLM
from fdiv.feeds import Counts, feed_of
from fdiv.methods._method import READABLE_IN_PAIRS, Out
from fdiv.methods.prefer.sparse_po import SparsePO
from fdiv.parallel import Spread, World
from fdiv.recipe import TrainSpec
from fdiv.tasks._task import Pairs, Text
from fdiv.train import validate

VOCAB, PAIRS, LENGTH = 23, 6, 9
MENU = tuple(name for names in READABLE_IN_PAIRS for name in names.split(", "))


@dataclass(frozen=True)
class Asks:
    """A method that asks for all there is, and keeps what it was given."""

    consumes: ClassVar[str] = "pairs"

    reads: tuple[str, ...] = MENU
    estimator: Any = Exact()
    divergence: Any = KL()
    seen: list[dict] = field(default_factory=list)

    def module(self, width: int, layers: int) -> nn.Module:
        return nn.Linear(width, layers)

    def __call__(self, **tensors) -> Out:
        self.seen.append(tensors)
        return Out(sum(t.sum() for name, t in tensors.items() if name.startswith("log_q")), {})


@dataclass(frozen=True)
class Given:
    """A task whose pairs, and what is to be retained, are there already."""

    chosen: Text
    rejected: Text

    def pairs(self, reference, count, generator):
        return Pairs(self.chosen, self.rejected)

    def retained(self, reference, count, generator):
        return self.chosen


def text(seed: int, least: int = 4) -> Text:
    """Prompts of two tokens, and responses of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (PAIRS, LENGTH), generator=generator)
    ids[:, :2] = torch.arange(PAIRS)[:, None] + torch.tensor([1, 2])  # the same prompts on both sides
    place, ends = torch.arange(LENGTH), torch.randint(least, LENGTH + 1, (PAIRS, 1), generator=generator)
    return Text(ids * (place < ends), (place >= 2) & (place < ends))


def feed(method, task, **train):
    spec = TrainSpec(batch_size=PAIRS, **train)
    return feed_of(method)(method, task, REFERENCE, spec, 0, World(device="cpu"))


REFERENCE, POLICY = (CausalLM.fresh(VOCAB, 16, 2, 2, seed) for seed in (0, 1))
REFERENCE.model.requires_grad_(False)


def summed(model: CausalLM, given: Text) -> Tensor:
    """log q of each response, from whole rows."""
    rows = model.model(given.ids).logits.log_softmax(-1)[:, :-1]
    each = rows.gather(-1, given.ids[:, 1:, None]).squeeze(-1)
    return torch.where(given.mask[:, 1:], each, 0.0).sum(1)


@pytest.fixture
def handed():
    method, task = Asks(), Given(text(0), text(1))
    own = feed(method, task)
    own.attend(POLICY)
    part = own.parts(POLICY, 0)[0]
    own.loss(POLICY, part, part.counts)
    return method.seen[0], part, own


def test_a_method_is_handed_all_that_the_menu_offers_and_nothing_else(handed):
    assert handed[0].keys() == {*MENU, "log_p", "log_q"}


def test_sums_lengths_and_tokens_agree_with_the_models(handed):
    seen, part, _ = handed
    sides = {"chosen": part.text, "rejected": Text(part.more["ids"], part.more["mask"])}
    for n, (side, given) in enumerate(sides.items()):
        for name, model in (("log_p", REFERENCE), ("log_q", POLICY)):
            torch.testing.assert_close(seen[f"{name}_{side}"], summed(model, given))
            of_side = seen["sequence"] // PAIRS == n
            total = torch.zeros(PAIRS).index_add(
                0, seen["sequence"][of_side] % PAIRS, seen[f"{name}_label"][of_side]
            )
            torch.testing.assert_close(total, seen[f"{name}_{side}"])
        assert seen[f"length_{side}"].tolist() == given.mask.sum(1).tolist()
    assert seen["pairs"] == seen["pairs_in_batch"] == PAIRS


def test_the_estimators_evidence_is_at_the_tokens_of_both_responses(handed):
    seen, _, _ = handed
    for name, label in (("log_p", "log_p_label"), ("log_q", "log_q_label")):
        assert seen[name].shape == (len(seen["sequence"]), VOCAB)
        assert (seen[name].logsumexp(-1).abs() < 1e-5).all()
        assert ((seen[name] - seen[label][:, None]).abs().amin(-1) < 1e-5).all()


def test_a_mismatched_response_stands_behind_the_prompt_of_another_pair(handed):
    seen, part, _ = handed
    moved = part.text.ids.clone()
    moved[:, :2] = part.text.ids.roll(1, 0)[:, :2]
    moved = Text(moved, part.text.mask)
    torch.testing.assert_close(
        seen["log_ratio_mismatched"], (summed(POLICY, moved) - summed(REFERENCE, moved)).detach()
    )
    assert not seen["log_ratio_mismatched"].requires_grad


def test_states_and_activations_are_the_references_where_a_token_is_predicted(handed):
    seen, part, _ = handed
    last = REFERENCE.hidden(*part.text)
    assert seen["p_states"].shape == (len(seen["sequence"]), 2, 16)
    torch.testing.assert_close(seen["p_states"][: len(last), -1], last)
    assert seen["p_activations"].shape == (len(seen["sequence"]), 6)  # two layers, attention and MLP of each
    assert not seen["p_states"].requires_grad and not seen["p_activations"].requires_grad


def test_what_is_to_be_retained_is_scored_by_both(handed):
    seen, part, _ = handed
    kept = Text(part.more["retain_ids"], part.more["retain_mask"])
    for name, model in (("log_p", REFERENCE), ("log_q", POLICY)):
        total = torch.zeros(PAIRS).index_add(0, seen["retain_sequence"], seen[f"{name}_retain_label"])
        torch.testing.assert_close(total, summed(model, kept))


def test_the_module_is_trained_beside_the_policy(handed):
    seen, _, own = handed
    assert isinstance(seen["module"], nn.Linear) and seen["module"] is own.module
    assert (seen["module"].in_features, seen["module"].out_features) == (16, 2)


def test_a_name_that_is_not_on_the_menu_is_refused():
    own = feed(Asks(reads=("log_q_label", "temper")), Given(text(0), text(1)))
    part = own.parts(POLICY, 0)[0]
    with pytest.raises(TypeError, match="temper"):
        own.loss(POLICY, part, part.counts)


def test_what_there_is_to_retain_is_asked_of_a_task_that_has_it():
    @dataclass(frozen=True)
    class Plain:
        given: Text

        def pairs(self, reference, count, generator):
            return Pairs(self.given, self.given)

    with pytest.raises(ValueError, match="text to be retained"):
        feed(Asks(), Plain(text(0)))


def methods():
    from fdiv.methods.prefer.chi_po import ChiPO
    from fdiv.methods.prefer.ipo import IPO
    from fdiv.methods.prefer.kto import KTO
    from fdiv.methods.prefer.sparse_po import MaPO, SparsePO
    from fdiv.methods.unlearn.flat import FLAT
    from fdiv.methods.unlearn.gradient_ascent import GradientAscent
    from fdiv.methods.unlearn.npo import NPO

    return [
        FDPO(),
        FDPO(length_normalised=True),
        IPO(),
        ChiPO(),
        KTO(),
        TDPO(),
        TDPO(ReverseKL(), Exact()),
        TDPO(estimator=FusedLinear(chunk=5)),
        SparsePO(),
        MaPO(),
        FLAT(),
        NPO(),
        GradientAscent(),
    ]


@pytest.mark.slow
def test_a_step_with_a_large_vocabulary_never_holds_tokens_by_vocabulary(monkeypatch):
    monkeypatch.setattr("fdiv.estimate.fused_log_prob.is_worth_compiling", lambda *_: False)  # takes long
    vocab = 151936
    reference, policy = (CausalLM.fresh(vocab, 8, 1, 2, seed) for seed in (0, 1))
    ids = torch.randint(1, vocab, (4, 33), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(33).expand(4, -1) > 0
    given = Given(Text(ids, mask), Text(ids.flip(1), mask))
    tokens = 2 * int(mask.sum())
    for method in (FDPO(), TDPO(estimator=FusedLinear(chunk=16, compiled=False))):
        spec = TrainSpec(batch_size=4)
        own = feed_of(method)(method, given, reference, spec, 0, World(device="cpu"))
        part = own.mine(own.pairs)[0]
        with PeakMemory(floor=vocab) as seen:
            own.loss(policy, part, part.counts).loss.backward()
        assert seen.largest <= tokens * vocab / 2
        assert seen.peak < 4 * tokens * vocab  # all that is held at one time, gradients included, in bytes


def gradient(method, task, size) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a batch in micro-batches of `size`."""
    own = feed(method, task, micro_batch=size)
    module = own.attend(POLICY)
    POLICY.model.zero_grad()
    if module is not None:
        module.eval()
        module.zero_grad()
    parts = own.parts(POLICY, 0)
    batch = Counts(*(sum(column) for column in zip(*(p.counts for p in parts), strict=True)))
    total = sum(own.loss(POLICY, part, batch).loss for part in parts)
    total.backward()
    trained = [*POLICY.model.parameters(), *(module.parameters() if module is not None else ())]
    return total.detach(), torch.cat([p.grad.flatten() for p in trained if p.grad is not None])


@pytest.mark.parametrize("method", methods(), ids=repr)
def test_micro_batches_add_up_to_the_batch(method):
    task = Given(text(0), text(1, least=2))  # one that is rejected may have no token at all
    whole, split = (gradient(method, task, size) for size in (None, 4))
    for one, two in zip(whole, split, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert whole[1].isfinite().all() and whole[1].any()


def test_what_is_held_out_is_validated_on_as_far_as_processes_can_share_it():
    @dataclass(frozen=True)
    class Held(Given):
        def held_out_pairs(self, reference, count, generator):
            return Pairs(self.chosen.rows(slice(0, 5)), self.rejected.rows(slice(0, 5)))

    task = Held(text(0), text(1))
    for rank in range(2):
        spec = TrainSpec(batch_size=PAIRS, validate_every=1, validate_on=8)
        own = feed_of(FDPO())(FDPO(), task, REFERENCE, spec, 0, World(rank, 2, "cpu"))
        (part,) = own.validation(POLICY)
        assert torch.equal(part.text.ids, task.chosen.ids[2 * rank : 2 * rank + 2])


def test_a_method_without_a_validation_loss_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match="leave out validate_every"):
        feed(Asks(), Given(text(0), text(1)), validate_every=1, validate_on=4)


def test_an_answer_has_another_pairs_prompt_to_stand_behind():
    spec = TrainSpec(batch_size=1)
    with pytest.raises(ValueError, match="batch_size is at least 2"):
        feed_of(KTO())(KTO(), Given(text(0), text(1)), REFERENCE, spec, 0, World(device="cpu"))


def test_a_validation_loss_is_without_the_dropout_of_what_is_trained_beside():
    method = SparsePO(dropout=0.5)
    own = feed(method, Given(text(0), text(1)), validate_every=1, validate_on=PAIRS)
    spread = Spread(POLICY.model, "ddp", own.world, beside=own.attend(POLICY))
    first, second = (validate(spread, POLICY, own) for _ in range(2))
    assert first == second
    assert own.module is not None and own.module.training


@pytest.mark.parametrize("kind", ["experts", "dropout"])
def test_activations_are_of_the_layers_their_attention_and_their_mlp(kind):
    """Not of a longer list inside a layer, nor of modules that only pass on what others put out."""
    if kind == "experts":
        model = CausalLM.fresh(VOCAB, 16, 2, 2, 0)
        for layer in model.model.model.layers:
            layer.mlp.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
        model = CausalLM(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, **sizes)).eval())
    given = text(0)
    layers = model.model.base_model.layers
    found = model.activations(*given)
    assert found.shape == (int(given.mask.sum()), 6)
    seen = []
    layers[1].register_forward_hook(lambda module, arguments, output: seen.append(output))
    model.hidden(*given)
    states = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    expected = states[:, :-1][given.mask[:, 1:]].mean(-1)
    assert (found - expected[:, None]).abs().amax(0).min() < 1e-6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_policy_that_is_still_the_reference_has_log_ratios_of_zero(precision):
    """Both are read in one precision, so that rounding cancels."""
    method = Asks((*MENU[:4], "log_ratio_mismatched"), estimator=None)
    own = feed(method, Given(text(0), text(1)), precision=precision)
    for part in own.parts(REFERENCE, 0):
        with own.precision():
            own.loss(REFERENCE, part, part.counts)
    (seen,) = method.seen
    for side in ("chosen", "rejected"):
        torch.testing.assert_close(seen[f"log_q_{side}"], seen[f"log_p_{side}"], rtol=0, atol=1e-5)
    assert seen["log_ratio_mismatched"].abs().max() < 1e-5
