"""Decoding of foreign media in worker processes, which may crash, hang or run out of memory.

A file from elsewhere can take its decoder down with it, so the program never decodes one itself:
`Decoder` keeps worker processes (a new Python each, never a fork, without jax) that answer over a
pipe, and replaces a worker that died or fell silent. Replies are a JSON head and raw pixels: a
worker taken over by a hostile file cannot hand the program anything but pixels.

What every file becomes: RGB, upright (rotation metadata and EXIF applied; mirroring is not), with
square pixels, transparency over white, scaled (area average down, bicubic up) until it covers the
wanted size and cropped at its centre. Time starts at the first frame; the picture at time t is
the last one that began by then, whatever the frame rate or its variation; where an animation's
last picture has no duration it stays as long as the one before. A file with any damaged frame, or
cut short, is refused as a whole. PNG, JPEG and WebP come through Pillow, still (one picture at
time 0) or animated; the rest through PyAV. What a file is, its content says, not its name.

Dimension key: n frames, H height, W width.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import queue
import select
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from vdit.errors import UserError

# Playlists and other formats that make FFmpeg open further files are not among them.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi,mpegts"
MP4_BOXES = (
    b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"mfra",
    b"meta", b"uuid", b"pnot", b"emsg", b"prft",
)  # fmt: skip
CHUNK = 64  # frames in one reply at most ...
CHUNK_BYTES = 1 << 24  # ... and, where that is more than one frame, pixel bytes
HEARTBEAT = 0.25  # seconds after which a worker reports even if it has no frame to send
HEAD_LIMIT = 1 << 16  # bytes of a reply's JSON head


class DecodeError(UserError):
    """A media file that cannot be used: `path`, and `reason` in one line."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        self.path = os.fspath(path)
        self.reason = reason
        super().__init__(f"{one_line(self.path)}: {reason}")

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (self.path, self.reason)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one file may cost before it is refused. Defaults let any ordinary film through."""

    pixels: int = 2**26  # of one decoded frame (8192 x 8192)
    frames: int = 2**20  # decoded, and given out (12 hours at 24 frames/s)
    bytes: int = 2**36  # of the file
    memory: int = 3 * 2**30  # address space of a worker, bytes (where the system enforces it)
    silence: float = 30.0  # seconds without a sign of life after which a worker is killed
    seconds: float = 4 * 3600.0  # for one request as a whole

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(f"limit {field.name}={getattr(self, field.name)}: must be over 0")


@dataclasses.dataclass(frozen=True)
class Info:
    """What a media file holds, counted in its packets rather than believed from its header."""

    frames: int
    fps: float  # mean rate; 0 for a still image
    width: int  # as shown: upright, square pixels
    height: int
    seconds: float  # from the first frame's start to the last one's end; 0 for a still image
    rotation: int  # degrees, counter-clockwise, that have been applied to show it upright


def one_line(text: str, limit: int = 300) -> str:
    """Text without control characters (as escapes), cut to `limit` characters."""
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


def is_time(value: Any) -> bool:
    """Whether what a foreign table holds is a finite number of seconds."""
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def is_text(value: Any) -> bool:
    """Whether what a foreign table holds is text that can be written: no lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def clip_times(start: float, count: int, fps: float) -> list[float]:
    """The times in seconds of `count` frames at `fps` from `start` on."""
    return [start + k / fps for k in range(count)]


# ---------------------------------------------------------------------------------------------
# The program's side
# ---------------------------------------------------------------------------------------------


