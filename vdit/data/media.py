"""The decoding worker: opens untrusted files, measures them, and resizes their frames.

It runs in a separate process, which `vdit.data.decode` starts, watches and may kill.

Frames become RGB, upright (display matrices and EXIF are applied, mirrors included), with square
pixels and transparency over white, in the colours of SDR: HDR (PQ, HLG) and wide gamuts are mapped
to BT.709, an HD film that names no matrix is read by that of BT.709, as players do, and interlaced
frames are deinterlaced. They are scaled (area down, bicubic up) until they cover the requested
size, and center-cropped. Time starts at the first frame; the frame at time t is the last one that
began by then, at constant and variable frame rates alike; where timestamps go back, or have not
risen yet, frames are counted by the rate. If the last picture of an animation has no duration, it
lasts as long as the one before. A file that is truncated, or has any damaged frame, is refused.
Pillow reads PNG, JPEG, WebP and AVIF, still (one frame at time 0) or animated, and PyAV the rest;
the content decides, not the name. Of a JPEG with several pictures (a gain map, a second eye) the
first is shown. HEIC is refused: its picture may lie in many streams.

Dimension key: n frames, H height, W width.
"""

import collections
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

from vdit.data.colours import HDR, TO_BT709, beyond_sdr, in_srgb, matrix, to_sdr, treatment
from vdit.data.containers import Bad, code_points, cut_short, gif_images, is_picture
from vdit.data.decode import CHUNK, CHUNK_BYTES, HEARTBEAT, Info, Limits, said
from vdit.errors import UserError

