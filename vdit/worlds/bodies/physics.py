"""The world's physics: kinds of objects, sampling of a scene, and its simulation by pymunk.

A scene is a room seen from the side; metres, x right, y up, the floor's top at y = 0. Everything
random comes from `Draws`, a counter-based stream of its own for each (seed, split, clip).

Dimension key: T frames, N objects, P polygon corners.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pymunk

from vdit.worlds.clips import Draws, draw_looks
from vdit.worlds.forms import (
    COLOURS,
    SHAPES,
    Form,
    add_bodies,
    enclose,
    new_body,
    solid,
    substeps,
)

MOTIONS = ("falls", "thrown_left", "thrown_right", "rolls_left", "rolls_right", "rests")
VERBS = tuple(  # of each motion: the verb and the direction
    (name.split("_")[0], -1.0 if name.endswith("left") else 1.0) for name in MOTIONS
)
MAX_OBJECTS = 2

GRAVITY = 9.81  # m/s^2, the same in every clip
ROOM = 5.0  # metres along the shorter side of the picture
FLOOR_DEPTH = 15 / 32  # metres of floor visible below y = 0
RADII = (3.4 * ROOM / 32, 5.6 * ROOM / 32)  # of the ball, in metres, by size
TRIANGLE = 1.38  # a triangle's circumradius, in ball radii: the area is .79 of the ball's

STEP = 1 / 80  # seconds: no physics step is longer
ELASTICITY, FLOOR_ELASTICITY = 0.75, 0.8  # of a pair: the product
FRICTION, FLOOR_FRICTION = 0.6, 0.3  # of a pair: the product
SLIDING = FRICTION * FLOOR_FRICTION * GRAVITY  # m/s^2 lost by what slides on the floor
FREE = 0.42  # seconds before an object touches anything but the floor that it is on
HORIZON = 1.4  # seconds in which objects that should meet, meet
MEETING = 0.75  # share of pairs that should; of them, some find no place in time
TRIES = 8  # places drawn for an object before all are placed anew
ROUNDS = 6  # times that all are placed anew before other kinds are drawn
GAP = 0.05  # metres between objects at the start, at least

Kind = tuple[int, int, int, int]  # indices of shape, colour, size, motion


# Held-out kinds: training never shows them, every held-out clip has one. 24 of the 216: 4 of each
# colour and motion, 8 of each shape, 12 of each size.
RESERVED: frozenset[Kind] = frozenset(
    ((2 * colour + turn) % 6 % 3, colour, (2 * colour + turn) % 6 // 3, (colour + offset) % 6)
    for colour in range(len(COLOURS))
    for turn, offset in enumerate((0, 1, 3, 4))
)
RESERVED_KINDS = tuple(sorted(RESERVED))


@dataclasses.dataclass(frozen=True)
class View:
    """How the room lies in a picture of `height` x `width` pixels.

    At zoom 1 the shorter side shows `ROOM` metres, and the edges but the lower one are walls and
    ceiling. The floor is seen to the same depth at every zoom. A pixel's middle is at (row + .5,
    column + .5); a point (x, y) lies at row (top - y) * scale, column (x - left) * scale.
    """

    height: int
    width: int
    zoom: float = 1.0
    left: float = 0.0  # metres from the left wall to the picture's left edge

    @functools.cached_property
    def scale(self) -> float:
        """Pixels per metre."""
        return min(self.height, self.width) / ROOM * self.zoom

    @functools.cached_property
    def room_width(self) -> float:
        """Metres between the walls."""
        return self.width / self.scale * self.zoom

    @functools.cached_property
    def top(self) -> float:
        """Height of the picture's upper edge (at zoom 1 the ceiling) above the floor, in metres."""
        return self.height / self.scale - FLOOR_DEPTH

    @functools.cached_property
    def right(self) -> float:
        """Metres from the left wall to the picture's right edge."""
        return self.left + self.width / self.scale

    @property
    def camera(self) -> tuple[float, float, float]:
        """x and y of the picture's middle in metres, and zoom."""
        return (self.left + self.right) / 2, self.top - self.height / self.scale / 2, self.zoom


@functools.cache
def form(shape: int, size: int) -> Form:
    """The outline of an object, in metres."""
    return solid(SHAPES[shape], RADII[size], TRIANGLE)


class State(NamedTuple):
    """Where an object is and how it moves: metres, m/s, radians."""

    x: float
    y: float
    vx: float
    vy: float
    angle: float


