"""The base class of all simulated sources: checked options, random access, random streams."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, TypeVar

import numpy as np
import pymunk
from ml_collections import ConfigDict

from vdit.data.sources import SPLITS, clip_shape
from vdit.errors import UserError

Item = TypeVar("Item")


def versions(name: str, version: int) -> str:
    """The versions that the bytes of a source's clips depend on."""
    return f"{name} {version}, pymunk {pymunk.version}, numpy {np.__version__}"


def clip_options(config: ConfigDict, options: Mapping[str, Any]) -> dict[str, Any]:
    """A source's options: those of the configuration, overridden by `options`."""
    return {**clip_shape(config), "objects": tuple(config.data.objects), **options}


def check(good: bool, where: str, name: str, given: object, allowed: str) -> None:
    """Raises `UserError` unless `good`."""
    if not good:
        raise UserError(f"{where}: {name} is {given!r}; allowed: {allowed}")


@dataclasses.dataclass(eq=False)
class Clips:
    """Clip i of a seed and split: always the same bytes, in any order, thread or process.

    A `grain.sources.RandomAccessDataSource`; subclasses implement `clip`. `digest` names the
    versions that the bytes depend on. Impossible options raise a `UserError`.
    """

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
        check(good, self.where, name, getattr(self, name), allowed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """The clip at `index` (negative counts from the end); IndexError outside the source."""
        return self.clip(clip_index(index, self.length))

    def clip(self, index: int) -> dict[str, Any]:
        """Clip `index` of at least 0."""
        raise NotImplementedError

    def draws(self, stream: int) -> "Draws":
        """The random stream of a clip."""
        return Draws(self.seed, SPLITS.index(self.split), stream)


def clip_index(index: SupportsIndex, length: int) -> int:
    """`index` as a number of at least 0; IndexError outside the source."""
    index = int(index)
    if not -length <= index < length:
        raise IndexError(f"clip {index} of a world of {length}")
    return index % length


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
