"""What solids of all worlds have in common: names, colours, and outlines.

Dimension key: E sides of a polygon.
"""

import math
from typing import NamedTuple

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
    normals: tuple[tuple[float, float], ...]  # outward, of the sides
    distances: tuple[float, ...]  # from the centroid to the sides
    outer: float  # to the farthest point
    inner: float  # radius of the inscribed circle
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
    return Form(0.0, corners, tuple(normals), tuple(distances), outer, min(distances), area)


def disc(radius: float) -> Form:
    """The form of a circle."""
    return Form(radius, (), (), (), radius, radius, math.pi * radius**2)


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