class Start(NamedTuple):
    """One object at time 0: its kind, position, velocity, angle and spin (rad/s)."""

    kind: Kind
    grounded: bool  # stands on the floor
    x: float
    y: float
    vx: float = 0.0
    vy: float = 0.0
    angle: float = 0.0
    spin: float = 0.0
    slowing: float = 0.0  # m/s^2, by friction

    @property
    def form(self) -> Form:
        return form(self.kind[0], self.kind[2])

    @property
    def motion(self) -> str:
        return MOTIONS[self.kind[3]]

    def at(self, time: float) -> State:
        """After `time` seconds, alone in an endless room without bounces."""
        angle = self.angle + self.spin * time
        if self.slowing:
            time = min(time, abs(self.vx) / self.slowing)
            vx = self.vx - math.copysign(self.slowing * time, self.vx)
            return State(self.x + (self.vx + vx) / 2 * time, self.y, vx, 0.0, angle)
        x = self.x + self.vx * time
        if self.grounded:
            return State(x, self.y, self.vx, 0.0, angle)
        y = self.y + (self.vy - GRAVITY / 2 * time) * time
        return State(x, max(self.form.floor, y), self.vx, self.vy - GRAVITY * time, angle)


def place(draws: Draws, kind: Kind, view: View) -> Start:
    """Draws a start at which `kind` does its motion, alone, for `FREE` seconds."""
    shape, _, size, motion = kind
    outline = form(shape, size)
    verb, side = VERBS[motion]
    width = view.room_width
    if verb == "rests":
        x = draws.uniform(outline.half + GAP, width - outline.half - GAP)
        return Start(kind, True, x, outline.floor)
    margin = outline.outer + GAP
    turns = SHAPES[shape] != "ball"
    if verb == "rolls":
        speed = draws.uniform(1.8, 3.2) if turns else draws.uniform(1.5, 3.0)
        x = draws.uniform(margin, width - margin - speed * FREE)
        x = x if side > 0 else width - x
        spin, slowing = (0.0, SLIDING) if turns else (-side * speed / outline.floor, 0.0)
        return Start(kind, True, x, outline.floor, side * speed, 0.0, 0.0, spin, slowing)
    vx, vy = 0.0, 0.0
    if verb == "thrown":
        vx, vy = draws.uniform(1.4, 2.8), draws.uniform(0.0, 2.5)
    low = margin + max(0.0, GRAVITY / 2 * FREE * FREE - vy * FREE)
    high = view.top - outline.outer - vy * vy / (2 * GRAVITY)
    x = draws.uniform(margin, width - margin - vx * FREE)
    x, y = x if side > 0 else width - x, draws.uniform(low, high)
    angle, spin = (draws.uniform(-0.3, 0.3), draws.uniform(-1, 1)) if turns else (0.0, 0.0)
    return Start(kind, False, x, y, side * vx, vy, angle, spin)


