"""Decoding of untrusted media in worker processes, which may crash, hang or run out of memory.

A malformed file can bring down its decoder, so the program never decodes one itself: `Decoder`
keeps worker processes (new Pythons, never forks, without jax) that answer over a socket, and
replaces those that die or fall silent. A reply is a JSON head and raw pixels, so a worker that a
hostile file has taken over can send nothing but pixels.

The workers' side, and how files are read, is `vdit/data/media.py`.

Dimension key: n frames, H height, W width.
"""

import contextlib
import dataclasses
import json
import math
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from vdit.errors import UserError

CHUNK = 64  # most frames in a reply
CHUNK_BYTES = 1 << 24  # most bytes of pixels in a reply of several frames
HEARTBEAT = 0.25  # seconds after which a worker reports even without a frame to send
HEAD_LIMIT = 1 << 16  # bytes of a reply's JSON head

# What is done to films whose pictures are not plain SDR frames.
TREATED = {
    "hdr": "HDR, tone-mapped",
    "wide": "of a wide gamut, mapped to BT.709",
    "untagged": "of HD size without a colour matrix, read by BT.709",
    "interlaced": "interlaced, deinterlaced",
}

AnyPath = str | os.PathLike[str]
Reply = tuple[dict[str, Any], bytearray]  # the head, and pixels


class DecodeError(UserError):
    """A media file that cannot be used: `path`, and `reason` in one line."""

    def __init__(self, path: AnyPath, reason: str):
        self.path, self.reason = os.fspath(path), reason
        super().__init__(f"{one_line(self.path)}: {reason}")

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (self.path, self.reason)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits over which a file is refused. The defaults admit any ordinary film."""

    pixels: int = 2**26  # of one decoded frame (8192 x 8192)
    frames: int = 2**20  # decoded, and returned (12 hours at 24 frames/s)
    bytes: int = 2**36  # of the file
    memory: int = 3 * 2**30  # address space of a worker, bytes (where the system enforces it)
    silence: float = 30.0  # seconds without a sign of life after which a worker is killed
    seconds: float = 4 * 3600.0  # for one request

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(f"limit {field.name}={getattr(self, field.name)}: must be over 0")


@dataclasses.dataclass(frozen=True)
class Info:
    """Properties of a media file, from its packets rather than its header."""

    frames: int
    fps: float  # mean rate; 0 for a still image
    width: int  # upright, with square pixels
    height: int
    seconds: float  # from the first frame's start to the last one's end; 0 for a still image
    rotation: int  # degrees counter-clockwise, already applied
    treated: str = ""  # names of TREATED


def one_line(text: str, limit: int = 300) -> str:
    """Text with control characters escaped, truncated to `limit` characters."""
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


def said(error: BaseException) -> str:
    """An exception's message, on one line."""
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return one_line(" ".join(text.split()), 200)


