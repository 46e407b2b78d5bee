"""`Folder`: real video as a random-access source for grain: a folder of clips with captions.

Captions come from one table in the folder, captions.jsonl or captions.csv, or else from a text
file beside every clip (`cat.mp4`, `cat.txt`). A table's row names a file and its caption, and
with `start` and `end` (seconds) a part of it, so that one long film can have many captions.

Every film is decoded once, as a whole, at construction, into a file of the cache (uint8 frames at
the wanted size and rate), so a damaged one is found and named before training begins, the order
never changes afterwards, and a clip is one short read.

Dimension key: T frames, H height, W width.
"""

import csv
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import math
import operator
import os
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from vdit.data.decode import DecodeError, Decoder, Limits, is_text, is_time, one_line
from vdit.errors import UserError
from vdit.runtime.files import atomic_path, write_text

SUFFIXES = (".gif", ".mkv", ".mov", ".mp4", ".webm")
TABLES = ("captions.jsonl", "captions.csv")
COLUMNS = ("file", "caption", "start", "end")
CACHE_FORMAT = 1  # another number when the same film would be stored otherwise


@dataclasses.dataclass(frozen=True)
class Row:
    """One captioned film, or part of one."""

    where: str  # names the row in messages
    file: str  # path inside the folder, with "/"
    caption: str
    start: float = 0.0  # seconds
    end: float | None = None  # None: to the film's end


@dataclasses.dataclass(frozen=True)
class _Film:
    """A decoded film in the cache."""

    path: Path
    frames: int
    offset: int  # of the first frame's bytes


