"""Captions of the films in a folder: captions.jsonl, captions.csv, or a text file beside each film.

A row of a table has a file and its caption. With `start` and `end` (seconds) it is a part of the
film, so one long film can have many captions. The text file of `cat.mp4` is `cat.txt`.
"""

import contextlib
import csv
import dataclasses
import io
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vdit.data.decode import is_text, is_time, one_line
from vdit.errors import UserError

SUFFIXES = (".gif", ".mkv", ".mov", ".mp4", ".webm")
TABLES = ("captions.jsonl", "captions.csv")
COLUMNS = ("file", "caption", "start", "end")


@dataclasses.dataclass(frozen=True)
class Row:
    """One captioned film, or part of one."""

    where: str  # names the row in messages
    file: str  # path inside the folder, with "/"
    caption: str
    start: float = 0.0  # seconds
    end: float | None = None  # None: to the film's end


def rows(root: Path, curated_too: bool = True) -> list[Row]:
    """The captioned films of a folder. Every film needs a caption, and every caption a film.

    A table whose rows all have `measures` was written by tools/curate.py: it may omit films, and
    the text files of its captions may remain. `curated_too=False` ignores such a table and reads
    the text files.
    """
    shown = one_line(str(root))
    clips, texts = _files(root)
    if not clips:
        raise UserError(f"{shown}: no clips in this folder ({', '.join(SUFFIXES)})")
    tables = [name for name in TABLES if (root / name).is_file()]
    if len(tables) > 1:
        raise UserError(f"{shown}: captions in {' and '.join(tables)}; one of them is allowed")
    if not tables:
        return [_beside(root, name) for name in clips]
    table, where = root / tables[0], f"{shown}/{tables[0]}"
    lines = list((_jsonl if table.suffix == ".jsonl" else _csv)(table))
    curated = bool(lines) and all("measures" in fields for _, fields in lines)
    if curated and not curated_too:
        return [_beside(root, name) for name in clips]
    beside = [name for name in clips if _text_name(name) in texts]
    if beside and not curated:
        raise UserError(
            f"{shown}: captions in {table.name} and in {_text_name(beside[0])}; one is allowed"
        )
    known = set(clips)
    seen: dict[tuple[str, float, float | None], Row] = {}
    for line, fields in lines:
        row = _row(f"{where} line {line}", fields, known)
        key = (row.file, row.start, row.end)
        if key in seen:
            before = seen[key].where.rsplit("line ")[-1]
            raise UserError(f"{row.where}: {row.file} again, as in line {before}")
        seen[key] = row
    missing = sorted(known - {file for file, _, _ in seen})
    if missing and not curated:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where}: no row for {missing[0]}{more}")
    return list(seen.values())


def _files(root: Path) -> tuple[list[str], set[str]]:
    """Sorted paths of the clips in the folder, and those of the text files; not hidden ones."""
    if not root.is_dir():
        raise UserError(f"{one_line(str(root))}: not a folder")

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {one_line(str(error.filename))}: {error.strerror}")

    clips, texts = [], set()
    for folder, inner, files in os.walk(root, onerror=fail):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            inside = Path(folder, name).relative_to(root).as_posix()
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix == ".txt":
                texts.add(inside)
            if suffix not in SUFFIXES:
                continue
            # Such a name does not fit on one line, or is not UTF-8.
            if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in inside):
                raise UserError(
                    f"{one_line(str(root))}: the file name {ascii(inside)} has a line break, "
                    "a control character or bytes that are not UTF-8; rename it"
                )
            clips.append(inside)
    return sorted(clips), texts


def _text_name(clip: str) -> str:
    return os.path.splitext(clip)[0] + ".txt"


def _beside(root: Path, clip: str) -> Row:
    """A film with the text file beside it."""
    path = root / _text_name(clip)
    if not path.is_file():
        raise UserError(
            f"{one_line(str(root / clip))}: no caption; write {path.name} beside it, or a row in "
            f"{' or '.join(TABLES)}"
        )
    return Row(clip, clip, checked_caption(one_line(str(path)), _text(path)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{one_line(str(path))}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"cannot read {one_line(str(path))}: {error.strerror}") from None


def checked_caption(where: str, text: Any) -> str:
    """The caption on one line, its white space folded."""
    if not is_text(text) or not text.strip():
        raise UserError(f"{where}: the caption is empty or no text")
    return " ".join(text.split())


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, fields) of every line that is not blank."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{one_line(str(path))} line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({one_line(str(error))})") from None
        if not isinstance(fields, dict):
            raise UserError(f'{where}: not an object like {{"file": ..., "caption": ...}}')
        yield number, fields


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, fields) of every row under the header; empty cells are left out."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    shown = one_line(str(path))
    try:
        head = list(reader.fieldnames or [])
        if not {"file", "caption"} <= set(head) <= set(COLUMNS) or len(set(head)) < len(head):
            found = one_line(",".join(head), 80)
            raise UserError(f"{shown} line 1: columns {found}; {','.join(COLUMNS)} are allowed")
        for cells in reader:
            if None in cells or None in cells.values():
                raise UserError(f"{shown} line {reader.line_num}: not {len(head)} cells")
            fields: dict[str, Any] = {name: cell for name, cell in cells.items() if cell.strip()}
            for name in {"start", "end"} & set(fields):
                with contextlib.suppress(ValueError):  # `_row` reports it
                    fields[name] = float(fields[name])
            yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(f"{shown} line {reader.line_num}: not CSV ({error})") from None


def _row(where: str, fields: Mapping[str, Any], clips: set[str]) -> Row:
    """A checked row of a table."""
    if unknown := sorted(set(fields) - {*COLUMNS, "measures"}):
        raise UserError(f"{where}: unknown {one_line(unknown[0], 40)!r}; allowed: {COLUMNS}")
    file = fields.get("file")
    if not isinstance(file, str) or not file:
        raise UserError(f"{where}: the file is missing or no text")
    inside = Path(file)
    if inside.is_absolute() or ".." in inside.parts:
        raise UserError(f"{where}: {ascii(file)} is outside of the folder")
    if inside.as_posix() not in clips:
        raise UserError(f"{where}: no clip {ascii(file)} in the folder ({', '.join(SUFFIXES)})")
    for name in ("start", "end"):
        if (value := fields.get(name)) is not None and not is_time(value):
            raise UserError(f"{where}: {name} {one_line(repr(value), 40)} is not a number")
    start, end = float(fields.get("start") or 0), fields.get("end")
    if start < 0 or (end is not None and end <= start):
        raise UserError(f"{where}: start {start:g}, end {end}: 0 <= start < end in seconds")
    caption = checked_caption(where, fields.get("caption"))
    return Row(where, inside.as_posix(), caption, start, None if end is None else float(end))
