"""The benchmark's own arithmetic: no test here looks at how long anything takes."""

import sys

import pytest
import torch
import typer
from benchmarks.speed import measure, table
from benchmarks.speed.__main__ import _chosen
from benchmarks.speed.case import Candidate, Case, Line, Outcome, Target
from benchmarks.speed.case import measure as measure_case
from benchmarks.speed.floor import bare_products
from benchmarks.speed.heads import Shape, exact, heads
from benchmarks.speed.peers import beta_of, peer
from benchmarks.speed.publish import BEGIN, END, publish
from benchmarks.speed.rows import entmax, newton, sinkhorn
from torch.utils.flop_counter import FlopCounterMode

import fdiv

SMALL = Shape(12, 8, 50)
MEGABYTE = 2**18  # float32 numbers


def outcome(*numbers: float) -> Outcome:
    return Outcome(torch.tensor(numbers))


def broken() -> Outcome:
    raise RuntimeError("no such kernel\nand a long story")


def allocate(megabytes: int, kept: int = 1):
    def step():
        torch.ones(megabytes * MEGABYTE)
        return torch.ones(kept * MEGABYTE)

    return step


# -- measuring ---------------------------------------------------------------------------------------------


def test_candidates_take_turns():
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = measure.alternate(steps, rounds=2)
    assert order == list("abcabc")
    assert {name: len(s) for name, s in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratios_are_taken_round_by_round():
    # the ratio of the medians would be 1
    assert measure.paired_ratio([1.0, 2.0, 9.0], [2.0, 1.0, 3.0]) == (2.0, 0.5, 3.0)


def test_relative_error_is_that_of_norms():
    assert measure.relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]).double()) == 1 / 5


@pytest.mark.slow
def test_peak_memory_is_found_again_in_blocks_that_the_heap_keeps():
    pins = []  # they lie between the blocks, so that the heap cannot shrink when those are freed

    def step():
        blocks = []
        for _ in range(1280):
            blocks.append(bytearray(2**16))
            pins.append(bytearray(600))

    step()
    found = [measure.peak_megabytes(step) for _ in range(2)]
    assert found == pytest.approx([80, 80], abs=6)


@pytest.mark.slow
def test_peak_memory_is_not_that_of_the_first_call():
    sizes = iter([200, 30])
    assert measure.peak_megabytes(lambda: torch.ones(next(sizes) * MEGABYTE)) == pytest.approx(30, abs=4)


def test_peak_memory_counts_what_is_returned_and_not_what_is_given_back_before():
    assert measure.peak_megabytes(allocate(20, kept=60)) == pytest.approx(60, abs=4)


def test_a_step_beyond_the_limit_is_reported(monkeypatch):
    monkeypatch.setattr(measure, "MEMORY_SHARE", 0.002)
    with pytest.raises(MemoryError, match="needs more than"):
        measure.peak_megabytes(allocate(500))


def test_a_step_that_fails_in_the_child_is_reported():
    with pytest.raises(MemoryError, match="no such kernel"):
        measure.peak_megabytes(broken)


# -- cases -------------------------------------------------------------------------------------------------


def test_a_missing_package_and_a_failure_leave_notes(monkeypatch):
    monkeypatch.setitem(sys.modules, "entmax", None)
    monkeypatch.delitem(sys.modules, "benchmarks.speed.peers.entmax", raising=False)
    candidates = (
        Candidate("ours", lambda: outcome(1.0)),
        Candidate("missing", peer("entmax", "sorted_entmax15", torch.zeros(2, 3))),
        Candidate("broken", broken),
    )
    case = Case("B0", "nothing", candidates, reference=lambda: outcome(2.0), weighed=False)
    ours, missing, failed = measure_case(case, rounds=1)
    assert ours.loss_error == 0.5 and ours.quantity("time") == 1
    assert missing.notes == ["not installed: entmax"] and missing.seconds is None
    assert failed.notes == ["failed: RuntimeError: no such kernel"] and failed.seconds is None


def test_ratios_and_floor_are_taken_to_the_named_candidate(monkeypatch):
    seconds = {"ours": [2.0], "peer": [6.0], "other": [3.0], "floor": [1.0]}
    monkeypatch.setattr("benchmarks.speed.case.alternate", lambda *_: seconds)
    candidates = (
        Candidate("ours", outcome),
        Candidate("peer", outcome),
        Candidate("other", outcome, against="peer"),
        Candidate("floor", outcome),
    )
    lines = measure_case(Case("B0", "", candidates, floor="floor", weighed=False), rounds=1)
    assert [line.quantity("time") for line in lines] == [1, 3, 0.5, 0.5]
    assert [line.of_floor for line in lines] == pytest.approx([0.5, 1 / 6, 1 / 3, 1])


