"""The base class of all simulated sources: checked options, random access, random streams."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, TypeVar

import numpy as np
import pymunk
from ml_collections import ConfigDict

from vdit.data.sources import SPLITS, clip_shape
from vdit.errors import UserError

MAX_SHOTS = 4
GOES_ON = 0.4  # share of cuts after which the take goes on, if another camera sees it

Item = TypeVar("Item")
Look = tuple[int, int, int, int]  # indices: the shape's, the colour's, the size's, and another


def versions(name: str, version: int) -> str:
    """The versions that the bytes of a source's clips depend on."""
    return f"{name} {version}, pymunk {pymunk.version}, numpy {np.__version__}"


def clip_options(config: ConfigDict, options: Mapping[str, Any]) -> dict[str, Any]:
    """A source's options: those of the configuration, overridden by `options`."""
    return {**clip_shape(config), "objects": tuple(config.data.objects), **options}


def padded(values: Any, count: int, most: int, fill: float, dtype: type) -> np.ndarray:
    """An array of `count` objects, (T, N, ...) or (N,), with N = `most`."""
    array: np.ndarray = np.asarray(values, dtype)
    axis = min(array.ndim - 1, 1)
    shape = (*array.shape[:axis], most - count, *array.shape[axis + 1 :])
    # np.pad would be a tenth of a small clip's time.
    return np.concatenate([array, np.full(shape, fill, dtype)], axis)


@dataclasses.dataclass(eq=False)
class Clips:
    """Clip i of a seed and split: always the same bytes (`digest`), in any order, thread, process.

    A `grain.sources.RandomAccessDataSource`; subclasses implement `clip`. Impossible options raise
    a `UserError`."""

    seed: int
    split: str = "train"
    frames: int = 17
    size: tuple[int, int] = (32, 32)
    fps: float = 10.0
    objects: tuple[int, int] = (1, 2)
    length: int = 1_000_000

    where = "World"  # named in errors
    most = 2  # objects in a clip, at most

    def __post_init__(self) -> None:
        self.check(0 <= self.seed < 2**63, "seed", "0 to 2**63 - 1")
        self.check(self.split in SPLITS, "split", ", ".join(SPLITS))
        self.check(self.frames >= 1, "frames", "1 or more")
        good = len(self.size) == 2 and min(self.size) >= 4
        self.check(good, "size", "(height, width), each 4 or more")
        self.check(1 <= self.fps <= 1000, "fps", "1 to 1000")
        low, high = self.objects
        self.check(1 <= low <= high <= self.most, "objects", f"(1, 1) to (1, {self.most})")
        self.check(1 <= self.length < 2**63, "length", "1 to 2**63 - 1")
        self.seed, self.frames, self.length = int(self.seed), int(self.frames), int(self.length)
        self.size, self.fps = (int(self.size[0]), int(self.size[1])), float(self.fps)
        self.objects = int(low), int(high)

    def check(self, good: bool, name: str, allowed: str) -> None:
        """Raises `UserError` for the option `name` unless `good`."""
        if not good:
            raise UserError(f"{self.where}: {name} is {getattr(self, name)!r}; allowed: {allowed}")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """The clip at `index` (negative counts from the end); IndexError outside the source."""
        index = int(index)
        if not -self.length <= index < self.length:
            raise IndexError(f"clip {index} of a world of {self.length}")
        return self.clip(index % self.length)

    def clip(self, index: int) -> dict[str, Any]:
        """Clip `index` of at least 0."""
        raise NotImplementedError

    def draws(self, stream: int) -> "Draws":
        """The random stream of a clip."""
        return Draws(self.seed, SPLITS.index(self.split), stream)

    def count(self, draws: "Draws") -> int:
        """Draws the number of a clip's objects."""
        low, high = self.objects
        return low + draws.below(high - low + 1)


class Draws:
    """Uniform numbers of one clip: a Philox stream whose key is (seed, split; index)."""

    def __init__(self, seed: int, split: int, index: int) -> None:
        key = np.array([2 * seed + split, index], dtype=np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=key))
        self._values = iter(self._more())

    def _more(self) -> Iterator[float]:
        while True:
            yield from self._generator.random(128).tolist()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._values)

    def below(self, count: int) -> int:
        return int(count * next(self._values))

    def chance(self, probability: float) -> bool:
        return next(self._values) < probability

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(len(items) * next(self._values))]


def draw_looks(
    draws: Draws, count: int, held_out: bool, reserved: Sequence[Look], drawn: Callable[[], Look]
) -> list[Look]:
    """`count` looks, no colour twice: one of a held-out clip is reserved, none of another."""
    looks: list[Look] = []
    while len(looks) < count:
        look = draws.pick(reserved) if held_out and not looks else drawn()
        if (held_out or look not in reserved) and all(look[1] != other[1] for other in looks):
            looks.append(look)
    return looks


def shot_blocks(fps: float, align: int, seconds: float) -> tuple[int, int]:
    """The least length of a clip's first shot (and one frame more) and of a later one, in `align`
    frames: `seconds`, and at least one latent frame beyond its first."""
    need = math.ceil(seconds * fps - 1e-9)
    return max(1, math.ceil((need - 1) / align)), max(2, math.ceil(need / align))


def check_shots(source: Any) -> None:
    """Checks and converts the `shots` = (least, most) of a source's clips and the `align` of cuts.

    Cuts stand at frames 1 + k·`align`, so that no latent frame of an autoencoder with that temporal
    patch covers two shots; each shot lasts `source.shortest` seconds at least.
    """
    shots, align = source.shots, source.align
    good = len(shots) == 2 and 1 <= shots[0] <= shots[1] <= MAX_SHOTS
    source.check(good, "shots", f"(1, 1) to (1, {MAX_SHOTS})")
    source.check(align >= 1, "align", "1 or more")
    most, (first, later) = shots[1], shot_blocks(source.fps, align, source.shortest)
    least = 1 + align * (first + (most - 1) * later) if most > 1 else 1
    allowed = f"{least} or more for shots={shots} at {source.fps:g} fps, align={align}"
    source.check(source.frames >= least, "frames", allowed)
    source.shots, source.align = (int(shots[0]), int(most)), int(align)


def draw_takes(draws: Draws, source: Any) -> list[list[int]]:
    """Draws a clip's cuts: of each take the first frames of its shots, and its end."""
    low, high = source.shots
    count, bounds = low + draws.below(high - low + 1), [0, source.frames]
    if count > 1:
        first, later = shot_blocks(source.fps, source.align, source.shortest)
        spare = (source.frames - 1) // source.align - first - (count - 1) * later
        more = sorted(draws.below(spare + 1) for _ in range(count - 1))
        blocks = [first + later * index + extra for index, extra in enumerate(more)]
        bounds[1:1] = [1 + source.align * block for block in blocks]
    begun = [0, *(at for at in bounds[1:-1] if not draws.chance(GOES_ON)), source.frames]
    return [
        [bound for bound in bounds if begin <= bound <= end]
        for begin, end in itertools.pairwise(begun)
    ]


def truth_of_cuts(shots: Sequence[Any]) -> dict[str, np.ndarray]:
    """The truth's shot, take and cuts (T,), of shots that have `begin`, `end` and `take`."""
    number = np.repeat(
        np.arange(len(shots), dtype=np.int32), [shot.end - shot.begin for shot in shots]
    )
    take = np.array([shot.take for shot in shots], np.int32)[number]
    return {"shot": number, "cuts": np.diff(number, prepend=0) > 0, "take": take}
