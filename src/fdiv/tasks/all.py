"""The tasks that a recipe can name."""

from fdiv.tasks.backspaced import Backspaced as Backspaced
from fdiv.tasks.classification import Classification as Classification
from fdiv.tasks.clustering import Clustering as Clustering
from fdiv.tasks.grammar import Grammar as Grammar
from fdiv.tasks.images import Images as Images
from fdiv.tasks.instructions import Instructions as Instructions
from fdiv.tasks.paths import Paths as Paths
from fdiv.tasks.points import Points as Points
from fdiv.tasks.regression import Regression as Regression
from fdiv.tasks.text import Corpus as Corpus
from fdiv.tasks.unlearning import Unlearning as Unlearning
from fdiv.tasks.unnormalised import Unnormalised as Unnormalised
