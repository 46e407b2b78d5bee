"""Playgrounds: sampling of a scene, and its simulation by pymunk.

A scene is a place, a structure (or none), perhaps a tower, and one to six characters of different
colours. The first is the actor: it rolls down the ramp, off the platform, swings, or falls on the
spring.

Dimension key: T frames, N characters, B blocks of the tower, G grains.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pymunk

from vdit.worlds.clips import Draws, draw_looks
from vdit.worlds.forms import Form, add_bodies, add_still, block, disc, enclose, new_body, substeps
from vdit.worlds.playground import cast
from vdit.worlds.playground.cast import Look, form

STEP = 1 / 120  # seconds: no physics step is longer
FREE = 0.42  # seconds in which characters that fly or roll at the start stay clear of each other
GAP = 0.12  # metres between things at the start, at least
TRIES = 30  # places drawn for a character before the scene is drawn anew
EARLY = tuple(FREE * part / 3 for part in range(4))
CROWD = 4  # characters at most where something is built


class Actor(NamedTuple):
    """A character at time 0: its look, its motion's name, position, velocity, angle and spin."""

    look: Look
    motion: str
    x: float
    y: float
    vx: float = 0.0
    vy: float = 0.0
    angle: float = 0.0
    spin: float = 0.0

    @property
    def form(self) -> Form:
        return form(self.look[0], self.look[2])


class Scene(NamedTuple):
    """The state at time 0."""

    place: str
    built: str  # of SETS
    side: int  # 1: the action goes to the right
    spot: float  # x of pivot, spring or spout
    tower: float  # x of the tower's middle, 0 for none
    actors: tuple[Actor, ...]
    width: float  # metres between the walls
    top: float  # metres from floor to ceiling
    grains: tuple[float, ...] = ()  # sideways speeds of what pours

    @property
    def gravity(self) -> float:
        return cast.PLACES[self.place].gravity


class Run(NamedTuple):
    """The states at each frame (float64), NaN for grains that are not there yet."""

    position: np.ndarray  # (T, N, 2)
    velocity: np.ndarray  # (T, N, 2)
    angle: np.ndarray  # (T, N)
    contact: np.ndarray  # (T, N) bool: touched anything since the frame before
    blocks: np.ndarray  # (T, B, 3): x, y, angle
    grains: np.ndarray  # (T, G, 2)
    plate: np.ndarray  # (T,): height of the top of the spring's plate; 0 without
    touches: list[tuple[int, int, int]]  # n first touched m (-1: the tower) just before frame
    energy: np.ndarray  # (T,) joules: of all that moves, without what the spring holds
    depth: float  # metres that a character was ever inside something at a frame, at most


def glides(look: Look) -> bool:
    """Whether it rolls or slides far: a ball, or slippery."""
    return cast.SHAPES[look[0]] == "ball" or cast.MATERIAL_NAMES[look[3]] == "slippery"


def draw_scene(
    draws: Draws, count: int, width: float, top: float, held_out: bool,
    built: Sequence[str] = cast.SETS, places: Sequence[str] = cast.PLACE_NAMES,
    characters: Sequence[Look] = ()
) -> Scene:  # fmt: skip
    """Draws a scene of `count` characters; `characters` fixes their looks."""
    large = 0.5 if count <= 2 else 0.2

    def look() -> Look:
        shape, colour = draws.below(len(cast.SHAPES)), draws.below(len(cast.COLOURS))
        return shape, colour, int(draws.chance(large)), draws.below(len(cast.MATERIALS))

    while True:
        place = draws.pick(places)
        plain = count > CROWD or draws.chance(0.35)
        what = "none" if plain and "none" in built else draws.pick(built)
        looks = list(characters) or draw_looks(draws, count, held_out, cast.RESERVED_LOOKS, look)
        if draws.chance(0.5):
            looks.reverse()
        tower = count <= CROWD and what in ("none", "ramp", "pendulum") and draws.chance(0.5)
        side = 1 if draws.chance(0.5) else -1
        if what in ("ramp", "platform") or (tower and what == "none"):
            gliding = [look for look in looks if glides(look)]
            if not gliding:
                continue
            looks.remove(gliding[0])
            looks.insert(0, gliding[0])
        scene = Scene(place, what, side, width / 2, 0.0, (), width, top)
        made = _fill(draws, scene, looks, tower)
        if made:
            return made