class Decoder:
    """A pool of decoding processes, started when first needed; safe to use from many threads.

    Use as a context manager. `workers` files can be decoded at a time, each by `threads` threads.
    """

    def __init__(self, limits: Limits | None = None, workers: int = 1, threads: int = 1):
        if workers < 1 or threads < 1:
            raise UserError(f"decoder workers={workers}, threads={threads}: at least 1 of each")
        self.limits = limits or Limits()
        self.workers = workers
        self._threads = threads
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._live: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; a request under way in another thread fails with `DecodeError`."""
        with self._lock:
            self._closed = True
            for worker in self._live:
                worker.process.kill()  # whoever uses it notices, and closes its pipes
        for _ in range(self.workers):
            with contextlib.suppress(queue.Empty):
                if (idle := self._idle.get_nowait()) is not None:
                    idle.kill()
                self._idle.put(None)

    def probe(self, path: str | os.PathLike[str]) -> Info:
        """Reads the whole file without decoding more than its first frame.

        Raises `DecodeError` (a `UserError`) for a file that cannot be used.
        """
        info: Any = None
        for head, _ in self._ask(path, {"op": "probe"}):
            info = head.get("info", info)
        try:
            return Info(**{name: kind(info[name]) for name, kind in Info.__annotations__.items()})
        except (TypeError, KeyError, ValueError):
            raise DecodeError(path, "the decoder gave no answer") from None

    def frames(
        self,
        path: str | os.PathLike[str],
        times: Sequence[float],
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """The pictures at `times` (seconds, not falling; see `clip_times`): uint8 (n, H, W, 3).

        `size` is (H, W), None for the file's own. Raises `DecodeError` for a file that cannot be
        used and for a time outside of it.
        """
        times = [float(t) for t in times]
        if not times or not all(math.isfinite(t) for t in times) or times != sorted(times):
            raise UserError(f"times {times[:4]}...: one or more finite numbers that do not fall")
        if times[0] < 0:
            raise DecodeError(path, f"time {times[0]:g} s is before the start")
        chunks = list(self._pixels(path, {"op": "frames", "times": times}, size, len(times)))
        video_nHW3 = np.concatenate(chunks) if chunks else np.empty((0, 0, 0, 3), np.uint8)
        if len(video_nHW3) != len(times):
            raise DecodeError(path, "the decoder gave too few frames")
        return video_nHW3

    def stream(
        self,
        path: str | os.PathLike[str],
        fps: float,
        size: tuple[int, int] | None = None,
        until: float | None = None,
        alive: Callable[[float], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """The whole file (up to `until` seconds) at `fps`, in uint8 pieces (n, H, W, 3).

        Memory stays flat however long the film is. `alive` is called with the second that the
        decoder has come to. Raises as `frames` does.
        """
        request = {"op": "stream", "fps": float(fps), "until": until}
        return self._pixels(path, request, size, self.limits.frames, alive)

    def _pixels(
        self,
        path: str | os.PathLike[str],
        request: dict[str, Any],
        size: tuple[int, int] | None,
        most: int,
        alive: Callable[[float], None] | None = None,
    ) -> Iterator[np.ndarray]:
        wanted = None if size is None else tuple(size)
        given = 0
        for head, data in self._ask(path, request | {"size": wanted}):
            if alive is not None and "at" in head:
                alive(float(head["at"]))
            if not data:
                continue
            n, h, w = head["shape"]
            given += n
            if given > most or (wanted is not None and wanted != (h, w)):
                raise DecodeError(path, "the decoder gave other frames than it was asked for")
            wanted = (h, w)
            yield np.frombuffer(data, np.uint8).reshape(n, h, w, 3)

    def _ask(
        self, path: str | os.PathLike[str], request: dict[str, Any]
    ) -> Iterator[tuple[dict[str, Any], bytearray]]:
        """Sends one request to an idle worker and yields its replies (JSON head, pixels)."""
        worker = self._idle.get()
        in_step = False  # the worker has ended its answer and waits for the next request
        try:
            if worker is not None and worker.dead():
                self._bury(worker)
                worker = None
            if worker is None:
                with self._lock:
                    if self._closed:
                        raise DecodeError(path, "the decoder has been closed")
                    worker = _Worker(self.limits, self._threads)
                    self._live.add(worker)
            # The name goes as bytes: file names need not be UTF-8.
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
    """One decoding process and its two pipes."""

    def __init__(self, limits: Limits, threads: int):
        self.limits = limits
        root = str(Path(__file__).resolve().parents[2])
        # Not `-m` and not multiprocessing: both would import the program's main module, and jax.
        code = "import sys; sys.path.insert(0, sys.argv[1]); from vdit.data import decode; "
        settings = json.dumps(dataclasses.asdict(limits) | {"threads": threads})
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code + "decode.serve(sys.argv[2])", root, settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # a Ctrl-C in the terminal is for the program alone
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._to, self._from = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)

    def dead(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def ask(self, request: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bytearray]]:
        """Yields (head, pixels) up to the head that says "done" or "error"."""
        end = time.monotonic() + self.limits.seconds
        line = json.dumps(request).encode()
        self._write(struct.pack(">I", len(line)) + line, end)
        while True:
            (length,) = struct.unpack(">I", self._read(4, end))
            if length > HEAD_LIMIT:
                raise _Lost("the decoder's answer makes no sense")
            try:
                head = json.loads(self._read(length, end))
                n, h, w = (int(x) for x in head.get("shape", (0, 0, 0)))
                sane = min(n, h, w) >= 0 and n <= CHUNK and h * w <= self.limits.pixels
                sane = sane and (n - 1) * h * w * 3 < CHUNK_BYTES
            except (ValueError, TypeError, AttributeError, RecursionError):
                sane = False
            if not sane:
                raise _Lost("the decoder's answer makes no sense")
            yield head, self._read(n * h * w * 3, end)
            if "error" in head or head.get("done"):
                return

    def _wait(self, descriptor: int, event: int, end: float) -> None:
        left = min(self.limits.silence, end - time.monotonic())
        poll = select.poll()
        poll.register(descriptor, event)
        if left <= 0 or not poll.poll(max(1, left * 1000)):
            if end - time.monotonic() <= 0:
                raise _Lost(f"decoding took over {self.limits.seconds:g} s and was stopped")
            raise _Lost(f"the decoder hung ({self.limits.silence:g} s without an answer)")

    def _write(self, data: bytes, end: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._to, select.POLLOUT, end)
            try:
                view = view[os.write(self._to, view) :]
            except OSError:
                raise _Lost(self._epitaph()) from None

    def _read(self, size: int, end: float) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            self._wait(self._from, select.POLLIN, end)
            try:
                got = os.readv(self._from, [view])
            except OSError:
                got = 0
            if not got:
                raise _Lost(self._epitaph())
            view = view[got:]
        return data

    def _epitaph(self) -> str:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the decoder stopped answering"
        return f"the decoder crashed ({f'signal {-code}' if code < 0 else f'status {code}'})"


# ---------------------------------------------------------------------------------------------
# The worker's side
# ---------------------------------------------------------------------------------------------


class _Bad(Exception):
    """The file cannot be used; says why in one line."""


def serve(settings: str) -> None:
    """A worker's whole life: requests from stdin, replies to stdout, until stdin ends."""
    values = json.loads(settings)
    threads = values.pop("threads")
    limits = Limits(**values)
    requests = os.fdopen(os.dup(0), "rb")
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not break the protocol
    import av  # noqa: F401  (before memory is limited)

    _limit_process(limits.memory)
    while prefix := requests.read(4):
        request = json.loads(requests.read(struct.unpack(">I", prefix)[0]))
        path = os.fsdecode(bytes.fromhex(request["path"]))
        watch = _Watch(out, limits.silence)
        try:
            watch.rest()
            if request["op"] == "probe":
                info = _probe(path, limits, threads, watch)
                watch.send({"info": dataclasses.asdict(info)})
            else:
                _send_frames(path, request, limits, threads, watch)
            watch.send({"done": True})
        except _Bad as error:
            watch.send({"error": str(error)})
        except MemoryError:
            watch.send({"error": f"needs more than {limits.memory >> 20} MiB to decode"})
        except BrokenPipeError:
            return
        except Exception as error:
            watch.send({"error": f"{type(error).__name__}: {_said(error)}"})


