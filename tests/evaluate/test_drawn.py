"""What generators made, in the report: points, densities and images; nothing where nothing was drawn."""

import json

import numpy as np
import pytest

from fdiv.evaluate.chapter import load_chapter
from fdiv.evaluate.drawn import _tiled, caption, drawn
from fdiv.evaluate.palette import styles
from fdiv.evaluate.report import write_report

LINE = {"x": [-1.0, 0.0, 1.0], "target": [0.1, 0.5, 0.1], "made": [0.2, 0.3, 0.2]}
PICTURES = {
    "points": {"points": [[0.0, 1.0], [1.0, 0.0]], "target": [[0.5, 0.5], [0.0, 0.0]]},
    "line": {"line": LINE},
    "paths": {
        "paths": [[[0.0, 0.0], [1.0, 1.0]]],
        "target": [],
        "surface": {"x": [0.0, 1.0], "y": [0.0, 1.0, 2.0], "energy": [[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]},
    },
    "images": {"images": [[[0, 255], [128, 0]]] * 7, "target": [[[255, 255], [0, 0]]] * 7},
}


def chapter(folder, picture, labels=("KL()", "JS(0.5)")):
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps({"name": "made", "order": list(labels)}))
    for seed in (0, 1):
        for n, label in enumerate(labels):
            run = folder / f"seed-{seed}" / f"m{n}"
            run.mkdir(parents=True)
            record = {"label": label, "seed": seed, "scalars": {"mode tv": 0.1 * n}}
            (run / "evaluation.json").write_text(json.dumps(record | ({"drawn": picture} if picture else {})))
    return folder


@pytest.mark.parametrize("kind", PICTURES)
def test_each_kind_has_a_panel_a_label_in_the_page(kind, tmp_path):
    page = write_report([chapter(tmp_path / "run", PICTURES[kind])], tmp_path / "out")
    text = page.read_text()
    assert "What was made" in text and "Seed 0." in text
    assert (tmp_path / "out" / "figures" / "made-drawn.png").exists()
    found = load_chapter(tmp_path / "run")
    figure = drawn(found, styles([found]))
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    aim = {"images": ["the data"], "paths": ["brute force"]}.get(kind, [])
    assert titles == [*aim, "KL()", "JS(0.5)"]


def test_nothing_is_drawn_where_nothing_was_recorded(tmp_path):
    found = load_chapter(chapter(tmp_path / "run", None))
    assert drawn(found, styles([found])) is None
    assert "What was made" not in write_report([tmp_path / "run"], tmp_path / "out").read_text()
    assert caption(found).startswith("Seed 0")


def test_images_stand_side_by_side_with_a_line_between():
    tiled = _tiled(np.arange(7).reshape(7, 1, 1).repeat(2, 1).repeat(2, 2))
    assert tiled.shape == (2 * 3, 6 * 3)
    assert tiled[0].tolist() == [v for n in range(6) for v in (n, n, 128)]
    assert tiled[3].tolist() == [6, 6, 128] + [128] * 15


def test_a_student_that_ran_away_does_not_shrink_the_data(tmp_path):
    far = {"points": [[1e6, 1e6], [0.0, 0.0]], "target": [[0.0, 0.0], [1.0, 1.0]]}
    found = load_chapter(chapter(tmp_path / "run", far))
    low, high = drawn(found, styles([found])).axes[0].get_xlim()
    assert (low, high) == (-0.25, 1.25)
