"""fdiv itself, through its public surface."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import fdiv
from conformance import oracle, world
from conformance.system import Penalty, Rows, System, TruncatedRows
from fdiv import FDPO, GKD, GRPO, JS, KL, Alpha, Exact, FDivergence, FusedLinear, MonteCarlo, ReverseKL, TopK
from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import Counts
from fdiv.feeds.responses import Responses
from fdiv.parallel import World
from fdiv.recipe import TrainSpec
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text

BY_NAME: dict[str, FDivergence] = {
    "forward KL": KL(),
    "reverse KL": ReverseKL(),
    "JSD(0.1)": JS(0.1),
    "JSD(0.5)": JS(0.5),
    "JSD(0.9)": JS(0.9),
    "forward and reverse KL(0.3)": 0.3 * KL() + 0.7 * ReverseKL(),
    "Jeffreys": fdiv.Jeffreys(),
    "skew KL(0.1)": fdiv.SkewKL(0.1),
    "skew reverse KL(0.1)": fdiv.SkewReverseKL(0.1),
    "alpha(0.3)": Alpha(0.3),
    "squared Hellinger": fdiv.SquaredHellinger(),
    "Pearson": fdiv.Pearson(),
    "Neyman": fdiv.Neyman(),
    "TV": fdiv.TV(),
    "triangular": fdiv.Triangular(),
}
PREFERENCES = {"reverse KL": ReverseKL(), "forward KL": KL(), "JS": 2 * JS(0.5), "alpha": Alpha(0.3)}


class Adapter(System):
    name = "fdiv"
    version = fdiv.__version__
    reasons: ClassVar[dict[str, str]] = {
        "C14": "fdiv clips no term of a divergence; a bounded divergence takes the place of a clip",
        "C33": "needs a server; what Served refuses is in tests/teachers/test_served.py",
        "C46": "fdiv compares the tables of tokens, not logits; tests/teachers/test_signal.py",
        "C50": "needs a server; what Served refuses is in tests/teachers/test_served.py",
    }

    # -- on the whole vocabulary --------------------------------------------------------------------------

    def divergences(self) -> dict[str, Rows]:
        return {name: on_logits(divergence) for name, divergence in BY_NAME.items()}

    def jsd(self, teacher: Tensor, student: Tensor, beta: float) -> Tensor:
        return on_logits(JS(beta))(teacher, student)

    def configure_jsd(self, beta: float) -> object:
        return GKD(divergence=JS(beta))

    def skew_kl(self, teacher: Tensor, student: Tensor, skew: float) -> Tensor:
        return on_logits(fdiv.SkewKL(skew))(teacher, student)

    def mismatched_vocabulary(self, teacher: Tensor, student: Tensor) -> Tensor:
        return on_logits(ReverseKL())(teacher, student)

    def padded_vocabulary(self, teacher: Tensor, student: Tensor, size: int) -> Tensor:
        return on_logits(ReverseKL())(teacher[:, :size], student[:, :size])

    # -- from hidden states and heads ---------------------------------------------------------------------

    def fused_jsd(self, teacher, student, beta, mask=None, chunk=None) -> Tensor:
        estimator = FusedLinear() if chunk is None else FusedLinear(chunk=chunk)
        divergence = {0.0: KL(), 1.0: ReverseKL()}.get(beta) or JS(beta)
        evidence = dict(zip(estimator.evidence, (*teacher, *student), strict=True))
        return GKD(divergence=divergence, estimator=estimator)(mask=mask, **evidence).loss

    # -- on a few atoms -----------------------------------------------------------------------------------

    def truncated(self) -> dict[str, TruncatedRows]:
        return {name: top_k(divergence) for name, divergence in BY_NAME.items()}

    def with_tail(self) -> dict[str, TruncatedRows]:
        return self.truncated()

    def tempered_truncated(self, teacher: Tensor, student: Tensor, k: int, temperature: float) -> Tensor:
        return top_k(KL())(teacher / temperature, student / temperature, k)

    def served(self, log_probs: Tensor, ids: Tensor, student: Tensor) -> Tensor:
        chosen = student.log_softmax(-1).gather(-1, ids)
        empty = log_probs == -torch.inf
        return TopK.atoms(KL(), log_probs, chosen.masked_fill(empty, -torch.inf)).value.mean()

    # -- sampled tokens -----------------------------------------------------------------------------------

    def penalties(self) -> dict[str, Penalty]:
        return self.off_policy_penalties() | {
            name: _on_policy_penalty(divergence) for name, divergence in BY_NAME.items()
        }

    def off_policy_penalties(self) -> dict[str, Penalty]:
        estimators = {
            ", off-policy": MonteCarlo("behaviour"),
            ", off-policy by importance": MonteCarlo("behaviour", "importance"),
        }
        return {
            name + how: _penalty(divergence, estimator)
            for name, divergence in BY_NAME.items()
            for how, estimator in estimators.items()
        }

    def full_penalty(self, reference: Tensor, policy: Tensor, name: str) -> Tensor:
        method = GRPO(divergence=BY_NAME[name], estimator=Exact(), beta=1.0)
        vocab = reference.shape[-1]
        log_policy = policy.log_softmax(-1).reshape(vocab, 1)  # every token sampled once, rewards all equal
        rows = {
            "log_p": reference.expand(vocab, 1, vocab),
            "log_q": policy.log_softmax(-1).expand(vocab, 1, vocab),
        }
        return method(
            log_policy=log_policy,
            log_behaviour=log_policy.detach(),
            rewards=torch.zeros(1, vocab),
            mask=torch.ones(vocab, 1, dtype=torch.bool),
            **rows,
        ).loss

    def policy_gradient(self, log_policy: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
        return GRPO(beta=0.0)(
            log_policy=log_policy,
            log_behaviour=log_policy.detach(),
            rewards=rewards.unsqueeze(0),
            mask=mask,
        ).loss

    def future_credit(self, log_ratios: Tensor, mask: Tensor) -> Tensor:
        gradients = [self._penalty_gradient(log_ratios, mask, future) for future in (True, False)]
        return gradients[0] - gradients[1]

    def _penalty_gradient(self, log_ratios: Tensor, mask: Tensor, future: bool) -> Tensor:
        log_policy = torch.full_like(log_ratios, -1.0).expand(2, -1).clone().requires_grad_()
        loss = GRPO(beta=1.0, future=future)(
            log_policy=log_policy,
            log_behaviour=log_policy.detach(),
            rewards=torch.zeros(1, 2),
            mask=mask.expand(2, -1),
            log_p=-1.0 - log_ratios.expand(2, -1),
            log_q=log_policy,
        ).loss
        return torch.autograd.grad(loss * 2 * mask.sum(), log_policy)[0][0]

    def ratio_functions(self):
        chosen = {"KL": KL(), "reverse KL": ReverseKL(), "JSD": JS(0.3), "alpha": Alpha(0.3)}
        return {
            f"{kind} of {name}": getattr(divergence, kind)
            for name, divergence in chosen.items()
            for kind in ("phi", "psi")
        }

    # -- preferences --------------------------------------------------------------------------------------

    def preference_scores(self):
        return {name: _score(divergence) for name, divergence in PREFERENCES.items()}

    def absolute_scores(self):
        return self.preference_scores()

    def alpha_score(self, log_ratio: Tensor, alpha: float) -> Tensor:
        return _score(Alpha.fdpo(alpha))(log_ratio)

    def preference_margins(self, chosen: float, rejected: float) -> tuple[float, float]:
        method = FDPO(divergence=KL(), beta=0.1)
        zero, ratios = torch.zeros(1), [torch.tensor([x]) for x in (chosen, rejected)]
        out = method(log_p_chosen=zero, log_p_rejected=zero, log_q_chosen=ratios[0], log_q_rejected=ratios[1])
        logged = out.metrics["reward_chosen"] - out.metrics["reward_rejected"]
        return logged.item(), -out.loss.expm1().log().item()  # the loss is -log sigmoid(margin)

    # -- a training loss ----------------------------------------------------------------------------------

    def token_mean(self, teacher: Tensor, student: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        return GKD()(mask=mask, count=count, log_p=log_p, log_q=log_q).loss

    def distil(self, teacher, student, ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = CausalLM(teacher).log_softmax(ids, mask)
        return GKD()(log_p=log_p, log_q=CausalLM(student).log_softmax(ids, mask)).loss

    def stop_token_mask(self, rollout: Tensor, prompt: int, eos: int) -> Tensor:
        # The mask is the caller's; what is asked is whether each of its tokens is learned.
        places = torch.arange(rollout.shape[1])
        ends = ((rollout == eos) & (places >= prompt)).int().argmax(1, keepdim=True)
        mask = (places >= prompt) & (places <= ends)
        teacher, student = world.language_model(1), world.language_model(2)
        gradient = world.gradient_at_positions(
            student, lambda: self.distil(teacher, student, rollout, mask), rollout.shape
        )
        return torch.cat([torch.zeros(len(rollout), 1, dtype=torch.bool), gradient[:, :-1] > 0], 1)

    def on_policy_denominator(self) -> tuple[float, float]:
        student = CausalLM(world.language_model(2))
        feed = _feed(GKD(lmbda=1.0), _Task())
        (part,) = feed.parts(student, 0)
        loss = feed.loss(student, part, Counts(*part.counts)).loss
        ids, mask = part.text
        rows = oracle.value(
            "forward KL", *(m.log_softmax(ids, mask).detach() for m in (feed.reference, student))
        )
        return len(rows), (rows.sum() / loss).item()

    def cached_signal(self) -> tuple[Tensor, Tensor]:
        method = GKD(estimator=FusedLinear())
        computed = _signal(method, _Task())
        with tempfile.TemporaryDirectory() as folder:
            _signal(method, _Task(first=1), Path(folder))  # the same samples, the other one first
            return computed, _signal(method, _Task(), Path(folder))

    # -- configuration ------------------------------------------------------------------------------------

    def unknown_options(self):
        rows = world.pair()[0].log_softmax(-1)
        return {
            "JS(bta=0.3)": lambda: fdiv.parse("JS(bta=0.3)"),
            "a divergence named Jensen": lambda: fdiv.parse("Jensen()"),
            "GKD(temprature=2)": lambda: fdiv.parse("GKD(temprature=2)"),
            "evidence that the estimator does not read": lambda: GKD()(log_p=rows, log_q=rows, hidden=rows),
        }

    def doubled_penalty(self):
        return lambda: fdiv.parse("GRPO(beta=0.04, reward_beta=0.04)")


def on_logits(divergence: FDivergence) -> Rows:
    return lambda teacher, student: divergence(teacher.log_softmax(-1), student.log_softmax(-1))


def top_k(divergence: FDivergence) -> TruncatedRows:
    return lambda p, q, k: TopK(k)(divergence, p.log_softmax(-1), q.log_softmax(-1))


def _on_policy_penalty(divergence: FDivergence) -> Penalty:
    return lambda log_p, log_q, log_behaviour: MonteCarlo().surrogate(divergence, log_p, log_q)


def _penalty(divergence: FDivergence, estimator: MonteCarlo) -> Penalty:
    return lambda log_p, log_q, log_behaviour: estimator.surrogate(divergence, log_p, log_q, log_behaviour)


def _score(divergence: FDivergence):
    method = FDPO(divergence=divergence)
    return lambda log_ratio: method.score(torch.zeros_like(log_ratio), log_ratio)


@dataclass(frozen=True)
class _Task:
    """Two short responses, the `first` of which comes first, and longer ones that the student writes."""

    first: int = 0
    answer_length: int = 7

    def responses(self, teacher: CausalLM, count: int, generator: torch.Generator) -> Text:
        ids, mask = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]), torch.zeros(2, 5, dtype=torch.bool)
        mask[:, 3:] = True
        return Text(ids.roll(self.first, 0), mask)

    def prompts(self, count: int, generator: torch.Generator) -> Text:
        ids = torch.tensor([[1, 2, 3], [5, 4, 3]])
        return Text(ids, torch.zeros_like(ids, dtype=torch.bool))

    def answer(self, model: CausalLM, prompts: Text, draws: Tensor, decoding: Decoding) -> Text:
        ids = model.sample(prompts.ids, self.answer_length)  # greedily
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[0, 3:], mask[1, 3:6] = True, True
        return Text(ids, mask)


def _feed(method: GKD, task: _Task, cache: Path | None = None) -> Responses:
    spec = TrainSpec(batch_size=2, examples=2)
    return Responses(method, task, CausalLM(world.language_model(1)), spec, 0, World(), cache=cache)


def _signal(method: GKD, task: _Task, cache: Path | None = None) -> Tensor:
    """What the teacher says of the task's samples, in the order in which they come."""
    return _feed(method, task, cache).signals.stored["p_hidden"]
