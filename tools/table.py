"""The score tables of one or more workdirs, as Markdown: `python -m tools.table WORKDIR ...`."""

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.runtime.metrics import read

COLUMNS = ("colour", "shape", "size", "motion", "permanence", "every_attribute")
SPLITS = ("real", "reconstructed", "generated", "paraphrased")
OBJECTS = ("one", "two", "all")


def cell(row: dict[str, Any], name: str) -> str:
    """A score with its 95% interval."""
    value = row.get(name)
    if value is None:
        return "–"
    text = f"{value:.2f}"
    if row["split"] in ("generated", "paraphrased") and row.get(f"{name}_low") is not None:
        text += f" ({row[f'{name}_low']:.2f}–{row[f'{name}_high']:.2f})"
    return text


def newest(workdir: Path) -> list[dict[str, Any]]:
    """The rows of the last evaluation of a workdir."""
    rows = [row for row in read(workdir) if row["stage"] == "eval"]
    if not any("split" in row for row in rows):
        raise UserError(f"{workdir}: no scores in metrics.jsonl; run the stage eval first")
    return rows


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def percent(value: float | None) -> str:
    """A share, or a dash if missing."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}%"


def mean_row(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Mean of a score over runs, with minimum and maximum."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return "–"
    show = percent if name == "gravity_error_median" else "{:.2f}".format
    return f"{show(sum(values) / len(values))} ({show(min(values))}–{show(max(values))})"


def scores(runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    """Scores by run, split and objects; of several runs also the mean."""
    heads = ["run", "clips", "objects", "n", *(name.replace("_", " ") for name in COLUMNS)]
    lines = []
    made: dict[str, list[dict[str, Any]]] = {}
    for name, rows in runs:
        by = {(row["split"], row["objects"]): row for row in rows if "split" in row}
        for split, objects in itertools.product(SPLITS, OBJECTS):
            row = by.get((split, objects))
            if row is None:
                continue
            if split == "generated":
                made.setdefault(objects, []).append(row)
            cells = [name, split, objects, str(row["clips"])]
            cells += [cell(row, column) for column in COLUMNS]
            lines.append([*cells, percent(row.get("gravity_error_median"))])
    if len(runs) > 1:
        for objects, rows in made.items():
            cells = [f"mean of {len(rows)} (least–most)", "generated", objects]
            cells.append(str(sum(row["clips"] for row in rows)))
            lines.append(cells + [mean_row(rows, c) for c in (*COLUMNS, "gravity_error_median")])
    return markdown([*heads, "gravity error"], lines)


def quality(runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    """PSNR and SSIM of the autoencoder, and PSNR of the frames after given ones."""
    lines = []
    for name, rows in runs:
        for row in rows:
            if row.get("split") == "reconstructed":
                what = f"reconstruction, {row['objects']}"
                value = f"{row['psnr']:.1f} dB, SSIM {row['ssim']:.3f}"
                lines.append([name, what, str(row["clips"]), value, "", ""])
            elif "gain_db" in row:
                interval = f"({row['gain_db_low']:+.1f} to {row['gain_db_high']:+.1f})"
                lines.append([
                    name, row["task"].replace("_", " "), str(row["clips"]),
                    f"{row['psnr_next']:.1f} dB",
                    f"{row['psnr_frozen']:.1f} dB; reconstructed {row['psnr_reconstructed']:.1f}",
                    f"{row['gain_db']:+.1f} dB {interval}",
                ])  # fmt: skip
    return markdown(["run", "what", "n", "PSNR", "a frozen frame", "gain"], lines)


def score_table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Scores of shots or playgrounds, a row per score."""
    of = [row for split in SPLITS for row in rows if row.get("split") == split]
    names = [key.removesuffix("_low") for key in of[0] if key.endswith("_low")]
    lines = [[key.replace("_", " "), *(cell(row, key) for row in of)] for key in names]
    heads = [name, *(f"{row['split']} ({row['clips']})" for row in of)]
    return markdown(heads, lines)


def lengths(runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    """Clips generated in one pass and in chunks: permanence, and drift per second."""
    drifts = ("colour", "contrast", "sharpness")
    lines = [
        [
            name, row["way"].replace("_", " "), str(row["clips"]), f"{row['permanence']:.2f}",
            f"{row['frames_whole']:.2f}",
            f"{row['frames_whole_first']:.2f}, {row['frames_whole_last']:.2f}",
            *(f"{row[f'{drift}_drift_percent_a_second']:.3f}%" for drift in drifts),
        ]
        for name, rows in runs
        for row in rows
        if row.get("task") == "length"
    ]  # fmt: skip
    heads = ["run", "clips", "n", "whole in every frame", "frames", "first, last tenth"]
    return markdown([*heads, *(f"{drift} a second" for drift in drifts)], lines) if lines else ""


def table(workdirs: Sequence[Path]) -> str:
    """All tables of the last evaluation of each workdir."""
    runs = [(workdir.name, newest(workdir)) for workdir in workdirs]
    of_world = [(name, rows) for name, rows in runs if not any("place" in row for row in rows)]
    parts = [scores(of_world)] if of_world else []
    parts += [score_table(*run) for run in runs if run not in of_world]
    return "\n\n".join(part for part in (*parts, quality(runs), lengths(runs)) if part)


def main(argv: Sequence[str]) -> int:
    """Prints the tables; returns the exit status, 2 for a workdir without scores."""
    try:
        if not argv:
            raise UserError("usage: python -m tools.table WORKDIR ...")
        print(table([Path(name) for name in argv]))
        return 0
    except UserError as error:
        print(f"vdit: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
