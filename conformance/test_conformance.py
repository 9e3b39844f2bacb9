"""Every applicable case on fdiv, and the suite itself: complete, and able to fail."""

import pytest
import torch

from conformance.broken import broken
from conformance.case import Result, run
from conformance.cases import CASES
from conformance.matrix import BEGIN, END, merged, page
from conformance.systems import SYSTEMS, Missing, load
from conformance.systems.fdiv import Adapter

torch.set_num_threads(1)  # tensors of a few numbers: more threads only cost

# What fdiv does not have; a case that becomes applicable has to leave this list.
NOT_APPLICABLE = {"C14", "C33", "C46", "C50"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_fdiv_conforms(case):
    result = run(case, Adapter())
    expected = "not applicable" if case.id in NOT_APPLICABLE else "pass"
    assert result.status == expected, f"{case.sentence} {result.status}: {result.value} {result.what}"


def test_every_id_is_present_once_and_in_order():
    assert [case.id for case in CASES] == [f"C{number:02d}" for number in range(1, 52)]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.id not in NOT_APPLICABLE], ids=lambda c: c.id
)
def test_a_system_that_makes_the_mistake_fails(case):
    result = run(case, broken(case.id))
    assert result.status == "fail", f"{case.sentence} {result.status}: {result.value} {result.what}"


def test_a_system_that_is_not_installed_is_skipped(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "fdiv", ("conformance.systems.of_nobody", "pip install nothing"))
    assert isinstance(load("fdiv"), Missing)


def test_a_system_that_was_not_run_keeps_its_last_results():
    old = [Result("C01", "trl", "1", "pass", 0.1, "x"), Result("C01", "fdiv", "1", "fail", 0.2, "x")]
    new = [Result("C01", "fdiv", "2", "pass", 0.3, "x"), Result("C01", "trl", "", "not installed", None, "y")]
    assert merged(old, new) == [new[0], old[0]]


def test_an_unexpected_exception_is_no_verdict():
    case = next(case for case in CASES if case.id == "C01")
    result = run(case, type("Raises", (Adapter,), {"jsd": lambda *_: 1 / 0})())
    assert (result.status, result.value) == ("error", None)


def test_the_page_holds_what_was_measured():
    text = page(f"before {BEGIN} old {END} after", [Result("C01", "fdiv", "0", "fail", 0.25, "error")])
    assert text.startswith("before ") and text.endswith(" after") and " old " not in text
    assert "**fail** 0.25" in text
