"""A source of clips of several shapes: images and videos of any size, length and frame rate."""

import itertools
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from vdit.data.loader import Source
from vdit.errors import UserError


class Mixture:
    """Interleaves K sources: clip i comes from source i % K, with "fps" (float) added.

    It is clip i of an `endless` source, so no two shapes show the same scene, else clip i // K. The
    mixture ends with the shortest source; with `to_the_end` the longer ones go on in turn. Raises
    `UserError` without sources.
    """

    def __init__(
        self, sources: Sequence[Source], fps: Sequence[float], endless: bool,
        to_the_end: bool = False,
    ) -> None:  # fmt: skip
        if not sources or len(sources) != len(fps):
            raise UserError(f"mixture: {len(sources)} sources and {len(fps)} rates; one each")
        self._sources, self._fps, self._endless = list(sources), list(fps), endless
        lengths = np.array([len(source) for source in sources])
        self._turns: np.ndarray | None = None  # (clips, 2): number in the source, source
        self._length = int(lengths.min()) * (1 if endless else len(sources))
        if to_the_end:
            self._turns = np.argwhere(np.arange(lengths.max())[:, None] < lengths)
            self._length = len(self._turns)
        # The digests of sources whose content can change (a folder), concatenated.
        self.digest = "".join(getattr(source, "digest", "") for source in sources)
        self.skipped: list[tuple[str, str]] = []  # (file, reason)
        known: list[Any] = [getattr(source, "texts", None) for source in sources]
        if all(known):
            self.texts = lambda: itertools.chain.from_iterable(texts() for texts in known)

    def __len__(self) -> int:
        return self._length

    def kind(self, index: int) -> int:
        """The number of the clip's shape: clips of one kind are encoded together."""
        return self._turn(index)[1]

    def _turn(self, index: int) -> tuple[int, int]:
        if self._turns is None:
            return divmod(index, len(self._sources))
        number, kind = self._turns[index]
        return int(number), int(kind)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < self._length:
            raise IndexError(f"clip {index} of a mixture of {self._length}")
        number, kind = self._turn(index)
        element = self._sources[kind][index if self._endless else number]
        return {**element, "fps": self._fps[kind]}
