"""Splits the films of a folder into shots, drops poor ones, and writes a table of the rest.

    python -m tools.curate FOLDER [--out=captions.jsonl] [--min-seconds=1 --max-seconds=10]
                           [--min-motion=.002 --max-motion=.2] [--min-sharpness=.01]
                           [--black=.5] [--duplicates=6] [--force] [--dry]

A shot is dropped as too_short, black (over that share of blank frames), static, too_much_motion,
blurred, or duplicate (its hash differs in at most that many of 64 bits from an earlier one); a film
as unreadable. Captions come from the folder's table or text files. OUT.report.json has the counts,
dropped.jsonl beside OUT every reason. Exit status 2 for wrong arguments.
"""

import argparse
import collections
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vdit.data.captions import Row
from vdit.data.captions import rows as captioned
from vdit.data.decode import DecodeError, Decoder, one_line
from vdit.errors import UserError
from vdit.runtime.files import write_text
from vdit.runtime.progress import Progress

from . import parsers, shots

SIZE = (64, 64)  # of the frames that are measured
RATE = 30.0  # frames a second at most
REASONS = (
    "too_short", "static", "too_much_motion", "blurred", "black", "duplicate", "unreadable",
)  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked options."""
    options = parsers.curate(__doc__).parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{name.replace('_', '-')}={value}: a number from 0 on")
    if not 0 < options.min_seconds <= options.max_seconds:
        raise UserError("--min-seconds, --max-seconds: 0 < min <= max")
    options.out = options.out or options.folder / "captions.jsonl"
    if options.out.exists() and not (options.force or options.dry):
        raise UserError(f"{one_line(str(options.out))} is there already; --force overwrites it")
    return options


@dataclasses.dataclass
class Result:
    """Shots that are kept and dropped, in order."""

    kept: list[dict[str, Any]]
    dropped: list[dict[str, Any]]


def reason(values: dict[str, float], seconds: float, options: argparse.Namespace) -> str | None:
    """Why a part is dropped, or None."""
    for name, bad in (
        ("too_short", seconds < options.min_seconds - 1e-6),
        ("black", values["black"] > options.black),
        ("static", values["motion"] < options.min_motion),
        ("too_much_motion", values["motion"] > options.max_motion),
        ("blurred", values["sharpness"] < options.min_sharpness),
    ):
        if bad:
            return name
    return None


def curated(options: argparse.Namespace) -> Result:
    """Measures every film, in sorted order."""
    result = Result([], [])
    seen: list[list[int]] = []
    rows: dict[str, list[Row]] = collections.defaultdict(list)
    for row in captioned(options.folder, curated_too=False):
        if row.where != row.file and options.out.exists() and not options.dry:
            table = one_line(row.where.rsplit(" line ", 1)[0])
            if Path(table).resolve() == options.out.resolve():
                raise UserError(f"{table} has the captions that are read; choose another --out")
        rows[row.file].append(row)
    with Decoder() as decoder, Progress("curate", len(rows)) as progress:
        for number, file in enumerate(sorted(rows), 1):
            try:
                info = decoder.probe(options.folder / file)
                rate = min(info.fps, RATE) or 1.0
                pieces = decoder.stream(options.folder / file, rate, SIZE)
                frames = shots.measure(pieces)
            except DecodeError as error:
                lost = {"file": file, "reason": "unreadable", "detail": error.reason}
                result.dropped.append(lost)
                progress.update(number)
                continue
            for row in sorted(rows[file], key=lambda row: (row.start, row.end or math.inf)):
                _film(row, frames, rate, options, seen, result)
            progress.update(number, kept=len(result.kept))
    return result


def _film(
    row: Row,
    frames: shots.Frames,
    rate: float,
    options: argparse.Namespace,
    seen: list[list[int]],
    result: Result,
) -> None:
    """Adds the shots within one row."""
    low = math.ceil(row.start * rate - 1e-6)
    high = len(frames.cut) if row.end is None else math.ceil(row.end * rate - 1e-6)
    most = max(1, math.floor(options.max_seconds * rate + 1e-6))
    for begin, end in shots.shots(frames):
        begin, end = max(begin, low), min(end, high)
        if end <= begin:
            continue
        for first, last in shots.parts(begin, end, most):
            values = shots.summary(frames, first, last)
            print_ = shots.hashes(frames, first, last)
            place = {"start": round(first / rate, 6), "end": round(last / rate, 6)}
            why = reason(values, (last - first) / rate, options)
            if why is None and any(shots.bits(print_, x) <= options.duplicates for x in seen):
                why = "duplicate"
            if why is None:
                seen.append(print_)
                measures = values | {"hash": f"{print_[1]:016x}"}
                fields = {"file": row.file, "caption": row.caption, **place, "measures": measures}
                result.kept.append(fields)
            else:
                result.dropped.append({"file": row.file, **place, "reason": why} | values)


def _write(path: Path, items: list[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    try:
        options = parse(arguments)
        result = curated(options)
        counts = collections.Counter(item["reason"] for item in result.dropped)
        dropped = {name: counts[name] for name in REASONS}
        report = json.dumps({"kept": len(result.kept), "dropped": dropped}, indent=1) + "\n"
        if options.dry:
            print(report, end="")
            return 0
        _write(options.out.with_name("dropped.jsonl"), result.dropped)
        write_text(options.out.with_name(options.out.name + ".report.json"), report)
        if not result.kept:  # a table without rows would mean films without captions
            raise UserError(f"no shot is kept, so no table is written; dropped: {dropped}")
        _write(options.out, result.kept)
        return 0
    except UserError as error:
        print(f"curate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