def is_time(value: Any) -> bool:
    """Whether a value of a table is a finite number of seconds."""
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def is_text(value: Any) -> bool:
    """Whether a value of a table is text that can be encoded: no lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def read_clip(
    path: AnyPath, fps: float, size: tuple[int, int] | None, frames: int
) -> tuple[np.ndarray, str]:
    """The first `frames` frames, or fewer, at `fps`, uint8 (T, H, W, 3) of `size` (None: of the
    file's); and a summary.

    Raises `DecodeError`.
    """
    try:
        os.stat(path)
    except OSError as error:  # said at once, without a worker
        raise DecodeError(path, said(error)) from None
    with Decoder() as decoder:
        info = decoder.probe(path)
        video = np.concatenate(list(decoder.stream(path, fps, size, until=frames / fps)))
    line = f"{path}: {info.width}x{info.height}, {len(video)} frames at {fps:g} a second"
    line += "".join(f", {text}" for name, text in TREATED.items() if name in info.treated.split())
    if size is not None and (info.height, info.width) != size:
        line += f", resized to {size[1]}x{size[0]}"
    return video[:frames], line


class Decoder(contextlib.AbstractContextManager):
    """A thread-safe pool of decoding processes, started on demand; a context manager.

    Decodes up to `workers` files at a time, each with `threads` threads.
    """

    def __init__(self, limits: Limits | None = None, workers: int = 1, threads: int = 1):
        if workers < 1 or threads < 1:
            raise UserError(f"decoder workers={workers}, threads={threads}: at least 1 of each")
        self.limits, self.workers, self._threads = limits or Limits(), workers, threads
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._live: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; requests of other threads fail with `DecodeError`."""
        with self._lock:
            self._closed = True
            for worker in self._live:
                worker.process.kill()  # the thread that uses it closes its socket
        for _ in range(self.workers):
            with contextlib.suppress(queue.Empty):
                if (idle := self._idle.get_nowait()) is not None:
                    idle.kill()
                self._idle.put(None)

    def probe(self, path: AnyPath) -> Info:
        """Reads all packets and decodes the first frame; raises `DecodeError` for a bad file."""
        info: Any = None
        for head, _ in self._ask(path, {"op": "probe"}):
            info = head.get("info", info)
        try:
            return Info(**{name: kind(info[name]) for name, kind in Info.__annotations__.items()})
        except (TypeError, KeyError, ValueError):
            raise DecodeError(path, "the decoder sent no answer") from None

    def frames(
        self, path: AnyPath, times: Sequence[float], size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """The pictures at `times` (seconds, not falling): uint8 (n, H, W, 3).

        `size` is (H, W), None for that of the file. Raises `DecodeError` for a bad file and for a
        time outside of it.
        """
        times = [float(t) for t in times]
        if not times or not all(math.isfinite(t) for t in times) or times != sorted(times):
            raise UserError(f"times {times[:4]}...: one or more finite numbers that do not fall")
        if times[0] < 0:
            raise DecodeError(path, f"time {times[0]:g} s is before the start")
        chunks = list(self._pixels(path, {"op": "frames", "times": times}, size, len(times)))
        video_nHW3 = np.concatenate(chunks) if chunks else np.empty((0, 0, 0, 3), np.uint8)
        if len(video_nHW3) != len(times):
            raise DecodeError(path, "the decoder sent too few frames")
        return video_nHW3

    def stream(
        self, path: AnyPath, fps: float, size: tuple[int, int] | None = None,
        until: float | None = None, alive: Callable[[float], None] | None = None,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        """The file (up to `until` seconds) at `fps`, in uint8 pieces (n, H, W, 3).

        Memory does not grow with its length. `alive` is called with the second that the decoder
        has reached. Raises as `frames` does.
        """
        request = {"op": "stream", "fps": float(fps), "until": until}
        return self._pixels(path, request, size, self.limits.frames, alive)

    def _pixels(
        self, path: AnyPath, request: dict[str, Any], size: tuple[int, int] | None, most: int,
        alive: Callable[[float], None] | None = None,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        wanted, given = None if size is None else tuple(size), 0
        for head, data in self._ask(path, request | {"size": wanted}):
            if alive is not None and "at" in head:
                alive(float(head["at"]))
            if not data:
                continue
            n, h, w = head["shape"]
            given += n
            if given > most or (wanted is not None and wanted != (h, w)):
                raise DecodeError(path, "the decoder sent unexpected frames")
            wanted = (h, w)
            yield np.frombuffer(data, np.uint8).reshape(n, h, w, 3)

    def _ask(self, path: AnyPath, request: dict[str, Any]) -> Iterator[Reply]:
        """Sends a request to an idle worker and yields its replies."""
        worker = self._idle.get()
        in_step = False  # the worker has finished its answer
        try:
            if worker is not None and worker.process.poll() is not None:
                self._bury(worker)
                worker = None
            if worker is None:
                with self._lock:
                    if self._closed:
                        raise DecodeError(path, "the decoder has been closed")
                    worker = _Worker(self.limits, self._threads)
                    self._live.add(worker)
            # Bytes, as file names need not be UTF-8.
            name = os.fsencode(os.path.abspath(path)).hex()
            for head, data in worker.ask({**request, "path": name}):
                if "error" in head:
                    in_step = True
                    raise DecodeError(path, one_line(str(head["error"])))
                in_step = bool(head.get("done"))
                yield head, data
        except _Lost as lost:
            raise DecodeError(path, str(lost)) from None
        finally:
            if worker is not None and not in_step:
                self._bury(worker)
            self._idle.put(worker if in_step else None)

    def _bury(self, worker: "_Worker") -> None:
        worker.kill()
        with self._lock:
            self._live.discard(worker)


class _Lost(Exception):
    """A worker that died, fell silent, or broke the protocol; says which."""


class _Worker:
    """One decoding process and the socket to it."""

    def __init__(self, limits: Limits, threads: int):
        self.limits = limits
        root = str(Path(__file__).resolve().parents[2])
        # Neither `-m` nor multiprocessing: both would import the program's main module, and jax.
        code = "import sys; sys.path.insert(0, sys.argv[1]); from vdit.data import media; "
        settings = json.dumps(dataclasses.asdict(limits) | {"threads": threads})
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code + "media.serve(sys.argv[2])", root, settings],
                stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the program only
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
            )  # fmt: skip

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._socket.close()

    def ask(self, request: dict[str, Any]) -> Iterator[Reply]:
        """Yields replies up to the one with "done" or "error"."""
        end = time.monotonic() + self.limits.seconds
        line = json.dumps(request).encode()
        self._within(end, self._socket.sendall, struct.pack(">I", len(line)) + line)
        while True:
            (length,) = struct.unpack(">I", self._read(4, end))
            if length > HEAD_LIMIT:
                raise _Lost("the decoder's answer makes no sense")
            try:
                head = json.loads(self._read(length, end))
                n, h, w = (int(x) for x in head.get("shape", (0, 0, 0)))
                sane = min(n, h, w) >= 0 and n <= CHUNK and h * w <= self.limits.pixels
                if not sane or (n - 1) * h * w * 3 >= CHUNK_BYTES:
                    raise ValueError
            except (ValueError, TypeError, AttributeError, RecursionError):
                raise _Lost("the decoder's answer makes no sense") from None
            yield head, self._read(n * h * w * 3, end)
            if "error" in head or head.get("done"):
                return

    def _read(self, size: int, end: float) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            got = self._within(end, self._socket.recv_into, view)
            if not got:
                raise _Lost(self._epitaph())
            view = view[got:]
        return data

    def _within(self, end: float, call: Callable[[Any], Any], data: Any) -> Any:
        """Calls a method of the socket, with the limits of silence and time as its timeout."""
        left = min(self.limits.silence, end - time.monotonic())
        try:
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            return call(data)
        except TimeoutError:
            why = f"the decoder hung ({self.limits.silence:g} s without an answer)"
            if time.monotonic() >= end:
                why = f"decoding took over {self.limits.seconds:g} s and was stopped"
            raise _Lost(why) from None
        except OSError:
            raise _Lost(self._epitaph()) from None

    def _epitaph(self) -> str:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the decoder stopped answering"
        return f"the decoder crashed ({f'signal {-code}' if code < 0 else f'status {code}'})"
