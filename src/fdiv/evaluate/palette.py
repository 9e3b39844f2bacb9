"""One colour, one marker and one dash a label, the same in every figure of a report.

The hues are those of Okabe and Ito (2008, "Color Universal Design") without their yellow, which is
too pale on white, followed by darker ones of Tol's muted scheme. The marker is the second channel
and the dash the third, so nothing is told by colour alone.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.markers import MarkerStyle

HUES = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#882255",
    "#8A8A00",
    "#332288",
    "#3C8D86",
    "#8B5A2B",
    "#1B4D3E",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "<", ">", "*", "d")
DASHES = ("-", (0, (5, 1.6)), (0, (1.6, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
GREYS = ("#1d2733", "#6b7580", "#4a525b", "#8c959e")


@dataclass(frozen=True)
class Style:
    """How one label is drawn; `hollow` marks references (teacher, base), which are grey."""

    colour: str
    marker: str
    dash: object
    hollow: bool = False

    @property
    def face(self):
        return "white" if self.hollow else self.colour


def styles(chapters):
    """{label or sweep line: Style} over all chapters, in order of first appearance."""
    runs = [run for c in chapters for label in c.labels for run in c.of(label)[:1]]
    members = dict.fromkeys(run.key for run in runs if run.is_member)
    references = dict.fromkeys(run.key for run in runs if not run.is_member)
    chosen = {
        key: Style(HUES[i % len(HUES)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
        for i, key in enumerate(members)
    }
    for i, key in enumerate(k for k in references if k not in members):
        chosen[key] = Style(GREYS[i % len(GREYS)], MARKERS[i % len(MARKERS)], DASHES[1 + i % 3], True)
    return chosen


def swatch(style):
    """A small inline SVG of the marker, for tables and legends in HTML."""
    marker = MarkerStyle(style.marker)
    shapes = marker.get_path().transformed(marker.get_transform()).to_polygons(closed_only=True)
    points = " ".join(f"{10 * x:.1f},{-10 * y:.1f}" for x, y in np.array(shapes[0]))
    return (
        '<svg class="swatch" viewBox="-9 -9 18 18" aria-hidden="true">'
        f'<polygon points="{points}" fill="{style.face}" stroke="{style.colour}" '
        'stroke-width="2"/></svg>'
    )