@pytest.mark.parametrize(
    ("ratio", "at_least", "at_most", "verdict"),
    [
        (3.1, 3.0, None, "met"),
        (2.9, 3.0, None, "not met"),
        (1.1, None, 1.15, "met"),
        (1.2, None, 1.15, "not met"),
        (float("nan"), 3.0, None, "not met"),
        (float("nan"), None, 3.0, "not met"),
        (None, 3.0, None, "not measured"),
    ],
)
def test_a_target_is_met_or_not_met(ratio, at_least, at_most, verdict):
    line = Line("B0", "", "peer", "ours", ratio=ratio and measure.Ratio(ratio, ratio, ratio))
    assert Target("B0", "time", at_least, at_most).verdict(line) == verdict


def test_an_unknown_row_is_refused_and_a_known_one_found():
    with pytest.raises(typer.BadParameter, match="no row B99"):
        _chosen(["b1,B99"])
    assert [group.rows[0] for group in _chosen(["b3 B18"])] == ["B1", "B18"]


# -- the float64 references and the peers --------------------------------------------------------------------


def test_the_reference_is_the_mean_divergence_with_its_gradients():
    given = heads(SMALL)
    value, (hidden, weight) = exact(fdiv.KL(), given)
    p_hidden, p_weight, q_hidden, q_weight = (t.detach().double() for t in given)
    p, q = ((h @ w.T).softmax(-1) for h, w in ((p_hidden, p_weight), (q_hidden, q_weight)))
    torch.testing.assert_close(value, (p * (p / q).log()).sum(-1).mean())
    torch.testing.assert_close(hidden, (q - p) @ q_weight / SMALL.rows)
    torch.testing.assert_close(weight, (q - p).T @ q_hidden / SMALL.rows)


def test_the_reference_leaves_masked_rows_out():
    given, valid = heads(SMALL), torch.arange(SMALL.rows) < 5
    value, (hidden, _) = exact(fdiv.KL(), given, valid)
    first = heads(SMALL)._replace(p_hidden=given.p_hidden[:5], q_hidden=given.q_hidden.detach()[:5])
    torch.testing.assert_close(value, exact(fdiv.KL(), first).value)
    assert hidden.shape == given.q_hidden.shape and not hidden[5:].any()


@pytest.mark.parametrize(("frozen", "products"), [(False, 4), (True, 3)])
def test_the_floor_is_the_products_and_nothing_else(monkeypatch, frozen, products):
    monkeypatch.setattr("benchmarks.speed.floor.chunk_rows", lambda models: 5)  # the last chunk is short
    with FlopCounterMode(display=False) as counter:
        bare_products(heads(SMALL, frozen=frozen))
    assert counter.get_total_flops() == products * 2 * SMALL.rows * SMALL.width * SMALL.vocab


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [fdiv.KL(), fdiv.ReverseKL(), fdiv.JS(0.3)], ids=repr)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("file", "function"),
    [("trl", "gkd"), ("trl", "chunked_divergence"), ("liger", "fused_linear_jsd")],
)
def test_peers_do_the_same_work(file, function, masked, divergence):
    pytest.importorskip({"trl": "trl", "liger": "liger_kernel"}[file])
    given, valid = heads(SMALL), (torch.arange(SMALL.rows) % 3 > 0) if masked else None
    expected = exact(divergence, given, valid)
    found = peer(file, function, divergence, given, valid)()
    for a, b in zip((found.value, *found.gradients), (expected.value, *expected.gradients), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_a_peer_says_what_it_does_not_cover():
    with pytest.raises(measure.Absent, match="covers KL"):
        beta_of(fdiv.Pearson())


def test_transport_solvers_are_set_to_one_error():
    pytest.importorskip("ot")
    expected = sinkhorn._exact(*(points.double() for points in sinkhorn.problem(4, 16)))
    for case, gradients in zip(sinkhorn.cases(quick=True), (0, 1), strict=True):
        for candidate in case.candidates:
            found = candidate.step()
            assert measure.relative_error(found.value, expected.value) <= sinkhorn.ERROR, candidate.name
            assert len(found.gradients) == gradients
            for gradient, wanted in zip(found.gradients, expected.gradients, strict=False):
                assert measure.relative_error(gradient, wanted) <= 0.1, candidate.name


def test_everybodys_sparse_softmax_has_the_references_gradient():
    pytest.importorskip("entmax")
    plain, graded = entmax.cases(quick=True)
    assert all(not candidate.step().gradients for candidate in plain.candidates)
    assert graded.reference is not None
    expected = graded.reference()
    for candidate in graded.candidates[:-1]:  # the last is the softmax
        found = candidate.step()
        assert measure.relative_error(found.value, expected.value) < 1e-5, candidate.name
        (gradient,), (wanted,) = found.gradients, expected.gradients
        assert measure.relative_error(gradient, wanted) < 1e-5, candidate.name


def test_the_entmax_reference_solves_its_own_optimality_condition():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).double()
    p = entmax._exact(logits).value
    slack = logits - p.sqrt() / (entmax.ALPHA - 1)  # one threshold a row, on the support
    torch.testing.assert_close(p.sum(-1), torch.ones(3).double())
    for row, support in zip(slack, p > 0, strict=True):
        assert row[support].std() < 1e-6 and (row[~support] <= row[support].max()).all()