def _said(error: BaseException) -> str:
    return one_line(str(getattr(error, "strerror", None) or error or type(error).__name__), 200)


def _limit_process(memory: int) -> None:
    """No core dumps, bounded memory; SIGALRM (see `_Watch`) ends the process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    import resource

    for what, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit on address space
            resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


class _Watch:
    """Sends replies, and a sign of life now and then; an alarm ends a worker left alone in a hang.

    The program kills a silent worker first; the alarm is for a program that is gone itself.
    """

    def __init__(self, out: BinaryIO, silence: float):
        self._out = out
        self._silence = silence
        self._last = time.monotonic()
        self._frames: list[np.ndarray] = []

    def rest(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._silence + 5)

    def send(self, head: dict[str, Any], chunk_nHW3: np.ndarray | None = None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)  # writing waits for the program, without limit
        line = json.dumps(head).encode()
        self._out.write(struct.pack(">I", len(line)) + line)
        if chunk_nHW3 is not None:
            self._out.write(chunk_nHW3.data)
        self._out.flush()
        self._last = time.monotonic()
        if "done" not in head and "error" not in head:
            self.rest()

    def frame(self, frame_HW3: np.ndarray, at: float) -> None:
        self._frames.append(frame_HW3)
        if len(self._frames) * frame_HW3.nbytes >= CHUNK_BYTES or len(self._frames) == CHUNK:
            self.flush(at)

    def flush(self, at: float) -> None:
        if self._frames:
            chunk_nHW3 = np.ascontiguousarray(np.stack(self._frames))  # turned ones are not
            self._frames = []
            self.send({"shape": chunk_nHW3.shape[:3], "at": at}, chunk_nHW3)

    def beat(self, at: float) -> None:
        if time.monotonic() - self._last > HEARTBEAT:
            if self._frames:
                self.flush(at)
            else:
                self.send({"at": at})


@dataclasses.dataclass
class _Shown:
    """One decoded frame and when it is shown, in seconds from the first one's start."""

    start: float
    end: float
    frame: Any  # av.VideoFrame
    rotation: int
    aspect: Fraction  # width of a pixel over its height


