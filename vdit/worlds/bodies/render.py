"""Draws a simulated scene: flat colours, anti-aliased by the distance to each outline.

Only a window around each object is computed, its coverage for all frames at once. Columns and
channels share the last axis of the arrays that have both, for numpy is slow on an innermost axis
of length 3.

Dimension key: T frames, N objects, E sides of a polygon, K window side in pixels, H height,
W width.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vdit.worlds.bodies.physics import RADII, REACH, Kind, View, form
from vdit.worlds.forms import PALETTE

BACKDROPS = {  # RGB of the wall, and of the floor and what is beyond the walls
    "studio": ((226, 229, 234), (112, 116, 122)),
    "day": ((148, 204, 236), (92, 138, 66)),
    "night": ((28, 30, 54), (70, 74, 92)),
    "indoors": ((206, 182, 152), (92, 62, 44)),
    "desert": ((244, 226, 196), (188, 142, 92)),
}
BACKGROUND, FLOOR_COLOUR = BACKDROPS["studio"]
FRAMINGS = {  # zoom, and the side that the camera is shifted to
    "wide": (1.0, 0),
    "left": (1.0, -1),
    "right": (1.0, 1),
    "close": (1.5, 0),
    "close_left": (1.5, -1),
    "close_right": (1.5, 1),
}
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


class Stencil(NamedTuple):
    """What drawing one look needs at every frame, in pixels."""

    radius: np.float32  # of a ball
    normals: np.ndarray | None  # (E, 2): a polygon's outward normals at angle 0
    distances: np.ndarray | None  # (E,): from the centroid to its sides
    reach: float  # from the centroid to the window's edge
    side: int  # K
    middles: np.ndarray  # (K,): pixel middles from the window's left or upper edge
    paint: np.ndarray  # (1, K * 3): the colour of a row


@functools.lru_cache(maxsize=512)
def _stencil(shape: int, colour: int, size: int, view: View) -> Stencil:
    outline = form(shape, size)
    distances = [  # of the sides: along their normals
        (nx * x + ny * y) * view.scale
        for (nx, ny), (x, y) in zip(outline.normals, outline.corners, strict=True)
    ]
    reach = REACH[shape, size].corner * view.scale + 1
    side = min(2 * math.ceil(reach) + 1, view.height, view.width)
    return Stencil(
        np.float32(RADII[size] * view.scale),
        np.array(outline.normals) if distances else None,
        np.array(distances, np.float32) if distances else None,
        reach,
        side,
        np.arange(side, dtype=np.float32) + np.float32(0.5),
        np.tile(np.array(PALETTE[colour], np.float32), side)[None],
    )


def render(
    kinds: Sequence[Kind],
    position: np.ndarray,
    angle: np.ndarray,
    view: View,
    backdrop: str = "studio",
) -> np.ndarray:
    """Pictures (T, H, W, 3) uint8 of objects at `position` (T, N, 2) metres, `angle` (T, N)."""
    frames = position.shape[0]
    height, width = view.height, view.width
    video = np.empty((frames, height, width * 3), np.float32)
    video[:] = _backdrop(view, backdrop)[None]
    for index, (shape, colour, size, _) in enumerate(kinds):
        stencil = _stencil(shape, colour, size, view)
        side = stencil.side
        column = (position[:, index, 0] - view.left) * view.scale
        row = (view.top - position[:, index, 1]) * view.scale
        left = _corner(column - stencil.reach, width - side)
        upper = _corner(row - stencil.reach, height - side)
        # Offsets of the pixels from the centroid, x right and y up.
        x_TK = stencil.middles[None] + (left - column).astype(np.float32)[:, None]
        y_TK = (row - upper).astype(np.float32)[:, None] - stencil.middles[None]
        cover = np.repeat(_coverage(stencil, x_TK, y_TK, angle[:, index]), 3, axis=2)
        for frame, (x, y) in enumerate(zip(left.tolist(), upper.tolist(), strict=True)):
            window = video[frame, y : y + side, 3 * x : 3 * (x + side)]
            change = stencil.paint - window
            change *= cover[frame]
            window += change
    video += np.float32(0.5)
    return video.astype(np.uint8).reshape(frames, height, width, 3)


def outline(
    shape: int, size: int, view: View, x_TK: np.ndarray, y_TK: np.ndarray, angle: np.ndarray
) -> np.ndarray:
    """What an object covers (T, K, K) of pixels whose middles lie at x and y pixels, y up, from its
    centroid, turned by angles (T,)."""
    return _coverage(_stencil(shape, 0, size, view), x_TK, y_TK, angle)


def _corner(start: np.ndarray, last: int) -> np.ndarray:
    """Where windows (T,) begin, kept inside the picture."""
    return np.minimum(np.maximum(np.floor(start).astype(np.int64), 0), last)


def _coverage(
    stencil: Stencil, x_TK: np.ndarray, y_TK: np.ndarray, angle: np.ndarray
) -> np.ndarray:
    """How much of each pixel (T, K, K) the object covers, from the distance to its outline."""
    if stencil.normals is None or stencil.distances is None:
        outside = (x_TK * x_TK)[:, None, :] + (y_TK * y_TK)[:, :, None]
        np.sqrt(outside, out=outside)
        outside -= stencil.radius
    else:
        # math's sine, not numpy's: the same bits with every numpy.
        turn = [(math.cos(value), math.sin(value)) for value in angle.tolist()]
        cos, sin = np.array(turn).T[..., None]
        nx, ny = stencil.normals.T[:, None]
        across = (cos * nx - sin * ny).astype(np.float32)[..., None] * x_TK[:, None]
        across -= stencil.distances[None, :, None]
        along = (sin * nx + cos * ny).astype(np.float32)[..., None] * y_TK[:, None]
        outside = (across[:, :, None, :] + along[..., None]).max(axis=1)
    np.subtract(np.float32(0.5), outside, out=outside)
    np.maximum(outside, 0, out=outside)
    return np.minimum(outside, 1, out=outside)
