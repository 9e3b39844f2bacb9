"""fdiv: the divergence between two distributions, made a choice."""

from fdiv import testing as testing
from fdiv._bregman import BregmanDivergence as BregmanDivergence
from fdiv._divergence import Divergence as Divergence
from fdiv._divergence import FDivergence as FDivergence
from fdiv._divergence import Reverse as Reverse
from fdiv._divergence import Sum as Sum
from fdiv._metric import MetricDivergence as MetricDivergence
from fdiv._metric import OnPoints as OnPoints
from fdiv.divergences.alpha import Alpha as Alpha
from fdiv.divergences.alpha_beta import AlphaBeta as AlphaBeta
from fdiv.divergences.cauchy_schwarz import CauchySchwarz as CauchySchwarz
from fdiv.divergences.chi_kl import ChiKL as ChiKL
from fdiv.divergences.chi_square import Neyman as Neyman
from fdiv.divergences.chi_square import Pearson as Pearson
from fdiv.divergences.energy import Energy as Energy
from fdiv.divergences.generator import Generator as Generator
from fdiv.divergences.hellinger import SquaredHellinger as SquaredHellinger
from fdiv.divergences.jeffreys import Jeffreys as Jeffreys
from fdiv.divergences.js import JS as JS
from fdiv.divergences.kernels import Gaussian as Gaussian
from fdiv.divergences.kernels import Laplace as Laplace
from fdiv.divergences.kl import KL as KL
from fdiv.divergences.kl import ReverseKL as ReverseKL
from fdiv.divergences.mmd import MMD as MMD
from fdiv.divergences.renyi import Renyi as Renyi
from fdiv.divergences.sinkhorn import Sinkhorn as Sinkhorn
from fdiv.divergences.skew import SkewKL as SkewKL
from fdiv.divergences.skew import SkewReverseKL as SkewReverseKL
from fdiv.divergences.softened import SoftenedKL as SoftenedKL
from fdiv.divergences.softened import SoftenedReverseKL as SoftenedReverseKL
from fdiv.divergences.triangular import Triangular as Triangular
from fdiv.divergences.tv import TV as TV
from fdiv.divergences.wasserstein import Sliced as Sliced
from fdiv.divergences.wasserstein import Wasserstein1D as Wasserstein1D
from fdiv.estimate._estimator import Estimator as Estimator
from fdiv.estimate._estimator import Guarantee as Guarantee
from fdiv.estimate.exact import Exact as Exact
from fdiv.estimate.fused_linear import FusedLinear as FusedLinear
from fdiv.estimate.monte_carlo import MonteCarlo as MonteCarlo
from fdiv.estimate.sampled_logits import SampledLogits as SampledLogits
from fdiv.estimate.top_k import TopK as TopK
from fdiv.estimate.variational import Variational as Variational
from fdiv.notation import parse as parse

__version__ = "0.1.0"