def _send_frames(
    path: str, request: dict[str, Any], limits: Limits, threads: int, watch: _Watch
) -> None:
    """Picks frames by time: those of a list, or every 1/fps seconds up to the end."""
    fit = _Fit(request["size"], limits)
    listed = request["op"] == "frames"
    if listed:
        wanted = iter(request["times"])
    else:
        until = math.inf if request["until"] is None else request["until"] - 1e-6
        grid = (k / request["fps"] for k in itertools.count())
        wanted = itertools.takewhile(lambda t: t < until, grid)
    given, target, last, end = 0, next(wanted, None), None, 0.0

    def give(shown: _Shown, before: float) -> None:
        """Gives `shown` for every wanted time before `before`."""
        nonlocal given, target
        picture = None
        while target is not None and target < before:
            if given == limits.frames:
                raise _Bad(f"over {limits.frames} frames at that rate: the limit")
            picture = fit(shown) if picture is None else picture
            watch.frame(picture, shown.start)
            given, target = given + 1, next(wanted, None)
            watch.beat(shown.start)

    for shown, slack in _decoded(path, limits, threads):
        watch.beat(shown.start)
        if last is not None:
            give(last, shown.start - slack)
        if target is None:
            break
        last, end = shown, shown.end if listed else shown.end - slack
    if last is None:
        raise _Bad("no frame could be decoded")
    give(last, max(end, last.start + 1e-9))
    if listed and target is not None:
        raise _Bad(f"time {target:g} s is past the end ({end:g} s)")
    watch.flush(end)


def _decoded(path: str, limits: Limits, threads: int) -> Iterator[tuple[_Shown, float]]:
    """Every frame in order with the slack, in seconds, that its clock's rounding asks for."""
    with _opened(path, limits) as source:
        frames = source if isinstance(source, _Stills) else _video(source, limits, threads)
        for count, item in enumerate(frames):
            if count == limits.frames:
                raise _Bad(f"over {limits.frames} frames: the limit")
            yield item