def _fill(draws: Draws, scene: Scene, looks: Sequence[Look], tower: bool) -> Scene | None:
    """The scene with its characters; None if no free places were drawn."""
    actors: list[Actor] = []
    taken: list[tuple[float, float]] = []  # x of what stands on the floor, and half its width
    side, width = scene.side, scene.width

    def at(x: float) -> float:
        """x as measured from the side where the action begins."""
        return x if side > 0 else width - x

    target = at(min(4.4, width - 1.2))
    if scene.built in ("spring", "pour"):
        scene = scene._replace(spot=draws.pick((0.35, 0.5, 0.65)) * width)
    if scene.built == "pour":
        speeds = tuple(draws.uniform(-0.5, 0.5) for _ in range(cast.GRAINS))
        scene = scene._replace(grains=speeds)
    opening = _opening(draws, scene, looks[0], at, tower)
    if opening is not None:
        actors.append(opening)
    if scene.built == "pendulum" and opening is not None:
        target = at(width / 2 + opening.form.outer + 0.6)
        taken.append((width / 2, opening.form.outer))
    if scene.built in ("ramp", "platform"):
        taken.append((at(cast.RAMP_LENGTH / 2), cast.RAMP_LENGTH / 2 + 0.3))
    if scene.built == "spring":
        taken.append((scene.spot, cast.PLATE[0] / 2 + 0.1))
    if tower:
        scene = scene._replace(tower=target)
        taken.append((target, cast.BLOCK / 2 + 0.35))
    struck = opening is not None and not tower and scene.built in ("ramp", "pendulum", "none")
    for number, look in enumerate(looks[len(actors) :]):
        for _ in range(TRIES):
            if struck and number == 0:
                # What swings meets it where it is lowest.
                hang = actors[0].form.outer + form(look[0], look[2]).outer + GAP
                swung = scene.built == "pendulum"
                new = _rest(look, at(width / 2 + hang) if swung else target)
            elif scene.built == "none" and not tower:
                new = _moves(draws, scene, look)
            elif draws.chance(0.5):
                new = _rest(look, draws.uniform(0.0, width))
            else:
                new = _flies(draws, scene, look, "falls", GAP)
            spare = [] if struck and number == 0 else taken
            if _clear(scene, new, actors, spare):
                break
        else:
            return None
        actors.append(new)
    if all(actor.motion == "rests" for actor in actors) and not scene.grains:
        return None
    return scene._replace(actors=tuple(actors))


def _opening(draws: Draws, scene: Scene, look: Look, at: Any, tower: bool) -> Actor | None:
    """The actor that uses the structure or runs into the tower, if there is one."""
    shape, side = form(look[0], look[2]), scene.side
    sideways = "right" if side > 0 else "left"
    if scene.built == "ramp":
        turn = math.atan2(cast.RAMP_HEIGHT, cast.RAMP_LENGTH)
        lean = shape.inner * math.sin(turn)
        along = max(0.25, (shape.outer + 0.05 - lean) / math.cos(turn))
        x = at(along * math.cos(turn) + lean)
        y = cast.RAMP_HEIGHT - along * math.sin(turn) + shape.inner * math.cos(turn) + 0.01
        speed = draws.uniform(0.8, 1.4)
        angle = 0.0 if shape.radius else -side * turn
        return Actor(look, f"rolls_{sideways}", x, y, side * speed * math.cos(turn),
                     -speed * math.sin(turn), angle, _spin(shape, side * speed))  # fmt: skip
    if scene.built == "platform":
        x, speed = shape.outer + draws.uniform(0.05, 0.3), draws.uniform(1.4, 2.4)
        y = cast.PLATFORM_TOP + shape.inner + 0.005
        return Actor(
            look, f"rolls_{sideways}", at(x), y, side * speed, spin=_spin(shape, side * speed)
        )
    if scene.built == "pendulum":
        rope = cast.PIVOT - shape.outer - cast.ROPE_LIFT
        turn = math.asin(min(0.62, (scene.width / 2 - shape.outer - 0.08) / rope))
        x, y = scene.width / 2 - side * rope * math.sin(turn), cast.PIVOT - rope * math.cos(turn)
        return Actor(look, f"swings_{sideways}", x, y)
    if scene.built == "spring":
        y = draws.uniform(scene.top - 2.2, scene.top - shape.outer - 0.1)
        return Actor(look, "falls", scene.spot + draws.uniform(-0.05, 0.05), y)
    if tower:
        x, speed = shape.outer + draws.uniform(0.05, 0.4), draws.uniform(2.4, 3.4)
        return Actor(look, f"rolls_{sideways}", at(x), shape.inner, side * speed,
                     spin=_spin(shape, side * speed))  # fmt: skip
    return None


