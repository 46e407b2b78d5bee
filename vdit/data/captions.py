"""Captions of the films in a folder: captions.jsonl, captions.csv, or a text file beside each film.

A row of a table has a file and its caption. With `start` and `end` (seconds) it is a part of the
film, so one long film can have many captions. The text file of `cat.mp4` is `cat.txt`.

A name in a table may have Windows' separators, and another form of Unicode or other cases than the
file's. The cells of captions.csv may have spaces before them.
"""

import collections
import contextlib
import csv
import dataclasses
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vdit.data.decode import is_text, is_time, one_line
from vdit.errors import UserError
from vdit.runtime.files import read_text

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
TABLES = ("captions.jsonl", "captions.csv")
COLUMNS = ("file", "caption", "start", "end")
Line = tuple[int, dict[str, Any] | UserError]  # its number, and its fields or what is wrong
Lines = list[Line]
Skipped = list[tuple[str, str]]  # (file or row, reason)


@dataclasses.dataclass(frozen=True)
class Row:
    """One captioned film, or part of one."""

    where: str  # names the row in messages
    file: str  # path inside the folder, with "/"
    caption: str
    start: float = 0.0  # seconds
    end: float | None = None  # None: to the film's end


@dataclasses.dataclass
class _Skips:
    """What of a folder is not used, as (name, reason); with `strict` wrong rows are refused."""

    root: str
    strict: bool
    named: Skipped

    @contextlib.contextmanager
    def over(self, name: str) -> Iterator[None]:
        """Skips `name` for a `UserError` that is raised within."""
        try:
            yield
        except UserError as error:
            if self.strict:
                raise
            reason = str(error).removeprefix(f"{self.root}/").removeprefix(f"{name}: ")
            self.named.append((name, reason))


def rows(
    root: Path, curated_too: bool = True, strict: bool = True,
    skipped: Skipped | None = None,
) -> list[Row]:  # fmt: skip
    """The captioned films of a folder.

    With `strict` every film needs a caption, and every caption a film. Else wrong rows and films
    without a caption are appended to `skipped`, as (name, reason), while some remain. So are files
    that are no films.

    A table whose rows all have `measures` was written by tools/curate.py: it may omit films, and
    the text files of its captions may remain. `curated_too=False` ignores such a table and reads
    the text files.
    """
    shown = one_line(str(root))
    skips = _Skips(shown, strict, [] if skipped is None else skipped)
    unused: Skipped = []
    clips, exact = _files(root, skips, unused)
    stems = {os.path.splitext(name)[0] for name in clips}
    texts = {_nfc(stem): text for stem, text in exact.items() if stem not in stems} | exact
    if not clips:
        raise UserError(f"{shown}: no clips in this folder ({', '.join(SUFFIXES)})")
    named = (path.name for path in root.iterdir() if path.is_file())
    tables = sorted((name for name in named if name.lower() in TABLES), reverse=True)
    if len(tables) > 1:
        raise UserError(f"{shown}: captions in {' and '.join(tables)}; one of them is allowed")
    lines: Lines = []
    if tables:
        table = root / tables[0]
        lines = list((_jsonl if table.suffix.lower() == ".jsonl" else _csv)(table))
    measured = ["measures" in fields for _, fields in lines if not isinstance(fields, UserError)]
    curated = bool(measured) and all(measured)
    if not tables or (curated and not curated_too):
        found = _all_beside(root, clips, texts, skips, unused)
    else:
        beside = [text for name in clips if (text := _text_of(name, texts))]
        if beside and not curated:
            text = beside[0]
            raise UserError(f"{shown}: captions in {table.name} and in {text}; one is allowed")
        found = _of_table(f"{shown}/{table.name}", lines, clips, curated, skips)
        unused += [(text, f"captions are in {table.name}") for text in exact.values()]
    if not found:
        name, why = skips.named[0]
        raise UserError(f"{shown}: none of its captions can be used ({name}: {why})")
    skips.named.extend(unused)
    return found


