"""Classification questions about clips of one body, answered by their truth."""

from vdit.data.labels import Classed, Question, Truth
from vdit.data.loader import Source
from vdit.worlds.bodies.physics import MOTIONS
from vdit.worlds.forms import COLOURS, SHAPES, SIZES


def impacts(truth: Truth) -> int:
    """The number of frames in which a contact begins; 3 stands for 3 and more."""
    contact_T = truth["contact"][:, 0]
    return min(int((contact_T[1:] & ~contact_T[:-1]).sum()), 3)


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
