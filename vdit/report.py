"""The report of a run: WORKDIR/report.html, self-contained, and WORKDIR/plots/loss.png.

python -m vdit.report WORKDIR

This file collects the data of the template page/report.html.j2. Figures are matplotlib SVGs, drawn
in the light palette and recoloured for dark mode.
"""

import contextlib
import functools
import io
import itertools
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from PIL import Image

from vdit.config.identity import stored_fields
from vdit.errors import UserError
from vdit.runtime import metrics
from vdit.runtime.files import atomic_path, write_text
from vdit.runtime.progress import clock
from vdit.runtime.video import to_data_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
Box = tuple[float, float, float, float]
Series = dict[str, list[tuple[float, float]]]  # name -> (step, value), by step

MOST_SAMPLES = 60
MOST_BYTES = 24 * 2**20  # of embedded media: phones still open the page
BINS = 100  # points of a curve
# In order of preference among files of the same stem.
MEDIA = {".webp": "image/webp", ".gif": "image/gif", ".mp4": "video/mp4", ".png": "image/png"}
# The palette of page/figures.mplstyle, and its dark counterpart.
INK, LINE = "#22211e", "#e7e3d9"
DARK = {
    INK: "#e6e3dc", LINE: "#2d2e31", "#6f6b62": "#98948a", "#2b6a8c": "#7fb9d8",
    "#b4603a": "#e09a74", "#5d7f4e": "#9dbf8d", "#7c659c": "#b9a3d8",
}  # fmt: skip
SPLITS = ("generated", "paraphrased", "reconstructed", "real")
OBJECTS = ("all", "one", "two")
SCORES = ["count", "colour", "shape", "size", "motion", "permanence", "every_attribute"]
NO_SCORE = {"clips", "captions", *SCORES}
LOGARITHMIC = re.compile("loss|mse|kl|norm|error")
NO_COLUMN = re.compile("stage|step|.*_(low|high)")  # of a score table


def write_report(workdir: str | Path) -> Path:
    """Writes WORKDIR/report.html and plots/loss.png; returns the path of the report.

    Raises `UserError` where `workdir` holds neither config.json nor metrics.jsonl, or cannot be
    written. Empty sections are omitted.
    """
    import jinja2
    from matplotlib import style

    workdir = Path(workdir)
    if not any((workdir / name).is_file() for name in ("config.json", "metrics.jsonl")):
        what = "has neither" if workdir.is_dir() else "is no folder"
        raise UserError(f"a workdir holds config.json or metrics.jsonl; {workdir} {what}")
    rows = [row for row in metrics.read(workdir) if "stage" in row and _is_number(row.get("step"))]
    config = stored_fields(workdir, lenient=True)
    curves = _curves(rows)
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("vdit", "page"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.ChainableUndefined,
    )  # fmt: skip
    pages.filters |= {"brief": _brief, "clock": clock}
    pages.tests["finite"] = _is_number
    with style.context(Path(__file__).parent / "page" / "figures.mplstyle", after_reset=True):
        page = pages.get_template("report.html.j2").render(
            name=config.get("name") or workdir.resolve().name,
            date=f"{datetime.now():%d %B %Y, %H:%M}",
            config=config,
            machine=next((row for row in reversed(rows) if row["stage"] == "run"), {}),
            samples=_gallery((workdir / "samples").glob("*"), [".webp", ".gif", ".mp4"]),
            reconstructions=_gallery(workdir.glob("reconstructions*"), [*MEDIA]),
            autoencoder=_autoencoder(rows),
            scores=_scores(rows),
            tables=_tables(rows),
            curves={stage: _panels(plots) for stage, plots in curves.items()},
            stages=stage_values(rows),
        )
        write_text(workdir / "report.html", page)
        plot_losses(curves, workdir / "plots" / "loss.png")
    return workdir / "report.html"


