"""Films decoded once into a cache: each a .npy file of uint8 frames at one size and rate.

A clip is then one short read, and damaged films are known before training begins.

Dimension key: T or n frames, H height, W width.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vdit.data.decode import TREATED, DecodeError, Decoder, Limits, is_time
from vdit.errors import UserError
from vdit.runtime.files import atomic_path, read_cache, write_text
from vdit.runtime.progress import say

FORMAT = 2  # changes whenever the same film would be stored differently
DIGESTS = "digests.json"  # in a cache's folder: those of files (`file_digests`)

Progress = Callable[[float, float], None]  # (seconds decoded, seconds in all)


@dataclasses.dataclass(frozen=True)
class Film:
    """A decoded film in the cache."""

    path: Path
    frames: int
    offset: int  # of the first frame's bytes
    content: str  # the digest of the file that it was decoded from

    def read(self, start: int, frames: int, size: tuple[int, int]) -> np.ndarray:
        """Frames from `start` on, uint8 (T, H, W, 3)."""
        shape = (frames, *size, 3)
        try:
            offset = self.offset + start * math.prod(shape[1:])
            data = np.fromfile(self.path, np.uint8, count=math.prod(shape), offset=offset)
            return data.reshape(shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: damaged cache ({error}); delete it and rerun") from None


class Films(Protocol):
    """Where films are stored, each under a name."""

    where: str  # names the whole in messages

    def digests(self, names: Sequence[str], workers: int = 1) -> dict[str, str]:
        """SHA-256 of the bytes of each film, or of its name if it cannot be read."""

    def file(self, name: str) -> AbstractContextManager[Path]:
        """A film as a file, for as long as the context lasts."""


class FilmCache:
    """A cache in `folder` of the films of a store, decoded at `size` (height, width) and `fps`.

    The key of a film is the digest of its bytes and the settings: a film that changes is decoded
    again, one that is moved or renamed is not.
    """

    def __init__(self, store: Films, folder: Path, size: tuple[int, int], fps: float):
        self.store, self.folder, self.size, self.fps = store, folder, size, fps

    def decode(
        self, ends: Mapping[str, float], max_bytes: int, limits: Limits | None = None,
        workers: int | None = None, progress: Progress | None = None,
    ) -> tuple[dict[str, Film], list[tuple[str, str]]]:  # fmt: skip
        """Decodes the films of `ends`, each up to that second; returns those that fail as well.

        Failures are (name, reason). Raises `UserError` if all frames exceed `max_bytes`.
        """
        cores = min(os.cpu_count() or 1, 8)
        digests = self.store.digests(sorted(ends), workers or cores)
        paths = {name: self._path(digest, ends[name]) for name, digest in digests.items()}
        films = {
            name: film for name, path in paths.items() if (film := self._load(path, digests[name]))
        }
        # Names of the same bytes are decoded once.
        first = {path: name for name, path in reversed(paths.items()) if name not in films}
        new = sorted(first.values())
        workers = min(workers or cores, max(1, len(new)))
        failed, lengths, done = dict[str, str](), dict[str, float](), dict[str, float]()
        treated, lock = collections.Counter[str](), threading.Lock()

        def probe(name: str) -> None:
            try:
                with self.store.file(name) as path:
                    info = decoder.probe(path)
                lengths[name] = min(info.seconds, ends[name])
                with lock:
                    treated.update(info.treated.split())
            except DecodeError as error:
                failed[name] = error.reason

        def reached(name: str, second: float) -> None:
            with lock:
                done[name] = max(done.get(name, 0.0), min(second, lengths[name]))
                if progress is not None:
                    total = sum(lengths.values())
                    progress(min(sum(done.values()), total), total)

        def decode(name: str) -> None:
            until = None if ends[name] == math.inf else ends[name]
            try:
                with self.store.file(name) as path:
                    pieces = decoder.stream(
                        path, self.fps, self.size, until, lambda at: reached(name, at)
                    )
                    films[name] = _store(paths[name], pieces, self.size, digests[name])
            except DecodeError as error:
                failed[name] = error.reason
            reached(name, math.inf)

        with Decoder(limits, workers, threads=max(1, cores // workers)) as decoder:
            _each(probe, new, workers, decoder.close)
            _tell(treated, len(new))
            stored = {film.path: film for film in films.values()}
            self._check_room(stored.values(), sum(lengths.values()), max_bytes)
            _each(decode, [name for name in new if name not in failed], workers, decoder.close)
        same = {name: first.get(path, name) for name, path in paths.items()}
        films |= {name: films[x] for name, x in same.items() if x in films}
        failed |= {name: failed[x] for name, x in same.items() if x in failed}
        return films, sorted(failed.items())

    def _path(self, digest: str, end: float) -> Path:
        settings = (self.size, self.fps, None if end == math.inf else end, FORMAT)
        key = hashlib.sha256(repr((digest, settings)).encode()).hexdigest()
        return self.folder / f"{key[:32]}.npy"

    def _load(self, path: Path, digest: str) -> Film | None:
        """A film from the cache; None if it is missing or damaged."""
        try:
            video_THW3 = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None
        if video_THW3.dtype != np.uint8 or video_THW3.shape[1:] != (*self.size, 3):
            return None
        return Film(path, len(video_THW3), video_THW3.offset, digest)

    def _check_room(self, films: Iterable[Film], seconds: float, max_bytes: int) -> None:
        """Refuses more than `max_bytes` for `films` and `seconds` that are still to be decoded."""
        frames = seconds * self.fps + sum(film.frames for film in films)
        need = frames * self.size[0] * self.size[1] * 3
        if need > max_bytes:
            raise UserError(
                f"{self.store.where}: {need / 2**30:.2g} GiB of frames at {self.size[0]}x"
                f"{self.size[1]} and {self.fps:g} fps, over the limit of "
                f"{max_bytes / 2**30:.2g} GiB; lower size or fps, or give fewer films"
            )


def _tell(treated: Mapping[str, int], count: int) -> None:
    """Says once how many of `count` new films needed which treatment."""
    for word, text in TREATED.items():
        if treated[word]:
            say(f"data: {treated[word]} of {count} new films are {text}")


def _store(path: Path, pieces: Iterator[np.ndarray], size: tuple[int, int], digest: str) -> Film:
    """Streams frames into one .npy file."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:

        def head(frames: int) -> int:
            file.seek(0)
            fields = {"descr": "|u1", "fortran_order": False, "shape": (frames, *size, 3)}
            np.lib.format.write_array_header_1_0(file, fields)  # has room for a longer shape
            return file.tell()

        begin, frames = head(0), 0
        for piece_nHW3 in pieces:
            frames += len(piece_nHW3)
            file.write(piece_nHW3.data)
        if head(frames) != begin:
            raise AssertionError("the .npy header grew")
    return Film(path, frames, begin, digest)


