"""Where a tree of answers branches: entropies in closed form, clusters by hand, and the rule that decides."""

import math

import pytest
import torch
from tests.worlds import close

from fdiv import parse
from fdiv.sample.branching import Branching, Dispersion, SemanticEntropy, semantic_entropy
from fdiv.sample.clustering import Overlap, SameAnswer, Written

NONE = -torch.inf


def logs(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


def directions(*degrees):
    """Embeddings of different lengths, which are to make no difference."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1) * torch.arange(1, len(degrees) + 1).unsqueeze(1)


def written(*texts):
    return [Written(tuple(map(ord, text)), text) for text in texts]


def initials(answers):
    """A user's clusterer."""
    return [ord(answer.text[0]) for answer in answers]


def miscounts(answers):
    return [0]


# -- how open a place is ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clusters", "expected"),
    [
        ([3, 3, 3, 3], 0.0),
        ([0, 1, 2, 3], math.log(4)),
        ([0, 5, 0, 5], math.log(2)),
        ([7, 7, 7, 1], 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ([1], 0.0),
    ],
)
def test_semantic_entropy_is_that_of_the_shares_of_clusters(clusters, expected):
    close(semantic_entropy(torch.tensor(clusters)), torch.tensor(expected, dtype=torch.float64))


def test_semantic_entropy_is_taken_row_by_row():
    rows = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]])
    close(semantic_entropy(rows), torch.tensor([math.log(2), 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("degrees", "distance", "authors"),
    [
        ((0, 0), 0.0, -0.5),
        ((0, 60), 0.25, -0.25),
        ((0, 90), 0.5, 0.0),
        ((0, 180), 1.0, 0.5),
    ],
)
def test_the_dispersion_of_two_even_candidates_follows_their_angle(degrees, distance, authors):
    even, angles = logs(0.5, 0.5), directions(*degrees)
    close(Dispersion()(even, angles), torch.tensor([math.log(2) * distance], dtype=torch.float64))
    found = Dispersion(distance=False)(even, angles)
    close(found, torch.tensor([math.log(2) * authors], dtype=torch.float64))


def test_dispersion_is_the_entropy_times_the_sum_over_pairs_of_the_likeliest():
    log_probs = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    embeddings = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()
    for row in log_probs:
        likely = row.argsort(descending=True)[:3].tolist()
        sums = {True: 0.0, False: 0.0}
        for i in likely:
            for j in likely:
                cos = torch.cosine_similarity(embeddings[i], embeddings[j], dim=0)
                both = (row[i] + row[j]).exp()
                sums[True] += both * (1 - cos)
                sums[False] -= both * cos * (i != j)
        entropy = -(row.exp() * row).sum()
        for distance, total in sums.items():
            close(Dispersion(3, distance)(row.unsqueeze(0), embeddings), (entropy * total).unsqueeze(0))


def test_a_token_without_mass_harms_no_dispersion():
    certain = torch.tensor([[0.0, NONE, NONE]], dtype=torch.float64)
    close(Dispersion()(certain, directions(0, 90, 180)), torch.zeros(1, dtype=torch.float64))


def test_only_the_distance_prefers_an_open_place_to_a_certain_one_among_candidates_that_are_alike():
    alike, certain, opened = directions(0, 60), logs(1.0, 0.0), logs(0.5, 0.5)
    assert Dispersion()(opened, alike) > Dispersion()(certain, alike)
    assert Dispersion(distance=False)(opened, alike) < Dispersion(distance=False)(certain, alike)


# -- clusters ---------------------------------------------------------------------------------------------


def test_the_same_answers_are_those_of_one_text_up_to_white_space():
    assert SameAnswer()(written("a b", " a  b\n", "ab", "a b")) == [0, 0, 1, 0]
    assert SameAnswer()([Written((1, 2)), Written((1,)), Written((1, 2))]) == [0, 1, 0]


def test_a_pattern_compares_final_answers_and_those_without_one_are_alike():
    texts = written("so #### 4", "#### 3\n#### 4 ", "#### 5", "I give up", "")
    assert SameAnswer(r"####(.*)")(texts) == [0, 0, 1, 2, 2]
    assert SameAnswer(r"\d")(texts) == [0, 0, 1, 2, 2]
    with pytest.raises(TypeError, match="no tokenizer"):
        SameAnswer(r"\d")([Written((1, 2))])


def test_overlap_joins_the_first_cluster_whose_founder_shares_enough():
    abcd, abce, xyz, bcde = written("abcd", "abce", "xyz", "bcde")
    assert Overlap(1, 0.6)([abcd, abce, xyz, bcde]) == [0, 0, 1, 0]  # 3 / 5 of all letters
    assert Overlap(1, 0.61)([abcd, abce, xyz, bcde]) == [0, 1, 2, 3]
    assert Overlap(2, 0.5)([abcd, abce, bcde]) == [0, 0, 0]  # ab bc of ab bc cd ce; bc cd of ab bc cd de
    assert Overlap(2, 0.51)([abcd, abce, bcde]) == [0, 1, 2]
    assert Overlap(3)(written("", "a", "")) == [0, 1, 0]


def test_a_users_clusterer_is_a_function_or_the_name_of_one():
    texts = written("apple", "ant", "bee", "bat")
    expected = pytest.approx(math.log(2))
    assert SemanticEntropy(initials)(texts) == expected
    assert SemanticEntropy(f"{__name__}:initials")(texts) == expected
    assert SemanticEntropy(SameAnswer())(texts) == pytest.approx(math.log(4))
    with pytest.raises(ValueError, match="1 clusters of 4 answers"):
        SemanticEntropy(miscounts)(texts)
    with pytest.raises(ValueError, match="cannot be found"):
        SemanticEntropy("no_such_module:initials")(texts)


# -- the rule ---------------------------------------------------------------------------------------------


def test_a_new_answer_leaves_the_place_of_the_largest_score_and_the_first_of_equals():
    plan = Branching(epsilon=0.25)
    scores = [torch.tensor([0.1, 0.7, 0.2]), torch.tensor([NONE, 0.7, 0.9, 0.9]), torch.tensor([])]
    assert plan.place(scores, 0.25) == (1, 2)
    assert plan.place(scores[:1], 0.99) == (0, 1)
    assert plan.place(scores, 0.24) == (-1, 0)


def test_scores_that_differ_by_rounding_are_equal():
    row = torch.tensor([0.1, 0.3, 0.3 + 1e-8], dtype=torch.float64)
    assert Branching(epsilon=0).place([row, row + 1e-9], 0.0) == (0, 1)


def test_the_place_of_the_first_token_and_no_place_at_all_are_the_root():
    plan = Branching(epsilon=0)
    for scores in ([torch.tensor([0.9, 0.1])], [torch.tensor([])], [torch.tensor([NONE, NONE])], []):
        assert plan.place(scores, 0.5) == (-1, 0)


def test_epsilon_is_the_chance_of_the_root():
    scores = [torch.tensor([0.0, 1.0])]
    uniform = torch.arange(100) / 100
    for epsilon in (0.0, 0.3, 1.0):
        at_root = [Branching(epsilon=epsilon).place(scores, float(u))[0] < 0 for u in uniform]
        assert sum(at_root) == round(100 * epsilon)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Branching(first=0), "first is a number of answers"),
        (lambda: Branching(epsilon=1.5), r"epsilon is a chance in \[0, 1\], got 1.5"),
        (lambda: Branching(measure=0.5), "measure is Dispersion"),
        (lambda: Branching(first=5).check(4), "do not fit into groups of 4"),
        (lambda: Dispersion(top=1), "top is a number of tokens"),
        (lambda: SemanticEntropy(continuations=1), "at least 2 continuations"),
        (lambda: SemanticEntropy(candidates=0), "at least 2 continuations"),
        (lambda: SemanticEntropy("initials"), "clusterer is SameAnswer"),
        (lambda: Overlap(run=0), "run is a number of tokens"),
        (lambda: Overlap(threshold=0.0), "threshold is a fraction"),
        (lambda: SameAnswer("("), "unterminated"),
    ],
)
def test_what_makes_no_sense_is_refused(make, match):
    with pytest.raises(Exception, match=match):
        make()


def test_its_repr_is_its_recipe():
    plugins = ("fdiv.sample.branching",)
    for plan in (
        Branching(),
        Branching(2, 0.1, Dispersion(5, distance=False)),
        Branching(measure=SemanticEntropy(Overlap(2, 0.4), 3)),
        Branching(measure=SemanticEntropy("mine:clusters")),
    ):
        assert parse(repr(plan), (*plugins, "fdiv.sample.clustering")) == plan
