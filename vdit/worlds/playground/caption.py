"""The grammar of playgrounds: captions of five to several hundred words, and their parser.

Colours are unique within a clip, so every mention of a character names its colour, and what follows
a mention describes it. A shot that begins a take is described like a clip of one shot; one that
continues a take by its framing and by the course of each visible character.
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
from vdit.worlds.playground.lexicon import LEXICON, LINKS
from vdit.worlds.playground.physics import Actor, Run, Scene
from vdit.worlds.shots.caption import COURSES

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

    def say(self, kind: str, name: str) -> str:
        return self.draws.pick(LEXICON[kind][name][self.unseen])

    def link(self, name: str) -> str:
        return self.draws.pick(LINKS[name][self.unseen])

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

    def stuff(self, actor: Actor) -> str:
        return self.say("material", MATERIAL_NAMES[actor.look[3]])

    def place(self, x: float, scene: Scene) -> str:
        return self.say("spot", spot(x, scene.width))

    def motion(self, actor: Actor) -> str:
        name = actor.motion
        if SHAPES[actor.look[0]] != "ball":
            name = name.replace("rolls", "slides")
        return self.say("motion", name)


def spot(x: float, width: float) -> str:
    """The third of the room in which x lies."""
    return next((name for low, high, name in PARTS if low <= x / width < high), "right")


def caption(
    draws: Draws, scene: Scene, run: Run, camera: str, faces: np.ndarray, events: Sequence[Event],
    unseen: bool = False, detail: int = DETAIL
) -> str:  # fmt: skip
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
        parts = [f"{voice.link('opening')} this {voice.say('place', scene.place)}: {listed(cast)}"]
        parts += [f"{voice.link('there')} {voice.say('built', name)}" for name in _built(scene)]
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
    parts = [f"{voice.link('opening')} this {voice.say('place', scene.place)}",
             voice.say("gravity", gravity)]  # fmt: skip
    parts += [f"{voice.link('there')} {voice.say('built', name)}" for name in _built(scene)]
    for number, actor in enumerate(actors):
        there = f"{voice.link('there')} {voice.name(actor, 'a')}"
        parts.append(f"{there}, and {voice.link('made')} {voice.stuff(actor)}")
        if first[number] >= 0:
            looks = f"{voice.again(actor)}: {voice.link('looks')}"
            parts.append(f"{looks} {voice.say('expression', EXPRESSIONS[first[number]])}")
        starts = f"{voice.again(actor)}: {voice.link('starts')} {voice.place(actor.x, scene)}"
        parts.append(f"{starts}, and it {voice.motion(actor)}")
    if events:
        parts.append(story(voice, scene, run, faces, events, True))
    for actor, x in zip(actors, run.position[-1, :, 0].tolist(), strict=True):
        parts.append(f"{voice.again(actor)} {voice.say('end', '')} {voice.place(x, scene)}")
    parts.append(filmed(voice, camera, actors[0]))
    return ". ".join(parts)


def _built(scene: Scene) -> list[str]:
    names = [] if scene.built == "none" else [scene.built]
    return [*names, "tower"] if scene.tower else names


def listed(parts: Sequence[str]) -> str:
    """As "a, b and c"."""
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
            same, last = event.frame == events[number - 1].frame, number == len(events) - 1
            text += f", {voice.link('same' if same else 'last' if last else 'then')} "
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
            stuff = voice.stuff(actors[n])
            who = voice.name(actors[n], "the", face=faces[n])
            parts.append(f"{voice.link('there')} {who}, and {voice.link('made')} {stuff}")
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
    words = [voice.link("first"), *(voice.link("then") for _ in where[2:]), voice.link("last")]
    if len(shots) == 1:
        return f"{text}, {where[0]}"
    return f"{text}: " + "; ".join(f"{w} {at}" for w, at in zip(words, where, strict=True))


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
