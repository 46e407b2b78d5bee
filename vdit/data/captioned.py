"""`Captioned`: the sources whose clips are cut from captioned films, wherever these are stored."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

from vdit.data.captions import Row, Skipped
from vdit.data.clips import Clips, held_out, write_skipped
from vdit.data.decode import Limits
from vdit.data.films import FORMAT, Film, FilmCache, Films, Progress, copies
from vdit.errors import UserError

Span = tuple[Row, int, int]  # a row, its first frame, and the frame after its last


class Store(Films, Protocol):
    """Films with captions: a folder, tar shards, tables."""

    kind: str  # data.source
    name: str

    def rows(self, strict: bool, skipped: Skipped) -> list[Row]:
        """The captioned films. With `strict` a wrong one is a `UserError`, else it is appended to
        `skipped` as (name, reason), as is what holds no film."""


class Captioned(Clips):
    """Clips of `frames` frames at `fps`, cut from the films of a store: a grain data source.

    Item i is {"video": uint8 (T, H, W, 3), "caption": str}, the same bytes every time. A clip
    starts every `stride` seconds, so clips of a film may overlap. Films are in the order of their
    digests, so other names change nothing, nor does another kind of store. The split "heldout" is a
    share `heldout` of the rows, at least one, drawn by `seed`; "train" is the rest. Rows of one
    film, or of its copies (`films.copies`), that overlap in time stay together, and of a single row
    the end is held out, so no frame is in both splits. `parts`, the `rows` of another source of
    this store, replaces the split: all clips are cut from these.

    `cache` is the folder of decoded films (`FilmCache`). Films that cannot be decoded or are
    shorter than a clip, wrong rows and other files are listed in `skipped` and in the file
    `skipped_path`; with `strict` only films that are too short and files that are no films are, and
    the others are refused. `progress` is called with (seconds decoded, seconds in total).

    Raises `UserError` for a store without usable clips, for captions that do not match the films,
    and for films that need more than `max_bytes` in the cache.
    """

    def __init__(
        self, store: Store, *, cache: str | os.PathLike[str], frames: int = 17,
        size: tuple[int, int] = (32, 32), fps: float = 10.0, stride: float = 1.0,
        split: str = "train", heldout: float = 0.1, seed: int = 0, strict: bool = False,
        parts: Sequence[Row] | None = None, max_bytes: int = 16 * 2**30,
        skipped_path: str | os.PathLike[str] | None = None, limits: Limits | None = None,
        workers: int | None = None, progress: Progress | None = None,
    ):  # fmt: skip
        super().__init__(store.kind, frames, size, fps, stride, split)
        if not 0 <= heldout < 1:
            raise UserError(f"{store.kind} heldout={heldout}: a share from 0 to under 1")
        self.name = store.name
        unused: Skipped = []
        captioned = store.rows(strict, unused) if parts is None else parts
        ends: dict[str, float] = {}  # the last second that any row needs of a film
        for row in captioned:
            ends[row.file] = max(ends.get(row.file, 0), math.inf if row.end is None else row.end)
        decoded = FilmCache(store, Path(cache), self.size, fps)
        films, failed = decoded.decode(ends, max_bytes, limits, workers, progress)
        if failed and strict:
            raise UserError(f"{store.where}/{failed[0][0]}: {failed[0][1]}")
        self.skipped += failed
        spans = self._spans(captioned, films, strict)
        self.skipped += unused
        if skipped_path is not None:
            write_skipped(skipped_path, self.skipped)
        if not spans:
            first = "; ".join(f"{name}: {why}" for name, why in self.skipped[:1])
            raise UserError(f"{store.where}: none of its clips can be used ({first})")
        if parts is None and heldout:
            self.copies = copies({row.file: films[row.file] for row, _, _ in spans}, self.size)
        if parts is None:
            groups = _groups(films, self.copies)
            spans = _split(spans, split, heldout, seed, frames, fps, groups, store.kind)
        if not spans:
            raise UserError(
                f"{store.where}: no clip is left for {split} of {len(captioned)} rows with "
                f"heldout={heldout}"
            )
        self.rows = [row for row, _, _ in spans]
        self._films = [films[row.file] for row in self.rows]
        content = [film.content for film in self._films], self.frames, self.size, fps, FORMAT
        bounds = {number: (first, end) for number, (_, first, end) in enumerate(spans)}
        self._cut(bounds, content, [row.caption for row in self.rows])

    def _spans(self, rows: Sequence[Row], films: Mapping[str, Film], strict: bool) -> list[Span]:
        """The decoded rows at least as long as a clip, by content and time; skips the others."""
        spans = []
        for row in sorted(rows, key=lambda row: (row.file, row.start, row.end or math.inf)):
            if row.file not in films:
                continue
            have = films[row.file].frames
            first = math.ceil(row.start * self.fps - 1e-6)  # start <= k / fps < end
            end = have if row.end is None else math.ceil(row.end * self.fps - 1e-6)
            if first >= have or end > have + 1:  # tolerates an end rounded up by a frame
                reason = (
                    f"{row.start:g} to {'the end' if row.end is None else row.end} s is outside of "
                    f"{row.file}, which is {have / self.fps:g} s long"
                )
                if strict:
                    raise UserError(f"{row.where}: {reason}")
                self.skipped.append((row.where.rsplit("/")[-1], reason))
                continue
            end = min(end, have)
            if end - first >= self.frames:
                spans.append((row, first, end))
            else:
                part = row.start > 0 or row.end is not None
                name = f"{row.file} from {row.start:g} s" if part else row.file
                self._skip_short(name, end - first)
        return sorted(
            spans, key=lambda span: (films[span[0].file].content, *span[1:], span[0].caption)
        )

    def texts(self) -> Iterator[tuple[str, str]]:
        """(where, caption) of each row."""
        return ((row.where, row.caption) for row in self.rows)

    def caption(self, index: SupportsIndex) -> str:
        """The caption of a clip, without its video."""
        return self.rows[self._place(index)[0]].caption

    @property
    def captions(self) -> list[str]:
        """The split's distinct captions, in order."""
        return list(dict.fromkeys(row.caption for row in self.rows))

    def _span_name(self, number: int) -> str:
        return self.rows[number].file

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        number, start = self._place(index)
        video_THW3 = self._films[number].read(start, self.frames, self.size)
        return {"video": video_THW3, "caption": self.rows[number].caption}