def _picture(
    width: int, height: int, box: Box, draw: Callable[["Axes"], None], alt: str
) -> dict[str, str]:
    """Light and dark SVG of axes filled by `draw`; sizes in CSS pixels, `box` as for add_axes."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    buffer, figure = io.StringIO(), Figure(figsize=(width / 96, height / 96))
    draw(figure.add_axes(box))
    about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=about)
    light = buffer.getvalue()
    dark = re.sub("|".join(DARK), lambda colour: DARK[colour[0]], light)
    light, dark = (to_data_uri(svg.encode(), "image/svg+xml") for svg in (light, dark))
    return {"light": light, "dark": dark, "alt": alt}


def draw_curves(axes: "Axes", series: Series) -> None:
    """Series over the step: the mean of each bin, and its range as a band."""
    from matplotlib.ticker import LogLocator

    for i, (name, points) in enumerate(series.items()):
        steps, lows, means, highs = zip(*_bins(points, BINS), strict=True)
        axes.fill_between(steps, lows, highs, color=f"C{i}", alpha=0.2, linewidth=0)
        axes.plot(steps, means, color=f"C{i}", label=name)
    steps, values = zip(*itertools.chain(*series.values()), strict=True)
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    axes.set_xlim(0 if 0 <= first < 0.2 * last else first, last)
    axes.locator_params(nbins=5, steps=[1, 2, 5, 10])
    if low > 0 and any(map(LOGARITHMIC.search, series)):
        axes.set_yscale("log")
        between = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=between, numticks=6))
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda tick, _: _brief(tick))
    axes.yaxis.set_major_formatter(lambda tick, _: _brief(tick))


def _strip(marks: Mapping[str, Sequence[Any]], first: float, last: float) -> dict[str, str]:
    """The (low, value, high) of each split on a line from `first` to `last`, clipped to it."""

    def draw(axes: "Axes") -> None:
        axes.set_xlim(first, last)
        axes.set_axis_off()
        axes.plot((first, last), (0, 0), color=LINE, linewidth=1)
        looks = {"real": ("|", INK), "reconstructed": ("|", "C1"), "generated": ("o", "C0")}
        for split, (marker, colour) in looks.items():
            numbers = [n if _is_number(n) else math.nan for n in marks.get(split, (None,) * 3)]
            low, value, high = np.clip(np.array(numbers), first, last)  # NaN is not drawn
            if split == "generated":
                axes.plot((low, high), (0, 0), color=colour, alpha=0.45, linewidth=4)
            axes.plot(value, 0, marker, color=colour, clip_on=False)

    texts = [f"{split} {value:.3g}" for split, (_, value, _) in marks.items() if _is_number(value)]
    return _picture(180, 16, (0.03, 0, 0.94, 1), draw, ", ".join(texts))


def _bins(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, ...]]:
    """(mean step, minimum, mean, maximum) of at most `most` bins of consecutive points."""
    runs = np.array_split(np.array(points, float), min(most, len(points)))
    return [(x.mean(), y.min(), y.mean(), y.max()) for x, y in (run.T for run in runs)]


def plot_losses(curves: Mapping[str, Mapping[str, Series]], path: Path) -> None:
    """Writes the losses as a PNG, one plot per stage; no file if there are none."""
    from matplotlib.figure import Figure

    losses = {stage: plots["loss"] for stage, plots in curves.items() if "loss" in plots}
    if not losses:
        return
    figure = Figure(figsize=(5 * len(losses), 3.4), dpi=140, layout="constrained")
    for i, (stage, series) in enumerate(losses.items(), 1):
        axes = figure.add_subplot(1, len(losses), i)
        draw_curves(axes, series)
        axes.set(xlabel="step", title=stage)
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _panels(plots: Mapping[str, Series]) -> list[tuple[dict[str, str], dict[str, float]]]:
    """The plots of a stage, losses first, each with the last value of its series."""
    panels, box = [], (0.12, 0.13, 0.85, 0.83)
    for _, series in sorted(plots.items(), key=lambda plot: plot[0] != "loss"):
        last = {name: points[-1][1] for name, points in series.items()}
        draw = functools.partial(draw_curves, series=series)
        panels.append((_picture(340, 190, box, draw, ", ".join(series)), last))
    return panels


def _curves(rows: Sequence[Row]) -> dict[str, dict[str, Series]]:
    """stage -> plot -> series, of metrics with more than one step; all losses share a plot."""
    points: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "seconds", "parameters") and _is_number(value):
                points[row["stage"], name][row["step"]] = value
    curves: dict[str, dict[str, Series]] = {}
    for (stage, name), values in points.items():
        if stage not in ("eval", "run") and len(values) > 1:
            plot = "loss" if "loss" in name else name
            series = curves.setdefault(stage, {}).setdefault(plot, {})
            series[name] = sorted(values.items())
    return curves


def _scores(rows: Sequence[Row]) -> dict[str, Any]:
    """A score table each for all clips, for those of one object and for those of two."""
    last = {(row["objects"], row["split"]): row for row in rows if _is_score(row)}
    shares = [row[name] for row in last.values() for name in SCORES if _is_number(row.get(name))]
    start = 0.5 if min(shares, default=0.0) > 0.55 else 0.0
    blocks: dict[str, dict[str, Any]] = {}
    for objects in OBJECTS:
        of = {split: last[objects, split] for split in SPLITS if (objects, split) in last}
        present = {name for row in of.values() for name, value in row.items() if _is_number(value)}
        others = sorted(name for name in present - NO_SCORE if not NO_COLUMN.fullmatch(name))
        strips = {}
        for name in [name for name in SCORES if name in present] + others:
            keys = (f"{name}_low", name, f"{name}_high")
            marks = {split: [row.get(key) for key in keys] for split, row in of.items()}
            most = max(n for numbers in marks.values() for n in numbers if _is_number(n))
            ends = (start, 1.0) if name in SCORES else (0.0, 1.1 * most or 1.0)
            strips[name] = _strip(marks, *ends)
        blocks |= {objects: {"of": of, "strips": strips}} if of else {}
    legend = {split: _strip({split: (0.4, 0.5, 0.6)}, 0, 1) for split in SPLITS}
    return {"blocks": blocks, "start": start, "legend": legend, "shares": SCORES}


def _is_score(row: Row) -> bool:
    """Whether a row belongs to a score table; `_tables` shows the other eval rows."""
    table = row.get("split") in SPLITS and row.get("objects") in OBJECTS
    return row["stage"] == "eval" and "task" not in row and table


def _tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The other eval rows: a table per set of string fields, the last row per their values."""
    tables: dict[tuple[str, ...], dict[tuple[str, ...], Row]] = {}
    for row in rows:
        named = {key: value for key, value in row.items() if isinstance(value, str)}
        if named.pop("stage") == "eval" and named and not _is_score(row):
            tables.setdefault(tuple(named), {})[tuple(named.values())] = row
    found = []
    for names, lines in tables.items():
        keys = dict.fromkeys(itertools.chain(*lines.values()))
        columns = [key for key in keys if key not in names and not NO_COLUMN.fullmatch(key)]
        found.append({"names": [*names], "columns": columns, "rows": [*lines.values()]})
    return found