class Folder:
    """Clips of `frames` frames at `fps`, cut from the films of a folder: a grain data source.

    Item i is {"video": uint8 (T, H, W, 3), "caption": str}, the same bytes every time. Clips begin
    every `stride` seconds (so a long film gives many, which may overlap). The share `heldout` of
    the rows, at least one, chosen by `seed`, is the split "heldout", the rest is "train"; rows of
    one film that overlap in time stay together, and of a single row the end is held out. So no
    frame is in both splits. With `parts`, the `rows` of another source of this folder, it is cut
    from all of these instead, and so has that one's split, whatever its clips' own length is.

    `cache` is a folder for the decoded films (their size and what is asked of them makes the name:
    a film that changes is decoded anew). Films that cannot be decoded, or are shorter than a clip,
    are left out and listed in `skipped` as (name, reason), and in the file `skipped_path`, one JSON
    object a line. `progress` is called with (seconds decoded, seconds in all). `digest` tells
    whether two sources hold the same clips in the same order.

    Raises `UserError`, in one line, for a folder without usable clips, captions that do not fit
    the films one to one, and films that need more than `max_bytes` in the cache.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        cache: str | os.PathLike[str],
        frames: int = 17,
        size: tuple[int, int] = (32, 32),
        fps: float = 10.0,
        stride: float = 1.0,
        split: str = "train",
        heldout: float = 0.1,
        seed: int = 0,
        parts: Sequence[Row] | None = None,
        max_bytes: int = 16 * 2**30,
        skipped_path: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        workers: int | None = None,
        progress: Callable[[float, float], None] | None = None,
    ):
        _check(frames, size, fps, stride, split, heldout)
        self.frames, self.size, self.fps, self.split = frames, (size[0], size[1]), fps, split
        self.skipped: list[tuple[str, str]] = []
        if not os.fspath(path):
            raise UserError("no folder of clips is given: its path is empty")
        root = Path(path)
        captioned = rows(root) if parts is None else parts
        films = self._decode(root, captioned, Path(cache), max_bytes, limits, workers, progress)
        spans = self._spans(root, captioned, films)
        if skipped_path is not None:
            write_skipped(skipped_path, self.skipped)
        if not spans:
            first = "; ".join(f"{name}: {why}" for name, why in self.skipped[:1])
            raise UserError(f"{one_line(str(root))}: none of its clips can be used ({first})")
        if parts is None:
            spans = _split(spans, split, heldout, seed, frames, fps)
        if not spans:
            raise UserError(
                f"{one_line(str(root))}: no clip is left for {split} of {len(captioned)} rows with "
                f"heldout={heldout}"
            )
        self._index(root, films, spans, stride)

    def _decode(
        self,
        root: Path,
        rows: Sequence[Row],
        cache: Path,
        max_bytes: int,
        limits: Limits | None,
        workers: int | None,
        progress: Callable[[float, float], None] | None,
    ) -> dict[str, _Film]:
        """Puts every film into the cache; notes those that fail in `skipped`."""
        ends: dict[str, float] = {}  # the second after which no row wants more of a film
        for row in rows:
            ends[row.file] = max(ends.get(row.file, 0), math.inf if row.end is None else row.end)
        names = sorted(ends)
        untils = {name: None if end == math.inf else end for name, end in ends.items()}
        paths = {name: cache / f"{self._key(root / name, untils[name])}.npy" for name in names}
        films = {name: _film(path, self.size) for name, path in paths.items()}
        new = [name for name in names if films[name] is None]
        cores = min(os.cpu_count() or 1, 8)
        workers = min(workers or cores, max(1, len(new)))
        threads = max(1, cores // workers)
        frame_bytes = self.size[0] * self.size[1] * 3
        bad: dict[str, str] = {}
        lengths: dict[str, float] = {}
        done: dict[str, float] = {}
        lock, sofar = threading.Lock(), 0.0

        def probe(name: str) -> None:
            try:
                lengths[name] = min(decoder.probe(root / name).seconds, ends[name])
            except DecodeError as error:
                bad[name] = error.reason

        def alive(name: str, second: float) -> None:
            nonlocal sofar
            with lock:
                before = done.get(name, 0.0)
                done[name] = max(before, min(second, lengths[name]))
                sofar += done[name] - before
                if progress is not None and (done[name] > before or second == math.inf):
                    progress(min(sofar, total), total)

        def decode(name: str) -> None:
            try:
                pieces = decoder.stream(
                    root / name,
                    self.fps,
                    self.size,
                    until=untils[name],
                    alive=lambda second: alive(name, second),
                )
                films[name] = _store(paths[name], pieces, self.size)
            except DecodeError as error:
                bad[name] = error.reason
            alive(name, math.inf)

        with Decoder(limits, workers, threads) as decoder:
            _each(probe, new, workers, decoder)
            total = sum(lengths.values())
            need = total * self.fps * frame_bytes
            need += sum(film.frames * frame_bytes for film in films.values() if film)
            if need > max_bytes:
                raise UserError(
                    f"{one_line(str(root))}: {need / 2**30:.2g} GiB of frames at {self.size[0]}x"
                    f"{self.size[1]} and {self.fps:g} fps, over the limit of "
                    f"{max_bytes / 2**30:.2g} GiB; lower size or fps, or give fewer films"
                )
            _each(decode, [name for name in new if name not in bad], workers, decoder)
        self.skipped += sorted(bad.items())
        return {name: film for name, film in films.items() if film is not None}

    def _key(self, path: Path, until: float | None) -> str:
        """Names a decoded film by the file as it is now and by what is asked of it."""
        asked = (self.size, self.fps, until, CACHE_FORMAT, importlib.metadata.version("av"))
        return hashlib.sha256(repr((_file(path), asked)).encode()).hexdigest()[:32]

    def _spans(
        self, root: Path, rows: Sequence[Row], films: Mapping[str, _Film]
    ) -> list[tuple[Row, int, int]]:
        """(row, first frame, frame after the last) of every row that holds a clip, in order."""
        spans = []
        for row in sorted(rows, key=lambda row: (row.file, row.start, row.end or math.inf)):
            if row.file not in films:
                continue
            have = films[row.file].frames
            first = math.ceil(row.start * self.fps - 1e-6)  # start <= k / fps < end
            last = have if row.end is None else math.ceil(row.end * self.fps - 1e-6)
            if first >= have or last > have + 1:  # a frame of grace for a rounded end
                raise UserError(
                    f"{row.where}: {row.start:g} to {'the end' if row.end is None else row.end} s "
                    f"is outside of {row.file}, which is {have / self.fps:g} s long"
                )
            last = min(last, have)
            if last - first >= self.frames:
                spans.append((row, first, last))
            else:
                part = row.start > 0 or row.end is not None
                name = f"{row.file} from {row.start:g} s" if part else row.file
                reason = f"{last - first} frames at {self.fps:g} fps: a clip has {self.frames}"
                self.skipped.append((name, reason))
        return spans

    def _index(
        self,
        root: Path,
        films: Mapping[str, _Film],
        spans: Sequence[tuple[Row, int, int]],
        stride: float,
    ) -> None:
        self.rows = [row for row, _, _ in spans]
        self._films = [films[row.file] for row, _, _ in spans]
        step = max(1, round(stride * self.fps))
        starts = [np.arange(first, last - self.frames + 1, step) for _, first, last in spans]
        self._start = np.concatenate(starts)
        self._row = np.repeat(np.arange(len(spans)), [len(s) for s in starts])
        told = [(row.file, row.caption, str(film.path.name)) for row, film in self._with_films()]
        parts = (repr((told, self.frames)).encode(), self._start.tobytes(), self._row.tobytes())
        self.digest = hashlib.sha256(b"".join(parts)).hexdigest()
        self._name = f"Folder({root.name!r}, {self.split}, {self.digest[:16]})"

    def _with_films(self) -> Iterator[tuple[Row, _Film]]:
        return zip(self.rows, self._films, strict=True)

    @property
    def captions(self) -> list[str]:
        """The split's different captions, in order."""
        return list(dict.fromkeys(row.caption for row in self.rows))

    def origin(self, index: SupportsIndex) -> tuple[str, float]:
        """(file, second at which it begins) of a clip."""
        index = self._checked(index)
        return self.rows[self._row[index]].file, float(self._start[index] / self.fps)

    def __len__(self) -> int:
        return len(self._start)

    def __repr__(self) -> str:
        return self._name  # grain compares it when it restores an iterator

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = self._checked(index)
        row = self._row[index]
        film = self._films[row]
        height, width = self.size
        frame_bytes = height * width * 3
        try:
            data = np.fromfile(
                film.path,
                np.uint8,
                count=self.frames * frame_bytes,
                offset=film.offset + int(self._start[index]) * frame_bytes,
            )
            video_THW3 = data.reshape(self.frames, height, width, 3)
        except (OSError, ValueError) as error:
            raise UserError(f"{film.path}: damaged cache ({error}); delete it and rerun") from None
        return {"video": video_THW3, "caption": self.rows[row].caption}

    def _checked(self, index: SupportsIndex) -> int:
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"clip {number} of {len(self)}")
        return number


