"""Labels of the world's clips: right by their definition, and none of them rare."""

import numpy as np
import pytest

from vdit.data.labels import Labelled
from vdit.worlds.bodies.physics import MOTIONS
from vdit.worlds.bodies.source import QUESTIONS, World, impacts
from vdit.worlds.forms import COLOURS

WORLD = World(0, size=(8, 8), objects=(1, 1))


@pytest.mark.parametrize(
    "touches, count",
    [("0000", 0), ("1111", 0), ("0111", 1), ("1001", 1), ("0101", 2), ("010101010", 3)],
)
def test_impacts_are_counted_where_contact_begins(touches: str, count: int) -> None:
    contact = np.array([[touch == "1", True] for touch in touches])
    assert impacts({"contact": contact}) == count


def test_every_answer_to_every_question_comes() -> None:
    clips = Labelled(WORLD, tuple(QUESTIONS.values()))
    label = np.stack([clips[i]["label"] for i in range(300)])
    assert label.dtype == np.int32
    for i, question in enumerate(QUESTIONS.values()):
        share = np.bincount(label[:, i], minlength=len(question.classes)) / 300
        assert len(share) == len(question.classes)
        assert share.min() > 0.03 and share.max() < 0.7


def test_labels_stand_in_the_order_of_the_questions_and_agree_with_the_caption() -> None:
    clips = Labelled(WORLD, [QUESTIONS[name] for name in ("colour", "motion")])
    assert len(clips) == len(WORLD)
    for i in range(20):
        clip, (colour, motion) = WORLD[i], clips[i]["label"]
        np.testing.assert_array_equal(clips[i]["video"], clip["video"])
        assert COLOURS[colour] in clip["caption"]
        assert MOTIONS[motion] == MOTIONS[clip["truth"]["motion"][0]]
