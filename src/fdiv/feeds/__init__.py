"""What a method is fed at a step: one file for each thing that methods consume."""

from fdiv.feeds._feed import Counts as Counts
from fdiv.feeds._feed import Feed as Feed
from fdiv.feeds._feed import Part as Part
from fdiv.feeds.cross_tokenizer import CrossTokenizer
from fdiv.feeds.examples import Examples
from fdiv.feeds.pairs import PairsFeed
from fdiv.feeds.paths import PathsFeed
from fdiv.feeds.responses import Responses
from fdiv.feeds.rollouts import Rollouts
from fdiv.feeds.tokens import Tokens

FEEDS: dict[str, type[Feed]] = {
    "tokens": Tokens,
    "responses": Responses,
    "pairs": PairsFeed,
    "rollouts": Rollouts,
    "examples": Tokens,  # of a text
    "paths": PathsFeed,
}


def feed_of(method, task=None) -> type[Feed]:
    """What feeds this method: by what it consumes, and whether the task has text or inputs with labels.

    Of text, also by whether it is read in two vocabularies.
    """
    if hasattr(task, "examples"):
        return Examples
    if hasattr(task, "rolled"):
        return PathsFeed
    of_teachers_tokens = {"p_group", "p_labels", "p_sequence"} & set(getattr(method, "reads", ()))
    return CrossTokenizer if of_teachers_tokens else FEEDS[method.consumes]
