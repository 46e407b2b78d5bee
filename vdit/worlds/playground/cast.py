"""Constants of playgrounds: looks, materials, faces, places, cameras, and their numbers.

Metres, kilograms, seconds; x right, y up, the floor's top at y = 0, the left wall at x = 0.
"""

import functools
from typing import NamedTuple

from vdit.worlds.forms import COLOURS, SHAPES, SIZES, Form, solid

MAX_CHARACTERS = 6
ROOM = 6.4  # metres along the shorter side of a picture at zoom 1
FLOOR_DEPTH = 0.6  # metres of floor below y = 0 that a resting camera at zoom 1 sees
RADII = (0.55, 0.8)  # of the ball, by size
TRIANGLE = 1.62  # a triangle's circumradius, in ball radii
FACE_PIXELS = 64  # shorter side of a picture from which on characters have faces


class Material(NamedTuple):
    """Mass for each square metre, and restitution and friction of a contact with the floor."""

    density: float
    elasticity: float
    friction: float


MATERIALS = {
    "bouncy": Material(1.0, 0.85, 0.5),
    "heavy": Material(4.0, 0.3, 0.6),
    "slippery": Material(1.0, 0.3, 0.02),
    "soft": Material(0.5, 0.0, 0.9),
}
MATERIAL_NAMES = tuple(MATERIALS)
EXPRESSIONS = ("happy", "sad", "surprised", "angry", "asleep")


class Place(NamedTuple):
    """Gravity (m/s^2), RGB of sky or wall, skyline and floor, and the light on characters."""

    gravity: float
    sky: tuple[int, int, int]
    far: tuple[int, int, int]
    floor: tuple[int, int, int]
    light: tuple[float, float, float]


PLACES = {
    "day": Place(9.81, (156, 208, 238), (124, 176, 186), (92, 138, 66), (1.0, 1.0, 1.0)),
    "night": Place(9.81, (28, 30, 54), (56, 60, 92), (76, 80, 98), (0.8, 0.8, 0.9)),
    "indoors": Place(9.81, (212, 190, 162), (184, 156, 124), (92, 62, 44), (1.0, 0.96, 0.86)),
    "moon": Place(1.62, (6, 6, 12), (50, 50, 58), (150, 150, 152), (1.0, 1.0, 1.0)),
}
PLACE_NAMES = tuple(PLACES)
CAMERAS = (
    "static", "pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out", "follow",
    "shake",
)  # fmt: skip
FRAMINGS = ("whole", "wide", "close_left", "close", "close_right")  # of a shot
MOTIONS = (
    "rests", "falls", "thrown_left", "thrown_right", "rolls_left", "rolls_right", "swings_left",
    "swings_right",
)  # fmt: skip
SETS = ("none", "ramp", "platform", "pendulum", "spring", "pour")  # structures; a tower beside
EVENTS = (
    "lands", "rolls_down", "drops_off", "swings", "springs", "moved", "topples", "pours", "face",
)  # fmt: skip

Look = tuple[int, int, int, int]  # indices of shape, colour, size, material


# Looks that training never shows; every held-out clip has one of them. They are 24 of the 144: 4 of
# each colour, each material once, 8 of each shape, 12 of a size.
RESERVED: frozenset[Look] = frozenset(
    ((colour + material) % len(SHAPES), colour, (colour // 3 + material) % len(SIZES), material)
    for colour in range(len(COLOURS))
    for material in range(len(MATERIALS))
)
RESERVED_LOOKS = tuple(sorted(RESERVED))


@functools.cache
def form(shape: int, size: int) -> Form:
    """The form of a character."""
    return solid(SHAPES[shape], RADII[size], TRIANGLE)


# Structures, mirrored where they stand on the right.
RAMP_HEIGHT, RAMP_LENGTH = 1.9, 2.6
PLATFORM_TOP, PLATFORM_LENGTH, PLATFORM_DEPTH = 1.9, 2.5, 0.25
PIVOT = 4.8  # metres above the floor
ROPE_LIFT = 0.12  # metres between the lowest point of what swings and the floor
SPRING_TOP, PLATE = 0.9, (1.6, 0.2)  # the plate's top at rest; its width and height
SPRING_RATE = 11.0  # rad/s of what lies on the plate
BLOCK, BLOCKS = 0.55, 4  # a tower's blocks: side, number
BLOCK_DENSITY, GRAIN_DENSITY = 0.3, 0.5
GRAIN, GRAINS, GRAIN_EVERY = 0.17, 20, 0.07  # radius, number, seconds from one to the next
SPOUT = (0.9, 0.3)  # width, height