def _of_table(
    where: str, lines: Lines, clips: Sequence[str], curated: bool, skips: _Skips
) -> list[Row]:
    """The rows of a table."""
    find = _finder(clips)
    seen: dict[tuple[str, float, float | None], Row] = {}
    for line, fields in lines:
        with skips.over(f"{where.rsplit('/')[-1]} line {line}"):
            if isinstance(fields, UserError):
                raise fields
            row = _row(f"{where} line {line}", fields, find)
            key = (row.file, row.start, row.end)
            if key in seen:
                before = seen[key].where.rsplit("line ")[-1]
                raise UserError(f"{row.where}: {row.file} again, as in line {before}")
            seen[key] = row
    missing = sorted(set(clips) - {file for file, _, _ in seen})
    if missing and not curated:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 and skips.strict else ""
        for name in missing:
            with skips.over(name):
                raise UserError(f"{where}: no row for {name}{more}")
    return list(seen.values())


def _all_beside(
    root: Path, clips: Sequence[str], texts: Mapping[str, str], skips: _Skips, unused: Skipped
) -> list[Row]:
    """The films with a text file beside them."""
    found = []
    for name in clips:
        with skips.over(name):
            found.append(_beside(root, name, _text_of(name, texts)))
    alone = dict.fromkeys(texts.values()).keys() - {_text_of(name, texts) for name in clips}
    unused += [(text, "no film beside it") for text in sorted(alone)]
    return found


def _text_of(clip: str, texts: Mapping[str, str]) -> str | None:
    """The text file of a film, whose name may be in another form of Unicode."""
    stem = os.path.splitext(clip)[0]
    return texts.get(stem) or texts.get(_nfc(stem))


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _nfc(_nfc(name).casefold())


def _finder(clips: Sequence[str]) -> Callable[[str], str | None]:
    """The path of the film that a table names, also in another spelling if it is one film's."""
    exact = {_nfc(name): name for name in clips} | {name: name for name in clips}
    count = collections.Counter(map(_folded, clips))
    folded = {_folded(name): name for name in clips if count[_folded(name)] == 1}

    def find(file: str) -> str | None:
        names = [file, _nfc(file), _nfc(file.replace("\\", "/"))]
        names = [Path(name).as_posix() for name in names]
        found = [exact.get(name) for name in names] + [folded.get(_folded(name)) for name in names]
        return next(filter(None, found), None)

    return find


def _files(root: Path, skips: _Skips, unused: Skipped) -> tuple[list[str], dict[str, str]]:
    """Sorted paths of the clips in the folder, and those of the text files by their paths without
    the suffix; not hidden ones. Links to folders are followed, in circles not."""
    if not root.is_dir():
        raise UserError(f"{one_line(str(root))}: not a folder")

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {one_line(str(error.filename))}: {error.strerror}")

    clips: list[str] = []
    texts: dict[str, str] = {}
    real = os.path.join(os.path.realpath(root), "")
    linked: set[str] = set()

    def follows(path: Path) -> bool:
        """Whether a folder is to be read: it is none that is read by another name."""
        if path.name.startswith(".") or not path.is_symlink():
            return not path.name.startswith(".")
        target = os.path.join(os.path.realpath(path), "")
        if target.startswith(real) or real.startswith(target) or target in linked:
            name = one_line(path.relative_to(root).as_posix())
            unused.append((name, "a link to a folder that is read already"))
            return False
        linked.add(target)
        return True

    for folder, inner, files in os.walk(root, onerror=fail, followlinks=True):
        inner[:] = [name for name in sorted(inner) if follows(Path(folder, name))]
        for name in sorted(files):
            inside = Path(folder, name).relative_to(root).as_posix()
            stem, suffix = os.path.splitext(inside)
            if name.startswith(".") or inside.lower() in TABLES:
                continue
            if suffix.lower() == ".txt":
                texts[stem] = inside if suffix == ".txt" else texts.get(stem, inside)
            elif suffix.lower() not in SUFFIXES:
                unused.append((one_line(inside), f"not a film ({', '.join(SUFFIXES)})"))
            # Such a name does not fit on one line, or is not UTF-8.
            elif any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in inside):
                with skips.over(ascii(inside)):
                    raise UserError(
                        f"{one_line(str(root))}: the file name {ascii(inside)} has a line break, "
                        "a control character or bytes that are not UTF-8; rename it"
                    )
            else:
                clips.append(inside)
    return sorted(clips), texts


