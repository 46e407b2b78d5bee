"""What solids of all worlds have in common: names, colours, outlines, how they are drawn
and simulated.

Dimension key: M pictures, K window side in pixels, E sides of a polygon.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pymunk

SHAPES = ("ball", "box", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
LOOKS = {"colour": len(COLOURS), "shape": len(SHAPES), "size": len(SIZES)}  # kinds of each
PALETTE = (  # RGB, in the order of COLOURS
    (220, 20, 36), (22, 150, 52), (24, 72, 230), (255, 226, 0), (150, 30, 190), (255, 128, 0),
)  # fmt: skip
BOX_HALF = 0.87  # half a box's side, in ball radii: the area is .96 of the ball's


class Form(NamedTuple):
    """A convex outline about its centroid at angle 0."""

    radius: float  # of a ball; 0 for a polygon
    corners: tuple[tuple[float, float], ...]  # counter-clockwise; () for a ball
    normals: np.ndarray  # (E, 2): outward, of the sides
    distances: np.ndarray  # (E,): from the centroid to the sides
    outer: float  # to the farthest point
    inner: float  # radius of the inscribed circle
    half: float  # sideways, when it stands on the floor
    floor: float  # down to the floor that it stands on
    area: float


def polygon(corners: tuple[tuple[float, float], ...]) -> Form:
    """The form of corners about the centroid, counter-clockwise."""
    sides = tuple(zip(corners, corners[1:] + corners[:1], strict=True))
    normals, distances = [], []
    for (ax, ay), (bx, by) in sides:
        length = math.hypot(bx - ax, by - ay)
        normals.append(((by - ay) / length, (ax - bx) / length))
        distances.append((by * ax - ay * bx) / length)
    # fsum: the last bit of sum is another one since Python 3.12.
    area = math.fsum(ax * by - ay * bx for (ax, ay), (bx, by) in sides) / 2
    outer = max(math.hypot(x, y) for x, y in corners)
    half, floor = max(x for x, _ in corners), -min(y for _, y in corners)
    return Form(0.0, corners, np.array(normals), np.array(distances), outer, min(distances), half,
                floor, area)  # fmt: skip


def disc(radius: float) -> Form:
    """The form of a circle."""
    none = np.empty(0)
    return Form(radius, (), none, none, radius, radius, radius, radius, math.pi * radius**2)


def block(width: float, height: float) -> Form:
    """The form of a rectangle."""
    x, y = width / 2, height / 2
    return polygon(((-x, -y), (x, -y), (x, y), (-x, y)))


def solid(shape: str, radius: float, triangle: float) -> Form:
    """The form of one of SHAPES; `triangle`: its circumradius, in radii of the ball."""
    if shape == "ball":
        return disc(radius)
    if shape == "box":
        return block(2 * BOX_HALF * radius, 2 * BOX_HALF * radius)
    turns, side = (math.pi * 7 / 6, math.pi * 11 / 6, math.pi / 2), triangle * radius
    return polygon(tuple((side * math.cos(turn), side * math.sin(turn)) for turn in turns))


def outside(
    form: Form, x_MK: np.ndarray, y_MK: np.ndarray, angle_M: np.ndarray, scale_M: np.ndarray
) -> np.ndarray:
    """Pixels (M, K, K) outside a form's outline, negative inside.

    x and y: of the pixels' middles from the centroid, y up; scale: pixels per metre.
    """
    if form.radius:
        distance = (x_MK * x_MK)[:, None, :] + (y_MK * y_MK)[:, :, None]
        np.sqrt(distance, out=distance)
        distance -= (scale_M * form.radius).astype(np.float32)[:, None, None]
        return distance
    # math's sine, not numpy's: the same bits with every numpy.
    turn = [(math.cos(value), math.sin(value)) for value in angle_M.tolist()]
    cos, sin = np.array(turn).reshape(-1, 2).T[..., None]
    nx, ny = form.normals.T[:, None]
    across = (cos * nx - sin * ny).astype(np.float32)[..., None] * x_MK[:, None]
    across -= (scale_M[:, None] * form.distances).astype(np.float32)[..., None]
    along = (sin * nx + cos * ny).astype(np.float32)[..., None] * y_MK[:, None]
    return (across[:, :, None, :] + along[..., None]).max(axis=1)


def cover(distance: np.ndarray) -> np.ndarray:
    """The share of each pixel that lies inside, by its middle's distance outside (overwritten)."""
    np.subtract(np.float32(0.5), distance, out=distance)
    np.maximum(distance, 0, out=distance)
    return np.minimum(distance, 1, out=distance)


def new_body(form: Form, mass: float, elasticity: float, friction: float, kind: int) -> pymunk.Body:
    """A body of one form, which is in no space yet."""
    if form.radius:
        body = pymunk.Body(mass, pymunk.moment_for_circle(mass, 0, form.radius))
        part: pymunk.Shape = pymunk.Circle(body, form.radius)
    else:
        body = pymunk.Body(mass, pymunk.moment_for_poly(mass, form.corners))
        part = pymunk.Poly(body, form.corners)
    part.elasticity, part.friction, part.collision_type = elasticity, friction, kind
    return body


def add_bodies(space: pymunk.Space, bodies: Sequence[pymunk.Body]) -> None:
    """Adds bodies and their shapes. Later bits depend on where the bodies are now."""
    space.add(*bodies, *(part for body in bodies for part in body.shapes))


def add_still(space: pymunk.Space, part: pymunk.Shape, elasticity: float, friction: float) -> None:
    """Adds what stands still."""
    part.elasticity, part.friction = elasticity, friction
    space.add(part)


def enclose(
    space: pymunk.Space, width: float, top: float, elasticity: float = 1.0, friction: float = 1.0
) -> pymunk.Shape:
    """Adds floor, walls and ceiling, thick, so that nothing tunnels out; returns the ceiling."""
    far = 1.0
    for a, b in (
        ((-far, -far), (width + far, -far)),
        ((-far, -far), (-far, top + far)),
        ((width + far, -far), (width + far, top + far)),
        ((-far, top + far), (width + far, top + far)),
    ):
        line = pymunk.Segment(space.static_body, a, b, far)
        add_still(space, line, elasticity, friction)
    return line


def substeps(fps: float, longest: float) -> tuple[int, float]:
    """The physics' steps in a frame, and their length: at most `longest` seconds."""
    count = max(1, math.ceil(1 / fps / longest - 1e-9))
    return count, 1 / fps / count
