"""DEPICT: clustering by a network that chases balanced targets made of its own predictions.

Dizaji, Herandi, Deng, Cai and Huang, "Deep Clustering via Joint Convolutional Autoencoder Embedding and
Relative Entropy Minimization", arXiv 1704.06327.

    min over q and the network of  mean_i KL(q_i, p_i) + KL(f, uniform) + reconstruction,   f = mean_i q_i

in turns: for a fixed network q_ik ~ p_ik / sqrt(sum_j p_jk), each row normalised; for fixed q the network
learns it by its noisy path, p being the clean path's. That q is the minimiser where all rows have one
normaliser. The reconstruction is (x - x')^2 plus `hidden` times the same of every hidden layer, clean against
decoded from the noisy path.

Symbols are the paper's but for direction: here the target is p and the network q, so that KL() is its own.
`power` a and `balance` b make the target p^a / (sum p)^b: a = 1, b = 1/2 are the paper's; a = 2, b = 1, which
its released code uses, are those of Xie, Girshick and Farhadi, "Unsupervised Deep Embedding for Clustering
Analysis", arXiv 1511.06335.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.represent.k_means import k_means
from fdiv.methods.represent.reconstruction import reconstruction
from fdiv.methods.robust.attacks import evaluated


@dataclass(frozen=True)
class DEPICT:
    """Mean D(target, noisy prediction) plus reconstruction; targets change once every example was seen.

    warmup: the share of the training in which the targets are k-means clusters of the reference's features,
    with the log-likelihood as loss. `restarts` and `seed` are those of k-means (scikit-learn).
    The network states decode(features), as fdiv.networks.autoencoder.Autoencoder; labels are not read.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "index", "network", "memory", "progress")

    divergence: FDivergence = field(default_factory=KL)
    power: float = 1.0
    balance: float = 0.5
    reconstruction: float = 1.0
    hidden: float = 0.1
    warmup: float = 0.2
    restarts: int = 20
    seed: int = 0

    def __post_init__(self):
        require_f_divergence(self.divergence, "DEPICT")
        if not (self.power > 0 and math.isfinite(self.power)):
            raise ValueError(f"power is finite and > 0, got {self.power!r}")
        for name in ("balance", "reconstruction", "hidden"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} is finite and >= 0, got {getattr(self, name)!r}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the training, in [0, 1], got {self.warmup!r}")
        if not (isinstance(self.restarts, int) and self.restarts >= 1):
            raise ValueError(f"restarts is a whole number >= 1, got {self.restarts!r}")

    def initial_memory(self, data: Any, reference: Any) -> dict[str, Tensor]:
        """Of each example its cluster, prediction and target, and how many were seen since these changed."""
        if reference is None:
            raise ValueError("DEPICT starts from clusters of a reference's features, and there is none")
        with torch.no_grad(), evaluated(reference):
            features = torch.cat([reference.features(some) for some in data.inputs.split(1024)])
        clusters = reference.head.out_features
        cluster = k_means(features, clusters, self.restarts, self.seed).to(features.device)
        uniform = features.new_full((len(features), clusters), -math.log(clusters))
        return {
            "cluster": cluster,
            "log_p": uniform,
            "log_target": uniform.clone(),
            "seen": torch.zeros((), dtype=torch.int64),
        }

    def __call__(
        self,
        *,
        inputs: Tensor,
        index: Tensor,
        network: Any,
        memory: dict[str, Tensor],
        progress: float,
        count: Tensor | float | None = None,
    ) -> Out:
        """inputs [B, ...], index [B] of the training data; the network in train mode is the noisy path."""
        if bool((index < 0).any()):
            raise ValueError("DEPICT has targets of training examples alone; leave out train.validate_every")
        noisy = network.stages(inputs)[-1]
        log_q = network.head(noisy).log_softmax(-1)
        if progress < self.warmup:
            apart = -log_q.gather(-1, memory["cluster"][index].unsqueeze(-1)).squeeze(-1)
        else:
            apart = self.divergence(memory["log_target"][index], log_q)
        restored = reconstruction(inputs, noisy, network, self.hidden)
        loss = mean_over_tokens(apart + self.reconstruction * restored, count=count)
        return Out(loss, self._metrics(apart, restored, memory))

    def remember(
        self,
        *,
        memory: dict[str, Tensor],
        inputs: Tensor,
        index: Tensor,
        network: Any,
        progress: float,
        count: Tensor | float | None = None,
    ) -> None:
        """Keep the clean path's predictions; after warm-up, new targets as often as all have been seen."""
        with torch.no_grad(), evaluated(network):
            memory["log_p"][index] = network(inputs).log_softmax(-1).to(memory["log_p"])
        memory["seen"] += len(index)
        if progress >= self.warmup and memory["seen"] >= len(memory["log_p"]):
            memory["log_target"].copy_(log_target(memory["log_p"], self.power, self.balance))
            memory["seen"].zero_()

    def _metrics(self, apart: Tensor, restored: Tensor, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        if not len(apart):
            return {}
        numbers = {"divergence": apart.detach().mean(), "reconstruction": restored.detach().mean()}
        return numbers | {"imbalance": imbalance(memory["log_target"])}


def log_target(log_p: Tensor, power: float = 1.0, balance: float = 0.5) -> Tensor:
    """log of p_ik^power / (sum_j p_jk)^balance, rows normalised, [N, K]; an empty cluster stays empty."""
    log_size = log_p.logsumexp(0)
    weighed = power * log_p - balance * torch.where(log_size == -math.inf, 0.0, log_size)
    return weighed.log_softmax(-1)


def imbalance(log_p: Tensor) -> Tensor:
    """KL(f, uniform) in nats, f = mean_i p_i of log p [N, K]: 0 if all clusters are of one size."""
    log_f = log_p.logsumexp(0) - math.log(len(log_p))
    return KL()(log_f, torch.full_like(log_f, -math.log(len(log_f))))
