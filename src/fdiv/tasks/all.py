"""The tasks that a recipe can name."""

from fdiv.tasks.backspaced import Backspaced as Backspaced
from fdiv.tasks.grammar import Grammar as Grammar
from fdiv.tasks.instructions import Instructions as Instructions
from fdiv.tasks.text import Corpus as Corpus
from fdiv.tasks.unlearning import Unlearning as Unlearning
