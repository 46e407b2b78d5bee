"""A source of clips of several shapes: images and videos of any size, aspect, length and rate."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from vdit.data.loader import Source
from vdit.errors import UserError


class Mixture:
    """Clip i is of source i % K, in turn; elements are that source's, and "fps" (float).

    With `endless` sources it is their clip i, so that no two shapes show one scene; else their
    clip i // K, as far as the shortest reaches, or, with `to_the_end`, as far as each does: then
    those that are left take turns. Raises `UserError` without sources.
    """

    def __init__(
        self, sources: Sequence[Source], fps: Sequence[float], endless: bool,
        to_the_end: bool = False,
    ) -> None:  # fmt: skip
        if not sources or len(sources) != len(fps):
            raise UserError(f"mixture: {len(sources)} sources and {len(fps)} rates; one each")
        self._sources, self._fps, self._endless = list(sources), list(fps), endless
        lengths = np.array([len(source) for source in sources])
        self._turns: np.ndarray | None = None  # (clips, 2) number in its source, and which source
        self._length = int(lengths.min()) * (1 if endless else len(sources))
        if to_the_end:
            self._turns = np.argwhere(np.arange(lengths.max())[:, None] < lengths)
            self._length = len(self._turns)
        # Of sources whose content can change (a folder), all together.
        self.digest = "".join(getattr(source, "digest", "") for source in sources)
        self.skipped: list[tuple[str, str]] = []  # files that they could not use, and why

    def __len__(self) -> int:
        return self._length

    def kind(self, index: int) -> int:
        """Which shape clip `index` has: clips of one kind are encoded together."""
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
