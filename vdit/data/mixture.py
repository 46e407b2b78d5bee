"""Several sources as one: `Mixture` of shapes, images and videos of any size, length and rate, and
`Shares` of data sets."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
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
        self.pictures = "".join(getattr(source, "pictures", "") for source in sources)
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


MOST = 10**8  # clips of `Shares`


class Shares:
    """Mixes K sources by shares: in any run of clips, source k has about its share.

    The order is a function of the lengths and shares. Every clip occurs, and those of a source too
    small for its share occur again. `kinds` has the numbers of a source's kinds within the mixture,
    for sources that are a `Mixture`. Raises `UserError` for shares of over `MOST` clips.
    """

    def __init__(
        self, sources: Sequence[Any], shares: Sequence[float],
        kinds: Sequence[Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        self._sources, self._kinds = list(sources), kinds
        whole = [share / math.fsum(shares) for share in shares]
        lengths = [len(source) for source in sources]
        total = max(n / share for n, share in zip(lengths, whole, strict=True))
        if total > MOST:
            raise UserError(
                f"data.mixture: {total:.3g} clips of sources of {lengths} by shares of"
                f" {list(shares)}; at most {MOST:.0e} are allowed: give the small ones less"
            )
        counts = [max(1, round(total * share)) for share in whole]
        # Clip j of n stands at (j + 1/2) / n of the way.
        order = np.argsort(
            np.concatenate([(np.arange(n) + 0.5) / n for n in counts]), kind="stable"
        )
        self._source = np.repeat(np.arange(len(counts)), counts)[order]
        numbers = [np.arange(n) % length for n, length in zip(counts, lengths, strict=True)]
        self._number = np.concatenate(numbers)[order]
        self.pictures, self.digest = (
            hashlib.sha256(repr([whole, *(getattr(x, name) for x in sources)]).encode()).hexdigest()
            for name in ("pictures", "digest")
        )
        self.skipped = list(dict.fromkeys(x for source in sources for x in source.skipped))

    def __len__(self) -> int:
        return len(self._number)

    def __repr__(self) -> str:  # grain compares it when it restores an iterator
        return f"Shares({self.digest[:16]})"

    def place(self, index: SupportsIndex) -> tuple[int, int]:
        """The source of a clip, and its number there."""
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of a mixture of {len(self)}")
        return int(self._source[index]), int(self._number[index])

    def kind(self, index: int) -> int:
        """See `Mixture.kind`."""
        source, number = self.place(index)
        return 0 if self._kinds is None else self._kinds[source][self._sources[source].kind(number)]

    def texts(self) -> Iterator[tuple[str, str]]:
        """(where, caption) of all clips."""
        return itertools.chain.from_iterable(source.texts() for source in self._sources)

    def __getitem__(self, index: SupportsIndex) -> Any:
        source, number = self.place(index)
        return self._sources[source][number]
