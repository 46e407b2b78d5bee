"""Video and image files: MP4, GIF, WebP, PNG, contact sheets, grids of videos.

All functions take uint8 RGB. `scale` enlarges by an integer factor (nearest neighbour), since a
32x32 clip is hard to see. GIF, WebP and PNG files are reproducible to the byte; of an MP4 only the
frames are (on CPUs with AVX-512 libx264 may write other bytes, even on one thread).

Dimension key: N videos, T frames, H height, W width, P pixels.
"""

import base64
import io
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vdit.errors import UserError
from vdit.runtime.files import atomic_path

AnyPath = str | os.PathLike[str]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write_mp4(
    path: AnyPath, video: Iterable[np.ndarray], fps: float, scale: int = 1, crf: int = 12
) -> None:
    """Writes H.264 that every browser plays: yuv420p, BT.709, index in front.

    `video` is (T, H, W, 3), or an iterable of such parts, of which one is in memory at a time.
    `crf` is from 0 (lossless) to 51; 12 looks lossless. 4:2:0 halves the resolution of colour, so
    use `scale` 2 or more to keep each pixel's colour. Odd sizes are padded by repeating the edge.
    """
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc, Interpolation

    rate = _rate(fps)

    def even(part_THW3: np.ndarray) -> np.ndarray:
        large = _enlarged(part_THW3, scale)
        odd_h, odd_w = large.shape[1] % 2, large.shape[2] % 2
        return np.pad(large, ((0, 0), (0, odd_h), (0, odd_w), (0, 0)), mode="edge")

    parts = iter([video] if isinstance(video, np.ndarray) else video)
    first = even(next(parts))
    frames = itertools.chain(first, (frame for part in parts for frame in even(part)))
    exact = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    with atomic_path(path) as temporary:
        options = {"movflags": "faststart"}
        with av.open(str(temporary), "w", format="mp4", options=options) as container:
            quality = {"crf": str(crf), "preset": "slow"}
            stream: Any = container.add_stream("libx264", rate=rate, options=quality)
            stream.height, stream.width = first.shape[1:3]
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.time_base = 1 / rate
            context.colorspace = context.color_primaries = ColorPrimaries.BT709
            context.color_trc = ColorTrc.BT709
            context.color_range = ColorRange.MPEG
            for index, frame_HW3 in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HW3), format="rgb24")
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace="ITU709", dst_color_range=ColorRange.MPEG,
                    interpolation=int(exact),
                )  # fmt: skip
                frame.pts, frame.time_base = index, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def gif_bytes(video_THW3: np.ndarray, fps: float, scale: int = 1) -> bytes:
    """A looping GIF with one palette of at most 256 colours, without dithering.

    Durations are multiples of 10 ms, rounded so that the mean frame rate is kept; the maximum is
    50 frames a second. Repeated frames are merged.
    """
    if fps > 50:
        raise UserError(f"fps={fps}: GIF shows at most 50 frames a second")
    durations = _durations(len(video_THW3), fps, unit_ms=10)
    large_THW3 = _enlarged(video_THW3, scale)
    pixels_P3 = video_THW3.reshape(-1, 3)  # the palette is fitted to at most 10^6 pixels
    pixels_P3 = pixels_P3[:: max(1, len(pixels_P3) // 1_000_000)]
    palette = Image.fromarray(np.ascontiguousarray(pixels_P3[None])).quantize(256)
    dither = Image.Dither.NONE
    frames = [Image.fromarray(x).quantize(palette=palette, dither=dither) for x in large_THW3]
    return _animation(frames, durations, format="GIF", optimize=False, disposal=1)


def webp_bytes(video_THW3: np.ndarray, fps: float, scale: int = 1, fast: bool = False) -> bytes:
    """A looping, lossless animated WebP; a `fast` one takes a tenth of the time to write."""
    durations = _durations(len(video_THW3), fps, unit_ms=1)
    frames = [Image.fromarray(x) for x in _enlarged(video_THW3, scale)]
    quality, method = (0, 0) if fast else (80, 4)
    return _animation(
        frames, durations, format="WEBP", lossless=True, quality=quality, method=method
    )


def png_bytes(image_HW3: np.ndarray, scale: int = 1) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_enlarged(image_HW3[None], scale)[0]).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_gif(path: AnyPath, video_THW3: np.ndarray, fps: float, scale: int = 1) -> None:
    _write(path, gif_bytes(video_THW3, fps, scale))


def write_webp(path: AnyPath, video_THW3: np.ndarray, fps: float, scale: int = 1) -> None:
    _write(path, webp_bytes(video_THW3, fps, scale))


def write_png(path: AnyPath, image_HW3: np.ndarray, scale: int = 1) -> None:
    _write(path, png_bytes(image_HW3, scale))


def tile(
    videos_NTHW3: np.ndarray, columns: int = 0, gap: int = 1, edge: int = 0, colour: int = 128
) -> np.ndarray:
    """A grid of videos as one video; by default `columns` make it about as wide as high.

    `gap` pixels of grey level `colour` separate videos, `edge` pixels surround the grid. A single
    video (T, H, W, 3) is returned unchanged.
    """
    if _checked(videos_NTHW3, ndims=(4, 5)).ndim == 4:
        return videos_NTHW3
    n, t, h, w, _ = videos_NTHW3.shape
    columns = columns or max(1, round(math.sqrt(n * h / w)))
    high = 2 * edge + math.ceil(n / columns) * (h + gap) - gap
    canvas_THW3 = np.full((t, high, 2 * edge + columns * (w + gap) - gap, 3), colour, np.uint8)
    for i, video_THW3 in enumerate(videos_NTHW3):
        top, left = edge + i // columns * (h + gap), edge + i % columns * (w + gap)
        canvas_THW3[:, top : top + h, left : left + w] = video_THW3
    return canvas_THW3


def contact_sheet(
    path: AnyPath, videos: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str] | None = None,
    columns: int = 1, every: int = 1, scale: int = 1,
) -> None:  # fmt: skip
    """Writes a PNG with a captioned strip of every `every`-th frame for each video.

    `videos` is (N, T, H, W, 3), or a sequence of (T, H, W, 3) of the same height and width.
    """
    gap, border, line_h = 2, 8, 14
    captions = [""] * len(videos) if captions is None else captions
    if not len(videos) or len(videos) != len(captions):
        raise UserError(f"contact sheet of {len(videos)} videos and {len(captions)} captions")
    if columns < 1 or every < 1:
        raise UserError(f"contact sheet with columns={columns}, every={every}: at least 1 each")
    strips = [_enlarged(video[::every], scale) for video in videos]
    if len({strip.shape[1:3] for strip in strips}) > 1:
        raise UserError("contact sheet: the videos differ in height or width")
    high, wide = strips[0].shape[1:3]
    cell_w = max(len(strip) for strip in strips) * (wide + gap) - gap
    cell_w = max(cell_w, 160)  # room for a caption above one small frame
    font = ImageFont.load_default()
    texts = [_wrapped(caption, font, cell_w, most=3) for caption in captions]
    rows = [range(i, min(i + columns, len(strips))) for i in range(0, len(strips), columns)]
    text_h = [line_h * max(len(texts[i]) for i in row) for row in rows]
    sheet_w = border + min(columns, len(strips)) * (cell_w + border)
    sheet_h = border + sum(text_h) + len(rows) * (high + border)
    sheet = Image.new("RGB", (sheet_w, sheet_h), "white")
    draw = ImageDraw.Draw(sheet)
    top = border
    for row, above in zip(rows, text_h, strict=True):
        for column, i in enumerate(row):
            left = border + column * (cell_w + border)
            for k, line in enumerate(texts[i]):
                draw.text((left, top + k * line_h), line, fill="black", font=font)
            strip_1HW3 = tile(strips[i][:, None], len(strips[i]), gap, colour=255)
            sheet.paste(Image.fromarray(strip_1HW3[0]), (left, top + above))
        top += above + high + border
    _write(path, png_bytes(np.asarray(sheet)))


