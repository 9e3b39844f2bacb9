"""fdiv: the divergence between two distributions, made a choice."""

from fdiv import testing as testing
from fdiv._bregman import BregmanDivergence as BregmanDivergence
from fdiv._divergence import Divergence as Divergence
from fdiv._divergence import FDivergence as FDivergence
from fdiv._divergence import Reverse as Reverse
from fdiv._divergence import Sum as Sum
from fdiv.divergences.alpha import Alpha as Alpha
from fdiv.divergences.alpha_beta import AlphaBeta as AlphaBeta
from fdiv.divergences.chi_kl import ChiKL as ChiKL
from fdiv.divergences.chi_square import Neyman as Neyman
from fdiv.divergences.chi_square import Pearson as Pearson
from fdiv.divergences.generator import Generator as Generator
from fdiv.divergences.hellinger import SquaredHellinger as SquaredHellinger
from fdiv.divergences.jeffreys import Jeffreys as Jeffreys
from fdiv.divergences.js import JS as JS
from fdiv.divergences.kl import KL as KL
from fdiv.divergences.kl import ReverseKL as ReverseKL
from fdiv.divergences.renyi import Renyi as Renyi
from fdiv.divergences.skew import SkewKL as SkewKL
from fdiv.divergences.skew import SkewReverseKL as SkewReverseKL
from fdiv.divergences.softened import SoftenedKL as SoftenedKL
from fdiv.divergences.softened import SoftenedReverseKL as SoftenedReverseKL
from fdiv.divergences.triangular import Triangular as Triangular
from fdiv.divergences.tv import TV as TV
from fdiv.notation import parse as parse

__version__ = "0.1.0"
