"""Videos stored in the records of a data set: raw or zlib-compressed pixels, or an image a frame.

Records are untrusted: nothing is inflated or decoded past the limits, and an invalid one raises
ValueError. Dimension key: T frames, H height, W width.
"""

import dataclasses
import io
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vdit.data.decode import Limits, said

MOST = 2**30  # bytes of one video's pixels


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a set stores its videos: shape (T, H, W, channels), None where it varies."""

    shape: tuple[int | None, ...]
    encoding: str  # none, bytes, zlib or images (a list of PNG or JPEG files)

    def read(self, value: Any, limits: Limits) -> np.ndarray:
        """The pixels of a record's video, uint8 (T, H, W, 3)."""
        if self.encoding == "images":
            return self._images(list(value), limits)
        shape = self.shape
        if isinstance(value, Mapping):
            actual, value = tuple(int(n) for n in value["shape"]), value["value"]
            if not _fits(actual, shape):
                raise ValueError(f"its shape is {shown(actual)}, not {shown(shape)}")
            shape = actual
        if isinstance(value, bytes):
            known = math.prod(n for n in shape if n is not None)  # bytes if free dimensions are 1
            most = _most(shape, limits) if None in shape else known
            _check_size([n or 1 for n in shape], limits)
            if self.encoding == "zlib":
                value = inflate(value, most)
            if len(value) > most or not value or len(value) % known:
                raise ValueError(f"{len(value)} bytes are no video of the shape {shown(shape)}")
            value = np.frombuffer(value, np.uint8)
        video_THW3 = np.reshape(value, [-1 if n is None else n for n in shape])
        if video_THW3.dtype != np.uint8 or not video_THW3.size:
            raise ValueError(f"its video is {video_THW3.dtype} {shown(video_THW3.shape)}")
        _check_size(video_THW3.shape, limits)
        return video_THW3

    def _images(self, files: Sequence[bytes], limits: Limits) -> np.ndarray:
        from PIL import Image

        if not files or self.shape[0] not in (None, len(files)):
            raise ValueError(f"{len(files)} frames, where its set has {shown(self.shape)}")
        pictures: list[np.ndarray] = []
        for number, file in enumerate(files):
            try:
                with Image.open(io.BytesIO(file), formats=("PNG", "JPEG")) as image:
                    actual = (len(files), image.height, image.width)
                    sides = pictures[0].shape[:2] if pictures else self.shape[1:3]
                    if not _fits(actual, wanted := (len(files), *sides)):
                        raise ValueError(f"{shown(actual)}, where {shown(wanted)} is wanted")
                    _check_size(actual, limits)  # before anything is decoded
                    pictures.append(np.asarray(image.convert("RGB")))
            except (OSError, SyntaxError, EOFError, struct.error, ValueError) as error:
                raise ValueError(f"frame {number} is damaged or another's: {said(error)}") from None
        return np.stack(pictures)


def shown(shape: Sequence[int | None]) -> str:
    """A shape as text, "?" for a free dimension."""
    return f"({', '.join('?' if n is None else str(n) for n in shape)})"


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether a record's shape is one that its set allows."""
    same = [w in (None, n) and n > 0 for n, w in zip(shape, wanted, strict=False)]
    return len(shape) == len(wanted) and all(same)


def _most(shape: Sequence[int | None], limits: Limits) -> int:
    """The most bytes of a video that has a free dimension."""
    frames, known = shape[0], math.prod(n for n in shape if n is not None)
    return min(MOST, known * limits.frames if frames is None else frames * limits.pixels * 3)


def _check_size(shape: Sequence[int], limits: Limits) -> None:
    """Raises ValueError for a video over the limits."""
    frames, height, width = shape[:3]
    if frames > limits.frames:
        raise ValueError(f"{frames} frames: over the limit of {limits.frames}")
    if height * width > limits.pixels:
        raise ValueError(f"frames of {width}x{height}: over the limit of {limits.pixels} pixels")
    if frames * height * width * 3 > MOST:
        raise ValueError(f"a video of {shown(shape)}: over the limit of {MOST >> 20} MiB")


def inflate(data: bytes, most: int) -> bytes:
    """The content of a zlib stream; inflates at most one byte over `most`.

    Raises ValueError if it is damaged, truncated, followed by more data, or over `most` bytes.
    """
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(f"damaged zlib data ({said(error)})") from None
    if len(content) > most:
        raise ValueError(f"its zlib data inflates to over {most} bytes")
    if not stream.eof or stream.unused_data:
        raise ValueError("its zlib data is cut short or goes on after its end")
    return content
