"""Targets as products: the log-scores of scorers in closed form, and what is no score."""

import math
from dataclasses import dataclass

import pytest
import torch
from tests.worlds import close

import fdiv
from fdiv.methods.match.target import Accept, Exponential, Target, Tilt

PLUGINS = ["fdiv.methods.match.target"]
IDS = torch.tensor([[1, 2, 3], [1, 5, 0], [1, 2, 2], [1, 7, 7]])
MASK = torch.tensor([[False, True, True]] * 4)
BASE = torch.tensor([-1.0, -2.5, -0.5, -4.0])


@dataclass(frozen=True)
class Judge:
    """A task that accepts answers whose last token is > 0."""

    def verify(self, ids, mask=None):
        return (ids[:, -1] > 0).float()

    def length(self, ids, mask):
        return mask.sum(1)


@dataclass(frozen=True)
class Grader(Judge):
    def reward(self, ids, mask):
        return ids[:, -1] / 2


def first(ids, mask):
    """The first token of the answer; tests name it as "module:function"."""
    return ids[:, 1].double()


FIRST = f"{__name__}:first"


def score(target, task=Judge()):
    return target.log_score(BASE, IDS, MASK, task)


def test_the_target_without_scorers_is_the_base_model():
    close(score(Target()), BASE.double())


def test_accept_keeps_the_base_model_where_the_verifier_says_1():
    close(score(Target() * Accept()).exp(), BASE.double().exp() * torch.tensor([1, 0, 1, 1]))


def test_tilt_adds_the_reward_over_beta():
    close(score(Target() * Tilt(0.5)), BASE.double() + torch.tensor([2, 0, 2, 2]))
    close(score(Target() * Tilt(0.5), Grader()), BASE.double() + torch.tensor([3, 0, 2, 7]))
    close(score(Target() * Tilt(0.5, "verify"), Grader()), BASE.double() + torch.tensor([2, 0, 2, 2]))


def test_exponential_is_linear_in_its_features():
    target = Target() * Exponential((first, "verify", "length"), (0.5, -1.0, 0.25))
    wanted = 0.5 * IDS[:, 1].double() - torch.tensor([1, 0, 1, 1]) + 0.5
    close(score(target), BASE.double() + wanted)


def test_scorers_multiply_in_any_order():
    ways = [Target() * Accept() * Tilt(0.3, first), Target() * Tilt(0.3, first) * Accept()]
    scores = [score(way) for way in ways]
    close(scores[0][[0, 2, 3]], scores[1][[0, 2, 3]])
    assert scores[0][1] == scores[1][1] == -math.inf
    assert ways[0] == Target(scorers=(Accept(), Tilt(0.3, first)))


def test_functions_are_callables_or_imported_or_the_tasks():
    numbers = [score(Target() * Tilt(2.0, function)) for function in (first, FIRST)]
    close(numbers[0], BASE.double() + IDS[:, 1].double() / 2)
    close(numbers[1], numbers[0])
    close(
        score(Target() * Accept(lambda ids, mask: ids[:, 1] > 2)).isfinite().double(),
        torch.tensor([0, 1, 0, 1.0]).double(),
    )


@pytest.mark.parametrize("missing", ["no.such.module:f", f"{__name__}:second", "checks"])
def test_a_name_that_leads_nowhere_is_refused_with_how_to_write_it(missing):
    with pytest.raises(ValueError, match=r"module:function"):
        score(Target() * Accept(missing))


def test_a_base_model_that_excludes_an_answer_is_followed():
    log_base = torch.tensor([-1.0, -math.inf, -math.inf, -2.0])
    found = (Target() * Tilt(1e-4)).log_score(log_base, IDS, MASK, Judge())
    assert found[1:3].tolist() == [-math.inf, -math.inf] and found[[0, 3]].isfinite().all()


def test_scores_are_float64_and_carry_no_gradient():
    log_base = BASE.clone().requires_grad_()
    found = (Target() * Tilt(0.3)).log_score(log_base, IDS, MASK, Judge())
    assert found.dtype == torch.float64 and not found.requires_grad
    assert score(Target() * Tilt(1e-30)).isfinite().all()


def test_a_reward_of_minus_infinity_rejects_and_others_are_refused():
    def reward(value):
        return lambda ids, mask: torch.tensor([0.0, value, 1.0, 2.0])

    assert score(Target() * Tilt(1.0, reward(-math.inf)))[1] == -math.inf
    for value, message in ((math.nan, "gave nan"), (math.inf, r"nan or \+inf")):
        with pytest.raises(ValueError, match=message):
            score(Target() * Tilt(1.0, reward(value)))
    with pytest.raises(ValueError, match="infinite for a sequence"):
        score(Target() * Exponential((reward(-math.inf),), (1.0,)))
    with pytest.raises(ValueError, match=r"Accept.* reads 0 or 1, its function gave 2; write Tilt"):
        score(Target() * Accept(reward(0.0)))
    with pytest.raises(ValueError, match="nan or"):
        Target().log_score(BASE * math.nan, IDS, MASK, Judge())


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"gave \(4, 3\) for 4 sequences"):
        score(Target() * Tilt(1.0, lambda ids, mask: ids))
    with pytest.raises(ValueError, match=r"log-probability is \(3,\) for 4"):
        Target().log_score(BASE[:3], IDS, MASK, Judge())


def test_wrong_settings_are_refused():
    for make, message in (
        (lambda: Tilt(0.0), "temperature > 0"),
        (lambda: Tilt(math.inf), "temperature > 0"),
        (lambda: Exponential(("verify",), ()), "1 features have 0 lambdas"),
        (lambda: Exponential(["verify"], (1.0,)), "are tuples"),
        (lambda: Exponential(("verify",), (math.inf,)), r"Accept\(function\)"),
        (lambda: Target() * Accept, "a scorer is"),
        (lambda: Target() * Target(), "a scorer is"),
        (lambda: Target() * 2.0, "a scorer is"),
        (lambda: Target([Accept()]), "a tuple"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make()


def test_the_object_is_its_recipe():
    target = Target() * Accept() * Tilt(0.3, FIRST) * Exponential(("verify", FIRST), (-0.5, 2.0))
    assert fdiv.parse(repr(target), PLUGINS) == target
    written = "Target() * Accept() * Tilt(0.3)"
    assert fdiv.parse(written, PLUGINS) == Target() * Accept() * Tilt(0.3)
    assert hash(target) == hash(fdiv.parse(repr(target), PLUGINS))
