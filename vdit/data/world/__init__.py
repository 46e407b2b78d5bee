"""The world: an endless, deterministic source of captioned physics clips."""

from vdit.data.world.render import BACKGROUND, FLOOR_COLOUR, PALETTE
from vdit.data.world.simulate import (
    COLOURS,
    FLOOR_DEPTH,
    GRAVITY,
    MAX_OBJECTS,
    MOTIONS,
    RADII,
    RESERVED,
    SHAPES,
    SIZES,
    View,
    corners,
)
from vdit.data.world.source import World

__all__ = [
    "BACKGROUND",
    "COLOURS",
    "FLOOR_COLOUR",
    "FLOOR_DEPTH",
    "GRAVITY",
    "MAX_OBJECTS",
    "MOTIONS",
    "PALETTE",
    "RADII",
    "RESERVED",
    "SHAPES",
    "SIZES",
    "View",
    "World",
    "corners",
]