def _spin(shape: Form, speed: float) -> float:
    """Angular velocity of a rolling ball; polygons slide."""
    return -speed / shape.radius if shape.radius else 0.0


def _rest(look: Look, x: float) -> Actor:
    return Actor(look, "rests", x, form(look[0], look[2]).inner)


def _moves(draws: Draws, scene: Scene, look: Look) -> Actor:
    """A character of an open scene with any motion."""
    motion = draws.pick(("rests", "falls", "falls", "thrown", "rolls"))
    shape = form(look[0], look[2])
    if motion == "rests":
        return _rest(look, draws.uniform(0.0, scene.width))
    if motion == "falls":
        return _flies(draws, scene, look, "falls", 1.1)
    side = 1 if draws.chance(0.5) else -1
    sideways = "right" if side > 0 else "left"
    if motion == "thrown":
        return _flies(draws, scene, look, f"thrown_{sideways}", 1.1, side)
    speed = side * (draws.uniform(1.6, 3.0) if glides(look) else draws.uniform(2.4, 3.4))
    low = shape.outer + GAP
    x = draws.uniform(low, scene.width - low - abs(speed) * FREE)
    x = x if side > 0 else scene.width - x
    return Actor(look, f"rolls_{sideways}", x, shape.inner, speed, spin=_spin(shape, speed))


def _flies(draws: Draws, scene: Scene, look: Look, motion: str, low: float, side: int = 0) -> Actor:
    """A character in the air, at least `low` above the floor, thrown where it has a side."""
    shape = form(look[0], look[2])
    vx = draws.uniform(1.4, 2.6) if side else 0.0
    vy = draws.uniform(0.0, 1.5) if side else 0.0
    edge = shape.outer + GAP
    x = draws.uniform(edge, scene.width - edge - vx * FREE)
    x = scene.width - x if side < 0 else x
    high = scene.top - shape.outer - vy * vy / (2 * scene.gravity)
    floor = max(low, scene.gravity / 2 * FREE**2 + GAP - vy * FREE) + shape.outer
    y = draws.uniform(min(floor, high), high)
    turns = not shape.radius
    angle, spin = (draws.uniform(-0.3, 0.3), draws.uniform(-1, 1)) if turns else (0.0, 0.0)
    return Actor(look, motion, x, y, side * vx, vy, angle, spin)


def _clear(
    scene: Scene, new: Actor, actors: Sequence[Actor], taken: Sequence[tuple[float, float]]
) -> bool:
    """Whether a character stays clear of the others for `FREE` seconds, and of structures."""
    shape = new.form
    if not shape.outer + GAP <= new.x <= scene.width - shape.outer - GAP:
        return False
    if new.y > scene.top - shape.inner:
        return False
    if any(abs(new.x - x) < half + shape.outer + GAP for x, half in taken):
        return False
    for other in actors:
        need = shape.outer + other.form.outer + GAP
        for time in EARLY:
            (ax, ay), (bx, by) = _path(scene, new, time), _path(scene, other, time)
            if (ax - bx) ** 2 + (ay - by) ** 2 < need * need:
                return False
    return True


def _path(scene: Scene, actor: Actor, time: float) -> tuple[float, float]:
    """Where an actor is after `time` seconds without contacts."""
    x, y = actor.x + actor.vx * time, actor.y
    if actor.motion == "falls" or actor.motion.startswith("thrown"):
        y = max(actor.form.inner, y + (actor.vy - scene.gravity / 2 * time) * time)
    return x, y