def _autoencoder(rows: Sequence[Row]) -> Row:
    """The last row with the PSNR of the autoencoder, from evaluation or else from training."""
    for stage in ("eval", "vae"):
        for row in reversed(rows):
            of = row["stage"] == stage and row.get("split", "reconstructed") == "reconstructed"
            if of and "task" not in row and _is_number(row.get("psnr")):
                return row
    return {}


def stage_values(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The last value of each metric per stage, without "run", which covers all stages.

    The seconds of a stage that was resumed are those of all its parts: they begin again with each,
    which a row of "run" without seconds begins. What was done again at the same step counts once.
    """
    stages: dict[str, dict[str, float]] = defaultdict(dict)
    spent: dict[str, list[tuple[int, float]]] = defaultdict(list)  # step, seconds: ends of parts
    begun: set[str] = set()  # stages with seconds in the newest part
    for row in rows:
        name, numbers = row["stage"], {key: n for key, n in row.items() if _is_number(n)}
        if name == "run":
            begun = begun if "seconds" in row else set()
            continue
        if "task" in row:  # a score, whose seconds are a video's
            numbers.pop("seconds", None)
        if (seconds := numbers.get("seconds")) is not None:
            parts, step = spent[name], row["step"]
            goes_on = name in begun and seconds >= parts[-1][1]
            if parts and (goes_on or step <= parts[-1][0]):
                parts.pop()
            parts.append((step, seconds))
            begun.add(name)
            numbers["seconds"] = sum(seconds for _, seconds in parts)
        stages[name] |= numbers
    return stages


def _gallery(paths: Iterable[Path], kinds: Sequence[str]) -> dict[str, Any]:
    """Images and videos as data URIs, one per stem in natural order, with their JSON."""
    files = [p for p in paths if p.suffix in kinds and p.name[0] != "." and p.is_file()]
    files.sort(key=lambda path: -kinds.index(path.suffix))
    best = {path.stem: path for path in files if path.stat().st_size}  # the best kind last
    figures, room = list[dict[str, Any]](), MOST_BYTES
    for stem in sorted(best, key=lambda stem: re.sub(r"\d+", lambda n: n[0].zfill(20), stem)):
        path, size = best[stem], best[stem].stat().st_size
        if size <= room and len(figures) < MOST_SAMPLES:
            room -= size
            source = to_data_uri(path.read_bytes(), MEDIA[path.suffix])
            about = _json(path.with_suffix(".json"))
            figures.append({"name": stem, "source": source, "shape": _shape(path), "about": about})
    return {"figures": figures, "more": len(best) - len(figures)}


def _shape(path: Path) -> tuple[int, int]:
    """(width, height); zeros if unreadable."""
    import av

    with contextlib.suppress(OSError, ValueError, IndexError, av.FFmpegError):
        if path.suffix != ".mp4":
            with Image.open(path) as image:
                return image.size
        with av.open(str(path)) as container:
            return container.streams.video[0].width, container.streams.video[0].height
    return 0, 0


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(found := json.loads(path.read_text(encoding="utf-8")), dict):
            return found
    return {}


def _brief(number: float) -> str:
    """1.5k, 4M, 0.02, 3e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status, 2 for a wrong workdir."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m vdit.report WORKDIR", file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    try:
        print(write_report(arguments[0]))
    except UserError as error:
        print(f"vdit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
