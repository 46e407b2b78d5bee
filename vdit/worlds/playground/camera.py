"""Cameras: where the picture's middle is and how far it is zoomed, frame by frame.

Dimension key: T frames.
"""

import math

import numpy as np

from vdit.worlds.clips import Draws
from vdit.worlds.playground.cast import CAMERAS, FLOOR_DEPTH, ROOM
from vdit.worlds.playground.render import home

ZOOM = {"pan": 0.85, "tilt": 0.85, "follow": 0.85, "shake": 0.9, "static": 1.0}
ZOOMS = (0.78, 1.0)  # the ends of a camera that zooms
SWAY = 0.55  # metres that a pan or tilt goes to either side of the middle
SHAKE = 0.11  # metres
HERTZ = (2.2, 3.4)  # of a camera that shakes
FRAMED = {"whole": 1.0, "wide": 0.78, "close_left": 1.4, "close": 1.4, "close_right": 1.4}  # zooms
BESIDE = 0.4  # metres beyond a wall that a close-up of that side sees
FOLLOWED = (1.0, 2.6)  # metres sideways that a character covers for a camera to follow it


def ease(frames: int) -> np.ndarray:
    """(T,) from 0 to 1: slow, fast, slow."""
    part = np.arange(frames) / max(frames - 1, 1)
    return part * part * (3 - 2 * part)


def path(
    draws: Draws, camera: str, frames: int, fps: float, size: tuple[int, int], x: np.ndarray
) -> np.ndarray:
    """Cameras (T, 3); `x` (T,) is the track of the character that `follow` keeps in its place."""
    kind, _, way = camera.partition("_")
    camera_T3 = np.tile((*home(*size), ZOOM.get(kind, 1.0)), (frames, 1))
    sway = SWAY * (2 * ease(frames) - 1) * (-1 if way in ("left", "down") else 1)
    if kind == "pan":
        camera_T3[:, 0] += sway
    if kind == "tilt":
        camera_T3[:, 1] += sway
    if kind == "zoom":
        low, high = ZOOMS if way == "in" else ZOOMS[::-1]
        camera_T3[:, 2] = low + (high - low) * ease(frames)
    if kind == "follow":
        camera_T3[:, 0] += x - x[0]
    if kind == "shake":
        for axis in (0, 1):
            for hertz in HERTZ:
                phase = draws.uniform(0, 2 * math.pi)
                wave = [math.sin(2 * math.pi * hertz * t / fps + phase) for t in range(frames)]
                camera_T3[:, axis] += SHAKE / 2 * np.array(wave)
    return camera_T3


def framed(framing: str, frames: int, size: tuple[int, int]) -> np.ndarray:
    """Static cameras (T, 3); close-ups have the floor at the same height as the whole scene."""
    (x, y), zoom, scale = home(*size), FRAMED[framing], min(size) / ROOM
    up, across = size[0] / scale / zoom / 2, size[1] / scale / zoom / 2
    if framing.startswith("close"):
        y = up - FLOOR_DEPTH
        x = {"close_left": across - BESIDE, "close": x}.get(framing, 2 * x + BESIDE - across)
    return np.tile((x, y, zoom), (frames, 1))


def draw_camera(draws: Draws, x: np.ndarray) -> str:
    """One of CAMERAS; `follow` only where the character on track `x` (T,) goes far enough."""
    names = [name for name in CAMERAS if name != "follow"]
    reach = np.abs(x - x[0]).max()
    if FOLLOWED[0] <= reach <= FOLLOWED[1]:
        names += ["follow"] * 3
    return draws.pick(names)