# -- files -------------------------------------------------------------------------------------------------


def line(row: str, ratio: float) -> Line:
    target = Target(row, "time", at_least=2.0)
    return Line(row, "JS(beta=0.5) float32 64 x 8 x 50", "TRL GKD loss", "ours", targets=(target,),
                seconds=0.5, ratio=measure.Ratio(ratio, ratio, ratio), megabytes=12.0)  # fmt: skip


def records(*lines: Line) -> list[table.Record]:
    environment = {"cpu": "a CPU", "threads": "1", "date": "2026-01-01", "commit": "abc"}
    packages = ("torch", "trl", "liger-kernel", "entmax", "POT", "geomloss", "transformers", "triton")
    return [table.record(each, 3, environment | dict.fromkeys(packages, "1.0")) for each in lines]


def test_rows_measured_again_replace_theirs_alone(tmp_path):
    file = tmp_path / "results" / "machine.csv"
    table.write(file, records(line("B10", 3.0), line("B9", 3.0), line("B1-B4", 3.0)))
    table.write(file, records(line("B9", 1.5)))
    assert [(r["rows"], r["time_ratio"], r["met"]) for r in table.read(file)] == [
        ("B1-B4", "3", "met"),
        ("B9", "1.5", "not met"),
        ("B10", "3", "met"),
    ]


def test_the_page_takes_the_table_between_its_markers(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    table.write(tmp_path / "machine.csv", records(line("B1-B4", 1.5), line("B7", 3.0)))
    publish(results=tmp_path, page=page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 1.50x (1.5 to 1.5) | time ≥ 2x | not met |" in text
    assert "Of 2 targets 1 are met and 1 are not." in text
    assert "any GPU | everybody | - | - | not measured |" in text
    for name in ("speed-machine", "speed-memory-machine"):
        assert f"img/{name}.svg" in text and "<svg" in (tmp_path / "img" / f"{name}.svg").read_text()


def test_solvers_have_a_picture_and_their_steps_a_table(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text(f"{BEGIN}{END}")
    ratio = measure.Ratio(4.0, 3.0, 5.0)
    solved = Line("B15", "64 problems", "geomloss", "fdiv Sinkhorn", seconds=2.0, ratio=ratio)
    counted = Line("B20", "40 x 40", "fdiv sinkhorn", "fdiv sparse_newton", seconds=0.5, notes=["65 steps"])
    table.write(tmp_path / "machine.csv", records(line("B1-B4", 1.5), solved, counted))
    publish(results=tmp_path, page=page)
    assert "| 40 x 40 | fdiv sinkhorn | 65 steps | 0.5 |" in page.read_text()
    assert "geomloss" in (tmp_path / "img" / "speed-solvers-machine.svg").read_text()


def test_the_solvers_of_one_transport_agree_on_its_value():
    for case in newton.cases(quick=True):
        values = torch.stack([candidate.step().value for candidate in case.candidates])
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-9, atol=0.0)
        assert all(candidate.note.endswith("steps") for candidate in case.candidates)


def test_a_page_without_results_says_so(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text(f"{BEGIN}{END}")
    publish(results=tmp_path, page=page)
    assert "Nothing has been measured yet." in page.read_text()