# None of these, unlike playlists, makes FFmpeg open further files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi,mpegts"
PICTURES = ("PNG", "JPEG", "WEBP", "AVIF")  # of Pillow
# FFmpeg's own decoders of these leave transparency out.
TRANSPARENT = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def serve(settings: str) -> None:
    """A worker's main loop: requests from stdin, replies to stdout, until stdin ends."""
    values = json.loads(settings)
    threads = values.pop("threads")
    limits = Limits(**values)
    requests = os.fdopen(os.dup(0), "rb")
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print must not break the protocol
    import av  # noqa: F401  (before memory is limited)

    _limit_process(limits.memory)
    while prefix := requests.read(4):
        request = json.loads(requests.read(struct.unpack(">I", prefix)[0]))
        path = os.fsdecode(bytes.fromhex(request["path"]))
        watch = _Watch(out, limits.silence)
        try:
            watch.rest()
            file = _File(path, limits, threads)
            if request["op"] == "probe":
                watch.send({"info": dataclasses.asdict(file.probe(watch))})
            else:
                _send_frames(file, request, watch)
            watch.send({"done": True})
        except Bad as error:
            watch.send({"error": str(error)})
        except MemoryError:
            watch.send({"error": f"needs more than {limits.memory >> 20} MiB to decode"})
        except ConnectionError:
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
    """Sends replies and heartbeats; an alarm ends a worker that hangs.

    The program kills a silent worker before that; the alarm is for a program that has died.
    """

    def __init__(self, out: BinaryIO, silence: float):
        self._out = out
        self._silence = silence
        self._last = time.monotonic()
        self._frames: list[np.ndarray] = []

    def rest(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._silence + 5)

    def send(self, head: dict[str, Any], chunk_nHW3: np.ndarray | None = None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)  # writing may wait for the program forever
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
            chunk_nHW3 = np.ascontiguousarray(np.stack(self._frames))  # rotated ones are not
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
    """A decoded frame and the time it is shown, in seconds from the start of the first one."""

    start: float
    end: float
    frame: Any  # av.VideoFrame
    treated: str = ""  # names of decode.TREATED
    mirrored: bool = False  # left and right are to be exchanged, before the rotation
    rotation: int = 0  # degrees, counter-clockwise: 0, 90, 180 or 270
    aspect: Fraction = Fraction(1)  # width of a pixel over its height

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) with square pixels, before rotation."""
        return max(1, round(self.frame.width * self.aspect)), self.frame.height


def _still(rgb_HW3: np.ndarray, start: float = 0.0, end: float = 0.0, treated: str = "") -> _Shown:
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb_HW3), "rgb24")
    return _Shown(start, end, frame, treated)


def _send_frames(file: "_File", request: dict[str, Any], watch: _Watch) -> None:
    """Sends the frames at listed times, or every 1/fps seconds up to the end."""
    fit, limits = _Fit(request["size"], file.limits), file.limits
    listed = request["op"] == "frames"
    if listed:
        wanted = iter(request["times"])
    else:
        until = math.inf if request["until"] is None else request["until"] - 1e-6
        grid = (k / request["fps"] for k in itertools.count())
        wanted = itertools.takewhile(lambda t: t < until, grid)
    given, target, last, end = 0, next(wanted, None), None, 0.0

    def give(shown: _Shown, before: float) -> None:
        """Sends `shown` for every time before `before`."""
        nonlocal given, target
        picture = None
        while target is not None and target < before:
            if given == limits.frames:
                raise Bad(f"over {limits.frames} frames at that rate: the limit")
            try:
                picture = fit(shown) if picture is None else picture
            except OSError as error:  # of swscale
                colours = f"in colours of matrix {int(shown.frame.colorspace)}, which FFmpeg"
                raise Bad(f"{colours} cannot convert ({said(error)})") from None
            watch.frame(picture, shown.start)
            given, target = given + 1, next(wanted, None)
            watch.beat(shown.start)

    for shown, slack in file.frames():
        watch.beat(shown.start)
        if last is not None:
            give(last, shown.start - slack)
        if target is None:
            break
        last, end = shown, shown.end if listed else shown.end - slack
    if last is None:
        raise Bad("no frame could be decoded")
    give(last, max(end, last.start + 1e-9))
    if listed and target is not None:
        raise Bad(f"time {target:g} s is past the end ({end:g} s)")
    watch.flush(end)


class _File:
    """A media file; the constructor checks its size, end and format."""

    def __init__(self, path: str, limits: Limits, threads: int):
        self.path, self.limits, self._threads = path, limits, threads
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise Bad("not a regular file")
            if status.st_size == 0:
                raise Bad("the file is empty")
            if status.st_size > limits.bytes:
                raise Bad(f"{status.st_size} bytes: over the limit of {limits.bytes}")
            with open(path, "rb") as file:
                head = file.read(4096)
                missing = cut_short(file, head, status.st_size)
                gif = head[:4] == b"GIF8"
                self._packets = gif_images(file, status.st_size) if gif else None
        except OSError as error:
            raise Bad(said(error)) from None
        if missing:
            raise Bad(f"cut short: {missing}")
        self._is_picture = is_picture(head)
        # Of pictures, which Pillow leaves as they are: transfer function and primaries.
        transfer, primaries = code_points(head) if self._is_picture else (1, 1)
        mapped = transfer in HDR or primaries in TO_BT709
        self._colours = (transfer, primaries) if mapped else None

    def frames(self) -> Iterator[tuple[_Shown, float]]:
        """All frames in order, each with the tolerance, in seconds, for its clock's rounding."""
        frames = self._pictures() if self._is_picture else self._film()
        for count, item in enumerate(frames):
            if count == self.limits.frames:
                raise Bad(f"over {self.limits.frames} frames: the limit")
            yield item

    def probe(self, watch: _Watch) -> Info:
        measure = self._measure_pictures if self._is_picture else self._measure_packets
        frames, seconds = measure(watch)
        if frames > self.limits.frames:
            raise Bad(f"{frames} frames: over the limit of {self.limits.frames}")
        first = next(self.frames(), None)
        if first is None:
            raise Bad("no frame could be decoded")
        (width, height), rotation = first[0].size, first[0].rotation
        if rotation % 180:
            width, height = height, width
        fps = frames / seconds if seconds else 0.0
        return Info(frames, fps, width, height, seconds, rotation, first[0].treated)

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self.limits.pixels:
            raise Bad(f"frames of {width}x{height}: over the limit of {self.limits.pixels} pixels")

    def _pictures(self) -> Iterator[tuple[_Shown, float]]:
        """Frames read by Pillow."""
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None  # `limits` replaces its warning
        try:
            image: Any = Image.open(self.path, formats=PICTURES)
            with image:
                self._check_pixels(image.width, image.height)
                count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
                start = length = 0.0
                # A PNG may have a picture before its animation, for programs that play none.
                first = int(count > 1 and bool(image.info.get("default_image")))
                if getattr(image, "rawmode", "") == "RGBX":  # what no WebP's frame covers is clear
                    image._mode = image.rawmode = "RGBA"
                for index in range(first, count):
                    image.seek(index)
                    image.load()
                    if count > 1:
                        length = image.info.get("duration", 0) / 1000 or length or 0.1
                    rgb_HW3, treated = _upright_rgb(image), ""
                    if self._colours and "icc_profile" not in image.info:
                        rgb_HW3 = to_sdr(rgb_HW3.astype(np.uint16) * 257, *self._colours)
                        treated = "hdr" if self._colours[0] in HDR else "wide"
                    yield _still(rgb_HW3, start, start + length, treated), 0.001
                    start += length
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            raise Bad(f"damaged image ({said(error)})") from None

    def _measure_pictures(self, watch: _Watch) -> tuple[int, float]:
        """Number of frames and seconds."""
        frames, seconds = 0, 0.0
        for shown, _ in self._pictures():
            frames, seconds = frames + 1, shown.end
            watch.beat(shown.start)
        return frames, seconds

    def _film(self) -> Iterator[tuple[_Shown, float]]:
        """Frames read by PyAV."""
        import av

        first, start, end = None, 0.0, 0.0
        with self._opened() as (container, stream):
            tick = float(stream.time_base)
            # WebM rounds to 1 ms and GIF to 10 ms: without slack a frame would be taken twice.
            slack = max(0.001, min(tick / 2 + 1e-6, 0.005))
            usual = float(1 / stream.average_rate) if stream.average_rate else 0.0
            try:
                for frame, picture, pts in _deinterlaced(self._decoded(container, stream)):
                    self._check_pixels(frame.width, frame.height)
                    if frame.is_corrupt:
                        raise Bad(f"damaged at {end:.2f} s")
                    if first is None:
                        first = pts or 0
                    # A frame without a time, or with a falling one, follows the previous frame, as
                    # do all those of a file whose times are all the same.
                    at = end if pts is None else (pts - first) * tick
                    before, start = start, at if at >= start and (at or not end) else end
                    usual = start - before or usual
                    end = start + ((frame.duration or 0) * tick or usual or 0.1)
                    shape = *_turn(frame), _pixel_aspect(stream)
                    yield _Shown(start, end, picture, treatment(frame), *shape), slack
            except av.FFmpegError as error:
                raise Bad(f"damaged at {end:.2f} s ({said(error)})") from None

    def _decoded(self, container: Any, stream: Any) -> Iterator[tuple[Any, int | None]]:
        """The stream's frames in the order in which they are shown, and their times in ticks."""
        decode = self._transparent(stream) or stream.codec_context.decode
        # AVI has times of frames as they are stored, not as they are shown.
        ordered = container.format.name == "avi"
        times: collections.deque[int | None] = collections.deque()
        for packet in itertools.islice(container.demux(stream), self._packets):
            if ordered and packet.size:
                times.append(packet.dts)
            for frame in decode(packet):
                yield frame, (times.popleft() if times else None) if ordered else frame.pts

    def _transparent(self, stream: Any) -> Any:
        """The decoding function for a WebM stream with transparency; None for others."""
        import av

        tags = {name.lower(): value for name, value in stream.metadata.items()}
        name = TRANSPARENT.get(stream.codec_context.name)
        if name is None or tags.get("alpha_mode") != "1":
            return None
        try:
            context: Any = av.CodecContext.create(name, "r")
        except ValueError:
            raise Bad(f"it is transparent, and this FFmpeg has no {name} to decode it") from None
        self._prepare(context)
        return context.decode

    def _prepare(self, context: Any) -> None:
        """Sets limits and threads of a codec context."""
        # For frames that are larger than the header says.
        context.options = {"max_pixels": str(self.limits.pixels)}
        context.thread_count = self._threads
        context.thread_type = "AUTO" if self._threads > 1 else "NONE"

    def _measure_packets(self, watch: _Watch) -> tuple[int, float]:
        """Number of frames and seconds, from the packets' times."""
        import av

        frames, start, end, last, falls, order = 0, math.inf, 0.0, 0.0, False, -math.inf
        with self._opened() as (container, stream):
            usual = float(1 / stream.average_rate) if stream.average_rate else 0.1
            try:
                for packet in itertools.islice(container.demux(stream), self._packets):
                    if not packet.size or packet.is_discard:
                        continue
                    if packet.is_corrupt:
                        raise Bad(f"damaged at {last:.2f} s")
                    frames += 1
                    if packet.dts is not None:
                        falls, order = falls or packet.dts < order, packet.dts
                    if packet.pts is not None:
                        last = float(packet.pts * stream.time_base)
                        length = float((packet.duration or 0) * stream.time_base) or usual
                        start, end = min(start, last), max(end, last + length)
                    watch.beat(last)
            except av.FFmpegError as error:
                raise Bad(f"damaged at {last:.2f} s ({said(error)})") from None
        rising = not falls and (frames == 1 or start < last)
        return frames, end - start if rising and start < end else frames * usual

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """PyAV's container and its first video stream that is no cover, ready to decode."""
        import av
        from av.stream import Disposition

        allowed = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        # By default PyAV before 19 refuses titles that are not UTF-8.
        old = int(av.__version__.split(".")[0]) < 19
        lenient: Any = {"metadata_errors": "replace"} if old else {}
        try:
            container = av.open(self.path, container_options=allowed, **lenient)
        except (av.FFmpegError, ValueError) as error:
            raise Bad(f"not a video that can be read ({said(error)})") from None
        with container:
            cover = Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                raise Bad("no video in it" + (" (audio only)" if container.streams.audio else ""))
            stream, context = streams[0], streams[0].codec_context
            # Decoding without a context is a crash (PyAV issue 2344).
            if context is None or not context.width or not context.height or not stream.time_base:
                raise Bad("damaged, or in a codec that is not known")
            self._check_pixels(context.width, context.height)
            self._prepare(context)
            yield container, stream