def _beside(root: Path, clip: str, text: str | None) -> Row:
    """A film with the text file beside it."""
    if text is None or not (root / text).is_file():
        raise UserError(
            f"{one_line(str(root / clip))}: no caption; write {Path(clip).stem}.txt beside it, or a"
            f" row in {' or '.join(TABLES)}"
        )
    path = root / text
    return Row(clip, clip, checked_caption(one_line(str(path)), _text(path)))


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise UserError(f"cannot read {one_line(str(path))}: {error.strerror}") from None


def checked_caption(where: str, text: Any) -> str:
    """The caption on one line, its white space folded."""
    if not is_text(text) or not text.strip():
        raise UserError(f"{where}: the caption is empty or no text")
    return " ".join(text.split())


def _jsonl(path: Path) -> Iterator[Line]:
    """(line, fields) of every line that is not blank."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{one_line(str(path))} line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            fields = UserError(f"{where}: not JSON ({one_line(str(error))})")
        if not isinstance(fields, dict | UserError):
            fields = UserError(f'{where}: not an object like {{"file": ..., "caption": ...}}')
        yield number, fields


def _csv(path: Path) -> Iterator[Line]:
    """(line, fields) of every row under the header; empty cells are left out."""
    text = io.StringIO(_text(path), newline="")
    reader = csv.DictReader(text, strict=True, skipinitialspace=True)
    shown = one_line(str(path))
    try:
        head = list(reader.fieldnames or [])
    except csv.Error as error:
        raise UserError(f"{shown} line 1: not CSV ({error})") from None
    if not {"file", "caption"} <= set(head) <= set(COLUMNS) or len(set(head)) < len(head):
        found = one_line(",".join(head), 80)
        raise UserError(f"{shown} line 1: columns {found}; {','.join(COLUMNS)} are allowed")
    while True:
        begin = reader.reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the next row begins on the next line
            yield begin, UserError(f"{shown} line {begin}: not CSV ({error})")
            continue
        if None in cells or None in cells.values():
            wrong = UserError(f"{shown} line {reader.line_num}: not {len(head)} cells")
            yield reader.line_num, wrong
            continue
        fields: dict[str, Any] = {name: cell for name, cell in cells.items() if cell.strip()}
        for name in {"start", "end"} & set(fields):
            with contextlib.suppress(ValueError):  # `_row` reports it
                fields[name] = float(fields[name])
        yield reader.line_num, fields


def _row(where: str, fields: Mapping[str, Any], find: Callable[[str], str | None]) -> Row:
    """A checked row of a table."""
    if unknown := sorted(set(fields) - {*COLUMNS, "measures"}):
        raise UserError(f"{where}: unknown {one_line(unknown[0], 40)!r}; allowed: {COLUMNS}")
    file = fields.get("file")
    if not isinstance(file, str) or not file:
        raise UserError(f"{where}: the file is missing or no text")
    inside = Path(file)
    if inside.is_absolute() or ".." in inside.parts:
        raise UserError(f"{where}: {ascii(file)} is outside of the folder")
    if (clip := find(file)) is None:
        raise UserError(f"{where}: no clip {ascii(file)} in the folder ({', '.join(SUFFIXES)})")
    for name in ("start", "end"):
        if (value := fields.get(name)) is not None and not is_time(value):
            raise UserError(f"{where}: {name} {one_line(repr(value), 40)} is not a number")
    start, end = float(fields.get("start") or 0), fields.get("end")
    if start < 0 or (end is not None and end <= start):
        raise UserError(f"{where}: start {start:g}, end {end}: 0 <= start < end in seconds")
    caption = checked_caption(where, fields.get("caption"))
    return Row(where, clip, caption, start, None if end is None else float(end))
