"""Draws a simulated scene: flat colours, anti-aliased by the distance to each outline.

Only a window around each object is computed, for all frames at once; columns and channels share an
axis, for numpy is slow on a last axis of 3.

Dimension key: T frames, N objects, K window side in pixels, H height, W width.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from vdit.worlds.bodies.physics import Kind, View, form
from vdit.worlds.forms import PALETTE, cover, outside

BACKDROPS = {  # RGB of the wall, and of the floor and what is beyond the walls
    "studio": ((226, 229, 234), (112, 116, 122)),
    "day": ((148, 204, 236), (92, 138, 66)),
    "night": ((28, 30, 54), (70, 74, 92)),
    "indoors": ((206, 182, 152), (92, 62, 44)),
    "desert": ((244, 226, 196), (188, 142, 92)),
}
BACKGROUND, FLOOR_COLOUR = BACKDROPS["studio"]
FRAMINGS = {  # zoom, and the side that the camera is shifted to
    "wide": (1.0, 0), "left": (1.0, -1), "right": (1.0, 1),
    "close": (1.5, 0), "close_left": (1.5, -1), "close_right": (1.5, 1),
}  # fmt: skip
BEYOND = 0.6  # metres beyond a side wall that a shifted camera sees


@functools.lru_cache(maxsize=64)
def framed(view: View, framing: str) -> View:
    """The room of `view` (at zoom 1) as the camera of a framing sees it; "wide" is all of it."""
    zoom, side = FRAMINGS[framing]
    spare = view.room_width * (1 - 1 / zoom) / 2
    return View(view.height, view.width, zoom, spare + side * (spare + BEYOND))


@functools.lru_cache(maxsize=64)
def _backdrop(view: View, backdrop: str) -> np.ndarray:
    """The empty room (H, W * 3), float32: wall above y = 0 and between the side walls."""
    row = np.arange(view.height, dtype=np.float32)[:, None] + 0.5
    column = np.arange(view.width, dtype=np.float32)[None] + 0.5
    floor = np.clip(row - view.top * view.scale + 0.5, 0, 1)
    left, right = -view.left * view.scale, (view.room_width - view.left) * view.scale
    beside = np.clip(np.maximum(left - column, column - right) + 0.5, 0, 1)
    outside = np.maximum(floor, beside)[..., None]
    wall, ground = np.array(BACKDROPS[backdrop])
    return (wall + outside * (ground - wall)).reshape(view.height, -1).astype(np.float32)


def render(
    kinds: Sequence[Kind], position: np.ndarray, angle: np.ndarray, view: View,
    backdrop: str = "studio",
) -> np.ndarray:  # fmt: skip
    """Pictures (T, H, W, 3) uint8 of objects at `position` (T, N, 2) metres, `angle` (T, N)."""
    frames = position.shape[0]
    height, width = view.height, view.width
    video = np.empty((frames, height, width * 3), np.float32)
    video[:] = _backdrop(view, backdrop)[None]
    for index, (shape, colour, size, _) in enumerate(kinds):
        reach = form(shape, size).outer * view.scale + 1  # pixels from the centroid to the edge
        side = min(2 * math.ceil(reach) + 1, height, width)
        middles = np.arange(side, dtype=np.float32) + np.float32(0.5)
        column = (position[:, index, 0] - view.left) * view.scale
        row = (view.top - position[:, index, 1]) * view.scale
        left, upper = _corner(column - reach, width - side), _corner(row - reach, height - side)
        # Offsets of the pixels from the centroid, x right and y up.
        x_TK = middles[None] + (left - column).astype(np.float32)[:, None]
        y_TK = (row - upper).astype(np.float32)[:, None] - middles[None]
        covers = np.repeat(outline(shape, size, view, x_TK, y_TK, angle[:, index]), 3, axis=2)
        paint = np.tile(np.array(PALETTE[colour], np.float32), side)[None]  # of a row
        for frame, (x, y) in enumerate(zip(left.tolist(), upper.tolist(), strict=True)):
            window = video[frame, y : y + side, 3 * x : 3 * (x + side)]
            change = paint - window
            change *= covers[frame]
            window += change
    video += np.float32(0.5)
    return video.astype(np.uint8).reshape(frames, height, width, 3)


def outline(
    shape: int, size: int, view: View, x_TK: np.ndarray, y_TK: np.ndarray, angle: np.ndarray
) -> np.ndarray:
    """What an object turned by angles (T,) covers (T, K, K) of pixels; x, y as in `outside`."""
    return cover(outside(form(shape, size), x_TK, y_TK, angle, np.full(len(angle), view.scale)))


def _corner(start: np.ndarray, last: int) -> np.ndarray:
    """Where windows (T,) begin, kept inside the picture."""
    return np.minimum(np.maximum(np.floor(start).astype(np.int64), 0), last)
