"""Captions of a playground's shots, and of clips of several shots.

A shot that begins a take is described like a clip of one shot; one that continues a take by its
framing and by the course of each visible character. The clip's caption counts the shots and names
the characters; it may also list places and framings in order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vdit.worlds.clips import Draws
from vdit.worlds.playground.caption import Voice, caption, filmed, listed, story
from vdit.worlds.playground.cast import MATERIAL_NAMES
from vdit.worlds.playground.events import Event
from vdit.worlds.playground.lexicon import FIRST, LAST, LEXICON, MADE, THEN, THERE
from vdit.worlds.playground.physics import Run, Scene
from vdit.worlds.shots.caption import COURSES

NUMBERS = tuple(LEXICON["shots"])


class Shot(NamedTuple):
    """One shot of a clip: frames `begin` to `end`, and what its caption describes."""

    begin: int
    end: int
    take: int
    goes_on: bool  # its take has begun in an earlier shot
    framing: str
    kind: str  # of CAMERAS
    camera: np.ndarray  # (T, 3), of this shot's frames only, as those below
    scene: Scene
    run: Run
    faces: np.ndarray  # (T, N)
    events: list[Event]
    shown: np.ndarray  # (N,): fully in the picture throughout
    courses: list[int]  # indices into COURSES


def shot_caption(draws: Draws, shot: Shot, unseen: bool, detail: int) -> str:
    """A caption of one shot, of a level of detail up to `detail`, by chance."""
    voice = Voice(draws, unseen)
    framing = voice.say("framing", shot.framing)
    if not shot.goes_on:
        described = (draws, shot.scene, shot.run, shot.kind, shot.faces, shot.events)
        text = caption(*described, unseen=unseen, detail=detail)
        return text if shot.framing == "whole" else f"{framing}: {text}"
    level = draws.below(detail + 1)
    seen = [n for n in range(len(shot.shown)) if shot.shown[n]] or list(range(len(shot.shown)))
    actors, place = shot.scene.actors, voice.say("place", shot.scene.place)

    def does(number: int) -> str:
        return voice.say("course", COURSES[shot.courses[number]])

    if level == 0:
        chosen = draws.pick(seen)
        return f"{framing}: {voice.again(actors[chosen])} {does(chosen)}"
    if level == 1:
        cast = [f"{voice.name(actors[n], 'the')} {does(n)}" for n in seen]
        return f"{framing} {place}: {listed(cast)}"
    faces = shot.faces[0].tolist()
    if level == 2:
        cast = [
            f"{voice.name(actors[n], 'the', draws.chance(0.7), faces[n])} {does(n)}" for n in seen
        ]
        parts = [f"{framing} {place}: {listed(cast)}", filmed(voice, shot.kind, actors[0])]
    else:
        parts = [f"{framing} {place}", filmed(voice, shot.kind, actors[0])]
        for n in seen:
            stuff = voice.say("material", MATERIAL_NAMES[actors[n].look[3]])
            who = voice.name(actors[n], "the", face=faces[n])
            parts.append(f"{voice.one(THERE)} {who}, and {voice.one(MADE)} {stuff}")
            parts.append(f"{voice.again(actors[n])} {does(n)}")
    if shot.events:
        parts.append(story(voice, shot.scene, shot.run, shot.faces, shot.events, level > 2))
    return ("; " if level == 2 else ". ").join(parts)


def clip_caption(draws: Draws, shots: Sequence[Shot], unseen: bool) -> str:
    """The clip's caption: number of shots and characters, perhaps materials and places."""
    voice = Voice(draws, unseen)
    style = draws.below(3)
    cast = [voice.name(actor, "a", style > 0 and draws.chance(0.5))
            for actor in shots[0].scene.actors]  # fmt: skip
    text = f"{voice.say('shots', NUMBERS[len(shots) - 1])} of {listed(cast)}"
    if style == 0:
        return text
    where = [voice.say("place", shot.scene.place) for shot in shots]
    if style == 2:
        where = [f"{voice.say('framing', shot.framing)} {place}"
                 for shot, place in zip(shots, where, strict=True)]  # fmt: skip
    words = [voice.one(FIRST), *(voice.one(THEN) for _ in where[2:]), voice.one(LAST)]
    if len(shots) == 1:
        return f"{text}, {where[0]}"
    return f"{text}: " + "; ".join(f"{w} {at}" for w, at in zip(words, where, strict=True))
