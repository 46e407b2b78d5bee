"""One page to look at a run: WORKDIR/report.html, self-contained, and WORKDIR/plots/loss.png.

python -m vdit.report WORKDIR
"""

import base64
import html
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

from vdit.config.identity import stored_fields
from vdit.errors import UserError
from vdit.runtime import metrics
from vdit.runtime.files import atomic_path, write_text
from vdit.runtime.progress import clock

Row = dict[str, Any]
Series = dict[str, list[tuple[float, float]]]  # name -> (step, value), by step

MOST_SAMPLES = 60
MOST_BYTES = 24 * 2**20  # of embedded files: a page that a phone still opens
BINS = 100  # points of a curve: more would be noise
MEDIA = {  # the first of a stem's files is shown
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".png": "image/png",
}
SPLITS = {
    "generated": "made", "paraphrased": "other words", "reconstructed": "rec.", "real": "real",
}  # fmt: skip
OBJECTS = {"all": "All clips", "one": "One object", "two": "Two objects"}
SCORES = ["count", "colour", "shape", "size", "motion", "permanence", "every_attribute"]
# Fields of the config that say what kind of run this was, by the last part of their name.
FACTS = (
    "preset seed frames size fps patch tubelet channels width depth layers steps batch batch_size "
    "optimizer process prediction sampler guidance text"
).split()
LOGARITHMIC = re.compile("loss|mse|kl|norm|error")


