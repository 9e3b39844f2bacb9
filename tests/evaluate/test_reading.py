import json

import pytest

from fdiv.evaluate.chapter import load_chapter
from fdiv.evaluate.claims import claims
from fdiv.evaluate.comparison import ranking
from fdiv.evaluate.overview import overview
from fdiv.evaluate.reading import read
from fdiv.evaluate.sweep import at_equal_x


def edit(folder, change):
    path = folder / "recipe.json"
    recipe = json.loads(path.read_text())
    change(recipe)
    path.write_text(json.dumps(recipe))
    return load_chapter(folder)


def set_scalar(folder, label, name, values):
    """Overwrite one scalar of a label, a value a seed."""
    for path in folder.glob("seed-*/*/evaluation.json"):
        record = json.loads(path.read_text())
        if record["label"] == label:
            record["scalars"][name] = values[record["seed"]]
            path.write_text(json.dumps(record))


def test_claims_come_out_or_not_or_cannot_be_checked(distill_folder):
    found = {c.text: (c.verdict, c.caveat) for c in claims(load_chapter(distill_folder))}
    assert found["Reverse KL is more precise than KL"] == ("came out", "")
    assert found["TV covers more than KL"] == ("did not come out", "")
    assert found["JS keeps more than two modes"] == ("came out", "")
    assert found["Rényi beats KL"][0] == "could not be checked"


def test_a_claim_within_the_noise_says_so(tmp_path, write_distill):
    folder = write_distill(tmp_path / "run")
    set_scalar(folder, "TV()", "pass@1", [0.50, 0.60, 0.70])
    set_scalar(folder, "KL()", "pass@1", [0.55, 0.62, 0.58])
    said = {"claim": "TV wins", "left": ["TV()", "pass@1"], "right": ["KL()", "pass@1"]}
    (claim,) = claims(edit(folder, lambda r: r.update(expect=[said])))
    assert (claim.came_out, claim.caveat) == (True, "within the noise")


def test_a_margin_that_is_not_reached_fails_the_claim(tmp_path, write_distill):
    said = {"left": ["ReverseKL()", "pass@1"], "right": ["KL()", "pass@1"], "margin": 0.9}
    folder = write_distill(tmp_path / "run")
    (claim,) = claims(edit(folder, lambda r: r.update(expect=[{"claim": "far better", **said}])))
    assert claim.verdict == "did not come out"


def test_members_within_the_noise_are_named_and_not_ordered(tmp_path, write_distill):
    folder = write_distill(tmp_path / "run")
    set_scalar(folder, "ReverseKL()", "pass@1", [0.80, 0.82, 0.84])
    set_scalar(folder, "TV()", "pass@1", [0.84, 0.79, 0.82])
    chapter = load_chapter(folder)
    rank = ranking(chapter, "pass@1")
    assert {rank.best, *rank.tied} == {"ReverseKL()", "TV()"}
    sentence = dict(read(chapter).findings)["pass@1"]
    assert "TV()" in sentence and "read no order among them" in sentence


def test_references_are_never_ranked(distill_folder):
    rank = ranking(load_chapter(distill_folder), "coverage@64")
    assert rank.best == "KL()"  # the base model covers more, and is no member
    assert "base" not in rank.means


def test_lower_is_better_for_ece_and_neither_for_entropy(distill_folder):
    chapter = load_chapter(distill_folder)
    assert [chapter.better(n) for n in ("ece", "reverse_kl", "pass@8", "entropy")] == [-1, -1, 1, 0]
    assert chapter.better("ece_null") == 0
    assert "neither end is better" in dict(read(chapter).findings)["entropy"]


def test_an_ordered_frontier_is_read_as_a_trade_off(distill_folder):
    assert "line up along a trade-off" in dict(read(load_chapter(distill_folder)).findings)["Frontier"]


def test_a_divergence_that_loses_its_own_column_is_named(tmp_path, write_distill):
    folder = write_distill(tmp_path / "run")
    for path in folder.glob("seed-*/js*/evaluation.json"):
        record = json.loads(path.read_text())
        record["divergences"]["KL()"] = 0.01
        path.write_text(json.dumps(record))
    said = dict(read(load_chapter(folder)).findings)["Trained with, measured under"]
    assert "7 of 8" in said
    assert "under KL() the smallest is JS(beta=0.5)'s (a clear difference)" in said


def test_one_seed_claims_nothing_about_noise(tmp_path, write_distill):
    chapter = load_chapter(write_distill(tmp_path / "run", seeds=(0,)))
    reading = read(chapter)
    assert "one seed, so whether that is more than noise is unknown" in dict(reading.findings)["pass@1"]
    assert all(c.caveat == "one seed, noise unknown" for c in reading.claims if c.came_out is not None)
    assert "with one seed nothing here" in overview([chapter], [reading])[0]


def test_sweep_lines_are_compared_at_equal_x(sweep_folder):
    x, level = at_equal_x(load_chapter(sweep_folder))
    assert 1 < x < 3.6
    means = {g: sum(v.values()) / 3 for g, v in level.items()}
    assert max(means, key=means.get) == "Alpha(alpha=0.5)"
    assert min(means, key=means.get) == "KL()"


def test_a_half_written_evaluation_counts_as_not_finished(tmp_path, write_distill):
    folder = write_distill(tmp_path / "run")
    (folder / "seed-1" / "kl" / "evaluation.json").write_text('{"label": "KL()", "sca')
    (folder / "seed-2" / "tv" / "evaluation.json").unlink()
    chapter = load_chapter(folder)
    found = {(m.slug, m.seed): m.why for m in chapter.missing}
    assert found == {("kl", 1): "unreadable evaluation.json", ("tv", 2): "no evaluation.json"}
    assert chapter.interval("KL()", "pass@1").count == 2


def test_a_folder_without_a_recipe_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe\.json"):
        load_chapter(tmp_path)
