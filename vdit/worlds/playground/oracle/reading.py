"""The reading of a clip: camera, place, characters, structures, events, unexplained pixels.

Dimension key: T frames, H height, W width, N characters.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from vdit.worlds.playground import events as what
from vdit.worlds.playground.cast import MOTIONS, PLACE_NAMES, PLACES, PLATFORM_TOP, SETS, form
from vdit.worlds.playground.oracle.bodies import Body, Figures, filled, find_bodies
from vdit.worlds.playground.oracle.built import actor_first, find_built, loose_pixels, tower_heights
from vdit.worlds.playground.oracle.camera import (
    BUILT_CODE,
    FAR,
    Eye,
    camera_kind,
    find_cameras,
    largest,
)
from vdit.worlds.playground.render import Canvas

SLACK = 0.12  # metres: tolerance of positions


class Reading(NamedTuple):
    """What was read from a clip."""

    place: int
    camera: np.ndarray  # (T, 3)
    camera_kind: int
    built: int
    side: int
    tower: np.ndarray  # (T,): its height, 0 without one
    poured: np.ndarray  # (T,)
    bodies: tuple[Body, ...]
    strange: np.ndarray  # (T,): share of the pixels that nothing explains
    drift: tuple[float, float, float]  # colour, contrast, sharpness: change a second
    events: list[what.Event]


def read(video: np.ndarray, fps: float) -> Reading:
    """Reads a clip `video` (T, H, W, 3) uint8 of a playground at `fps` frames a second."""
    eye = Eye(video)
    figures = Figures(eye, *find_cameras(eye))
    return put_together(figures, find_bodies(figures), fps)


def put_together(
    figures: Figures, bodies: list[Body], fps: float, near: np.ndarray | None = None
) -> Reading:
    """The reading of a take with these `bodies`.

    In frames that are `near` (T,) a body is trusted only where all of it is in the picture.
    """
    eye, place, camera = figures.eye, figures.index, figures.camera
    built, side, spot = find_built(figures)
    bodies = actor_first(bodies, built, side, spot, eye.room)
    if built == "pendulum" and bodies:
        side = 1 if filled(bodies[0].track)[0, 0] < spot else -1
    loose = loose_pixels(figures, built, side, spot, bodies[0] if bodies else None)
    tower = tower_heights(figures, loose, built)
    moved = []
    for number, body in enumerate(bodies):
        track = filled(body.track)
        motion = motion_of(track, form(body.look[0], body.look[2]), fps, place, built, number == 0)
        moved.append(dataclasses.replace(body, motion=motion))
    poured = loose.sum((1, 2)) if built == "pour" else np.zeros(len(camera))
    gravity = PLACES[PLACE_NAMES[place]].gravity
    count, frames = len(moved), len(camera)
    places, faces = np.zeros((frames, count, 2)), np.full((frames, count), -1)
    hidden = np.zeros(loose.shape, bool)  # pixels of bodies that are not trusted
    for number, body in enumerate(moved):
        cut_off = near & ~body.inside if near is not None else np.zeros(frames, bool)
        mine = (figures.owner == body.look[1]) & figures.close
        hidden |= cut_off[:, None, None] & mine
        track = np.where(cut_off[:, None], np.nan, body.track)
        places[:, number] = filled(body.track if np.isnan(track).all() else track)
        last = np.maximum.accumulate(np.where(cut_off, 0, np.arange(frames)))
        faces[:, number] = body.expression[last]
    sight = what.Sight(
        places, tuple(form(body.look[0], body.look[2]) for body in moved), faces,
        tuple(MOTIONS[body.motion] if body.motion >= 0 else "" for body in moved), built, side,
        spot, eye.room, gravity, fps, tower, poured / figures.scale**2,
    )  # fmt: skip
    strange, drift = unexplained(figures, moved, hidden, fps)
    kind = camera_kind(camera, [body.track for body in moved])
    return Reading(
        place, camera, kind, SETS.index(built), side, tower, poured, tuple(moved), strange, drift,
        what.find(sight),
    )  # fmt: skip


def motion_of(
    track: np.ndarray, shape: Any, fps: float, place: int, built: str, first: bool
) -> int:
    """Index into MOTIONS of how a character begins, by its track (T, 2); -1 for none of them."""
    if first and built == "pendulum":
        way = np.nanmean(track[1 : 1 + max(1, int(fps * 0.8)), 0]) - track[0, 0]
        return MOTIONS.index("swings_right" if way > 0 else "swings_left")
    gravity = PLACES[PLACE_NAMES[place]].gravity
    flight = what.landing(track, fps, gravity)
    # What flies falls by g t^2 / 2; on the floor, a ramp or a platform it cannot.
    span = min(flight, len(track), 2 + int(fps * 0.5 * math.sqrt(9.81 / gravity)))
    time = np.arange(span) / fps
    x, y = track[:span].T
    speed = (x[-1] - x[0]) / max(time[-1], 1e-9) if span > 1 else 0.0
    stands = bool(y[0] < shape.inner + SLACK)
    if first and built == "platform":
        stands = stands or abs(y[0] - PLATFORM_TOP - shape.inner) < SLACK
    if first and built == "ramp":
        stands = True
        few = track[: 2 + int(fps * 0.5)]
        speed = 1.2 * math.copysign(1.0, few[-1, 0] - few[0, 0])
    sideways = "left" if speed < 0 else "right"
    if stands:
        # Friction may stop it within a few frames.
        if not (first and built == "ramp"):
            spans = (2 + int(fps * 0.1), 2 + int(fps * 0.4))
            speed = max((_speed(track[:span, 0], fps) for span in spans), key=abs)
        sideways = "left" if speed < 0 else "right"
        return MOTIONS.index("rests" if abs(speed) < 0.6 else f"rolls_{sideways}")
    # A gentle touch may end its flight unseen: the first part is flight more surely.
    parts = (span, max(4, span * 2 // 3)) if span >= 4 else ()
    if parts and max(-2 * np.polyfit(time[:n], y[:n], 2)[0] for n in parts) < 0.4 * gravity:
        return -1  # it hangs in the air
    return MOTIONS.index("falls" if abs(speed) < 0.7 else f"thrown_{sideways}")


def _speed(x: np.ndarray, fps: float) -> float:
    """Of the first steps, m/s; 0 of one frame."""
    return float((x[-1] - x[0]) / (len(x) - 1) * fps) if len(x) > 1 else 0.0


def unexplained(
    figures: Figures, bodies: Sequence[Body], hidden: np.ndarray, fps: float
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """The share (T,) of pixels that nothing explains, and the drift of those that are explained;
    pixels that are `hidden` (T, H, W) do not count."""
    frames = len(figures.video)
    canvas = Canvas(figures.empty.copy(), figures.camera)
    for body in bodies:
        canvas.character(body.look, body.expression, figures.place, body.track, body.angle)
    off = figures.video - canvas.pictures
    around = ndimage.binary_dilation(figures.codes == BUILT_CODE, np.ones((1, 5, 5))) | hidden
    plain = (largest(off) < 2 * FAR) & ~around  # what fades is still what it was
    strange = ((largest(off) >= FAR) & ~around).mean((1, 2))
    if frames < 2:
        return strange, (0.0, 0.0, 0.0)
    time = (np.arange(frames) - (frames - 1) / 2) / fps

    def slope(values: np.ndarray) -> float:
        return float((values * time).sum() / np.square(time).sum())

    tint = []
    for channel in range(3):
        drawn = (canvas.pictures[..., channel] * plain).sum((1, 2))
        tint.append(slope((off[..., channel] * plain).sum((1, 2)) / np.maximum(drawn, 1.0)))
    ratios = []
    for measure in (_contrast, _sharpness):
        seen, drawn = (measure(x, plain) for x in (figures.video, canvas.pictures))
        ratios.append(slope(seen / np.maximum(drawn, 1e-3)))
    return strange, (max(tint, key=abs), *ratios)  # type: ignore[return-value]


def _contrast(picture: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Deviation (T,) of the pixels' brightness."""
    grey, count = picture.mean(3), np.maximum(plain.sum((1, 2)), 1)
    mean = (grey * plain).sum((1, 2)) / count
    return np.sqrt((np.square(grey - mean[:, None, None]) * plain).sum((1, 2)) / count)


def _sharpness(picture: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Deviation (T,) of the steps from pixel to pixel."""
    grey = picture.mean(3)
    step, both = np.diff(grey, axis=2), plain[..., 1:] & plain[..., :-1]
    return np.sqrt((np.square(step) * both).sum((1, 2)) / np.maximum(both.sum((1, 2)), 1))