def _build(space: pymunk.Space, scene: Scene) -> None:
    """Floor, walls and ceiling, ramp or platform."""
    width, still = scene.width, space.static_body
    enclose(space, width, scene.top)
    wall, side = (0.0, 1) if scene.side > 0 else (width, -1)
    if scene.built == "ramp":
        corners = [(wall, 0.0), (wall, cast.RAMP_HEIGHT), (wall + side * cast.RAMP_LENGTH, 0.0)]
        add_still(space, pymunk.Poly(still, corners), 1.0, 1.0)
    if scene.built == "platform":
        low, edge = cast.PLATFORM_TOP - cast.PLATFORM_DEPTH, wall + side * cast.PLATFORM_LENGTH
        corners = [(wall, low), (wall, cast.PLATFORM_TOP), (edge, cast.PLATFORM_TOP), (edge, low)]
        add_still(space, pymunk.Poly(still, corners), 1.0, 1.0)


class _Contacts:
    """Who touches whom while a scene moves."""

    def __init__(self, space: pymunk.Space, scene: Scene, bodies: Sequence[pymunk.Body]) -> None:
        self.frame, self.depth = 0, 0.0
        self.numbers = {body: number for number, body in enumerate(bodies)}
        self.touches: list[tuple[int, int, int]] = []
        self.touched = [
            actor.motion == "rests" or actor.motion.startswith("rolls") for actor in scene.actors
        ]
        self._seen: set[tuple[int, int]] = set()
        space.on_collision(1, 1, begin=self._meet)
        space.on_collision(1, 2, begin=self._strike)
        space.on_collision(1, None, begin=self._touch)

    def _first(self, one: int, two: int) -> None:
        if (one, two) not in self._seen:
            self._seen.add((one, two))
            self.touches.append((self.frame, one, two))

    def _meet(self, arbiter: pymunk.Arbiter, space: pymunk.Space, data: Any) -> None:
        one, two = (self.numbers[body] for body in arbiter.bodies)
        self._first(one, two)
        self._first(two, one)

    def _strike(self, arbiter: pymunk.Arbiter, space: pymunk.Space, data: Any) -> None:
        self._first(next(self.numbers[b] for b in arbiter.bodies if b in self.numbers), -1)

    def _touch(self, arbiter: pymunk.Arbiter, space: pymunk.Space, data: Any) -> None:
        for body in arbiter.bodies:
            if body in self.numbers:
                self.touched[self.numbers[body]] = True

    def rest(self, arbiter: pymunk.Arbiter, number: int) -> None:
        """Notes a contact that lasts at the end of a frame."""
        self.touched[number] = True
        points = arbiter.contact_point_set.points
        self.depth = max([self.depth, *(-point.distance for point in points)])


def _characters(space: pymunk.Space, scene: Scene, kick: float) -> list[pymunk.Body]:
    """The characters' bodies; what flies starts faster downwards by `kick`."""
    bodies = []
    for actor in scene.actors:
        shape, stuff = actor.form, cast.MATERIALS[cast.MATERIAL_NAMES[actor.look[3]]]
        mass = stuff.density * shape.area
        body = new_body(shape, mass, stuff.elasticity, stuff.friction, 1)
        add_bodies(space, [body])
        flies = actor.motion == "falls" or actor.motion.startswith("thrown")
        body.position = actor.x, actor.y
        body.velocity = actor.vx, actor.vy - (kick if flies else 0.0)
        body.angle, body.angular_velocity = actor.angle, actor.spin
        bodies.append(body)
    return bodies


def _tower(space: pymunk.Space, scene: Scene) -> list[pymunk.Body]:
    """The blocks of a tower, if there is one."""
    blocks = []
    for level in range(cast.BLOCKS if scene.tower else 0):
        mass = cast.BLOCK_DENSITY * cast.BLOCK**2
        body = new_body(block(cast.BLOCK, cast.BLOCK), mass, 0.2, 0.7, 2)
        add_bodies(space, [body])
        body.position = scene.tower, cast.BLOCK * (level + 0.5)
        blocks.append(body)
    return blocks