def write_skipped(
    path: str | os.PathLike[str], skipped: Iterable[tuple[str, str]]
) -> None:
    """What was left out, (name, reason) each, as one JSON object a line."""
    lines = (json.dumps({"file": name, "reason": why}) for name, why in dict.fromkeys(skipped))
    write_text(path, "".join(line + "\n" for line in lines))


def _check(
    frames: int, size: Sequence[int], fps: float, stride: float, split: str, heldout: float
) -> None:
    if frames < 1 or len(size) != 2 or min(size) < 1:
        raise UserError(f"folder frames={frames}, size={tuple(size)}: whole numbers from 1 on")
    if not 0 < fps <= 1000 or not 0 < stride < math.inf:
        raise UserError(f"folder fps={fps}, stride={stride} s: over 0, fps at most 1000")
    if split not in ("train", "heldout"):
        raise UserError(f"folder split={split!r}: train or heldout")
    if not 0 <= heldout < 1:
        raise UserError(f"folder heldout={heldout}: a share from 0 to under 1")


# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------


def rows(root: Path, curated_too: bool = True) -> list[Row]:
    """The captioned films of a folder; every film has a caption and every caption a film.

    In a table whose rows all have `measures`, made by tools/curate.py, films may be left out, and
    the texts that its captions came from may stay beside the clips. Without `curated_too` such a
    table is not read, but the texts.
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
    read = _jsonl if tables[0].endswith(".jsonl") else _csv
    lines = list(read(root / tables[0]))
    curated = bool(lines) and all("measures" in fields for _, fields in lines)
    if curated and not curated_too:
        return [_beside(root, name) for name in clips]
    beside = [name for name in clips if _text_name(name) in texts]
    if beside and not curated:
        raise UserError(
            f"{shown}: captions in {tables[0]} and in {_text_name(beside[0])}; one is allowed"
        )
    known = set(clips)
    found = [_row(f"{shown}/{tables[0]} line {line}", fields, known) for line, fields in lines]
    seen: dict[tuple[str, float, float | None], str] = {}
    for row in found:
        key = (row.file, row.start, row.end)
        if key in seen:
            before = seen[key].rsplit("line ")[-1]
            raise UserError(f"{row.where}: {row.file} again, as in line {before}")
        seen[key] = row.where
    missing = sorted(known - {row.file for row in found})
    if missing and not curated:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{shown}/{tables[0]}: no row for {missing[0]}{more}")
    return found


def _files(root: Path) -> tuple[list[str], set[str]]:
    """The clips, and the text files, as sorted paths inside the folder; hidden ones left out."""
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
            if suffix in SUFFIXES:
                # Such a name cannot be written on one line, or not in UTF-8.
                if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in inside):
                    raise UserError(
                        f"{one_line(str(root))}: the file name {ascii(inside)} has a line break, "
                        "a control character or bytes that are not UTF-8; rename it"
                    )
                clips.append(inside)
            elif suffix == ".txt":
                texts.add(inside)
    return sorted(clips), texts


def _text_name(clip: str) -> str:
    return os.path.splitext(clip)[0] + ".txt"


def _beside(root: Path, clip: str) -> Row:
    path = root / _text_name(clip)
    if not path.is_file():
        raise UserError(
            f"{one_line(str(root / clip))}: no caption; write {path.name} beside it, or a row in "
            f"{' or '.join(TABLES)}"
        )
    return Row(clip, clip, _caption(one_line(str(path)), _text(path)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{one_line(str(path))}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"cannot read {one_line(str(path))}: {error.strerror}") from None


def _caption(where: str, text: Any) -> str:
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
    """(line, fields) of every row under the head; empty cells are left out."""
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
                try:
                    fields[name] = float(fields[name])
                except ValueError:
                    pass  # `_row` says what is wrong
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
    start, end = fields.get("start"), fields.get("end")
    for name, value in (("start", start), ("end", end)):
        if value is not None and not is_time(value):
            raise UserError(f"{where}: {name} {one_line(repr(value), 40)} is not a number")
    start = 0.0 if start is None else float(start)
    if start < 0 or (end is not None and end <= start):
        raise UserError(f"{where}: start {start:g}, end {end}: 0 <= start < end in seconds")
    caption = _caption(where, fields.get("caption"))
    return Row(where, inside.as_posix(), caption, start, None if end is None else float(end))


# ---------------------------------------------------------------------------------------------
# Films in the cache, and the split
# ---------------------------------------------------------------------------------------------


def _store(path: Path, pieces: Iterator[np.ndarray], size: tuple[int, int]) -> _Film:
    """Writes frames as one .npy file while they come."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:

        def head(frames: int) -> int:
            file.seek(0)
            fields = {"descr": "|u1", "fortran_order": False, "shape": (frames, *size, 3)}
            np.lib.format.write_array_header_1_0(file, fields)  # leaves room for a longer number
            return file.tell()

        begin, frames = head(0), 0
        for piece_nHW3 in pieces:
            frames += len(piece_nHW3)
            file.write(piece_nHW3.data)
        if head(frames) != begin:
            raise AssertionError("the .npy head grew")
    return _Film(path, frames, begin)


