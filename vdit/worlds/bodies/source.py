"""`World`: captioned physics clips as an endless, deterministic random-access source for grain."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vdit.data.labels import Classed, Question, Truth
from vdit.data.loader import Source
from vdit.errors import UserError
from vdit.worlds.bodies import physics
from vdit.worlds.bodies.caption import caption
from vdit.worlds.bodies.physics import GRAVITY, MAX_OBJECTS, MOTIONS, Kind, Run, View
from vdit.worlds.bodies.render import render
from vdit.worlds.clips import Clips, clip_options, padded, versions
from vdit.worlds.forms import COLOURS, LOOKS, SHAPES, SIZES
from vdit.worlds.truth import Camera, covered, in_picture

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
        draws, view = self.draws(index), View(*self.size)
        starts = physics.draw_scene(draws, self.count(draws), view, self.split == "heldout")
        run = physics.simulate(starts, self.frames, self.fps, view)
        kinds = [start.kind for start in starts]
        return {
            "video": render(kinds, run.position, run.angle, view),
            "caption": caption(draws, starts, run, view),
            "truth": truth_of(kinds, run),
        }


def truth_of(kinds: Sequence[Kind], run: Run) -> dict[str, np.ndarray]:
    """The truth's arrays, padded to MAX_OBJECTS."""
    count, looks = len(kinds), np.array(kinds).T
    names, moving = ("shape", "colour", "size", "motion"), ("position", "velocity", "angle")

    def each(values: np.ndarray, fill: int, dtype: type) -> np.ndarray:
        return padded(values, count, MAX_OBJECTS, fill, dtype)

    return {
        "count": np.array(count, np.int32),
        **{name: each(row, -1, np.int32) for name, row in zip(names, looks, strict=True)},
        **{name: each(getattr(run, name), 0, np.float32) for name in moving},
        "contact": each(run.contact, 0, np.bool_),
        "gravity": np.array(GRAVITY, np.float32),
    }


def picture_truth(clip: Mapping[str, Any]) -> np.ndarray:
    """What a clip of `World` or `Shots` shows of its bodies: see `DataSource.truth`."""
    return in_picture(clip, physics.ROOM, physics.form, LOOKS, _rest(clip))


def picture_bodies(clip: Mapping[str, Any]) -> np.ndarray:
    """Where a clip of `World` or `Shots` shows bodies: see `DataSource.bodies`."""
    return covered(clip, physics.ROOM, physics.form, _rest(clip))


def _rest(clip: Mapping[str, Any]) -> Camera | None:
    """The camera of a world whose truth has none."""
    return None if "camera" in clip["truth"] else View(*clip["video"].shape[1:3]).camera


def impacts(truth: Truth) -> int:
    """The number of frames in which a contact begins; 3 stands for 3 and more."""
    contact_T = truth["contact"][:, 0]
    return min(int((contact_T[1:] & ~contact_T[:-1]).sum()), 3)


# Classification questions about clips of one body, answered by their truth.
QUESTIONS: dict[str, Question] = {
    "motion": Question(MOTIONS, lambda truth: int(truth["motion"][0])),
    "impacts": Question(("none", "one", "two", "more"), impacts),
    "shape": Question(SHAPES, lambda truth: int(truth["shape"][0])),
    "colour": Question(COLOURS, lambda truth: int(truth["colour"][0])),
    "size": Question(SIZES, lambda truth: int(truth["size"][0])),
}


def by_truth(source: Source, question: str) -> Classed:
    """Clips with truth, whose class is the answer to a question."""
    asked = QUESTIONS[question]
    return Classed(source, asked.classes, lambda clip: asked.answer(clip["truth"]))


def make(config: ConfigDict, split: str, workdir: Path, **options: Any) -> World | Classed:
    """The source `world`."""
    del workdir
    world = World(config.seed, split, **clip_options(config, options))
    return by_truth(world, config.data.label) if config.data.label else world


def check(config: ConfigDict) -> None:
    """Refuses classes and questions where a clip may have two bodies."""
    objects = tuple(config.data.objects)
    asks = "data.label" if config.data.label else "the stage classify"
    if objects != (1, 1) and (config.data.label or "classify" in config.stages):
        allowed = f"(1, 1) is allowed with {asks}, whose classes are of one body"
        raise UserError(f"data.objects is {objects}: {allowed}")