def _groups(films: Mapping[str, Film], copies: Mapping[str, str]) -> dict[str, str]:
    """The least digest of a film and its copies, by name."""
    least: dict[str, str] = {}
    for name, film in films.items():
        first = copies.get(name, name)
        least[first] = min(film.content, least.get(first, film.content))
    return {name: least[copies.get(name, name)] for name in films}


def _split(
    spans: Sequence[Span], split: str, heldout: float, seed: int, frames: int, fps: float,
    groups: Mapping[str, str], kind: str,
) -> list[Span]:  # fmt: skip
    """The spans of one split, their rows cut to it. No frame or copy of it is in both splits;
    `groups` has an equal value for copies."""

    def film(span: Span) -> str:
        return groups[span[0].file]

    if not heldout:
        if split == "heldout":
            raise UserError(f"{kind} heldout=0: nothing is held out to make the split of")
        return list(spans)
    # A unit is a set of spans connected by overlap in time.
    units: list[list[Span]] = []
    last = 0
    for span in sorted(spans, key=lambda span: (film(span), span[1])):
        _, first, end = span
        if units and film(units[-1][-1]) == film(span) and first < last:
            units[-1].append(span)
            last = max(last, end)
        else:
            units.append([span])
            last = end
    if len(units) == 1:
        return _split_in_time(units[0], last, split, heldout, frames, fps)
    held = held_out([f"{unit[0][1]} {film(unit[0])}" for unit in units], heldout, seed)
    chosen = [unit for n, unit in enumerate(units) if (n in held) == (split == "heldout")]
    return [span for unit in chosen for span in unit]


def _split_in_time(
    unit: list[Span], last: int, split: str, heldout: float, frames: int, fps: float
) -> list[Span]:
    """One split of a unit that ends at frame `last`: its last part is held out."""
    have = last - unit[0][1]
    tail = max(frames, round(heldout * have))
    if have - tail < frames:
        raise UserError(
            f"{unit[0][0].file}: {have} frames are too few for a clip of {frames} to "
            "train and one to hold out; give more clips, or --config.data.heldout=0 to train on "
            "all of it, and be scored on the same"
        )
    cut, inside = last - tail, []
    for row, first, end in unit:
        if split == "train" and end > cut:
            row, end = dataclasses.replace(row, end=cut / fps), cut
        elif split == "heldout" and first < cut:
            row, first = dataclasses.replace(row, start=cut / fps), cut
        inside.append((row, first, end))
    return [(row, first, end) for row, first, end in inside if end - first >= frames]
