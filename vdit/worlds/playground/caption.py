"""The grammar of playgrounds: captions of five to several hundred words, and their parser.

Wordings come from `lexicon`, seen or held-out. Colours are unique within a clip, so every mention
of a character names its colour, and what follows a mention describes it.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vdit.worlds.clips import Draws
from vdit.worlds.forms import COLOURS, SHAPES, SIZES
from vdit.worlds.playground.cast import EXPRESSIONS, MATERIAL_NAMES
from vdit.worlds.playground.events import Event
from vdit.worlds.playground.lexicon import (
    LAST,
    LEXICON,
    LOOKS,
    MADE,
    OPENINGS,
    SAME,
    STARTS,
    THEN,
    THERE,
)
from vdit.worlds.playground.physics import Actor, Run, Scene

PARTS = ((0.0, 0.36, "left"), (0.36, 0.64, "middle"), (0.64, 1.01, "right"))  # of the width
DETAIL = 3  # the highest level: 0 a clause, 1 a sentence, 2 with events and camera, 3 a text


class Told(NamedTuple):
    """The content of a caption; names as in LEXICON."""

    said: tuple[tuple[str, str], ...]  # (kind, name) of the clip: place, camera, built, gravity
    characters: dict[str, dict[str, str]]  # by colour: size, shape, material, expression, ...
    events: tuple[tuple[str, str, str], ...]  # in order: event, colour of whom or "", detail
    words: int


class Voice:
    """Draws wordings for one caption: seen or held-out ones."""

    def __init__(self, draws: Draws, unseen: bool) -> None:
        self.draws, self.unseen = draws, unseen

    def one(self, wordings: tuple[Sequence[str], Sequence[str]]) -> str:
        return self.draws.pick(wordings[self.unseen])

    def say(self, kind: str, name: str) -> str:
        return self.one(LEXICON[kind][name])

    def colour(self, actor: Actor) -> str:
        return self.say("colour", COLOURS[actor.look[1]])

    def name(self, actor: Actor, article: str, material: bool = False, face: int = -1) -> str:
        """A character in words: "a happy bouncy small red ball"."""
        shape, _, size, stuff = actor.look
        parts = [article]
        if face >= 0:
            parts.append(self.say("expression", EXPRESSIONS[face]))
        if material:
            parts.append(self.say("material", MATERIAL_NAMES[stuff]))
        parts += [self.say("size", SIZES[size]), self.colour(actor)]
        parts.append(self.say("shape", SHAPES[shape]))
        if parts[0] == "a" and parts[1][0] in "aeiou":
            parts[0] = "an"
        return " ".join(parts)

    def again(self, actor: Actor) -> str:
        """A character that was named before."""
        return f"the {self.colour(actor)} {self.say('shape', SHAPES[actor.look[0]])}"

    def motion(self, actor: Actor) -> str:
        name = actor.motion
        if SHAPES[actor.look[0]] != "ball":
            name = name.replace("rolls", "slides")
        return self.say("motion", name)


def spot(x: float, width: float) -> str:
    """The third of the room in which x lies."""
    return next((name for low, high, name in PARTS if low <= x / width < high), "right")


def caption(
    draws: Draws,
    scene: Scene,
    run: Run,
    camera: str,
    faces: np.ndarray,
    events: Sequence[Event],
    unseen: bool = False,
    detail: int = DETAIL,
) -> str:
    """An English caption in lower case, of a level of detail up to `detail`, by chance."""
    voice = Voice(draws, unseen)
    level = draws.below(detail + 1)
    actors, first = scene.actors, faces[0].tolist()
    if level == 0:
        chosen = actors[0] if draws.chance(0.5) else draws.pick(actors)
        text = f"{voice.name(chosen, 'a')} {voice.motion(chosen)}"
        return f"{text} {voice.say('place', scene.place)}" if draws.chance(0.5) else text
    if level == 1:
        cast = [f"{voice.name(actor, 'a')} {voice.motion(actor)}" for actor in actors]
        text = f"{listed(cast)}, {voice.say('place', scene.place)}"
        for name in _built(scene):
            text += f", with {voice.say('built', name)}"
        return text
    if level == 2:
        cast = [
            f"{voice.name(actor, 'a', draws.chance(0.7), face)} {voice.motion(actor)}"
            for actor, face in zip(actors, first, strict=True)
        ]
        parts = [f"{voice.one(OPENINGS)} this {voice.say('place', scene.place)}: {listed(cast)}"]
        parts += [f"{voice.one(THERE)} {voice.say('built', name)}" for name in _built(scene)]
        parts.append(filmed(voice, camera, actors[0]))
        if events:
            parts.append(story(voice, scene, run, faces, events, False))
        return "; ".join(parts)
    return _text(voice, scene, run, camera, faces, events)


def _text(
    voice: Voice, scene: Scene, run: Run, camera: str, faces: np.ndarray, events: Sequence[Event]
) -> str:
    """A text about everything, of up to several hundred words."""
    actors, first = scene.actors, faces[0].tolist()
    gravity = "moon" if scene.place == "moon" else "earth"
    parts = [f"{voice.one(OPENINGS)} this {voice.say('place', scene.place)}",
             voice.say("gravity", gravity)]  # fmt: skip
    parts += [f"{voice.one(THERE)} {voice.say('built', name)}" for name in _built(scene)]
    for number, actor in enumerate(actors):
        parts.append(
            f"{voice.one(THERE)} {voice.name(actor, 'a')}, and {voice.one(MADE)}"
            f" {voice.say('material', MATERIAL_NAMES[actor.look[3]])}"
        )
        if first[number] >= 0:
            parts.append(
                f"{voice.again(actor)}: {voice.one(LOOKS)}"
                f" {voice.say('expression', EXPRESSIONS[first[number]])}"
            )
        parts.append(
            f"{voice.again(actor)}: {voice.one(STARTS)}"
            f" {voice.say('spot', spot(actor.x, scene.width))}, and it {voice.motion(actor)}"
        )
    if events:
        parts.append(story(voice, scene, run, faces, events, True))
    for number, actor in enumerate(actors):
        last = float(run.position[-1, number, 0])
        parts.append(
            f"{voice.again(actor)} {voice.say('end', '')}"
            f" {voice.say('spot', spot(last, scene.width))}"
        )
    parts.append(filmed(voice, camera, actors[0]))
    return ". ".join(parts)


def _built(scene: Scene) -> list[str]:
    names = [] if scene.built == "none" else [scene.built]
    return [*names, "tower"] if scene.tower else names


def listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def filmed(voice: Voice, camera: str, actor: Actor) -> str:
    """What the camera does; `follow` goes along with the actor."""
    text = voice.say("camera", camera)
    return f"{text} {voice.again(actor)}" if camera == "follow" else text


def story(
    voice: Voice, scene: Scene, run: Run, faces: np.ndarray, events: Sequence[Event], times: bool
) -> str:
    """The events in order, each after a word that says so."""
    text = ""
    for number, event in enumerate(events):
        if number:
            if event.frame == events[number - 1].frame:
                link = voice.one(SAME)
            elif number == len(events) - 1:
                link = voice.one(LAST)
            else:
                link = voice.one(THEN)
            text += f", {link} "
        clause = _clause(voice, scene, run, faces, event)
        if times and event.frame:
            clause += f" after about {event.frame / len(faces):.0%} of the time"
        text += clause
    return text


def _clause(voice: Voice, scene: Scene, run: Run, faces: np.ndarray, event: Event) -> str:
    frame, kind, who = event
    if kind in ("topples", "pours"):
        by = next((n for at, n, other in run.touches if other == -1 and at <= frame), None)
        if kind == "topples" and by is not None:
            return f"{voice.again(scene.actors[by])} {voice.say('event', 'fells')}"
        return voice.say("event", kind)
    name = voice.again(scene.actors[who])
    if kind == "face":
        expression = EXPRESSIONS[int(faces[frame, who])]
        return f"{name} {voice.say('event', kind)} {voice.say('expression', expression)}"
    if kind == "moved":
        hits = [n for at, n, other in run.touches if other == who and at <= frame]
        if hits:
            return f"{voice.again(scene.actors[hits[-1]])} {voice.say('event', 'hits')} {name}"
    return f"{name} {voice.say('event', kind)}"


# ---- reading --------------------------------------------------------------------------------


@functools.cache
def _phrases() -> tuple[re.Pattern[str], dict[str, tuple[str, str]]]:
    """A pattern of all wordings, the longest first, and the meaning of each."""
    table: dict[str, tuple[str, str]] = {}
    for kind, words in LEXICON.items():
        for name, (seen, unseen) in words.items():
            for phrase in (*seen, *unseen):
                assert phrase not in table, phrase
                table[phrase] = kind, name
    every = "|".join(re.escape(phrase) for phrase in sorted(table, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])({every})(?![\w-])"), table


def parse(text: str) -> Told:
    """Parses a caption."""
    pattern, table = _phrases()
    said: list[tuple[str, str]] = []
    characters: dict[str, dict[str, str]] = {}
    events: list[tuple[str, str, str]] = []
    waiting: dict[str, str] = {}  # adjectives before the colour
    who, pending, ending = "", "", False
    for match in pattern.finditer(text):
        kind, name = table[match[1]]
        if kind == "colour":
            if pending == "hits":
                events.append(("moved", name, who))
            if pending == "follow":
                said.append(("followed", name))
            pending, who, ending = "", name, False
            characters.setdefault(who, {}).update(waiting)
            waiting = {}
        elif kind in ("size", "material", "expression"):
            if kind == "expression" and pending == "face":
                events.append(("face", who, name))
                pending = ""
            elif kind == "size" or _before_noun(text, match.end()):
                waiting[kind] = name
            else:
                characters[who][kind] = name
        elif kind in ("shape", "motion", "course"):
            characters[who][kind] = name
        elif kind == "spot":
            characters[who]["end" if ending else "spot"] = name
        elif kind == "end":
            ending = True
        elif kind == "event":
            if name in ("hits", "face"):
                pending = name
            elif name in ("topples", "pours", "fells"):
                fells = who if name == "fells" else ""
                events.append(("pours" if name == "pours" else "topples", "", fells))
            else:
                events.append((name, who, ""))
        else:
            said.append((kind, name))
            if name == "follow":
                pending = name
    return Told(tuple(said), characters, tuple(events), len(text.split()))


def _before_noun(text: str, end: int) -> bool:
    """Whether what follows leads to a colour with nothing but adjectives between."""
    pattern, table = _phrases()
    match = pattern.match(text, end + 1)
    while match and table[match[1]][0] in ("material", "size", "expression"):
        match = pattern.match(text, match.end() + 1)
    return match is not None and table[match[1]][0] == "colour"
