import csv
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from rich.console import Console

from fdiv.evaluate.report import write_report
from fdiv.evaluate.terminal import terminal_table

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects ids, links and text, and checks that every tag is closed."""

    def __init__(self, source):
        super().__init__()
        self.ids, self.links, self.open, self.words = [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[k] for k in ("href", "src", "xlink:href") if k in attrs]
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).replace("\u200b", "").split())


@pytest.fixture(scope="module")
def built(distill_folder, sweep_folder, tmp_path_factory):
    """A report over two chapters, one run of which is not finished."""
    folder = tmp_path_factory.mktemp("report")
    run = shutil.copytree(distill_folder, folder / "distil")
    (run / "seed-2" / "tv" / "evaluation.json").unlink()
    page = write_report([run, sweep_folder], folder / "out")
    return page, page.read_text(encoding="utf-8"), Page(page.read_text(encoding="utf-8"))


def test_the_report_is_one_small_file_that_needs_nothing_else(built):
    path, source, page = built
    assert path.stat().st_size < 2_000_000
    assert not page.open
    assert not [link for link in page.links if link.startswith(("http:", "https:", "//", "/"))]
    assert "<script" not in source and "@import" not in source
    assert not re.search(r"url\((?!#)", source)


def test_inline_figures_share_no_ids_and_every_reference_resolves(built):
    _, source, page = built
    assert len(page.ids) == len(set(page.ids))
    wanted = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', source))
    assert wanted <= set(page.ids)


def test_files_beside_the_report_exist(built):
    path, _, page = built
    files = [link for link in page.links if not link.startswith("#")]
    assert len(files) > 20
    assert all((path.parent / link).is_file() for link in files)


def test_every_label_claim_and_unfinished_run_is_shown(built, distill_folder):
    _, _, page = built
    recipe = json.loads((distill_folder / "recipe.json").read_text())
    labels = {json.loads(p.read_text())["label"] for p in distill_folder.glob("seed-*/*/*.json")}
    for text in [*labels, *(c["claim"] for c in recipe["expect"]), *recipe["notes"]]:
        assert text in page.text
    assert "TV covers more than KL: did not come out." in page.text
    assert "Not finished tv, seed 2: no evaluation.json" in page.text
    assert "2 of 3 seeds" in page.text


def test_the_number_of_seeds_and_the_kind_of_interval_are_stated(built):
    assert "95% Student-t interval over 3 seeds" in built[2].text


def test_tables_to_paste_hold_the_numbers_of_the_runs(built, distill_folder):
    folder = built[0].parent / "tables"
    row = next(r for r in csv.DictReader((folder / "distil-table.csv").open()) if r["label"] == "KL()")
    runs = (json.loads(p.read_text()) for p in distill_folder.glob("seed-*/kl/evaluation.json"))
    values = [r["scalars"]["pass@1"] for r in runs]
    assert float(row["pass@1"]) == pytest.approx(sum(values) / 3)
    assert r"\toprule" in (folder / "distil-table.tex").read_text()
    assert "| KL() |" in (folder / "distil-table.md").read_text()


def test_figures_keep_their_text_as_text_and_carry_no_date(built):
    svg = (built[0].parent / "figures" / "distil-frontier.svg").read_text()
    assert "ReverseKL()" in svg
    assert "dc:date" not in svg


def test_the_same_runs_give_the_same_report(tmp_path, sweep_folder):
    first, second = (write_report([sweep_folder], tmp_path / name) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_a_chapter_with_scalars_alone_still_makes_a_report(tmp_path):
    run = tmp_path / "bare" / "seed-0" / "kl"
    run.mkdir(parents=True)
    (tmp_path / "bare" / "recipe.json").write_text('{"name": "bare"}')
    record = {
        "label": "KL()",
        "slug": "kl",
        "role": "member",
        "seed": 0,
        "scalars": {"pass@1": 0.5},
    }
    (run / "evaluation.json").write_text(json.dumps(record))
    text = Page(write_report([tmp_path / "bare"], tmp_path / "report.html").read_text()).text
    assert "Too few finished runs" in text and "0.500" in text


def test_a_chapter_without_a_finished_run_says_so(tmp_path):
    (tmp_path / "bare" / "seed-0" / "kl").mkdir(parents=True)
    (tmp_path / "bare" / "recipe.json").write_text('{"name": "bare", "frontier": {"x": "a", "y": "b"}}')
    text = Page(write_report([tmp_path / "bare"], tmp_path / "out").read_text()).text
    assert "kl, seed 0: no evaluation.json" in text


def test_text_from_the_runs_is_escaped(tmp_path, write_distill):
    folder = write_distill(tmp_path / "run", names=("KL()", "TV()"), seeds=(0,))
    path = folder / "seed-0" / "kl" / "evaluation.json"
    record = json.loads(path.read_text())
    record["samples"][0]["outputs"][0] = "<script>alert(1)</script>"
    path.write_text(json.dumps(record))
    assert "<script" not in write_report([folder], tmp_path / "out").read_text()


def test_values_that_are_not_finite_are_shown_as_such(tmp_path, write_distill):
    folder = write_distill(tmp_path / "run", names=("KL()", "TV()", "Pearson()"), seeds=(0, 1))
    path = folder / "seed-0" / "kl" / "evaluation.json"
    record = json.loads(path.read_text())
    record["scalars"]["pass@1"], record["divergences"]["TV()"] = float("nan"), float("inf")
    path.write_text(json.dumps(record))
    text = Page(write_report([folder], tmp_path / "out").read_text()).text
    assert "not finite" in text and "∞" in text


def test_the_terminal_table_names_members_claims_and_unfinished_runs(distill_folder):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table([distill_folder]))
    text = console.export_text()
    assert "SkewReverseKL(skew=0.1)" in text
    assert "✗ did not come out: TV covers more than KL" in text