def _deinterlaced(
    frames: Iterator[tuple[Any, int | None]],
) -> Iterator[tuple[Any, Any, int | None]]:
    """Each frame, its picture and its time; from the first interlaced one on FFmpeg's bwdif makes
    whole pictures of interlaced frames."""
    import av
    from av.filter import Graph

    graph: Any = None
    shape: Any = None
    waiting: collections.deque[tuple[Any, int | None]] = collections.deque()

    def ready() -> Iterator[tuple[Any, Any, int | None]]:
        with contextlib.suppress(av.BlockingIOError, av.EOFError):
            while waiting:
                picture = graph.vpull()
                frame, pts = waiting.popleft()
                yield frame, picture, pts

    def end() -> Iterator[tuple[Any, Any, int | None]]:
        if graph is not None:
            graph.vpush(None)
            yield from ready()

    for frame, pts in frames:
        if graph is not None and shape != (frame.width, frame.height, frame.format.name):
            yield from end()
            graph = None
        if graph is None and frame.interlaced_frame:
            shape = frame.width, frame.height, frame.format.name
            graph = Graph()
            graph.threads = 1
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format,
                time_base=frame.time_base or Fraction(1, 1000),
            )  # fmt: skip
            whole = graph.add("bwdif", "mode=send_frame:deint=interlaced")
            graph.link_nodes(source, whole, graph.add("buffersink")).configure()
        if graph is None:
            yield frame, frame, pts
            continue
        waiting.append((frame, pts))
        graph.vpush(frame)
        yield from ready()
    yield from end()