def file_status(path: Path) -> tuple[str, int, int, int]:
    """Real path, size, and times of a file's last changes."""
    try:
        status = os.stat(path)
    except OSError:  # the decoder reports it
        return os.path.realpath(path), 0, 0, 0
    return os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def file_digests(
    root: Path, names: Sequence[str], remembered: Path, workers: int = 1
) -> dict[str, str]:
    """SHA-256 of the bytes of each file, or of its name if it cannot be read.

    The file `remembered` caches them by path, size and times.
    """
    known, keys = read_cache(remembered), {name: repr(file_status(root / name)) for name in names}
    found: dict[str, str] = {key: known[key] for key in keys.values() if key in known}

    def work(name: str) -> None:
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.stat(root / name).st_mode):  # a pipe would be waited for
                with (root / name).open("rb") as file:
                    found[keys[name]] = hashlib.file_digest(file, "sha256").hexdigest()

    _each(work, [name for name in names if keys[name] not in found], workers)
    if not found.items() <= known.items():
        write_text(remembered, json.dumps(known | found))
    return {name: str(found.get(key, f"no file {name}")) for name, key in keys.items()}


def _each(
    work: Callable[[str], None], names: Sequence[str], workers: int,
    stop: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Runs `work` on every name in threads; the first error, or Ctrl-C, cancels the rest."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(work, name) for name in names]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise


def copies(films: Mapping[str, Film], size: tuple[int, int]) -> dict[str, str]:
    """The first, by name, of the films that show the same, for each other one: near-duplicates.

    These have as many frames, give or take one, and eight of them, averaged to 8x8, differ by less
    than 6 levels, and 30 in the worst hundredth: a film that is encoded again, in another size or
    container, but not a part of it.
    """
    names = sorted(films)
    if not names:
        return {}
    frames = np.array([films[name].frames for name in names])
    prints = np.stack([_print(films[name], size) for name in names])
    # Averages differ by no more than what they are averages of: most pairs need no look at more.
    coarse = prints.reshape(len(names), 8, -1, 3).mean(2).reshape(len(names), -1)
    means = coarse.mean(1)
    order = np.argsort(means, kind="stable")
    first, rising = np.arange(len(names)), means[order]
    for at, number in enumerate(order):
        near = order[at + 1 : np.searchsorted(rising, means[number] + 6, "right")]
        near = near[np.abs(frames[near] - frames[number]) <= 1]
        for values in (coarse, prints):
            near = near[np.abs(values[near] - values[number]).mean(1) < 6]
        worst = np.sort(np.abs(prints[near] - prints[number]), axis=1)
        same = near[worst[:, -1 - worst.shape[1] // 100] < 30]
        groups = np.unique(first[[number, *same]])
        first[np.isin(first, groups)] = groups[0]
    return {names[i]: names[k] for i, k in enumerate(first) if i != k}


def _print(film: Film, size: tuple[int, int]) -> np.ndarray:
    """Eight frames of a film, averaged to 8x8: float32 (8 * 8 * 8 * 3,)."""
    shown = []
    for place in range(8):
        frame_HW3 = film.read((film.frames - 1) * place // 7, 1, size)[0].astype(np.float32)
        for axis, length in enumerate(size):
            starts = np.arange(min(8, length)) * length // min(8, length)
            counts = np.diff([*starts, length])
            shape = [-1 if k == axis else 1 for k in range(3)]
            frame_HW3 = np.add.reduceat(frame_HW3, starts, axis) / counts.reshape(shape)
        shown.append(frame_HW3.ravel())
    return np.concatenate(shown)


def fitting(
    store: Films, files: Iterable[str], sizes: Sequence[tuple[int, int]], remembered: Path
) -> dict[str, set[int]]:
    """Indices of the sizes (height, width) that suit each film's aspect ratio.

    These crop least of its picture, within 5% of it (see `media.fit`). The file `remembered` caches
    the films' aspects.
    """
    known, found = read_cache(remembered), {}
    with Decoder() as decoder:
        for name, key in store.digests(sorted(set(files))).items():
            aspect: Any = known.get(key)
            if not is_time(aspect) or aspect <= 0:
                with store.file(name) as path:
                    info = decoder.probe(path)
                aspect = info.height / info.width
            known[key] = aspect
            ratios = [height / width / aspect for height, width in sizes]
            shown = [min(ratio, 1 / ratio) for ratio in ratios]
            found[name] = {i for i, share in enumerate(shown) if share >= max(shown) - 0.05}
    write_text(remembered, json.dumps(known))
    return found