def _video(container: Any, limits: Limits, threads: int) -> Iterator[tuple[_Shown, float]]:
    import av

    stream = _video_stream(container, limits, threads)
    tick = float(stream.time_base)
    # WebM rounds to 1 ms and GIF to 10 ms: without slack a frame would be taken twice.
    slack = max(0.001, min(tick / 2 + 1e-6, 0.005))
    usual = float(1 / stream.average_rate) if stream.average_rate else 0.0
    first, start, end = None, 0.0, 0.0
    try:
        for frame in container.decode(stream):
            if frame.width * frame.height > limits.pixels:
                raise _Bad(_too_large(frame.width, frame.height, limits))
            if frame.is_corrupt:
                raise _Bad(f"damaged at {end:.2f} s")
            if first is None:
                first = frame.pts or 0
            # A frame without a time, or with one that falls, comes right after the one before.
            told = end if frame.pts is None else (frame.pts - first) * tick
            before, start = start, max(told, start)
            usual = start - before or usual
            end = start + ((frame.duration or 0) * tick or usual or 0.1)
            aspect = _pixel_aspect(stream)
            yield _Shown(start, end, frame, _quarter(frame.rotation), aspect), slack
    except av.FFmpegError as error:
        raise _Bad(f"damaged at {end:.2f} s ({_said(error)})") from None


def _pixel_aspect(stream: Any) -> Fraction:
    """Width over height of a pixel; 1 where the file says nothing sensible."""
    aspect = stream.sample_aspect_ratio
    return aspect if aspect and Fraction(1, 10) <= aspect <= 10 else Fraction(1)


def _quarter(degrees: float) -> int:
    return round((degrees or 0) / 90) % 4 * 90


def _too_large(width: int, height: int, limits: Limits) -> str:
    return f"frames of {width}x{height}: over the limit of {limits.pixels} pixels"


def _video_stream(container: Any, limits: Limits, threads: int) -> Any:
    """The first real video stream (a cover picture is none), checked and ready to decode."""
    from av.stream import Disposition

    streams = [
        s for s in container.streams.video if not s.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise _Bad("no video in it" + (" (audio only)" if container.streams.audio else ""))
    stream = streams[0]
    context = stream.codec_context
    # Decoding without a context is a crash (PyAV issue 2344).
    if context is None or not context.width or not context.height or not stream.time_base:
        raise _Bad("damaged, or in a codec that is not known")
    if context.width * context.height > limits.pixels:
        raise _Bad(_too_large(context.width, context.height, limits))
    context.options = {"max_pixels": str(limits.pixels)}  # also for what the header does not say
    context.thread_count = threads
    context.thread_type = "AUTO" if threads > 1 else "NONE"
    return stream


@contextlib.contextmanager
def _opened(path: str, limits: Limits) -> Iterator[Any]:
    """An `av` container or `_Stills`, whichever the content asks for."""
    import av

    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise _Bad("not a regular file")
        if status.st_size == 0:
            raise _Bad("the file is empty")
        if status.st_size > limits.bytes:
            raise _Bad(f"{status.st_size} bytes: over the limit of {limits.bytes}")
        with open(path, "rb") as file:
            head = file.read(16)
            missing = _cut_short(file, head, status.st_size)
    except OSError as error:
        raise _Bad(_said(error)) from None
    if missing:
        raise _Bad(f"cut short: {missing}")
    if head[:8] == b"\x89PNG\r\n\x1a\n" or head[:3] == b"\xff\xd8\xff" or head[8:12] == b"WEBP":
        yield _Stills(path, limits)
        return
    try:
        allowed = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        # Before version 19 PyAV refuses a film whose title is not UTF-8, unless told.
        old = int(av.__version__.split(".")[0]) < 19
        lenient: Any = {"metadata_errors": "replace"} if old else {}
        container = av.open(path, container_options=allowed, **lenient)
    except (av.FFmpegError, ValueError) as error:
        raise _Bad(f"not a video that can be read ({_said(error)})") from None
    with container:
        yield container


def _cut_short(file: BinaryIO, head: bytes, size: int) -> str:
    """Says what is missing at the end of a GIF, Matroska/WebM or MP4/MOV file; "" if nothing.

    FFmpeg plays what there is of a truncated file without a word.
    """
    if head[:4] == b"GIF8":
        file.seek(max(0, size - 64))
        return "" if file.read().rstrip(b"\0")[-1:] == b"\x3b" else "no end mark"
    if head[:4] == b"\x1a\x45\xdf\xa3":  # EBML head, then one segment that tells its length
        file.seek(4)
        if (length := _ebml_size(file)) is None:
            return ""
        file.seek(length, os.SEEK_CUR)
        if file.read(4) != b"\x18\x53\x80\x67" or (length := _ebml_size(file)) is None:
            return ""  # a live recording, or something that FFmpeg will judge
        return _lacks(file.tell() + length, size)
    at = 0
    while at + 8 <= size:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind not in MP4_BOXES:
            break
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        if length < 8:  # 0: up to the end; else FFmpeg will judge
            break
        at += length
    return _lacks(at, size)


def _lacks(end: int, size: int) -> str:
    return f"{size} bytes of {end}" if end > size else ""


def _ebml_size(file: BinaryIO) -> int | None:
    """A Matroska length: the first byte's leading zeros count the bytes that follow."""
    first = file.read(1)
    if not first or first == b"\0":
        return None
    extra = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> extra)]) + file.read(extra), "big")
    return None if value == (1 << 7 * (extra + 1)) - 1 else value


