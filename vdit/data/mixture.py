"""A source of clips of several shapes: images and videos of any size, aspect, length and rate."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

from vdit.data.loader import Source
from vdit.errors import UserError


class Mixture:
    """Clip i is of source i % K, in turn; elements are that source's, and "fps" (float).

    With `endless` sources it is their clip i, so that no two shapes show one scene; else their
    clip i // K, as far as the shortest reaches. Raises `UserError` without sources.
    """

    def __init__(self, sources: Sequence[Source], fps: Sequence[float], endless: bool) -> None:
        if not sources or len(sources) != len(fps):
            raise UserError(f"mixture: {len(sources)} sources and {len(fps)} rates; one each")
        self._sources, self._fps, self._endless = list(sources), list(fps), endless
        shortest = min(len(source) for source in sources)
        self._length = shortest if endless else shortest * len(sources)
        # Of sources whose content can change (a folder), all together.
        self.digest = "".join(getattr(source, "digest", "") for source in sources)

    def __len__(self) -> int:
        return self._length

    def kind(self, index: int) -> int:
        """Which shape clip `index` has: clips of one kind are encoded together."""
        return index % len(self._sources)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < self._length:
            raise IndexError(f"clip {index} of a mixture of {self._length}")
        number, kind = divmod(index, len(self._sources))
        element = self._sources[kind][index if self._endless else number]
        return {**element, "fps": self._fps[kind]}
