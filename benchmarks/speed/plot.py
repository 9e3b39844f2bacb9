"""The pictures of docs/speed.md, drawn from the records of one CSV file."""

from pathlib import Path
from textwrap import fill

from benchmarks.speed.table import Record
from fdiv.evaluate.canvas import FAINT, as_svg, drawing, legend_below
from fdiv.evaluate.palette import DASHES, HUES, MARKERS

WIDTH = 7.0  # inches
WORDS = 36  # letters in a line beside an axis
OURS = "fdiv FusedLinear"
PEERS = ("TRL ChunkedDivergence", "TRL GKD loss", "Liger JSD", "Liger JSD compiled")
SOLVERS = ("entmax bisection, 50 steps", "entmax15, k=100", "POT solve_batch", "geomloss")


def draw(records: list[Record], folder: Path, machine: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"speed": _times}
    pictures |= {"speed-memory": _memory} if has_memory(records) else {}
    pictures |= {"speed-solvers": _solvers} if has_solvers(records) else {}
    for kind, picture in pictures.items():
        name = f"{kind}-{machine}"
        (folder / f"{name}.svg").write_text(picture(records, name), encoding="utf-8")


def has_memory(records: list[Record]) -> bool:
    return any(r["rows"] == "B7" and r["peak_mb"] for r in records)


def has_solvers(records: list[Record]) -> bool:
    return any(r["rows"] in ("B14", "B15") and r["time_ratio"] for r in records)


def _times(records: list[Record], name: str) -> str:
    """Fused losses."""
    chosen = [r for r in records if r["rows"] in ("B1-B4", "B5-B6") and r["setting"].startswith("JS")]
    return _ratios(chosen, PEERS, name)


def _solvers(records: list[Record], name: str) -> str:
    """Sparse softmax and Sinkhorn."""
    return _ratios([r for r in records if r["rows"] in ("B14", "B15")], SOLVERS, name, log=True)


def _ratios(records: list[Record], peers: tuple[str, ...], name: str, log: bool = False) -> str:
    """A peer's time over ours, a row a setting; the bar is the range over rounds."""
    chosen = [r for r in records if r["candidate"] in peers and r["time_ratio"]]
    settings = list(dict.fromkeys(r["setting"] for r in chosen))
    with drawing(WIDTH, 1.4 + 0.62 * len(settings)) as figure:
        axes = figure.add_subplot()
        handles = []
        for i, who in enumerate(peers, start=1):  # colours are those of the other picture, where 0 is ours
            own = [r for r in chosen if r["candidate"] == who]
            middle = [float(r["time_ratio"]) for r in own]
            spread = [
                [m - float(r["time_ratio_low"]) for m, r in zip(middle, own, strict=True)],
                [float(r["time_ratio_high"]) - m for m, r in zip(middle, own, strict=True)],
            ]
            heights = [settings.index(r["setting"]) + 0.16 * (i - 2.5) for r in own]
            bars = axes.errorbar(
                middle, heights, xerr=spread, fmt=MARKERS[i], color=HUES[i], markersize=5, label=who
            )
            handles.append(bars)
        axes.axvline(1, color=FAINT, linewidth=1)
        axes.set_yticks(range(len(settings)), [fill(setting, WORDS) for setting in settings])
        axes.invert_yaxis()
        if log:
            axes.set_xscale("log")
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel("CPU time of the peer / CPU time of fdiv")
        legend_below(figure, handles)
        return as_svg(figure, name)


def _memory(records: list[Record], name: str) -> str:
    """Peak memory against tokens, both on logarithmic axes."""
    chosen = [r for r in records if r["rows"] == "B7" and r["peak_mb"]]
    everybody = (OURS, *PEERS)
    people = [(i, who) for i, who in enumerate(everybody) if any(r["candidate"] == who for r in chosen)]
    with drawing(WIDTH, 3.4) as figure:
        axes = figure.add_subplot()
        handles = []
        for i, who in people:
            own = sorted((_tokens(r), float(r["peak_mb"])) for r in chosen if r["candidate"] == who)
            look = {"color": HUES[i], "marker": MARKERS[i], "linestyle": DASHES[i % len(DASHES)]}
            handles += axes.plot(*zip(*own, strict=True), label=who, **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({_tokens(r) for r in chosen})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_xlabel("tokens")
        axes.set_ylabel("peak memory beyond the inputs, MB")
        legend_below(figure, handles)
        return as_svg(figure, name)


def _tokens(record: Record) -> int:
    return int(record["setting"].split("float32 ")[1].split(" x ")[0])
