"""Labels: questions with a handful of answers that the world's truth gives of one-object clips.

`Labelled` clips carry the answers to some questions, `Classed` ones the class that they are of.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from vdit.data.loader import Source
from vdit.data.world import COLOURS, MOTIONS, SHAPES, SIZES

Truth = Mapping[str, np.ndarray]


class Question(NamedTuple):
    """The names of the answers, and the index of the right one from a clip's truth."""

    classes: tuple[str, ...]
    answer: Callable[[Truth], int]


def impacts(truth: Truth) -> int:
    """How often the body touches something after a frame in which it touched nothing; 3 is 3 on."""
    contact_T = truth["contact"][:, 0]
    return min(int((contact_T[1:] & ~contact_T[:-1]).sum()), 3)


QUESTIONS: dict[str, Question] = {
    "motion": Question(MOTIONS, lambda truth: int(truth["motion"][0])),
    "impacts": Question(("none", "one", "two", "more"), impacts),
    "shape": Question(SHAPES, lambda truth: int(truth["shape"][0])),
    "colour": Question(COLOURS, lambda truth: int(truth["colour"][0])),
    "size": Question(SIZES, lambda truth: int(truth["size"][0])),
}


class Labelled:
    """A source of clips with truth, as {"video": uint8 (T, H, W, 3), "label": int32 (Q,)}."""

    def __init__(self, source: Source, questions: Sequence[str]) -> None:
        self.source = source
        self.questions = [QUESTIONS[name] for name in questions]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        clip = self.source[index]
        label = [question.answer(clip["truth"]) for question in self.questions]
        return {"video": clip["video"], "label": np.array(label, np.int32)}


class Classed:
    """Clips of named classes: beside what `source` gives, "label" int32, and its name as caption.

    `answer` gives the number of a clip's class in `classes`.
    """

    def __init__(
        self, source: Source, classes: Sequence[str], answer: Callable[[Mapping[str, Any]], int]
    ) -> None:
        self.source, self.classes, self._answer = source, tuple(classes), answer
        self.digest = getattr(source, "digest", "")
        self.skipped = getattr(source, "skipped", [])

    def __len__(self) -> int:
        return len(self.source)

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


def by_truth(source: Source, question: str) -> Classed:
    """Clips with truth, whose class is the answer to a question."""
    asked = QUESTIONS[question]
    return Classed(source, asked.classes, lambda clip: asked.answer(clip["truth"]))
