"""`World`: captioned physics clips as an endless, deterministic random-access source for grain."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pymunk

from vdit.data.world.caption import caption
from vdit.data.world.render import render
from vdit.data.world.simulate import (
    GRAVITY,
    MAX_OBJECTS,
    Draws,
    Kind,
    Run,
    View,
    draw_scene,
    simulate,
)
from vdit.errors import UserError

SPLITS = ("train", "heldout")
VERSION = 1  # of the clips: another one, other bytes


def versions(name: str, version: int) -> str:
    """What the bytes of a source's clips depend on beside its options."""
    return f"{name} {version}, pymunk {pymunk.version}, numpy {np.__version__}"


class Options(NamedTuple):
    """What a source of clips is asked for, checked."""

    seed: int
    split: str
    frames: int
    size: tuple[int, int]
    fps: float
    objects: tuple[int, int]
    length: int


def check(good: bool, where: str, name: str, given: object, allowed: str) -> None:
    """Raises `UserError` unless `good`."""
    if not good:
        raise UserError(f"{where}: {name} is {given!r}; allowed: {allowed}")


def options(
    where: str,
    seed: int,
    split: str,
    frames: int,
    size: tuple[int, int],
    fps: float,
    objects: tuple[int, int],
    length: int,
    most: int = MAX_OBJECTS,
) -> Options:
    """The options of the source `where`, of `most` objects; `UserError` for the impossible."""
    check(0 <= seed < 2**63, where, "seed", seed, "0 to 2**63 - 1")
    check(split in SPLITS, where, "split", split, ", ".join(SPLITS))
    check(frames >= 1, where, "frames", frames, "1 or more")
    good = len(size) == 2 and min(size) >= 4
    check(good, where, "size", size, "(height, width), each 4 or more")
    check(1 <= fps <= 1000, where, "fps", fps, "1 to 1000")
    low, high = objects
    good = 1 <= low <= high <= most
    check(good, where, "objects", objects, f"(1, 1) to (1, {most})")
    check(1 <= length < 2**63, where, "length", length, "1 to 2**63 - 1")
    pair = (int(size[0]), int(size[1]))
    return Options(
        int(seed), split, int(frames), pair, float(fps), (int(low), int(high)), int(length)
    )


def clip_index(index: int, length: int) -> int:
    """The clip that `index` asks for (negative counts from the end); IndexError outside."""
    index = int(index)
    if not -length <= index < length:
        raise IndexError(f"clip {index} of a world of {length}")
    return index % length


class World:
    """Clip i of a seed and split: always the same bytes, in any order, thread or process.

    A `grain.sources.RandomAccessDataSource` whose items are
    `{"video": uint8 (T, H, W, 3), "caption": str, "truth": dict}`. The truth's arrays, with
    N = MAX_OBJECTS, padded with -1 (the four kinds of index) or 0:

    - count int32 (); shape, colour, size, motion int32 (N,): indices into SHAPES, COLOURS, ...
    - position (metres), velocity (m/s) float32 (T, N, 2), x right, y up, the floor's top at 0;
      angle float32 (T, N), radians, counter-clockwise
    - contact bool (T, N): touched anything since the frame before (frame 0: lies on the floor)
    - gravity float32 (), m/s^2

    Falling and thrown objects fly freely for `simulate.FREE` seconds at least: five frames at the
    default rate. "heldout" clips each hold an object of a `RESERVED` kind, "train" clips never do.

    `digest` names the versions that the bytes depend on.

    Raises:
      UserError: an unknown split, or a seed, size, frame or object count that is not possible.
    """

    digest = versions("world", VERSION)

    def __init__(
        self,
        seed: int,
        split: str = "train",
        frames: int = 17,
        size: tuple[int, int] = (32, 32),
        fps: float = 10.0,
        objects: tuple[int, int] = (1, 2),
        length: int = 1_000_000,
    ) -> None:
        given = options("World", seed, split, frames, size, fps, objects, length)
        self.seed, self.split, self.frames, self.size = given[:4]
        self.fps, self.objects, self.length = given[4:]
        self._view = View(*self.size)

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return (
            f"World(seed={self.seed}, split={self.split!r}, frames={self.frames}, "
            f"size={self.size}, fps={self.fps}, objects={self.objects}, length={self.length})"
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The clip at `index` (negative counts from the end); IndexError outside the source."""
        index = clip_index(index, self.length)
        draws = Draws(self.seed, SPLITS.index(self.split), index)
        view, (low, high) = self._view, self.objects
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