def write_report(workdir: str | Path) -> Path:
    """Writes WORKDIR/report.html from what the run left there, and returns its path.

    Sections that have nothing to show are left out. Raises `UserError` where `workdir` holds
    neither config.json nor metrics.jsonl, or cannot be written.
    """
    workdir = Path(workdir)
    if not any((workdir / name).is_file() for name in ("config.json", "metrics.jsonl")):
        what = "has neither" if workdir.is_dir() else "is no folder"
        raise UserError(f"a workdir holds config.json or metrics.jsonl; {workdir} {what}")
    rows = [row for row in metrics.read(workdir) if "stage" in row and _is_number(row.get("step"))]
    config = stored_fields(workdir, lenient=True)
    curves = _curves(rows)
    name = str(config.get("name") or workdir.resolve().name)
    sections = [
        ("Samples", _samples(workdir)),
        ("Scores", _scores(rows)),
        ("Other scores", _tables(rows)),
        ("Reconstructions", _reconstructions(workdir, rows)),
        ("Curves", "".join(_panels(stage, series) for stage, series in curves.items())),
        ("Stages", _stages(rows, curves)),
        ("Settings", _settings(config)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{part}</section>" for title, part in sections if part)
    page = _PAGE.format(
        title=_text(name),
        style=_STYLE,
        header=_figures(rows) + _facts(config, rows),
        body=body,
        date=f"{datetime.now():%d %B %Y, %H:%M}",
    )
    write_text(workdir / "report.html", page)
    plot_losses(curves, workdir / "plots" / "loss.png")
    return workdir / "report.html"


# ---------------------------------------------------------------------------------------------
# The header


def _figures(rows: Sequence[Row]) -> str:
    """The few large numbers: the best summary of a run that is one line long."""
    figures: list[tuple[str, str]] = []
    for objects, label in OBJECTS.items():
        row = _score_rows(rows).get((objects, "generated"), {})
        if objects != "all" and _is_number(row.get("every_attribute")):
            figures.append((_score(row["every_attribute"]), f"every attribute, {label.lower()}"))
    gravity = _score_rows(rows).get(("all", "generated"), {}).get("gravity_error_median")
    if _is_number(gravity):
        figures.append((f"{100 * gravity:.1f}%", "median gravity error"))
    vae = _autoencoder(rows)
    if _is_number(vae.get("psnr")):
        figures.append((f"{vae['psnr']:.1f} dB", "autoencoder PSNR"))
    if _is_number(vae.get("ssim")):
        figures.append((f"{vae['ssim']:.3f}", "autoencoder SSIM"))
    seconds = sum(_seconds(rows).values())
    if seconds:
        unit = "hours" if seconds >= 3600 else "minutes"
        figures.append((clock(seconds), f"{unit}, all stages"))
    items = "".join(f"<div><dd>{value}</dd><dt>{label}</dt></div>" for value, label in figures)
    return f'<dl class="figures">{items}</dl>' if items else ""


def _facts(config: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Sizes and steps of each part of the config; versions and device from stage "run"."""
    parts: dict[str, list[tuple[str, Any]]] = {}
    for key, value in _flat(config).items():
        part, _, name = key.rpartition(".")
        if name in FACTS and value not in (None, ""):
            parts.setdefault(part, []).append((name, value))
    for row in rows:
        if row["stage"] == "run":
            machine = [(key, value) for key, value in row.items() if key not in ("stage", "step")]
            parts["ran on"] = machine
    return _definitions((part or "run", facts) for part, facts in parts.items())


def _definitions(parts: Iterable[tuple[str, Iterable[tuple[str, Any]]]]) -> str:
    """A line a part: its name, then its names and values."""
    lines = ""
    for part, facts in parts:
        words = " ".join(
            f"<span><small>{_text(name)}</small> {_text(_plain(value))}</span>"
            for name, value in facts
        )
        lines += f"<div><dt>{_text(part)}</dt><dd>{words}</dd></div>"
    return f'<dl class="facts">{lines}</dl>' if lines else ""


# ---------------------------------------------------------------------------------------------
# Pictures


def _samples(workdir: Path) -> str:
    files = _media(sorted((workdir / "samples").glob("*"), key=_natural), still=False)
    figures, left = [], MOST_BYTES
    for path in files[:MOST_SAMPLES]:
        left -= path.stat().st_size
        if left < 0:
            break
        about = _json(path.with_suffix(".json"))
        prompt = str(about.get("prompt") or "")
        notes = [f"seed {about['seed']}"] if "seed" in about else []
        if given := about.get("given"):
            notes.append(f"given {_plain(given)}")
        figures.append(
            f"<figure>{_embed(path, prompt or path.stem, width=192)}<figcaption>"
            f'<p title="{_text(prompt)}">{_text(prompt or path.stem)}</p>'
            f"<small>{_text(' · '.join(notes))}</small></figcaption></figure>"
        )
    if not figures:
        return ""
    more = len(files) - len(figures)
    note = f"<p class=note>{more} more in the folder samples.</p>" if more else ""
    return f'<div class="samples">{"".join(figures)}</div>{note}'


def _reconstructions(workdir: Path, rows: Sequence[Row]) -> str:
    figures = []
    for path in _media(sorted(workdir.glob("reconstructions*"), key=_natural), still=True):
        if path.stat().st_size <= MOST_BYTES:
            name = path.stem.removeprefix("reconstructions").strip("_- ").replace("_", " ")
            caption = str(_json(path.with_suffix(".json")).get("caption") or name)
            picture = _embed(path, caption or "reconstructions", width=1088)
            words = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
            figures.append(f'<figure class="wide">{picture}{words}</figure>')
    vae = _autoencoder(rows)
    scores = [f"PSNR {vae['psnr']:.2f} dB"] if _is_number(vae.get("psnr")) else []
    scores += [f"SSIM {vae['ssim']:.4f}"] if _is_number(vae.get("ssim")) else []
    note = f'<p class="note">{", ".join(scores)}</p>' if scores and figures else ""
    return "".join(figures) + note


def _media(paths: Iterable[Path], still: bool) -> list[Path]:
    """The files to show, one a stem, in the order of the stems."""
    order = [suffix for suffix in MEDIA if still or suffix != ".png"]
    best: dict[str, Path] = {}
    for path in paths:
        if path.suffix in order and path.name[0] != "." and path.is_file() and path.stat().st_size:
            known = best.setdefault(path.stem, path)
            best[path.stem] = min(known, path, key=lambda p: order.index(p.suffix))
    return list(best.values())


def _embed(path: Path, alt: str, width: int) -> str:
    """An image or a video as a data URI, shown at about `width`; not blurred if much enlarged."""
    data = path.read_bytes()
    w, h = _dimensions(data, path.suffix)
    shape = f' style="aspect-ratio:{w}/{h}"' if w and h else ""
    shape += ' class="pixels"' if 0 < 2 * w <= width else ""
    kind = MEDIA[path.suffix]
    source = f'src="data:{kind};base64,{base64.b64encode(data).decode()}"{shape}'
    if kind.startswith("video"):
        return f'<video {source} autoplay loop muted playsinline title="{_text(alt)}"></video>'
    return f'<img {source} alt="{_text(alt)}">'


def _dimensions(data: bytes, suffix: str) -> tuple[int, int]:
    """(width, height); zeros where it cannot be read."""
    if suffix == ".mp4":  # the track header ends with both as 16.16 fixed point numbers
        _, _, track = data.partition(b"tkhd")
        numbers = track[88:96] if track[:1] == b"\1" else track[76:84]
        return int.from_bytes(numbers[:2], "big"), int.from_bytes(numbers[4:6], "big")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except (UnidentifiedImageError, OSError):
        return 0, 0


# ---------------------------------------------------------------------------------------------
# Scores


def _score_rows(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """The last eval row of each (objects, split)."""
    return {(row["objects"], row["split"]): row for row in rows if _is_score(row)}


def _is_score(row: Row) -> bool:
    """Whether this is a row of the score table; other eval rows have tables of their own."""
    table = row.get("split") in SPLITS and row.get("objects") in OBJECTS
    return row["stage"] == "eval" and "task" not in row and table


def _autoencoder(rows: Sequence[Row]) -> Row:
    """The last row with the autoencoder's PSNR: of the evaluation, else of its training."""
    found = [
        row
        for row in rows
        if row["stage"] in ("vae", "eval")
        and _is_number(row.get("psnr"))
        and "task" not in row
        and row.get("split", "reconstructed") == "reconstructed"
    ]
    return max(reversed(found), key=lambda row: row["stage"] == "eval", default={})


def _scores(rows: Sequence[Row]) -> str:
    scores = _score_rows(rows)
    if not scores:
        return ""
    shares = [row[name] for row in scores.values() for name in SCORES if _is_number(row.get(name))]
    start = 0.5 if min(shares, default=0.0) > 0.55 else 0.0
    blocks = []
    for objects, label in OBJECTS.items():
        of = {split: scores[objects, split] for split in SPLITS if (objects, split) in scores}
        if of:
            blocks.append(_score_block(label, of, start))
    whiskers = (
        '<i class="range" style="left:15%;width:70%"></i><i class="dot" style="left:50%"></i>'
    )
    marks = {
        "<b>generated</b>, with its 95% interval": whiskers,
        "reconstructed by the autoencoder": '<i class="tick rec" style="left:50%"></i>',
        "real clips": '<i class="tick real" style="left:50%"></i>',
    }
    legend = "".join(
        f'<span><span class="strip">{m}</span>{name}</span>' for name, m in marks.items()
    )
    note = (
        f"Lines run from {start:g} to 1; those of errors from 0, where less is better. "
        "Reconstructed and real clips are the ceilings, scored by the same code. Other words: "
        "captions in wordings that training never shows, of the first of these clips."
    )
    legend = f'<p class="note legend">{legend}</p><p class="note">{note}</p>'
    return f'{legend}<div class="scores">{"".join(blocks)}</div>'


def _score_block(label: str, of: Mapping[str, Row], start: float) -> str:
    """One table: a score a line, its strip, and its value in each split."""
    some = of.get("generated") or next(iter(of.values()))
    counts = [f"{_plain(some[name])} {name}" for name in ("clips", "captions") if name in some]
    present = {name for row in of.values() for name, value in row.items() if _is_number(value)}
    present -= {"step", "clips", "captions"}
    values = [name for name in present if not name.endswith(("_low", "_high"))]
    order = [name for name in SCORES if name in values]
    order += sorted(name for name in values if name not in SCORES)
    lines = []
    for name in order:
        cells = "".join(f"<td>{_cell(row, name)}</td>" for row in of.values())
        strip = _strip(name, of, start)
        lines.append(f"<tr><th>{_label(name)}{strip}</th>{cells}</tr>")
    heads = "".join(f"<th>{SPLITS[split]}</th>" for split in of)
    return (
        f'<div><h3>{label}</h3><p class="note">{_text(", ".join(counts))}</p>'
        f'<table class="{"made" if "generated" in of else ""}"><thead><tr><th></th>{heads}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(row: Row, name: str) -> str:
    """A value, and its 95% interval in small."""
    text = _score(row.get(name), name)
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if _is_number(low) and _is_number(high):
        text += f"<small>{_score(low, name)}–{_score(high, name)}</small>"
    return text


def _strip(name: str, of: Mapping[str, Row], start: float) -> str:
    """The three values as marks on one line, from `start` to 1 (else from 0 to the largest)."""
    keys = (name, f"{name}_low", f"{name}_high")
    numbers = [row[key] for row in of.values() for key in keys if _is_number(row.get(key))]
    first, last = (start, 1.0) if name in SCORES else (0.0, 1.1 * max(numbers) or 1.0)

    def at(value: float) -> float:
        return 100 * min(max((value - first) / (last - first), 0.0), 1.0)

    marks = ""
    for split, kind in (("real", "tick real"), ("reconstructed", "tick rec"), ("generated", "dot")):
        row = of.get(split, {})
        low, value, high = row.get(f"{name}_low"), row.get(name), row.get(f"{name}_high")
        if split == "generated" and _is_number(low) and _is_number(high):
            size = f"left:{at(low):.1f}%;width:{at(high) - at(low):.1f}%"
            marks += f'<i class="range" style="{size}"></i>'
        if _is_number(value):
            marks += f'<i class="{kind}" style="left:{at(value):.1f}%"></i>'
    return f'<span class="strip">{marks}</span>'


def _tables(rows: Sequence[Row]) -> str:
    """The other eval rows: a table for each set of named fields, the last row of each name."""
    tables: dict[tuple[str, ...], dict[tuple[str, ...], Row]] = {}
    for row in rows:
        named = {key: value for key, value in row.items() if isinstance(value, str)}
        if named.pop("stage") != "eval" or not named or _is_score(row):
            continue  # what names nothing is in the header
        names = tuple(named)
        tables.setdefault(names, {})[tuple(named.values())] = row
    parts = []
    for names, lines in tables.items():
        columns = list(dict.fromkeys(key for row in lines.values() for key in row))
        columns = [
            key
            for key in columns
            if key not in (*names, "stage", "step") and not key.endswith(("_low", "_high"))
        ]
        head = "".join(f"<th>{_label(name)}</th>" for name in (*names, *columns))
        body = "".join(
            "<tr>"
            + "".join(f"<th>{_text(row[name])}</th>" for name in names)
            + "".join(f"<td>{_cell(row, key)}</td>" for key in columns)
            + "</tr>"
            for row in lines.values()
        )
        parts.append(
            f'<div class="scroll"><table class="plain"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
    return "".join(parts)


def _score(value: Any, name: str = "") -> str:
    """0.97; an error is a fraction and reads 7.5%."""
    if not _is_number(value):
        return "–"
    if "error" in name and "psnr" not in name:
        return f"{100 * value:.1f}%"
    if name in SCORES or isinstance(value, float) and abs(value) < 10:
        return f"{value:.2f}"
    return _plain(value)


# ---------------------------------------------------------------------------------------------
# Curves


def _curves(rows: Sequence[Row]) -> dict[str, Series]:
    """stage -> name -> points, of all that was written at more than one step."""
    stages: dict[str, dict[str, dict[float, float]]] = {}
    for row in rows:
        if row["stage"] not in ("eval", "run"):
            for name, value in row.items():
                if name not in ("step", "seconds", "parameters") and _is_number(value):
                    points = stages.setdefault(row["stage"], {}).setdefault(name, {})
                    points[row["step"]] = value
    return {
        stage: series
        for stage, all_series in stages.items()
        if (series := {n: sorted(p.items()) for n, p in all_series.items() if len(p) > 1})
    }


def _panels(stage: str, series: Series) -> str:
    """The plots of a stage: all its losses in one, then each other series."""
    losses = {name: points for name, points in series.items() if "loss" in name}
    others = [{name: points} for name, points in series.items() if "loss" not in name]
    plots = [svg_plot(group) for group in [losses, *others] if group]
    return f'<h3>{_text(stage)}</h3><div class="plots">{"".join(plots)}</div>'


def svg_plot(series: Series) -> str:
    """A plot of a few series over the step: for each its mean, over the range of its values.

    The drawing stretches to the width there is; the words lie over it as HTML, so that they stay
    readable at every width.
    """
    values = [value for points in series.values() for _, value in points]
    log = min(values) > 0 and any(LOGARITHMIC.search(name) for name in series)
    scale: Callable[[float], float] = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    margin = 0.06 * (high - low) or 0.5 * (abs(high) if not log else 1.0) or 1.0
    low, high = low - margin, high + margin
    first = min(points[0][0] for points in series.values())
    first = 0 if first < 0.2 * max(points[-1][0] for points in series.values()) else first
    last = max(points[-1][0] for points in series.values())

    def at(step: float, value: float) -> str:
        x = 100 * (step - first) / (last - first)
        y = 100 * (high - scale(value)) / (high - low)
        return f"{x:.2f},{y:.2f}"

    drawing, words, names = "", "", ""
    for tick in _log_ticks(low, high) if log else _ticks(low, high):
        y = 100 * (high - scale(tick)) / (high - low)
        drawing += f'<path class="grid" d="M0,{y:.2f}H100"/>'
        words += f'<span class="y" style="top:{y:.2f}%">{_brief(tick)}</span>'
    for tick in _ticks(first, last):
        x = 100 * (tick - first) / (last - first)
        edge = " end" if x > 92 else ""
        words += f'<span class="x{edge}" style="left:{x:.2f}%">{_brief(tick)}</span>'
    for i, (name, points) in enumerate(series.items()):
        bins = _bins(points, BINS)
        if len(points) > len(bins):
            outline = [at(step, top) for step, _, _, top in bins]
            outline += [at(step, bottom) for step, bottom, _, _ in reversed(bins)]
            drawing += f'<polygon class="c{i % 4}" points="{" ".join(outline)}"/>'
        line = " ".join(at(step, mean) for step, _, mean, _ in bins)
        drawing += f'<polyline class="c{i % 4}" points="{line}"/>'
        end = _brief(points[-1][1])
        names += f'<span class="c{i % 4}"><b>{_label(name)}</b> {end}</span>'
    title = _text(", ".join(series))
    return (
        f'<figure class="plot{" large" if any("loss" in name for name in series) else ""}">'
        f'<figcaption>{names}</figcaption><div class="canvas">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{title}">'
        f"{drawing}</svg>{words}</div></figure>"
    )


def _bins(
    points: Sequence[tuple[float, float]], most: int
) -> list[tuple[float, float, float, float]]:
    """(middle step, least, mean, largest) of at most `most` runs of neighbouring points."""
    size = math.ceil(len(points) / most)
    found = []
    for i in range(0, len(points), size):
        steps, values = zip(*points[i : i + size], strict=True)
        mean = sum(values) / len(values)
        found.append((sum(steps) / len(steps), min(values), mean, max(values)))
    return found


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between 10^low and 10^high, with 2 and 5 times them where they are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = max(1, math.ceil((high - low) / 5))
    factors = (1, 2, 5) if high - low < 2 else (1,)
    numbers = [m * 10.0**power for power in powers if power % every == 0 for m in factors]
    inside = [number for number in numbers if low <= math.log10(number) <= high]
    return inside if len(inside) > 1 else [10**low * 1.02, 10**high * 0.98]


def plot_losses(curves: Mapping[str, Series], path: Path) -> None:
    """The losses as a PNG, an axis a stage; nothing where there are none."""
    losses = {
        stage: {name: points for name, points in series.items() if "loss" in name}
        for stage, series in curves.items()
    }
    losses = {stage: series for stage, series in losses.items() if series}
    if not losses:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(losses), 3.4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (stage, series) in zip(
        figure.subplots(1, len(losses), squeeze=False)[0], losses.items(), strict=True
    ):
        for i, (name, points) in enumerate(series.items()):
            colour = ("#2b6a8c", "#b4603a", "#5d7f4e", "#7c659c")[i % 4]
            steps, lows, means, highs = zip(*_bins(points, BINS), strict=True)
            axis.fill_between(steps, lows, highs, color=colour, alpha=0.2, linewidth=0)
            axis.plot(steps, means, color=colour, linewidth=1.4, label=name)
        if all(value > 0 for points in series.values() for _, value in points):
            axis.set_yscale("log")
        axis.set_title(stage, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


# ---------------------------------------------------------------------------------------------
# Stages and settings


def _seconds(rows: Sequence[Row]) -> dict[str, float]:
    """The time that each stage took: the last "seconds" of its rows."""
    return {row["stage"]: row["seconds"] for row in rows if _is_number(row.get("seconds"))}


def _stages(rows: Sequence[Row], curves: Mapping[str, Series]) -> str:
    """A line a stage: steps, time (also as a bar), last loss, parameters."""
    seconds = _seconds(rows)
    longest = max(seconds.values(), default=0.0) or 1.0
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in rows if row["stage"] != "run"):
        of = [row for row in rows if row["stage"] == stage]
        steps = max(row["step"] for row in of)
        parameters = next((_brief(r["parameters"]) for r in of if "parameters" in r), "")
        losses = curves.get(stage, {}).get("loss")
        share = 100 * seconds.get(stage, 0.0) / longest
        cells = [
            f"{steps:,}" if steps else "",
            clock(seconds[stage]) if stage in seconds else "",
            _brief(losses[-1][1]) if losses else "",
            parameters,
            f'<i class="bar" style="width:{share:.1f}%"></i>' if stage in seconds else "",
        ]
        lines.append([_text(stage), *cells])
    if not lines:
        return ""
    heads = ["", "steps", "time", "last loss", "parameters", ""]
    used = [i for i in range(1, len(heads)) if any(line[i] for line in lines)]
    head = "".join(f"<th>{heads[i]}</th>" for i in (0, *used))
    body = "".join(
        f"<tr><th>{line[0]}</th>{''.join(f'<td>{line[i]}</td>' for i in used)}</tr>"
        for line in lines
    )
    return (
        f'<div class="scroll"><table class="plain stages"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _settings(config: Mapping[str, Any]) -> str:
    """The whole config, folded away."""
    parts: dict[str, list[tuple[str, Any]]] = {}
    for key, value in _flat(config).items():
        part, _, name = key.rpartition(".")
        parts.setdefault(part, []).append((name, value))
    listed = _definitions((part or "run", facts) for part, facts in parts.items())
    return f"<details><summary>config.json</summary>{listed}</details>" if listed else ""


# ---------------------------------------------------------------------------------------------
# Small things


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _natural(path: Path) -> list[str | int]:
    """Sorts 2.mp4 before 10.mp4."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _text(value: object) -> str:
    """Foreign text as HTML."""
    return html.escape(str(value))


def _label(name: str) -> str:
    """The name of a number as words."""
    return _text(name.replace("gravity_error_median", "gravity error").replace("_", " "))


def _plain(value: Any) -> str:
    """A setting as a reader writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(_is_number(item) for item in value):
        return " × ".join(map(_plain, value))
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return str(value)


def _brief(number: float) -> str:
    """1.5k, 4M, 0.02, 3e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>{title} · vdit</title>
<style>{style}</style>
</head>
<body>
<header><p class="eyebrow">vdit</p><h1>{title}</h1>{header}</header>
<main>{body}</main>
<footer>Written on {date}.</footer>
</body>
</html>
"""

_STYLE = """
:root { --paper: #fcfbf8; --ink: #22211e; --soft: #6f6b62; --line: #e7e3d9; --shade: #f3f0e8;
  --c0: #2b6a8c; --c1: #b4603a; --c2: #5d7f4e; --c3: #7c659c; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #151618; --ink: #e6e3dc; --soft: #98948a; --line: #2d2e31; --shade: #1d1e21;
    --c0: #7fb9d8; --c1: #e09a74; --c2: #9dbf8d; --c3: #b9a3d8; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--paper); color: var(--ink); padding: 0 clamp(1.25rem, 5vw, 4rem);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
header, main, footer { max-width: 68rem; margin: 0 auto; }
header { padding-top: clamp(2.5rem, 7vw, 5.5rem); }
footer { color: var(--soft); font-size: .85rem; padding: 2rem 0 4rem; }
h1, h2, h3, .figures dd { font-weight: 400;
  font-family: "Iowan Old Style", Charter, "Palatino Linotype", Palatino, Georgia, serif; }
h1 { font-size: clamp(2rem, 5vw, 3.1rem); line-height: 1.15; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.6rem; margin-bottom: 1.4rem; }
h3 { font-size: 1.15rem; }
section { border-top: 1px solid var(--line); padding: 2.4rem 0 3.2rem; }
small, .note, dt { color: var(--soft); font-size: .85rem; }
.eyebrow { color: var(--c0); letter-spacing: .12em; font-size: .85rem; margin-bottom: .4rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr));
  gap: 1.5rem 1.6rem; margin-top: 2.2rem; }
.figures dd { font-size: 1.9rem; line-height: 1.2; }
.facts { margin: 2.2rem 0 2.6rem; }
.facts div { display: grid; grid-template-columns: 6.5rem 1fr; padding: .3rem 0; }
.facts dt { font-size: inherit; }
.facts dd { display: flex; flex-wrap: wrap; gap: 0 1.4rem; overflow-wrap: anywhere; }
figure img, figure video { display: block; width: 100%; border-radius: 5px;
  background: var(--shade); object-fit: cover; }
.pixels { image-rendering: pixelated; }
figcaption { margin-top: .5rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr));
  gap: 1.8rem 1.4rem; }
.samples p { font-size: .88rem; line-height: 1.4; overflow-wrap: anywhere; display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 5; overflow: hidden; }
.wide { margin-bottom: 1rem; } .wide figcaption { color: var(--soft); font-size: .88rem; }
.note + .samples, .samples + .note { margin-top: 1.6rem; }
table { border-collapse: collapse; width: 100%; }
th { font-weight: 400; text-align: left; }
thead th { color: var(--soft); font-size: .82rem; }
td, thead th { text-align: right; padding: .34rem 0 .34rem .7rem; vertical-align: baseline; }
th:first-child { text-align: left; padding-left: 0; }
tbody tr { border-top: 1px solid var(--line); }
td small { display: block; font-size: .72rem; line-height: 1.2; font-weight: 400;
  white-space: nowrap; }
.made td:nth-child(2) { font-weight: 700; }
.scores td:nth-child(n + 3) small { display: none; }
.scores { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: 2.6rem 3rem; margin-top: 1.8rem; }
.scores table { margin-top: .6rem; } .scores th, .scores td { line-height: 1.25; }
.scores tbody th { width: 45%; vertical-align: top; padding: .34rem 0; }
.strip { position: relative; display: block; height: 1rem; margin-top: .15rem;
  background: linear-gradient(var(--line), var(--line)) center / 100% 1px no-repeat; }
.strip i { position: absolute; top: 50%; transform: translate(-50%, -50%); }
.strip .range { transform: translateY(-50%); height: 5px; border-radius: 3px;
  background: var(--c0); opacity: .45; }
.strip .dot { width: 9px; height: 9px; border-radius: 50%; background: var(--c0); }
.strip .tick { width: 2px; height: .95rem; background: var(--ink); }
.strip .rec { background: var(--c1); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.8rem; margin-bottom: .5rem; }
.legend > span { display: inline-flex; align-items: center; }
.legend .strip { width: 3rem; margin: 0 .6rem 0 0; }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 2rem; }
.plain { width: auto; min-width: min(34rem, 100%); }
.plain td, .plain th { padding-left: 1.6rem; white-space: nowrap; }
.plain th:first-child { padding-left: 0; }
.plain tbody th { text-align: left; } .plain thead th { text-align: right; }
.plain thead th:first-child { text-align: left; }
.stages td:last-child { width: 12rem; text-align: left; }
@media (max-width: 40rem) { .plain td, .plain th { padding-left: .9rem; }
  .stages td:last-child, .stages th:last-child { display: none; } }
.bar { display: inline-block; height: .5rem; border-radius: 3px; background: var(--c0);
  opacity: .7; min-width: 2px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr));
  gap: 2rem 2.4rem; margin: .9rem 0 2.4rem; }
@media (min-width: 46rem) { .plot.large { grid-column: span 2; } }
.plot figcaption { display: flex; flex-wrap: wrap; gap: 0 1.2rem; font-size: .88rem;
  margin: 0 0 .5rem; color: var(--soft); }
.plot b { font-weight: 600; }
.canvas { position: relative; height: 10.5rem; margin: 0 0 1.5rem 2.9rem; }
.canvas svg { width: 100%; height: 100%; overflow: visible; display: block; }
.canvas path, .canvas polyline { fill: none; vector-effect: non-scaling-stroke; }
.canvas .grid { stroke: var(--line); stroke-width: 1; }
.canvas polyline { stroke-width: 1.6; stroke: currentColor; stroke-linejoin: round; }
.canvas polygon { fill: currentColor; opacity: .18; }
.canvas span { position: absolute; color: var(--soft); font-size: .75rem; line-height: 1; }
.canvas .y { right: calc(100% + .5rem); transform: translateY(-50%); }
.canvas .x { top: calc(100% + .5rem); transform: translateX(-50%); }
.canvas .x.end { transform: translateX(-100%); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); }
summary { cursor: pointer; color: var(--soft); }
"""


def main(arguments: Sequence[str]) -> int:
    """Writes the report of one workdir; 2 where the workdir is wrong."""
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