def to_data_uri(data: bytes, mime: str) -> str:
    """A data URI, for self-contained pages."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _checked(video: np.ndarray, ndims: Sequence[int] = (4,)) -> np.ndarray:
    kind, shape = getattr(video, "dtype", None), np.shape(video)
    if kind != np.uint8 or len(shape) not in ndims or shape[-1] != 3 or 0 in shape:
        raise UserError(f"a video to write is uint8 (T, H, W, 3), not {kind} {shape}")
    return np.asarray(video)


def _enlarged(video_THW3: np.ndarray, scale: int) -> np.ndarray:
    """Nearest-neighbour upsampling."""
    if scale < 1:
        raise UserError(f"scale={scale}: an integer of at least 1")
    return _checked(video_THW3).repeat(scale, axis=1).repeat(scale, axis=2)


def _rate(fps: float) -> Fraction:
    if not 0.001 <= fps <= 1000:
        raise UserError(f"fps={fps}: from 0.001 to 1000 frames a second")
    return Fraction(fps).limit_denominator(1001)


def _durations(count: int, fps: float, unit_ms: int) -> list[int]:
    """Frame durations in ms: multiples of `unit_ms` that keep the mean frame rate."""
    ends = [round(k * 1000 / (_rate(fps) * unit_ms)) for k in range(count + 1)]
    return [(b - a) * unit_ms for a, b in zip(ends, ends[1:], strict=False)]


def _animation(frames: Sequence[Image.Image], durations: list[int], **options: Any) -> bytes:
    buffer = io.BytesIO()
    options |= {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
    frames[0].save(buffer, **options)
    return buffer.getvalue()


def _wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """Wraps to at most `most` lines of at most `width` pixels; "..." marks omitted text."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    for i, line in enumerate(lines):
        while font.getlength(line) > width and len(line) > 3:
            line = line.removesuffix("...").rstrip()[:-1] + "..."
        lines[i] = line
    return lines


def _write(path: AnyPath, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
