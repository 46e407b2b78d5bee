"""Captions of shots, and of clips of several shots.

A shot's caption has framing and place, and the world's `caption` where the shot begins a take, else
each object's course. The clip's caption counts the shots and names the characters; it may also list
places and framings, or all shots' captions, in order.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vdit.worlds.bodies.caption import SIZE_WORDS, caption, look
from vdit.worlds.bodies.physics import Kind, Run, Start, View
from vdit.worlds.clips import Draws

FRAMING_WORDS = {
    "wide": ("wide shot", "a wide shot", "seen from afar", "in full view"),
    "left": ("camera to the left", "the camera looks left", "shifted to the left"),
    "right": ("camera to the right", "the camera looks right", "shifted to the right"),
    "close": ("close-up", "a close-up", "seen up close", "a close shot"),
    "close_left": ("close-up of the left side", "seen up close, to the left"),
    "close_right": ("close-up of the right side", "seen up close, to the right"),
}
PLACE_WORDS = {
    "studio": ("in a grey room", "in a plain grey room", "in the studio"),
    "day": ("by day", "in daylight", "on a meadow by day"),
    "night": ("at night", "by night", "in the dark of night"),
    "indoors": ("indoors", "inside a house", "indoors on a wooden floor"),
    "desert": ("in the desert", "on desert sand"),
}

# What an object does in a shot in which its take goes on; `course` says which.
COURSE_WORDS = {
    "still": ("lies still", "does not move", "stays where it is"),
    "bounces": ("bounces", "bounces up again", "comes down and bounces"),
    "left": ("moves on to the left", "keeps moving to the left", "goes on to the left"),
    "right": ("moves on to the right", "keeps moving to the right", "goes on to the right"),
    "moves": ("moves on", "keeps moving", "goes on"),
}
COURSES = tuple(COURSE_WORDS)
STILL = 0.08  # metres: an object that stays this near to where it was lies still
AWAY = 0.4  # metres: one that gets this far, and never turns, moves to a side
TURN = 0.5  # m/s down and then up, at least, of one that bounces

FORMS = (
    "{framing}, {place}: {text}",
    "{framing} {place}: {text}",
    "{place}, {text}; {framing}",
    "{place}: {text}, {framing}",
    "{framing}: {text}, {place}",
)
ARTICLES = ("the", "the", "the same", "a")  # of an object, from the second shot on
NUMBERS = (("one", "a single", "1"), ("two", "2"), ("three", "3"), ("four", "4"))
ORDINALS = ("first", "second", "third", "fourth")
NEXT, LAST = ("then", "next", "after that"), ("finally", "at last", "last")
OBJECT = re.compile(rf"\ba (?=({'|'.join(w for words in SIZE_WORDS.values() for w in words)})\b)")


class Shot(NamedTuple):
    """One shot of a clip: frames `begin` to `end`, and what its caption describes."""

    begin: int
    end: int
    take: int
    backdrop: str
    framing: str
    run: Run  # of its own frames only
    starts: Sequence[Start]  # how its take begins
    goes_on: bool  # its take has begun in an earlier shot


def course(track: np.ndarray, fps: float) -> int:
    """Index into COURSES of what an object at `track` (T, 2), metres, does."""
    away, step = track - track[:1], np.diff(track, axis=0)
    if np.abs(away).max() < STILL:
        return COURSES.index("still")
    speed = step[:, 1] * fps
    if ((speed[:-1] < -TURN) & (speed[1:] > TURN)).any():
        return COURSES.index("bounces")
    for name, side in (("left", -1), ("right", 1)):
        if side * away[-1, 0] > AWAY and (side * step[:, 0]).min() > -STILL / 2:
            return COURSES.index(name)
    return COURSES.index("moves")


def shot_caption(draws: Draws, shot: Shot, view: View) -> str:
    """One line about a shot: framing, place, and each object's looks and motion; where an object
    starts in the room `view` is only said of a wide shot."""
    if shot.goes_on:
        parts = []
        for start, track in zip(shot.starts, shot.run.position.swapaxes(0, 1), strict=True):
            words = COURSE_WORDS[COURSES[course(track, 1 / shot.run.step)]]
            parts.append(f"the {look(draws, start.kind)} {draws.pick(words)}")
        text = draws.pick((" and ", ", and ", " while ")).join(parts)
    else:
        text = caption(draws, shot.starts, shot.run, view, shot.framing == "wide")
        if shot.begin:
            text = OBJECT.sub(draws.pick(ARTICLES) + " ", text)
    return draws.pick(FORMS).format(text=text, **_where(draws, shot))


def _where(draws: Draws, shot: Shot) -> dict[str, str]:
    """Words for a shot's framing and place."""
    return {
        "framing": draws.pick(FRAMING_WORDS[shot.framing]),
        "place": draws.pick(PLACE_WORDS[shot.backdrop]),
    }


def _ordered(draws: Draws, parts: Sequence[str], end: str) -> str:
    """The parts in order, each after a word that says so."""
    if draws.chance(0.3):
        names = [f"in the {ORDINALS[index]} shot" for index in range(len(parts))]
    else:
        names = ["first", *(draws.pick(NEXT) for _ in parts[2:]), draws.pick((*LAST, *NEXT))]
    pairs = zip(names, parts, strict=False)
    return end.join(f"{name}, {part}" for name, part in pairs)


def clip_caption(
    draws: Draws, kinds: Sequence[Kind], shots: Sequence[Shot], captions: Sequence[str]
) -> str:
    """The clip's caption: from a count and the characters up to all of its shots' `captions`."""
    number = draws.pick(NUMBERS[len(shots) - 1]) + (" shot" if len(shots) == 1 else " shots")
    cast = " and ".join(f"a {look(draws, kind)}" for kind in kinds)
    style = draws.below(4)
    if style == 0:
        return f"{number} of {cast}"
    if style == 3:
        if len(shots) == 1:
            return f"{number}: {captions[0]}"
        return f"{number}. {_ordered(draws, captions, '. ')}"
    form = "{place}" if style == 1 else "{framing} {place}"
    where = [form.format(**_where(draws, shot)) for shot in shots]
    if len(shots) == 1:
        return f"{number} of {cast}, {where[0]}"
    return f"{number} of {cast}: {_ordered(draws, where, '; ')}"