def _turn(frame: Any) -> tuple[bool, int]:
    """Whether a frame's display matrix mirrors it, and the degrees that it then rotates it by."""
    from av.sidedata.sidedata import Type

    found = frame.side_data.get(Type.DISPLAYMATRIX)  # to iterate gives kinds from PyAV 19 on
    data = b"" if found is None else bytes(found)
    if len(data) != 36:
        return False, 0
    # (x, y) is shown at (a x + c y, b x + d y); y points down.
    a, b, _, c, d, *_ = struct.unpack("=9i", data)
    mirrored = a * d < b * c
    across, up = (-a, b) if mirrored else (a, -b)
    return mirrored, round(math.degrees(math.atan2(up, across)) / 90) % 4 * 90


def _pixel_aspect(stream: Any) -> Fraction:
    """Width over height of a pixel; 1 if the file has no plausible value."""
    aspect = stream.sample_aspect_ratio
    return aspect if aspect and Fraction(1, 10) <= aspect <= 10 else Fraction(1)


def _upright_rgb(image: Any) -> np.ndarray:
    """uint8 (H, W, 3): EXIF orientation and ICC profile applied, 16 bits to 8, over white."""
    from PIL import Image, ImageOps

    if image.mode.startswith("I"):  # 16-bit grayscale, which Pillow would clip
        deep_HW = np.asarray(image).astype(np.int64)
        alpha_HW = np.where(deep_HW == image.info.get("transparency", -1), 0, 255)
        image = Image.fromarray(np.dstack([deep_HW >> 8, alpha_HW]).astype(np.uint8), "LA")
    image = in_srgb(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def _over_white(rgba_HW4: np.ndarray) -> np.ndarray:
    rgb, alpha = rgba_HW4[..., :3].astype(np.uint16), rgba_HW4[..., 3:].astype(np.uint16)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


class _Fit:
    """Resizes decoded frames to uint8 (H, W, 3) of a size (None: that of the file)."""

    def __init__(self, size: Sequence[int] | None, limits: Limits):
        from av.video.reformatter import VideoReformatter

        self._size, self._limits, self._reformatter = size, limits, VideoReformatter()

    def __call__(self, shown: _Shown) -> np.ndarray:
        import av
        from av.video.reformatter import Interpolation

        frame, (wide, high), turned = shown.frame, shown.size, shown.rotation % 180 != 0
        if self._size is None:
            # That of the first frame: a film may change its size in the middle.
            self._size = (wide, high) if turned else (high, wide)
        h, w = (self._size[1], self._size[0]) if turned else self._size
        scale = max(h / high, w / wide)
        full_h, full_w = max(h, round(high * scale)), max(w, round(wide * scale))
        if max(full_h * full_w, full_h * frame.width) > self._limits.pixels:
            raise Bad(f"{wide}x{high} cannot be fitted to {w}x{h}: too long a shape")
        colours, tagged = beyond_sdr(frame), matrix(frame)
        if any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8":
            rgba_HW4 = frame.to_ndarray(format="rgba64le" if colours else "rgba", **tagged)
            if colours:
                rgb_HW3 = to_sdr(rgba_HW4[..., :3], *colours)
                rgba_HW4 = np.dstack([rgb_HW3, (rgba_HW4[..., 3] >> 8).astype(np.uint8)])
            frame = av.VideoFrame.from_ndarray(_over_white(rgba_HW4), format="rgb24")
            colours, tagged = None, {}
        kind = Interpolation.AREA if scale <= 1 else Interpolation.BICUBIC
        # Without full chroma swscale is off by up to 3 levels: white becomes 253.
        exact = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
        picture_HW3 = self._reformatter.reformat(
            frame, width=full_w, height=full_h, format="rgb48le" if colours else "rgb24",
            interpolation=int(kind | exact), threads=1, **tagged,
        ).to_ndarray()  # fmt: skip
        top, left = (full_h - h) // 2, (full_w - w) // 2
        if colours:
            picture_HW3 = to_sdr(picture_HW3, *colours)
        cut_HW3 = picture_HW3[top : top + h, left : left + w]
        return np.rot90(cut_HW3[:, ::-1] if shown.mirrored else cut_HW3, shown.rotation // 90)


def fit(video_nHW3: np.ndarray, size: tuple[int, int], limits: Limits | None = None) -> np.ndarray:
    """Frames, uint8 (n, H, W, 3), scaled and cropped to `size` (H, W) as those of files are.

    Raises `UserError` for an aspect ratio too extreme for that.
    """
    if video_nHW3.shape[1:3] == tuple(size):
        return video_nHW3
    fitted = _Fit(size, limits or Limits())
    try:
        return np.stack([fitted(_still(picture_HW3)) for picture_HW3 in video_nHW3])
    except Bad as error:
        raise UserError(str(error)) from None
