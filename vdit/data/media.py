"""A decoding worker: foreign files opened, measured, and turned into pictures of the wanted size.

It runs in a process of its own, which `vdit.data.decode` starts, watches and may kill.

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
import signal
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np

from vdit.data.decode import CHUNK, CHUNK_BYTES, HEARTBEAT, Info, Limits, said
from vdit.errors import UserError

# Playlists and other formats that make FFmpeg open further files are not among them.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi,mpegts"
MP4_BOXES = (
    b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"mfra",
    b"meta", b"uuid", b"pnot", b"emsg", b"prft",
)  # fmt: skip


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
            watch.send({"error": f"{type(error).__name__}: {said(error)}"})


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
        raise _Bad(f"damaged at {end:.2f} s ({said(error)})") from None


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
        raise _Bad(said(error)) from None
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
        raise _Bad(f"not a video that can be read ({said(error)})") from None
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
            raise _Bad(f"damaged image ({said(error)})") from None


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
        raise _Bad(f"damaged at {last:.2f} s ({said(error)})") from None
    return frames, end - start if start < end else frames * usual


def _measure_stills(
    stills: _Stills, limits: Limits, threads: int, watch: _Watch
) -> tuple[int, float]:
    frames, seconds = 0, 0.0
    for shown, _ in stills:
        frames, seconds = frames + 1, shown.end
        watch.beat(shown.start)
    return frames, seconds
