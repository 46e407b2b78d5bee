"""`Clips`: the common part of the sources that cut clips from videos, `Folder` and `VideoSet`."""

import hashlib
import json
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from vdit.errors import UserError
from vdit.runtime.files import write_text
from vdit.runtime.progress import say


class Clips:
    """Clips of `frames` frames of `size` (height, width) at `fps`, one every `stride` seconds.

    Frame k of a video is the picture at k / fps seconds. `skipped` lists unusable videos as
    (name, reason). Equal digests mean the same clips in the same order; `pictures` is a digest of
    their videos alone. Neither depends on where the files are and how they are called. `source`
    names the data source in messages. Raises `UserError` for invalid settings.
    """

    name: str
    digest: str
    pictures: str

    def __init__(
        self, source: str, frames: int, size: tuple[int, int], fps: float, stride: float, split: str
    ):
        shown = tuple(size)
        if frames < 1 or len(shown) != 2 or min(shown) < 1:
            raise UserError(f"{source} frames={frames}, size={shown}: whole numbers from 1 on")
        if not 0 < fps <= 1000 or not 0 < stride < math.inf:
            raise UserError(f"{source} fps={fps}, stride={stride} s: over 0, fps at most 1000")
        if split not in ("train", "heldout"):
            raise UserError(f"{source} split={split!r}: train or heldout")
        self.frames, self.size, self.fps, self.split = frames, (size[0], size[1]), fps, split
        self.skipped: list[tuple[str, str]] = []
        self.copies: dict[str, str] = {}  # films that show the same as another
        self._step = max(1, round(stride * fps))

    def _skip_short(self, name: str, frames: int) -> None:
        reason = f"{frames} frames at {self.fps:g} fps: a clip has {self.frames}"
        self.skipped.append((name, reason))

    def _cut(
        self, spans: Mapping[int, tuple[int, int]], content: object, captions: object = None
    ) -> None:
        """Numbers the clips of spans, (first frame, end) by number; `content`, of the videos, and
        the captions are hashed too."""
        clips = [np.arange(a, b - self.frames + 1, self._step) for a, b in spans.values()]
        self._start = np.concatenate(clips)
        self._span = np.repeat(list(spans), [len(starts) for starts in clips])
        parts = (repr(content).encode(), self._start.tobytes(), self._span.tobytes())
        self.pictures = hashlib.sha256(b"".join(parts)).hexdigest()
        self.digest = hashlib.sha256((self.pictures + repr(captions)).encode()).hexdigest()

    def _place(self, index: SupportsIndex) -> tuple[int, int]:
        """Span and first frame of a clip."""
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"clip {number} of {len(self)}")
        return int(self._span[number]), int(self._start[number])

    def _span_name(self, number: int) -> str:
        raise NotImplementedError

    def origin(self, index: SupportsIndex) -> tuple[str, float]:
        """(file or record, second at which it begins) of a clip."""
        span, start = self._place(index)
        return self._span_name(span), start / self.fps

    def __len__(self) -> int:
        return len(self._start)

    def __repr__(self) -> str:  # grain compares it when it restores an iterator
        return f"{type(self).__name__}({self.split}, {self.digest[:16]})"


def held_out(keys: Sequence[str], share: float, seed: int) -> set[int]:
    """Numbers of the keys that are held out: a share, at least one but not all, drawn by `seed`."""
    hashes = [hashlib.sha256(f"{seed} {key}".encode()).digest() for key in keys]
    count = min(len(keys) - 1, max(1, round(share * len(keys))))
    return set(sorted(range(len(keys)), key=hashes.__getitem__)[:count])


def write_skipped(path: str | os.PathLike[str], skipped: Iterable[tuple[str, str]]) -> None:
    """Writes (name, reason) pairs as JSON lines."""
    lines = (json.dumps({"file": name, "reason": why}) for name, why in dict.fromkeys(skipped))
    write_text(path, "".join(line + "\n" for line in lines))


def tell_skipped(clips: Any) -> None:
    """Prints a line about what a source skipped, if anything: files and rows, by their reason; and
    one about copies of films."""
    if copies := getattr(clips, "copies", None):
        (name, first), *more = copies.items()
        others = f", and {len(more)} more are copies" if more else ""
        say(f"data: {name} shows the same as {first}{others}; copies are held out together")
    if skipped := getattr(clips, "skipped", None):
        names: dict[str, list[str]] = {}
        for name, reason in skipped:
            names.setdefault(reason, []).append(name)
        said = [
            f"{some[0]}{f' and {len(some) - 1} more' if len(some) > 1 else ''} ({reason})"
            for reason, some in names.items()
        ]
        more = ", ..." if len(said) > 4 else ""
        say(f"data: {len(skipped)} skipped (see skipped.jsonl): {', '.join(said[:4])}{more}")
