"""The reading of a clip: camera, place, characters, structures, events, unexplained pixels.

Dimension key: T frames, H height, W width, N characters.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from vdit.worlds.forms import Form, block
from vdit.worlds.playground import cast
from vdit.worlds.playground import events as what
from vdit.worlds.playground.cast import MOTIONS, PLACE_NAMES, PLACES, SETS, form
from vdit.worlds.playground.oracle import camera as seen
from vdit.worlds.playground.oracle.bodies import Body, Figures, filled, find_bodies
from vdit.worlds.playground.oracle.camera import BUILT_CODE, FAR, NEAR, Eye, largest
from vdit.worlds.playground.physics import Scene
from vdit.worlds.playground.render import BUILT, Canvas, backdrop, built_parts, lit

WHITE = np.ones(3, np.float32)
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
    figures = Figures(eye, *seen.find_cameras(eye))
    return put_together(figures, find_bodies(figures), fps)


def put_together(
    figures: Figures, bodies: list[Body], fps: float, near: np.ndarray | None = None
) -> Reading:
    """The reading of a take with these `bodies`, each trusted in frames that are `near` (T,) only
    where all of it is in the picture."""
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
    kind = seen.camera_kind(camera, [body.track for body in moved])
    return Reading(
        place, camera, kind, SETS.index(built), side, tower, poured, tuple(moved), strange, drift,
        what.find(sight),
    )  # fmt: skip


def _stencil(
    parts: Sequence[tuple[Form, tuple[float, float]]], camera: np.ndarray, size: tuple[int, int]
) -> Canvas:
    """Things that stand still, white on black."""
    canvas = Canvas(np.zeros((len(camera), *size, 3), np.float32), camera)
    for shape, place in parts:
        canvas.thing(shape, WHITE, np.tile(place, (len(camera), 1)))
    return canvas


def find_built(figures: Figures) -> tuple[str, int, float]:
    """The structure in the first frame, its side and its x."""
    (height, width), room, camera = figures.eye.size, figures.eye.room, figures.camera[:1]
    bare = backdrop(figures.place, camera, height, width, room)[0]
    paint = lit(BUILT, figures.place)
    best = (0.6, "none", 1, room / 2)
    for name, side, part in itertools.product(SETS[1:], (1, -1), (0.35, 0.5, 0.65)):
        turned = name in ("ramp", "platform")
        if (turned and part != 0.5) or (not turned and side < 0):
            continue
        if name == "pendulum" and part != 0.5:
            continue
        scene = Scene(figures.place, name, side, part * room, 0.0, (), room, figures.eye.top)
        parts = built_parts(scene)
        if name == "spring":
            parts = [(block(*cast.PLATE), (scene.spot, cast.SPRING_TOP - cast.PLATE[1] / 2))]
        cover = _stencil(parts, camera, figures.eye.size).pictures[0, ..., :1]
        shown = largest(figures.video[0] - bare - cover * (paint - bare)) < NEAR
        there = cover[..., 0] > 0.7  # less could be the empty place as well
        if there.any():
            best = max(best, (float(shown[there].mean()), name, side, scene.spot))
    return best[1:]


def loose_pixels(
    figures: Figures, built: str, side: int, spot: float, actor: Body | None
) -> np.ndarray:
    """(T, H, W): pixels in the colour of structures that no static part explains."""
    still = Scene(figures.place, built, side, spot, 0.0, (), figures.eye.room, figures.eye.top)
    canvas = _stencil(built_parts(still), figures.camera, figures.eye.size)
    if built == "pendulum" and actor is not None:
        ends = np.nan_to_num(actor.track, nan=0.0) - (spot, cast.PIVOT)
        length = float(np.median(np.sqrt(np.square(ends).sum(1))))
        angle = np.arctan2(ends[:, 1], ends[:, 0])
        canvas.thing(block(length, 0.2), WHITE, ends / 2 + (spot, cast.PIVOT), angle)
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
        stands = stands or abs(y[0] - cast.PLATFORM_TOP - shape.inner) < SLACK
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
    """The share (T,) of pixels that nothing explains, and the others' drift; none are `hidden`."""
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
