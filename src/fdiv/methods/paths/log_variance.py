"""Log-variance: a sampler of paths whose log-ratio to the wanted law of paths should not vary.

Nuesken and Richter, "Solving high-dimensional Hamilton-Jacobi-Bellman PDEs using neural networks:
perspectives from the theory of controlled diffusions and measures on path space", arXiv 2005.05409; as a loss
on replayed paths with a learned control variate, Seong, Park, Kim, Kim and Ahn, "Transition Path Sampling
with Improved Off-Policy Training of Diffusion Path Samplers" (TPS-DPS), arXiv 2405.19961.

    dx = (b + u) dt + sigma dW makes the law Q, u = 0 the law P_0, and P is P_0 e^reward, normalised by Z
    l(x) = sum over steps k of (u_k . m_k - |u_k|^2 dt / 2) / sigma^2 - reward(x),   m_k = x_k+1 - x_k - b_k
    dt LV_V = Var of l over x ~ V = 0 if and only if Q = P, whatever V

V is whoever drew the paths: Q itself, or earlier and hotter samplers. At V = Q the gradient is twice that of
KL(Q, P). With log Z + l in place of l less its mean it is trajectory balance, whose least value over log Z is
LV.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fdiv._divergence import Divergence
from fdiv._math import effective_count, in_working_precision
from fdiv.divergences.kl import ReverseKL
from fdiv.methods._method import Consumes, Out, mean_over_tokens

CONTROLS = ("learned", "batch", None)


class LogPartition(nn.Module):
    """What a learned control variate adds to where it started."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))


