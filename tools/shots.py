"""Shot detection and quality measures of a film, from small frames that arrive in pieces.

A few numbers a frame are kept (`Frames`), no pixels.

Dimension key: n frames, H height, W width, D descriptor.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import fft, ndimage

BINS, GRID = 16, 8  # of a descriptor: histogram bins a colour, blocks a side
REACH = 3  # frames: a shorter flash is no cut
WINDOW = 12  # frames on each side that a cut is compared with
FLOOR, TIMES = 0.06, 4.0  # least distance at a cut: absolute, and in local medians
DARK, FLAT = 20.0, 4.0  # luma, and its deviation, below which a frame is blank


@dataclasses.dataclass(frozen=True)
class Frames:
    """Measures of the frames of a film, each of shape (n,)."""

    cut: np.ndarray  # distance to the previous frame, without flashes
    motion: np.ndarray  # mean absolute difference, 0 to 1, without changes of brightness
    sharpness: np.ndarray  # variance of the Laplacian over that of the frame
    dark: np.ndarray  # bool
    blank: np.ndarray  # bool: dark, or one colour
    hash: np.ndarray  # uint64


def gray(frame_HW3: np.ndarray) -> np.ndarray:
    """float32 luma (H, W), 0 to 255 (BT.601)."""
    return frame_HW3.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def phash(gray_HW: np.ndarray) -> int:
    """Perceptual hash: which of the lowest 8 x 8 DCT coefficients at 32 x 32 exceed the median."""
    scale = (32 / gray_HW.shape[0], 32 / gray_HW.shape[1])
    small = ndimage.zoom(gray_HW, scale, order=1, grid_mode=True, mode="nearest")
    low = fft.dctn(small, norm="ortho")[:8, :8].ravel()
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def sharpness(gray_HW: np.ndarray) -> float:
    """Variance of the Laplacian over that of the picture; 0 for a flat one."""
    spread = float(gray_HW.var())
    return float(ndimage.laplace(gray_HW).var()) / spread if spread > 1.0 else 0.0


def _descriptor(frame_HW3: np.ndarray) -> np.ndarray:
    """(D,): colour histograms with sum 1, then block means over 255."""
    h, w, _ = frame_HW3.shape
    index = (frame_HW3 >> 4) + BINS * np.arange(3, dtype=np.uint8)
    histogram = np.bincount(index.ravel(), minlength=3 * BINS) / frame_HW3.size
    part = frame_HW3[: h // GRID * GRID, : w // GRID * GRID].astype(np.float32)
    blocks = part.reshape(GRID, h // GRID, GRID, w // GRID, 3).mean((1, 3)).ravel() / 255
    return np.concatenate([histogram, blocks])


def _distance(a_D: np.ndarray, b_D: np.ndarray) -> float:
    gap = np.abs(a_D - b_D)
    return float(gap[: 3 * BINS].sum() / 2 + gap[3 * BINS :].mean())


def measure(pieces: Iterable[np.ndarray]) -> Frames:
    """The measures of a film, uint8 (n, H, W, 3) pieces, H and W at least 8."""
    cut: list[float] = []
    rows: list[tuple[float, float, bool, bool]] = []
    hashes: list[int] = []
    last: collections.deque[np.ndarray] = collections.deque(maxlen=REACH + 1)
    before: np.ndarray | None = None
    for frame_HW3 in (frame for piece in pieces for frame in piece):
        now, descriptor = gray(frame_HW3), _descriptor(frame_HW3)
        change = now - before if before is not None else np.zeros_like(now)
        motion = float(np.abs(change - np.median(change)).mean()) / 255
        dark = float(now.mean()) < DARK
        rows.append((motion, sharpness(now), dark, dark or float(now.std()) < FLAT))
        hashes.append(phash(now))
        cut.append(_distance(last[-1], descriptor) if last else 0.0)
        # If this frame resembles an earlier one, those between are a flash, no cut.
        for back in range(2, len(last) + 1):
            gap = _distance(last[-back], descriptor)
            for k in range(len(cut) - back, len(cut)):
                cut[k] = min(cut[k], gap)
        last.append(descriptor)
        before = now
    columns = [np.array(column) for column in zip(*rows, strict=True)] or [np.zeros(0)] * 4
    return Frames(
        np.array(cut), columns[0], columns[1], columns[2].astype(bool),
        columns[3].astype(bool), np.array(hashes, np.uint64),
    )  # fmt: skip


def shots(frames: Frames) -> list[tuple[int, int]]:
    """(first frame, frame after the last) of every shot: cuts, and the ends of dark runs."""
    count = len(frames.cut)
    borders = {0, count}
    for t in range(1, count):
        low, high = max(1, t - WINDOW), min(count, t + WINDOW + 1)
        near = np.delete(frames.cut[low:high], t - low)
        usual = float(np.median(near)) if near.size else 0.0
        peak = frames.cut[t] >= frames.cut[max(1, t - 1) : t + 2].max()
        if peak and frames.cut[t] > max(FLOOR, TIMES * usual):
            borders.add(t)
        if frames.dark[t] != frames.dark[t - 1]:
            borders.add(t)
    edges = sorted(borders)
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]


def parts(first: int, last: int, most: int) -> list[tuple[int, int]]:
    """Splits a shot into equal parts of at most `most` frames."""
    count = -(-(last - first) // most)
    edges = [first + (last - first) * k // count for k in range(count + 1)]
    return list(zip(edges, edges[1:], strict=False))


def summary(frames: Frames, first: int, last: int) -> dict[str, float]:
    """The measures of frames `first` to `last` - 1, summarised."""
    inner = frames.motion[first + 1 : last]
    return {
        "motion": round(float(inner.mean()) if inner.size else 0.0, 6),
        "sharpness": round(float(np.median(frames.sharpness[first:last])), 6),
        "black": round(float(frames.blank[first:last].mean()), 6),
    }


def hashes(frames: Frames, first: int, last: int) -> list[int]:
    """The hashes of three frames, at a quarter, a half and three quarters."""
    return [int(frames.hash[first + (last - first) * k // 4]) for k in (1, 2, 3)]


def bits(a: Sequence[int], b: Sequence[int]) -> float:
    """Mean Hamming distance of two lists of hashes, 0 to 64."""
    return sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True)) / len(a)