class _Stills:
    """A PNG, JPEG or WebP file, still or animated, as (shown frame, slack)."""

    def __init__(self, path: str, limits: Limits):
        self.path = path
        self.limits = limits

    def __iter__(self) -> Iterator[tuple[_Shown, float]]:
        import av
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None  # our own limit stands instead of a warning
        try:
            with Image.open(self.path, formats=("PNG", "JPEG", "WEBP")) as image:
                if image.width * image.height > self.limits.pixels:
                    raise _Bad(_too_large(image.width, image.height, self.limits))
                start = 0.0
                for index in range(getattr(image, "n_frames", 1)):
                    image.seek(index)
                    image.load()
                    end = start + image.info.get("duration", 0) / 1000
                    rgb_HW3 = _upright_rgb(image)
                    frame = av.VideoFrame.from_ndarray(rgb_HW3, format="rgb24")
                    yield _Shown(start, end, frame, 0, Fraction(1)), 0.001
                    start = end
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            raise _Bad(f"damaged image ({_said(error)})") from None


def _upright_rgb(image: Any) -> np.ndarray:
    """uint8 (H, W, 3): EXIF orientation applied, 16 bits to 8, transparency over white."""
    from PIL import Image, ImageOps

    if image.mode.startswith("I"):  # 16-bit grayscale; Pillow's own conversion would clip it
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.ascontiguousarray(image.convert("RGB"))


def _over_white(rgba_HW4: np.ndarray) -> np.ndarray:
    rgb, alpha = rgba_HW4[..., :3].astype(np.uint16), rgba_HW4[..., 3:].astype(np.uint16)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


