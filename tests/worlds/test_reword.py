"""Held-out wordings: the same said of the same, in words that no caption of training has."""

import re

import numpy as np

from vdit.worlds.bodies.source import World
from vdit.worlds.forms import COLOURS
from vdit.worlds.reword import UNSEEN, paraphrase
from vdit.worlds.shots.source import Shots

KEPT = {"a", "and", "at", "close", "by", "in", "is", "of", "on", "room", "the", "they", "under",
        "stay"}  # fmt: skip


def captions(split: str) -> list[str]:
    """Of the world, and of shots and their clips."""
    world, shots = World(5, split, frames=9, size=(16, 16)), Shots(5, split, size=(16, 16))
    clips = [shots[index] for index in range(60)]
    told = [clip["caption"] for clip in clips]
    told += [text for clip in clips for _, text in clip["shots"]]
    return [*(world[index]["caption"] for index in range(300)), *told]


def words(text: str) -> set[str]:
    return set(re.findall(r"[\w-]+", text))


def test_no_caption_of_training_has_an_unseen_wording() -> None:
    new = set().union(*(words(text) for text in UNSEEN.values())) - KEPT
    seen = set().union(*(words(text) for text in captions("train")))
    assert len(new) > 30 and not new & seen


def test_paraphrases_have_no_seen_wording_and_keep_what_is_said() -> None:
    looks = {"small", "little", "large", "big", "ball", "disc", "box", "square", "triangle"}
    verbs = {"falls", "drops", "rolls", "slides", "rests", "lies", "thrown", "tossed", "flies"}
    changed = []
    for text in captions("heldout"):
        other = paraphrase(text)
        assert not words(other) & (looks | verbs), (text, other)
        for word in (*COLOURS, "left", "right", "leftwards", "rightwards"):
            count = len(re.findall(rf"\b{word}\b", text))
            assert len(re.findall(rf"\b{word}\b", other)) == count, (text, other)
        for old, new in (("small|little", "tiny"), ("large|big", "huge"), ("ball|disc", "sphere"),
                         ("box|square", "crate"), ("triangle", "pyramid")):  # fmt: skip
            assert len(re.findall(rf"\b({old})\b", text)) == len(re.findall(rf"\b{new}\b", other))
        assert paraphrase(other) == other
        changed.append(len(words(other) - words(text)) / len(words(text)))
    assert np.mean(changed) > 0.3


def test_one_example() -> None:
    assert paraphrase("a small red ball falls down onto a big blue box lying on the floor") == (
        "a tiny red sphere plummets upon a huge blue crate at rest"
    )