def _apart(one: Start, two: Start, times: Sequence[float], need: float) -> bool:
    """Whether two centroids stay `need` metres apart at all `times`, each on its own path."""
    for time in times:
        a, b = one.at(time), two.at(time)
        if (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < need * need:
            return False
    return True


def _clear(one: Start, two: Start) -> bool:
    """Whether two objects surely stay clear of each other for the first `FREE` seconds."""
    width = "half" if one.grounded and two.grounded else "outer"
    need = getattr(one.form, width) + getattr(two.form, width)
    return _apart(one, two, EARLY, need + GAP)


def _meet(one: Start, two: Start) -> bool:
    """Whether two objects are going to touch within `HORIZON`."""
    return not _apart(one, two, LATER, RADII[one.kind[2]] + RADII[two.kind[2]])


EARLY = tuple(FREE * part / 3 for part in range(4))
LATER = tuple(FREE + (HORIZON - FREE) * part / 7 for part in range(1, 8))


def draw_kinds(draws: Draws, count: int, held_out: bool) -> list[Kind]:
    """Kinds of `count` objects, no colour twice, not all at rest; held out: one is reserved."""

    def kind() -> Kind:
        return draws.below(3), draws.below(6), draws.below(2), draws.below(6)

    while True:
        kinds = draw_looks(draws, count, held_out, RESERVED_KINDS, kind)
        if count == 1 or any(MOTIONS[kind[3]] != "rests" for kind in kinds):
            if draws.chance(0.5):
                kinds.reverse()
            return kinds


def draw_scene(draws: Draws, count: int, view: View, held_out: bool) -> list[Start]:
    """Draws `count` objects that each do their labelled motion; many pairs are going to meet."""
    while True:
        starts = draw_places(draws, draw_kinds(draws, count, held_out), view)
        if starts:
            return starts


def draw_places(draws: Draws, kinds: Sequence[Kind], view: View) -> list[Start]:
    """Draws where objects of these kinds start; none of them where no place was found in time."""
    for _ in range(ROUNDS):
        starts: list[Start] = []
        for kind in kinds:
            meet = len(starts) == 1 and draws.chance(MEETING)
            found = _find(draws, kind, view, starts, meet)
            if found is None:
                break
            starts.append(found)
        else:
            return starts
    return []


def _find(
    draws: Draws, kind: Kind, view: View, others: Sequence[Start], meet: bool
) -> Start | None:
    """A place for `kind` clear of the others, if possible one where it will `meet` the first."""
    found = None
    for _ in range(TRIES):
        start = place(draws, kind, view)
        if all(_clear(start, other) for other in others):
            found = start
            if not meet or _meet(start, others[0]):
                break
    return found


class Meeting(NamedTuple):
    """Object `one` began to touch object `two` just before `frame`."""

    frame: int
    one: int
    two: int
    above: bool  # `one` came onto `two` from above


class Run(NamedTuple):
    """The state at each frame (float64) and who met whom, in order and from either side."""

    position: np.ndarray  # (T, N, 2)
    velocity: np.ndarray  # (T, N, 2)
    angle: np.ndarray  # (T, N)
    contact: np.ndarray  # (T, N) bool: touched anything since the frame before
    step: float  # seconds between two frames
    meetings: list[Meeting]


def _bodies(
    space: pymunk.Space, starts: Sequence[Start], time: float, kick: float
) -> list[pymunk.Body]:
    """Adds the objects, of density 1, as they are at `time`; what flies falls faster by `kick`."""
    bodies = []
    for start in starts:
        state = start.at(time)
        body = new_body(start.form, start.form.area, ELASTICITY, FRICTION, 1)
        body.position = state.x, state.y
        body.velocity = state.vx, state.vy - (0.0 if start.grounded else kick)
        body.angle, body.angular_velocity = state.angle, start.spin
        bodies.append(body)
    add_bodies(space, bodies)
    return bodies


def simulate(starts: Sequence[Start], frames: int, fps: float, view: View) -> Run:
    """Moves the scene for `frames` frames: by closed form while nothing meets, then by pymunk.

    pymunk's steps move first and accelerate then: velocities start half a step ahead, so free
    flight is exact at every step, and whatever departs from it has touched something.
    """
    count = len(starts)
    steps, step = substeps(fps, STEP)
    kick = GRAVITY * step / 2
    states: list[float] = []
    free = min(frames, int(FREE * fps + 1e-9) + 1)
    for frame in range(free):
        for start in starts:
            x, y, vx, vy, angle = start.at(frame / fps)
            states += (x, y, vx, vy if start.grounded else vy - kick, angle)

    space = pymunk.Space()
    space.gravity = (0.0, -GRAVITY)
    space.collision_slop = 0.005
    ceiling = enclose(space, view.room_width, view.top, FLOOR_ELASTICITY, FLOOR_FRICTION)
    ceiling.elasticity = ceiling.friction = 0.0
    bodies = _bodies(space, starts, (free - 1) / fps, kick)
    meetings: list[Meeting] = []
    frame = 0

    def begin(arbiter: pymunk.Arbiter, space: pymunk.Space, data: Any) -> None:
        one, two = (bodies.index(body) for body in arbiter.bodies)
        # The normal points from the first to the second: down where the first lies above.
        down = -arbiter.normal.y
        meetings.append(Meeting(frame, one, two, down > 0.6))
        meetings.append(Meeting(frame, two, one, down < -0.6))

    if count > 1:
        space.on_collision(1, 1, begin=begin)
    for frame in range(free, frames):  # noqa: B007 (begin reads it)
        for _ in range(steps):
            space.step(step)
        for body in bodies:
            states += (*body.position, *body.velocity, body.angle)
    table = np.array(states).reshape(frames, count, 5)
    position, velocity, angles = table[..., :2], table[..., 2:4], table[..., 4]

    contact = np.empty((frames, count), bool)
    contact[0] = [start.grounded for start in starts]
    straight = table[:-1, :, :4].copy()
    straight[..., :2] += velocity[:-1] / fps
    straight[..., 1] -= GRAVITY / 2 * (1 / fps - step) / fps
    straight[..., 3] -= GRAVITY / fps
    contact[1:] = (abs(table[1:, :, :4] - straight) > 1e-6).any(axis=2)
    # Take the head start back from what flies here; what lies on something has none.
    flies = ~contact
    flies[:-1] |= ~contact[1:]
    velocity[..., 1] += kick * flies
    velocity[0, :, 1] = [start.vy for start in starts]
    return Run(position, velocity, angles, contact, 1 / fps, meetings)
