"""How a playground's scene is drawn, and how pymunk moves it.

A scene is a place, something built (or nothing), perhaps a tower of blocks, and one to six
characters of different colours. The first is the actor: it rolls down the ramp, off the platform,
swings, or falls on the spring.

Dimension key: T frames, N characters, B blocks of the tower, G grains.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pymunk

from vdit.worlds.clips import Draws
from vdit.worlds.playground.cast import (
    BLOCK,
    BLOCK_DENSITY,
    BLOCKS,
    COLOURS,
    GRAIN,
    GRAIN_DENSITY,
    GRAIN_EVERY,
    GRAINS,
    MATERIAL_NAMES,
    MATERIALS,
    PIVOT,
    PLACE_NAMES,
    PLACES,
    PLATE,
    PLATFORM_DEPTH,
    PLATFORM_LENGTH,
    PLATFORM_TOP,
    RAMP_HEIGHT,
    RAMP_LENGTH,
    RESERVED,
    RESERVED_LOOKS,
    ROPE_LIFT,
    SETS,
    SHAPES,
    SPRING_RATE,
    SPRING_TOP,
    Form,
    Look,
    block,
    disc,
    form,
)

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
    """What there is at time 0."""

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
        return PLACES[self.place].gravity


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


def draw_looks(draws: Draws, count: int, held_out: bool) -> list[Look]:
    """Looks of `count` characters, no colour twice; held out: one of them is reserved."""
    looks: list[Look] = []
    large = 0.5 if count <= 2 else 0.2
    while len(looks) < count:
        if held_out and not looks:
            look = draws.pick(RESERVED_LOOKS)
        else:
            look = (
                draws.below(len(SHAPES)), draws.below(len(COLOURS)), int(draws.chance(large)),
                draws.below(len(MATERIALS)),
            )  # fmt: skip
            if not held_out and look in RESERVED:
                continue
        if all(look[1] != other[1] for other in looks):
            looks.append(look)
    return looks


def glides(look: Look) -> bool:
    """Whether friction does not stop it: a ball, or slippery."""
    return SHAPES[look[0]] == "ball" or MATERIAL_NAMES[look[3]] == "slippery"


def draw_scene(
    draws: Draws,
    count: int,
    width: float,
    top: float,
    held_out: bool,
    built: Sequence[str] = SETS,
    places: Sequence[str] = PLACE_NAMES,
    cast: Sequence[Look] = (),
) -> Scene:
    """Draws a scene of `count` characters with one of what may be `built`, in one of the `places`;
    the `cast` of another scene plays in this one too."""
    while True:
        place = draws.pick(places)
        plain = count > CROWD or draws.chance(0.35)
        what = "none" if plain and "none" in built else draws.pick(built)
        looks = list(cast) or draw_looks(draws, count, held_out)
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
    """The scene with its characters; None where they found no place."""
    actors: list[Actor] = []
    taken: list[tuple[float, float]] = []  # x of what stands on the floor, and half its width
    side, width = scene.side, scene.width

    def at(x: float) -> float:
        """x as measured from the side where the action begins."""
        return x if side > 0 else width - x

    target = at(min(4.4, width - 1.2))
    if scene.built == "spring":
        scene = scene._replace(spot=draws.pick((0.35, 0.5, 0.65)) * width)
    if scene.built == "pour":
        scene = scene._replace(
            spot=draws.pick((0.35, 0.5, 0.65)) * width,
            grains=tuple(draws.uniform(-0.5, 0.5) for _ in range(GRAINS)),
        )
    opening = _opening(draws, scene, looks[0], at, tower)
    if opening is not None:
        actors.append(opening)
    if scene.built == "pendulum" and opening is not None:
        target = at(width / 2 + opening.form.outer + 0.6)
        taken.append((width / 2, opening.form.outer))
    if scene.built in ("ramp", "platform"):
        taken.append((at(RAMP_LENGTH / 2), RAMP_LENGTH / 2 + 0.3))
    if scene.built == "spring":
        taken.append((scene.spot, PLATE[0] / 2 + 0.1))
    if tower:
        scene = scene._replace(tower=target)
        taken.append((target, BLOCK / 2 + 0.35))
    struck = opening is not None and not tower and scene.built in ("ramp", "pendulum", "none")
    for number, look in enumerate(looks[len(actors) :]):
        found = None
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
                found = new
                break
        if found is None:
            return None
        actors.append(found)
    if all(actor.motion == "rests" for actor in actors) and not scene.grains:
        return None
    return scene._replace(actors=tuple(actors))


def _opening(draws: Draws, scene: Scene, look: Look, at: Any, tower: bool) -> Actor | None:
    """The actor, where something is built for it or a tower stands."""
    shape, side = form(look[0], look[2]), scene.side
    sideways = "right" if side > 0 else "left"
    if scene.built == "ramp":
        turn = math.atan2(RAMP_HEIGHT, RAMP_LENGTH)
        lean = shape.inner * math.sin(turn)
        along = max(0.25, (shape.outer + 0.05 - lean) / math.cos(turn))
        x = at(along * math.cos(turn) + lean)
        y = RAMP_HEIGHT - along * math.sin(turn) + shape.inner * math.cos(turn) + 0.01
        speed = draws.uniform(0.8, 1.4)
        angle = 0.0 if shape.radius else -side * turn
        return Actor(look, f"rolls_{sideways}", x, y, side * speed * math.cos(turn),
                     -speed * math.sin(turn), angle, _spin(shape, side * speed))  # fmt: skip
    if scene.built == "platform":
        x, speed = shape.outer + draws.uniform(0.05, 0.3), draws.uniform(1.4, 2.4)
        y = PLATFORM_TOP + shape.inner + 0.005
        return Actor(
            look, f"rolls_{sideways}", at(x), y, side * speed, spin=_spin(shape, side * speed)
        )
    if scene.built == "pendulum":
        rope = PIVOT - shape.outer - ROPE_LIFT
        turn = math.asin(min(0.62, (scene.width / 2 - shape.outer - 0.08) / rope))
        x, y = scene.width / 2 - side * rope * math.sin(turn), PIVOT - rope * math.cos(turn)
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
    """Of a ball that rolls; what has sides slides."""
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


def _flies(
    draws: Draws, scene: Scene, look: Look, motion: str, low: float, side: int = 0
) -> Actor:
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
    scene: Scene,
    new: Actor,
    actors: Sequence[Actor],
    taken: Sequence[tuple[float, float]],
) -> bool:
    """Whether a character stays clear of the others for `FREE` seconds, and of what is built."""
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
    """Where an actor is, if nothing is in its way."""
    x, y = actor.x + actor.vx * time, actor.y
    if actor.motion == "falls" or actor.motion.startswith("thrown"):
        y = max(actor.form.inner, y + (actor.vy - scene.gravity / 2 * time) * time)
    return x, y


# ---- moving ---------------------------------------------------------------------------------


def _body(
    space: pymunk.Space, shape: Form, mass: float, elasticity: float, friction: float, kind: int
) -> pymunk.Body:
    """A free body of one shape in the space."""
    if shape.radius:
        body = pymunk.Body(mass, pymunk.moment_for_circle(mass, 0, shape.radius))
        part: pymunk.Shape = pymunk.Circle(body, shape.radius)
    else:
        body = pymunk.Body(mass, pymunk.moment_for_poly(mass, shape.corners))
        part = pymunk.Poly(body, shape.corners)
    part.elasticity, part.friction, part.collision_type = elasticity, friction, kind
    space.add(body, part)
    return body


def _still(space: pymunk.Space, shape: pymunk.Shape) -> None:
    shape.elasticity = shape.friction = 1.0
    space.add(shape)


def _build(space: pymunk.Space, scene: Scene) -> None:
    """Floor, walls and ceiling (thick, so that nothing tunnels out), and what stands still."""
    width, top, far, still = scene.width, scene.top, 1.0, space.static_body
    for a, b in (
        ((-far, -far), (width + far, -far)),
        ((-far, -far), (-far, top + far)),
        ((width + far, -far), (width + far, top + far)),
        ((-far, top + far), (width + far, top + far)),
    ):
        _still(space, pymunk.Segment(still, a, b, far))
    wall, side = (0.0, 1) if scene.side > 0 else (width, -1)
    if scene.built == "ramp":
        corners = [(wall, 0.0), (wall, RAMP_HEIGHT), (wall + side * RAMP_LENGTH, 0.0)]
        _still(space, pymunk.Poly(still, corners))
    if scene.built == "platform":
        low, edge = PLATFORM_TOP - PLATFORM_DEPTH, wall + side * PLATFORM_LENGTH
        corners = [(wall, low), (wall, PLATFORM_TOP), (edge, PLATFORM_TOP), (edge, low)]
        _still(space, pymunk.Poly(still, corners))


def simulate(scene: Scene, frames: int, fps: float) -> Run:
    """Moves the scene for `frames` frames.

    pymunk's steps move first and accelerate then: what flies starts half a step's fall faster, so
    that its places are exact, and has that taken from the velocities that are told.
    """
    substeps = max(1, math.ceil(1 / fps / STEP - 1e-9))
    step = 1 / fps / substeps
    kick = scene.gravity * step / 2
    space = pymunk.Space()
    space.gravity, space.collision_slop, space.iterations = (0.0, -scene.gravity), 0.003, 20
    _build(space, scene)
    bodies = []
    for actor in scene.actors:
        shape, stuff = actor.form, MATERIALS[MATERIAL_NAMES[actor.look[3]]]
        body = _body(space, shape, stuff.density * shape.area, stuff.elasticity, stuff.friction, 1)
        flies = actor.motion == "falls" or actor.motion.startswith("thrown")
        body.position = actor.x, actor.y
        body.velocity = actor.vx, actor.vy - (kick if flies else 0.0)
        body.angle, body.angular_velocity = actor.angle, actor.spin
        bodies.append(body)
    blocks = []
    if scene.tower:
        for level in range(BLOCKS):
            mass = BLOCK_DENSITY * BLOCK**2
            body = _body(space, block(BLOCK, BLOCK), mass, 0.2, 0.7, 2)
            body.position = scene.tower, BLOCK * (level + 0.5)
            blocks.append(body)
    plate = _spring(space, scene, bodies[0].mass) if scene.built == "spring" else None
    if scene.built == "pendulum":
        space.add(pymunk.PinJoint(space.static_body, bodies[0], (scene.spot, PIVOT), (0, 0)))
    numbers = {body: number for number, body in enumerate(bodies)}
    touches: list[tuple[int, int, int]] = []
    seen: set[tuple[int, int]] = set()
    frame, deepest = 0, 0.0

    def begin(arbiter: pymunk.Arbiter, space: pymunk.Space, data: Any) -> None:
        one, two = (numbers[body] for body in arbiter.bodies)
        for pair in ((one, two), (two, one)):
            if pair not in seen:
                seen.add(pair)
                touches.append((frame, *pair))

    def touch(arbiter: pymunk.Arbiter, space: pymunk.Space, data: Any) -> None:
        for body in arbiter.bodies:
            if body in numbers:
                touched[numbers[body]] = True

    def lies(arbiter: pymunk.Arbiter, number: int) -> None:
        nonlocal deepest
        touched[number] = True
        points = arbiter.contact_point_set.points
        deepest = max([deepest, *(-point.distance for point in points)])

    def strike(arbiter: pymunk.Arbiter, space: pymunk.Space, data: Any) -> None:
        one = next(numbers[body] for body in arbiter.bodies if body in numbers)
        if (one, -1) not in seen:
            seen.add((one, -1))
            touches.append((frame, one, -1))

    space.on_collision(1, 1, begin=begin)
    space.on_collision(1, 2, begin=strike)
    space.on_collision(1, None, begin=touch)
    grains: list[pymunk.Body] = []
    touched = [actor.motion in ("rests",) or actor.motion.startswith("rolls")
               for actor in scene.actors]  # fmt: skip
    rows: list[list[float]] = []
    others = np.full((frames, len(blocks), 3), np.nan)
    poured = np.full((frames, len(scene.grains), 2), np.nan)
    plates, contact = np.zeros(frames), np.zeros((frames, len(bodies)), bool)
    energy = np.zeros(frames)
    for frame in range(frames):
        for number in range(substeps if frame else 0):
            time = (frame - 1) / fps + number * step
            while len(grains) < len(scene.grains) and len(grains) * GRAIN_EVERY <= time:
                mass = GRAIN_DENSITY * math.pi * GRAIN**2
                body = _body(space, disc(GRAIN), mass, 0.2, 0.4, 3)
                body.position = scene.spot, scene.top - 0.5
                body.velocity = scene.grains[len(grains)], -2.0
                grains.append(body)
            space.step(step)
        for number, body in enumerate(bodies if frame else ()):
            body.each_arbiter(lies, number)
        total = []
        for body in (*bodies, *blocks, *grains):
            x, y, vx, vy = *body.position, *body.velocity
            if body in numbers:
                vy += 0.0 if touched[numbers[body]] or scene.built == "pendulum" else kick
                rows.append([x, y, vx, vy, body.angle])
            spin = body.moment * body.angular_velocity**2 / 2
            total.append(body.mass * ((vx * vx + vy * vy) / 2 + scene.gravity * y) + spin)
        energy[frame] = math.fsum(total)
        contact[frame] = touched
        touched = [False] * len(bodies)
        others[frame] = [[*body.position, body.angle] for body in blocks] or others[frame]
        for number, body in enumerate(grains):
            poured[frame, number] = body.position
        if plate is not None:
            plates[frame] = plate.position.y + PLATE[1] / 2
    table = np.array(rows).reshape(frames, len(bodies), 5)
    return Run(
        table[..., :2], table[..., 2:4], table[..., 4], contact, others, poured, plates, touches,
        energy, deepest,
    )  # fmt: skip


def _spring(space: pymunk.Space, scene: Scene, mass: float) -> pymunk.Body:
    """A plate on a spring that swings at `SPRING_RATE` with the actor on it."""
    body = pymunk.Body(mass * 0.1, math.inf)
    part = pymunk.Poly.create_box(body, PLATE)
    part.elasticity, part.friction, part.collision_type = 0.0, 1.0, 4
    height = SPRING_TOP - PLATE[1] / 2
    body.position = scene.spot, height
    space.add(body, part)
    still = space.static_body
    rate = mass * 1.1 * SPRING_RATE**2
    sag = body.mass * scene.gravity / rate  # so that it rests at its height
    space.add(pymunk.GrooveJoint(still, body, (scene.spot, 0.25), (scene.spot, height), (0, 0)))
    rest = height + sag
    damping = mass * SPRING_RATE / 9
    space.add(pymunk.DampedSpring(still, body, (scene.spot, 0), (0, 0), rest, rate, damping))
    return body