def _file(path: Path) -> tuple[str, int, int]:
    """A file as it is now: where, how long, and from when."""
    try:
        status = os.stat(path)
    except OSError:  # the decoder will say it
        return os.path.realpath(path), 0, 0
    return os.path.realpath(path), status.st_size, status.st_mtime_ns


def _film(path: Path, size: tuple[int, int]) -> _Film | None:
    """A film that is in the cache whole; else None."""
    try:
        video_THW3 = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    if video_THW3.dtype != np.uint8 or video_THW3.shape[1:] != (*size, 3):
        return None
    return _Film(path, len(video_THW3), video_THW3.offset)


def _each(
    work: Callable[[str], None], names: Sequence[str], workers: int, decoder: Decoder
) -> None:
    """Runs `work` on every name in threads; the first error, or Ctrl-C, ends the others."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(work, name) for name in names]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            decoder.close()
            raise


def fitting(
    root: Path, files: Iterable[str], sizes: Sequence[tuple[int, int]], remembered: Path
) -> dict[str, set[int]]:
    """Which of the sizes (height, width) each film is shown at: those that its aspect suits best.

    Of a film's picture such a size shows as much as any does, or less by a twentieth at most (see
    `media.fit`). What films measure is kept in the file `remembered`.
    """
    try:
        known = dict(json.loads(remembered.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        known = {}
    aspects, found = {}, {}
    with Decoder() as decoder:
        for name in sorted(set(files)):
            key = repr(_file(root / name))
            aspect: Any = known.get(key)
            if not is_time(aspect) or aspect <= 0:
                info = decoder.probe(root / name)
                aspect = info.height / info.width
            aspects[key] = aspect
            ratios = [height / width / aspect for height, width in sizes]
            shown = [min(ratio, 1 / ratio) for ratio in ratios]
            found[name] = {i for i, share in enumerate(shown) if share >= max(shown) - 0.05}
    write_text(remembered, json.dumps(aspects))
    return found


def _split(
    spans: Sequence[tuple[Row, int, int]],
    split: str,
    heldout: float,
    seed: int,
    frames: int,
    fps: float,
) -> list[tuple[Row, int, int]]:
    """The spans of one split, and their rows as they are cut for it. No frame is in both."""
    if not heldout:
        if split == "heldout":
            raise UserError("folder heldout=0: nothing is held out to make the split of")
        return list(spans)
    # Units: spans that overlap in time, directly or through others, stay together.
    units: list[list[tuple[Row, int, int]]] = []
    end = 0
    for row, first, last in spans:  # in order of file and start
        if units and units[-1][-1][0].file == row.file and first < end:
            units[-1].append((row, first, last))
            end = max(end, last)
        else:
            units.append([(row, first, last)])
            end = last
    if len(units) == 1:
        first, have = units[0][0][1], end - units[0][0][1]
        tail = max(frames, round(heldout * have))
        if have - tail < frames:
            raise UserError(
                f"{units[0][0][0].file}: {have} frames are too few for a clip of {frames} to "
                "train and one to hold out; give more clips, or heldout=0"
            )
        cut = first + have - tail
        inside = []
        for row, a, b in units[0]:
            if split == "train" and b > cut:
                row, b = dataclasses.replace(row, end=cut / fps), cut
            elif split == "heldout" and a < cut:
                row, a = dataclasses.replace(row, start=cut / fps), cut
            inside.append((row, a, b))
        return [(row, a, b) for row, a, b in inside if b - a >= frames]

    def rank(unit: list[tuple[Row, int, int]]) -> bytes:
        row, first, _ = unit[0]
        return hashlib.sha256(f"{seed} {first} {row.file}".encode()).digest()

    count = min(len(units) - 1, max(1, round(heldout * len(units))))
    held = {id(unit) for unit in sorted(units, key=rank)[:count]}
    return [span for unit in units if (id(unit) in held) == (split == "heldout") for span in unit]
