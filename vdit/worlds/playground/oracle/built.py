"""Structures: ramps, platforms, pendulums, springs, spouts and towers.

Dimension key: T frames, H height, W width.
"""

import itertools

import numpy as np
from scipy import ndimage

from vdit.worlds.forms import block
from vdit.worlds.playground import cast
from vdit.worlds.playground.oracle.bodies import Body, Figures, filled
from vdit.worlds.playground.oracle.camera import BUILT_CODE, NEAR, largest
from vdit.worlds.playground.physics import Scene
from vdit.worlds.playground.render import BUILT, Canvas, backdrop, built_parts, lit


def find_built(figures: Figures) -> tuple[str, int, float]:
    """The structure in the first frame, its side and its x."""
    height, width = figures.eye.size
    room, top = figures.eye.room, height / (min(height, width) / cast.ROOM) - cast.FLOOR_DEPTH
    bare = backdrop(figures.place, figures.camera[:1], height, width, room)[0]
    paint = lit(BUILT, figures.place)
    best = (0.6, "none", 1, room / 2)
    for name, side, part in itertools.product(cast.SETS[1:], (1, -1), (0.35, 0.5, 0.65)):
        turned = name in ("ramp", "platform")
        if (turned and part != 0.5) or (not turned and side < 0):
            continue
        if name == "pendulum" and part != 0.5:
            continue
        scene = Scene(figures.place, name, side, part * room, 0.0, (), room, top)
        parts = built_parts(scene)
        if name == "spring":
            parts = [(block(*cast.PLATE), (scene.spot, cast.SPRING_TOP - cast.PLATE[1] / 2))]
        canvas = Canvas(np.zeros((1, height, width, 3), np.float32), figures.camera[:1])
        for shape, place in parts:
            canvas.thing(shape, np.ones(3, np.float32), np.array([place]))
        cover = canvas.pictures[0, ..., :1]
        shown = largest(figures.video[0] - bare - cover * (paint - bare)) < NEAR
        there = cover[..., 0] > 0.7  # less could be the empty place as well
        if there.any():
            best = max(best, (float(shown[there].mean()), name, side, scene.spot))
    return best[1:]


def loose_pixels(
    figures: Figures, built: str, side: int, spot: float, actor: Body | None
) -> np.ndarray:
    """(T, H, W): pixels in the colour of structures that no static part explains."""
    height, width = figures.eye.size
    frames, room = len(figures.video), figures.eye.room
    top = height / (min(height, width) / cast.ROOM) - cast.FLOOR_DEPTH
    canvas = Canvas(np.zeros((frames, height, width, 3), np.float32), figures.camera)
    still = Scene(figures.place, built, side, spot, 0.0, (), room, top)
    ones = np.ones(3, np.float32)
    for shape, place in built_parts(still):
        canvas.thing(shape, ones, np.tile(place, (frames, 1)))
    if built == "pendulum" and actor is not None:
        ends = np.nan_to_num(actor.track, nan=0.0) - (spot, cast.PIVOT)
        length = float(np.median(np.sqrt(np.square(ends).sum(1))))
        angle = np.arctan2(ends[:, 1], ends[:, 0])
        canvas.thing(block(length, 0.2), ones, ends / 2 + (spot, cast.PIVOT), angle)
    known = ndimage.binary_dilation(canvas.pictures[..., 0] > 0.05, np.ones((1, 3, 3)))
    return (figures.codes == BUILT_CODE) & ~known


def tower_heights(figures: Figures, loose: np.ndarray, built: str) -> np.ndarray:
    """Its height (T,) in metres, 0 throughout where none stands at the start."""
    frames = len(loose)
    area = loose[0].sum() / figures.scale[0] ** 2
    if built not in ("none", "ramp", "pendulum") or area < 0.45 * cast.BLOCKS * cast.BLOCK**2:
        return np.zeros(frames)
    rows = (figures.eye.size[0] / 2 - np.arange(figures.eye.size[0])[None]) / figures.scale[:, None]
    high = np.where(loose.sum(2) >= 2, rows + figures.camera[:, 1:2], -np.inf).max(1)
    return np.where(np.isfinite(high), high, 0.0)


def actor_first(bodies: list[Body], built: str, side: int, spot: float, room: float) -> list[Body]:
    """The characters, the one that uses the structure first."""

    def far(body: Body) -> float:
        x, y = filled(body.track)[0]
        along = x if side > 0 else room - x
        if built == "pendulum":
            return -float(np.ptp(filled(body.track)[: max(2, len(body.track) // 3), 0]))
        if built == "spring":
            return abs(x - spot)
        if built in ("ramp", "platform"):
            return along + 2 * (y < 1.6)
        return 0.0

    return sorted(bodies, key=far)
