"""`World`: captioned physics clips as an endless, deterministic random-access source for grain."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vdit.data.labels import Classed
from vdit.errors import UserError
from vdit.worlds.bodies.caption import caption
from vdit.worlds.bodies.physics import (
    GRAVITY,
    MAX_OBJECTS,
    ROOM,
    Kind,
    Run,
    View,
    draw_scene,
    form,
    simulate,
)
from vdit.worlds.bodies.questions import by_truth
from vdit.worlds.bodies.render import render
from vdit.worlds.clips import Clips, clip_options, versions
from vdit.worlds.forms import LOOKS
from vdit.worlds.truth import in_picture

VERSION = 1  # of the clips: another one, other bytes


@dataclasses.dataclass(eq=False)
class World(Clips):
    """Clips of one or two bodies in a room: {"video": uint8 (T, H, W, 3), "caption": str,
    "truth": dict}.

    The truth's arrays, with N = MAX_OBJECTS, padded with -1 (the four kinds of index) or 0:

    - count int32 (); shape, colour, size, motion int32 (N,): indices into SHAPES, COLOURS, ...
    - position (metres), velocity (m/s) float32 (T, N, 2), x right, y up, the floor's top at 0;
      angle float32 (T, N), radians, counter-clockwise
    - contact bool (T, N): touched anything since the frame before (frame 0: lies on the floor)
    - gravity float32 (), m/s^2

    Falling and thrown objects fly freely for `physics.FREE` seconds at least: five frames at the
    default rate. "heldout" clips each hold an object of a `RESERVED` kind, "train" clips never do.
    """

    digest = versions("world", VERSION)

    def clip(self, index: int) -> dict[str, Any]:
        draws, view, (low, high) = self.draws(index), View(*self.size), self.objects
        count = low + draws.below(high - low + 1)
        starts = draw_scene(draws, count, view, self.split == "heldout")
        run = simulate(starts, self.frames, self.fps, view)
        kinds = [start.kind for start in starts]
        return {
            "video": render(kinds, run.position, run.angle, view),
            "caption": caption(draws, starts, run, view),
            "truth": truth_of(kinds, run),
        }


def truth_of(kinds: Sequence[Kind], run: Run) -> dict[str, np.ndarray]:
    """The truth's arrays, padded to MAX_OBJECTS."""
    frames, count = run.angle.shape
    index = np.full((4, MAX_OBJECTS), -1, np.int32)
    index[:, :count] = np.array(kinds).T
    states = np.zeros((2, frames, MAX_OBJECTS, 2), np.float32)
    states[0, :, :count], states[1, :, :count] = run.position, run.velocity
    angle = np.zeros((frames, MAX_OBJECTS), np.float32)
    angle[:, :count] = run.angle
    contact = np.zeros((frames, MAX_OBJECTS), bool)
    contact[:, :count] = run.contact
    return {
        "count": np.array(count, np.int32),
        "shape": index[0],
        "colour": index[1],
        "size": index[2],
        "motion": index[3],
        "position": states[0],
        "velocity": states[1],
        "angle": angle,
        "contact": contact,
        "gravity": np.array(GRAVITY, np.float32),
    }


def picture_truth(clip: Mapping[str, Any]) -> np.ndarray:
    """What a clip of `World` or `Shots` shows of its bodies: see `DataSource.truth`."""
    rest = None if "camera" in clip["truth"] else View(*clip["video"].shape[1:3]).camera
    return in_picture(clip, ROOM, form, LOOKS, rest)


def make(config: ConfigDict, split: str, workdir: Path, **options: Any) -> World | Classed:
    """The source `world`."""
    del workdir
    world = World(config.seed, split, **clip_options(config, options))
    return by_truth(world, config.data.label) if config.data.label else world


def check(config: ConfigDict) -> None:
    """Refuses classes and questions where a clip may have two bodies."""
    objects = tuple(config.data.objects)
    if objects != (1, 1) and config.data.label:
        raise UserError(
            f"data.objects is {objects}: (1, 1) is allowed with data.label, which is of one body"
        )
    if objects != (1, 1) and "classify" in config.stages:
        raise UserError(
            f"data.objects is {objects}: (1, 1) is allowed with the stage classify, whose labels"
            " are of one body"
        )