class _Fit:
    """Turns decoded frames into uint8 (H, W, 3) of the wanted size (None: the file's own)."""

    def __init__(self, size: Sequence[int] | None, limits: Limits):
        from av.video.reformatter import VideoReformatter

        self._size = size
        self._limits = limits
        self._reformatter = VideoReformatter()

    def __call__(self, shown: _Shown) -> np.ndarray:
        import av
        from av.video.reformatter import Interpolation

        frame = shown.frame
        wide, high = _shown_size(shown)
        if self._size is None:
            # Every frame as the first one: a film may change its size in the middle.
            self._size = (wide, high) if shown.rotation % 180 else (high, wide)
        turned = shown.rotation % 180 != 0
        h, w = (self._size[1], self._size[0]) if turned else self._size
        scale = max(h / high, w / wide)
        full_h, full_w = max(h, round(high * scale)), max(w, round(wide * scale))
        if max(full_h * full_w, full_h * frame.width) > self._limits.pixels:
            raise _Bad(f"{wide}x{high} cannot be fitted to {w}x{h}: too long a shape")
        if any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8":
            rgb_HW3 = _over_white(frame.to_ndarray(format="rgba"))
            frame = av.VideoFrame.from_ndarray(rgb_HW3, format="rgb24")
        kind = Interpolation.AREA if scale <= 1 else Interpolation.BICUBIC
        # Without full chroma swscale loses up to 3 levels: white comes out as 253.
        exact = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
        picture_HW3 = self._reformatter.reformat(
            frame,
            width=full_w,
            height=full_h,
            format="rgb24",
            interpolation=int(kind | exact),
            threads=1,
        ).to_ndarray()
        top, left = (full_h - h) // 2, (full_w - w) // 2
        return np.rot90(picture_HW3[top : top + h, left : left + w], shown.rotation // 90)


def fit(
    video_nHW3: np.ndarray, size: tuple[int, int], limits: Limits | None = None
) -> np.ndarray:
    """Pictures, uint8 (n, H, W, 3), scaled and cropped to `size` (H, W) as those of a file are.

    Raises `UserError` for a shape that is too long for that.
    """
    import av

    if video_nHW3.shape[1:3] == tuple(size):
        return video_nHW3
    fitted = _Fit(size, limits or Limits())
    frames = (
        av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HW3), format="rgb24")
        for picture_HW3 in video_nHW3
    )
    try:
        return np.stack([fitted(_Shown(0.0, 0.0, frame, 0, Fraction(1))) for frame in frames])
    except _Bad as error:
        raise UserError(str(error)) from None


def _shown_size(shown: _Shown) -> tuple[int, int]:
    """(width, height) of a frame with square pixels, before it is turned."""
    return max(1, round(shown.frame.width * shown.aspect)), shown.frame.height


def _probe(path: str, limits: Limits, threads: int, watch: _Watch) -> Info:
    with _opened(path, limits) as source:
        measure = _measure_stills if isinstance(source, _Stills) else _measure_packets
        frames, seconds = measure(source, limits, threads, watch)
    if frames > limits.frames:
        raise _Bad(f"{frames} frames: over the limit of {limits.frames}")
    first = next(_decoded(path, limits, threads), None)
    if first is None:
        raise _Bad("no frame could be decoded")
    shown = first[0]
    wide, high = _shown_size(shown)
    return Info(
        frames=frames,
        fps=frames / seconds if seconds else 0.0,
        width=high if shown.rotation % 180 else wide,
        height=wide if shown.rotation % 180 else high,
        seconds=seconds,
        rotation=shown.rotation,
    )


def _measure_packets(
    container: Any, limits: Limits, threads: int, watch: _Watch
) -> tuple[int, float]:
    """Number of frames and seconds, from every packet's own time."""
    import av

    stream = _video_stream(container, limits, threads)
    frames, start, end, last = 0, math.inf, 0.0, 0.0
    usual = float(1 / stream.average_rate) if stream.average_rate else 0.1
    try:
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise _Bad(f"damaged at {last:.2f} s")
            frames += 1
            if packet.pts is not None:
                last = float(packet.pts * stream.time_base)
                length = float((packet.duration or 0) * stream.time_base) or usual
                start, end = min(start, last), max(end, last + length)
            watch.beat(last)
    except av.FFmpegError as error:
        raise _Bad(f"damaged at {last:.2f} s ({_said(error)})") from None
    return frames, end - start if start < end else frames * usual


def _measure_stills(
    stills: _Stills, limits: Limits, threads: int, watch: _Watch
) -> tuple[int, float]:
    frames, seconds = 0, 0.0
    for shown, _ in stills:
        frames, seconds = frames + 1, shown.end
        watch.beat(shown.start)
    return frames, seconds
