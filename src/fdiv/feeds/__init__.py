"""What a method is fed at a step: one file for each thing that methods consume."""

from fdiv.feeds._feed import Counts as Counts
from fdiv.feeds._feed import Feed as Feed
from fdiv.feeds._feed import Part as Part
from fdiv.feeds.cross_tokenizer import CrossTokenizer
from fdiv.feeds.pairs import PairsFeed
from fdiv.feeds.responses import Responses
from fdiv.feeds.rollouts import Rollouts
from fdiv.feeds.tokens import Tokens

FEEDS: dict[str, type[Feed]] = {
    "tokens": Tokens,
    "responses": Responses,
    "pairs": PairsFeed,
    "rollouts": Rollouts,
}


def feed_of(method) -> type[Feed]:
    """What feeds this method: by what it consumes, and whether it reads a text in two vocabularies."""
    of_teachers_tokens = {"p_group", "p_labels", "p_sequence"} & set(getattr(method, "reads", ()))
    return CrossTokenizer if of_teachers_tokens else FEEDS[method.consumes]
