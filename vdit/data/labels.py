"""Labels of clips: `Labelled` clips carry the answers to questions, `Classed` ones their class."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from vdit.data.loader import Source

Truth = Mapping[str, np.ndarray]


class Question(NamedTuple):
    """The names of the answers, and the index of the right one by a clip's truth."""

    classes: tuple[str, ...]
    answer: Callable[[Truth], int]


class Labelled:
    """A source of clips with truth, as {"video": uint8 (T, H, W, 3), "label": int32 (Q,)}."""

    def __init__(self, source: Source, questions: Sequence[Question]) -> None:
        self.source, self.questions = source, questions

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        clip = self.source[index]
        label = [question.answer(clip["truth"]) for question in self.questions]
        return {"video": clip["video"], "label": np.array(label, np.int32)}


class Masked:
    """Clips as {"video": uint8 (T, H, W, 3), "bodies": bool (T, H, W)}, by `bodies(clip)`."""

    def __init__(self, source: Source, bodies: Callable[[Mapping[str, Any]], np.ndarray]) -> None:
        self.source, self._bodies = source, bodies

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        clip = self.source[index]
        return {"video": clip["video"], "bodies": self._bodies(clip)}


class Classed:
    """Clips with a class: "label" (int32) is `answer(clip)`, and the caption is its name."""

    def __init__(
        self, source: Source, classes: Sequence[str], answer: Callable[[Mapping[str, Any]], int]
    ) -> None:
        self.source, self.classes, self._answer = source, tuple(classes), answer
        self.digest = getattr(source, "digest", "")
        self.pictures = getattr(source, "pictures", "")
        self.skipped = getattr(source, "skipped", [])

    def __len__(self) -> int:
        return len(self.source)

    def texts(self) -> Iterator[tuple[str, str]]:
        """(where, name) of each class."""
        return ((f"class {i}", name) for i, name in enumerate(self.classes))

    def __repr__(self) -> str:
        return f"Classed({self.source!r}, {self.classes})"  # grain compares it

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        clip = self.source[index]
        label = self._answer(clip)
        return {**clip, "caption": self.classes[label], "label": np.int32(label)}


def by_caption(source: Source, classes: Sequence[str]) -> Classed:
    """Clips whose captions are the names of their classes."""
    number = {name: i for i, name in enumerate(classes)}
    return Classed(source, classes, lambda clip: number[clip["caption"]])