def _pour(space: pymunk.Space, scene: Scene, grains: list[pymunk.Body], time: float) -> None:
    """Adds the grains that have come out of the spout at `time`."""
    while len(grains) < len(scene.grains) and len(grains) * cast.GRAIN_EVERY <= time:
        mass = cast.GRAIN_DENSITY * math.pi * cast.GRAIN**2
        body = new_body(disc(cast.GRAIN), mass, 0.2, 0.4, 3)
        add_bodies(space, [body])
        body.position = scene.spot, scene.top - 0.5
        body.velocity = scene.grains[len(grains)], -2.0
        grains.append(body)


def _energy(body: pymunk.Body, vy: float, gravity: float) -> float:
    """Joules of height, speed and spin of what moves upwards at `vy`."""
    vx, y = body.velocity.x, body.position.y
    spin = body.moment * body.angular_velocity**2 / 2
    return body.mass * ((vx * vx + vy * vy) / 2 + gravity * y) + spin


def simulate(scene: Scene, frames: int, fps: float) -> Run:
    """Moves the scene. pymunk's steps move first and accelerate then: what flies starts half a step
    ahead, so that its places are exact, and has that taken from its velocities afterwards."""
    steps, step = substeps(fps, STEP)
    kick = scene.gravity * step / 2
    space = pymunk.Space()
    space.gravity, space.collision_slop, space.iterations = (0.0, -scene.gravity), 0.003, 20
    _build(space, scene)
    bodies, blocks = _characters(space, scene, kick), _tower(space, scene)
    plate = _spring(space, scene, bodies[0].mass) if scene.built == "spring" else None
    if scene.built == "pendulum":
        space.add(pymunk.PinJoint(space.static_body, bodies[0], (scene.spot, cast.PIVOT), (0, 0)))
    contacts = _Contacts(space, scene, bodies)
    grains: list[pymunk.Body] = []
    states = np.empty((frames, len(bodies), 5))
    tower = np.full((frames, len(blocks), 3), np.nan)
    poured = np.full((frames, len(scene.grains), 2), np.nan)
    plates, contact = np.zeros(frames), np.zeros((frames, len(bodies)), bool)
    energy = np.zeros(frames)
    for frame in range(frames):
        contacts.frame = frame
        for number in range(steps if frame else 0):
            _pour(space, scene, grains, (frame - 1) / fps + number * step)
            space.step(step)
        joules = []
        for number, body in enumerate(bodies):
            if frame:
                body.each_arbiter(contacts.rest, number)
            late = 0.0 if contacts.touched[number] or scene.built == "pendulum" else kick
            vx, vy = body.velocity.x, body.velocity.y + late
            states[frame, number] = *body.position, vx, vy, body.angle
            joules.append(_energy(body, vy, scene.gravity))
        joules += [_energy(body, body.velocity.y, scene.gravity) for body in (*blocks, *grains)]
        energy[frame] = math.fsum(joules)
        contact[frame] = contacts.touched
        contacts.touched = [False] * len(bodies)
        for number, body in enumerate(blocks):
            tower[frame, number] = *body.position, body.angle
        for number, body in enumerate(grains):
            poured[frame, number] = body.position
        if plate is not None:
            plates[frame] = plate.position.y + cast.PLATE[1] / 2
    return Run(
        states[..., :2], states[..., 2:4], states[..., 4], contact, tower, poured, plates,
        contacts.touches, energy, contacts.depth,
    )  # fmt: skip


def _spring(space: pymunk.Space, scene: Scene, mass: float) -> pymunk.Body:
    """A plate on a spring that swings at `SPRING_RATE` with the actor on it."""
    body = pymunk.Body(mass * 0.1, math.inf)
    part = pymunk.Poly.create_box(body, cast.PLATE)
    part.elasticity, part.friction, part.collision_type = 0.0, 1.0, 4
    height = cast.SPRING_TOP - cast.PLATE[1] / 2
    body.position = scene.spot, height
    space.add(body, part)
    still = space.static_body
    rate = mass * 1.1 * cast.SPRING_RATE**2
    sag = body.mass * scene.gravity / rate  # so that it rests at its height
    space.add(pymunk.GrooveJoint(still, body, (scene.spot, 0.25), (scene.spot, height), (0, 0)))
    rest = height + sag
    damping = mass * cast.SPRING_RATE / 9
    space.add(pymunk.DampedSpring(still, body, (scene.spot, 0), (0, 0), rest, rate, damping))
    return body