@dataclass(frozen=True)
class LogVariance:
    """The variance of l over replayed paths.

    control: what is taken from l before it is squared. "learned", a log Z that is trained beside the sampler,
        the paper's; "batch", the batch's mean of l, over n - 1; None, nothing, and so no variance.
    reduction: of the log-ratio over steps and coordinates; "sum" is the divergence of laws. "mean", the
        authors' code, divides it by their number, which wants another law, P_0 being tempered beside the
    reward. truncated: steps behind the one that is nearest to the target do not count, as in the paper: then
        the law is one of paths that end there.
    pace: steps of log Z are this many times those of the network (the authors' 10 are under "mean", where l
        is smaller by far); it starts at minus the first paths' mean l.
    paths: of a roll-out; capacity: paths that are kept; hot: the temperature of the first roll-out over that
        of the last. `train.reuse` is the number of steps between two roll-outs, each on a batch of kept
    paths. importance: the share of a batch that is not drawn evenly from these, but by dP/dQ, by how much
        the sampler underrates them: one that takes one of several ways draws the others hardly any more, and
        learns them from paths that it has kept. The weights are those at the last roll-out, tempered so that
    a share `effective` of the kept paths counts. divergence: LV is no f-divergence and depends on V; this is
        the one that its gradient is twice that of, at V = Q (p being what is wanted).
    """

    consumes: ClassVar[Consumes] = "paths"
    divergence: ClassVar[Divergence] = ReverseKL()

    control: Literal["learned", "batch"] | None = "learned"
    reduction: Literal["sum", "mean"] = "sum"
    truncated: bool = True
    pace: float = 100.0
    paths: int = 128
    capacity: int = 1000
    hot: float = 2.0
    importance: float = 0.0
    effective: float = 0.1

    def __post_init__(self):
        if self.control not in CONTROLS:
            raise ValueError(f"control is 'learned', 'batch' or None, got {self.control!r}")
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction is 'sum' or 'mean', got {self.reduction!r}")
        for name in ("pace", "hot"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is finite and > 0, got {getattr(self, name)!r}")
        for name in ("paths", "capacity"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"{name} is a number of paths, at least 1, got {getattr(self, name)!r}")

        if not 0 <= self.importance <= 1:
            raise ValueError(f"importance is a share of a batch, in [0, 1], got {self.importance!r}")
        if not 0 < self.effective <= 1:
            raise ValueError(f"effective is a share of the kept paths, in (0, 1], got {self.effective!r}")
        if not self.importance and self.effective != LogVariance.effective:
            raise ValueError(
                "effective tempers the weights that importance draws by: give importance > 0, 0.5 say, or "
                "leave effective out"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of READABLE_IN_PATHS."""
        learned = ("module", "memory") if self.control == "learned" else ()
        return (*STEPS, "network", "log_reward", *learned)

    @property
    def unit(self) -> str | None:
        return "batch" if self.control == "batch" else None

    def module(self) -> LogPartition | None:
        return LogPartition() if self.control == "learned" else None

    def initial_memory(self, **first: Any) -> dict[str, Tensor]:
        """Where log Z starts, from what is read of the first paths."""
        if self.control != "learned":
            return {}
        with torch.no_grad():
            return {"log_partition": -self.log_ratio(**first).mean()}

    def underrated(self, log_ratio: Tensor) -> Tensor:
        """The weights [B], of sum 1, by which kept paths are drawn whose l is `log_ratio` [B]."""
        return tempered(-log_ratio, self.effective)

    def heat(self, progress: float) -> float:
        """The temperature of a roll-out over that of the wanted law; progress is 1 at the last."""
        return 1 + (self.hot - 1) * (1 - progress)

    def __call__(
        self,
        *,
        module: LogPartition | None = None,
        memory: dict[str, Tensor] | None = None,
        count: Tensor | float | None = None,
        **paths: Any,
    ) -> Out:
        """paths: as in `log_ratio`. count: paths of the global batch (default: here).

        metrics: `log ratio`, the mean l, and `log-variance`, over the paths of this call.
        """
        gap = self.log_ratio(**paths)
        if self.control == "batch":
            if len(gap) < 2:
                raise ValueError(f"a variance is over at least 2 paths, got {len(gap)}")
            loss = gap.var()
        else:
            loss = mean_over_tokens((gap + self._log_partition(module, memory)).square(), count=count)
        said = gap.detach()
        metrics = {"log ratio": said.mean()} if len(said) else {}
        return Out(loss, metrics | ({"log-variance": said.var()} if len(said) > 1 else {}))

    def _log_partition(self, module: LogPartition | None, memory: dict[str, Tensor] | None) -> Tensor | float:
        if self.control is None:
            return 0.0
        if module is None:
            raise ValueError("control='learned' trains a log Z beside the sampler; give what module() made")
        start = (memory or {}).get("log_partition", 0.0)
        return start + self.pace * module.shift

    def log_ratio(
        self,
        *,
        positions: Tensor,
        moves: Tensor,
        when: Tensor,
        length: Tensor,
        target: Tensor,
        step_size: float,
        variance: float,
        network: Any,
        log_reward: Tensor,
        **_: Any,
    ) -> Tensor:
        """l [B], with the network's gradient and none into the paths.

        positions [B, K + 1, *shape]; moves [B, K, *shape], less the unbiased drift; when [K] in [0, 1);
        length [B], the steps to the place nearest to the target; variance: of the noise, for a unit of time.
        """
        if not bool(log_reward.isfinite().all()):
            raise ValueError(f"log_reward is finite, got {log_reward.tolist()}; a relaxed indicator is")
        log_ratio = log_likelihood_ratio(
            positions, moves, when, target, step_size, variance, network, length if self.truncated else None
        )
        if self.reduction == "mean":
            log_ratio = log_ratio / max(1, moves[0].numel() if len(moves) else 1)
        (reward,) = in_working_precision(log_reward)
        return log_ratio - reward


def tempered(log_weight: Tensor, effective: float) -> Tensor:
    """w^tau over its sum [B], at the largest tau <= 1 at which (sum w^tau)^2 / sum w^(2 tau) >= effective B.

    That is the number of samples that count, which falls as tau grows.
    """
    least, low, high = effective * len(log_weight), 0.0, 1.0
    if effective_count(log_weight) >= least:
        low = 1.0
    for _ in range(50 if low < 1 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if effective_count(middle * log_weight) >= least else (low, middle)
    return (low * log_weight).softmax(0)


STEPS = ("positions", "moves", "when", "length", "target", "step_size", "variance")


def log_likelihood_ratio(
    positions: Tensor,
    moves: Tensor,
    when: Tensor,
    target: Tensor,
    step_size: float,
    variance: float,
    network: Any,
    length: Tensor | None = None,
) -> Tensor:
    """log dQ/dP_0 [B] of paths, or of their first `length` steps."""
    moves = moves.detach()
    force = network(positions[:, :-1].detach(), target, when)  # [B, K, *shape]
    steps = (force * moves - force.square() * (step_size / 2)) / variance
    (steps,) = in_working_precision(steps.flatten(2).sum(-1))  # [B, K]
    if length is None:
        return steps.sum(-1)
    early = torch.arange(steps.shape[1], device=steps.device) < length.unsqueeze(-1)
    return torch.where(early, steps, 0.0).sum(-1)
