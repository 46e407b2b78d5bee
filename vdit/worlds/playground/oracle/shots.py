"""Clips of several shots: detected by jumps of place or framing, read by take, scored by shot.

Dimension key: T frames, M cameras, N characters.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vdit.worlds.playground.cast import CAMERAS, FRAMINGS, PLACE_NAMES
from vdit.worlds.playground.oracle.bodies import Body, Figures, filled, find_bodies
from vdit.worlds.playground.oracle.camera import Eye, camera_kind, first_look, follow, starts
from vdit.worlds.playground.oracle.judge import LOOKS, judge, judge_looks
from vdit.worlds.playground.oracle.reading import Reading, put_together
from vdit.worlds.playground.render import framed
from vdit.worlds.shots.caption import course
from vdit.worlds.statistics import judge_cuts, means, nearest

JUMP = 0.07  # of zoom from one frame to the next: more is a cut
DOUBT = 0.02  # mean difference from the empty place, in FAR, that a frame adds which may be a cut
KNOWN = 0.5  # mean difference from the empty place, in FAR: above it the place is unknown
OF_SHOTS = ("place", "camera", "framing", "count", *LOOKS, "course")
OF_TAKES = ("built", "motion", "expression", "events", "order", "gravity", "penetration",
            "permanence")  # fmt: skip
SCORES = ("cut_precision", "cut_recall", "shots", *OF_SHOTS, "identity", *OF_TAKES,
          "every_attribute")  # fmt: skip
EVERY = ("cut_precision", "cut_recall", "shots", *OF_SHOTS, "built", "motion", "expression",
         "events")  # fmt: skip


class Seen(NamedTuple):
    """A detected shot: frames `begin` to `end` of the clip, and its characters."""

    begin: int
    end: int
    camera: int  # its kind
    framing: int
    bodies: list[Body]


class Take(NamedTuple):
    """Shots of one place that follow each other, read as one."""

    begin: int
    end: int
    reading: Reading
    shots: list[Seen]


def find_shots(eye: Eye) -> list[tuple[int, int, np.ndarray]]:
    """First frame, place (-1: none that is known) and cameras (T, 3) of each shot, in order."""
    begins = np.concatenate(
        [starts(eye.size), *(framed(name, 1, eye.size) for name in FRAMINGS[1:])]
    )
    found: list[tuple[int, int, list[np.ndarray]]] = []
    cost = math.inf  # the least of the running shot
    for frame in range(len(eye.video)):
        _, index, cameras = found[-1] if found else (0, -1, [])
        made, now = np.zeros(3), math.inf
        if index >= 0:
            made, now = follow(eye, PLACE_NAMES[index], frame, cameras, cost)
            if now <= cost + DOUBT and _near(made, cameras[-1]):
                cost = min(now, cost)
                cameras.append(made)
                continue
        place, camera = first_look(eye, frame, begins)
        also = float(eye.cost(PLACE_NAMES[place], frame, camera[None])[0])
        if place == index and now <= also:
            camera, also = made, now
        if place == index and _near(camera, cameras[-1]):
            cameras.append(camera)
        elif also < KNOWN:
            found.append((frame, place, [camera]))
            cost = also
        elif not found or index >= 0:
            found.append((frame, -1, []))
    return [(begin, place, np.array(cameras)) for begin, place, cameras in found]


def _near(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether a camera (3,) may be that of the frame after another's."""
    return abs(float(one[2] - two[2])) <= JUMP


def framing_of(camera: np.ndarray, kind: int, size: tuple[int, int]) -> int:
    """Index into FRAMINGS of a camera's path (T, 3), of a kind."""
    if CAMERAS[kind] != "static":
        return FRAMINGS.index("whole")
    still = np.array([framed(name, 1, size)[0] for name in FRAMINGS])
    return int(np.abs(still - np.median(camera, axis=0)).sum(1).argmin())


def _joined(parts: Sequence[tuple[slice, list[Body]]], frames: int) -> list[Body]:
    """The characters of a take of `frames`: those of its shots, merged by colour."""
    made: dict[int, Body] = {}
    for at, bodies in parts:
        for body in bodies:
            if body.look[1] not in made:
                nothing = np.zeros(frames, bool)
                made[body.look[1]] = dataclasses.replace(
                    body, track=np.full((frames, 2), np.nan), angle=np.zeros(frames),
                    whole=nothing, inside=nothing.copy(),
                    expression=np.full(frames, body.expression[0]),
                )  # fmt: skip
            whole = made[body.look[1]]
            for name in ("track", "angle", "whole", "inside"):
                getattr(whole, name)[at] = getattr(body, name)
            whole.expression[at.start :] = body.expression[-1]
            whole.expression[at] = body.expression
    return list(made.values())


def read_shots(video: np.ndarray, fps: float) -> list[Take]:
    """Reads a clip `video` (T, H, W, 3) uint8 of several shots at `fps` frames a second."""
    takes = []
    for place, group in itertools.groupby(find_shots(Eye(video)), key=lambda shot: shot[1]):
        if place < 0:
            continue
        shots = [(begin, begin + len(cameras), cameras) for begin, _, cameras in group]
        first, last = shots[0][0], shots[-1][1]
        camera = np.concatenate([cameras for *_, cameras in shots])
        figures = Figures(Eye(video[first:last]), place, camera)
        parts, seen, near = [], [], np.zeros(last - first, bool)
        for begin, end, cameras in shots:
            at = slice(begin - first, end - first)
            bodies = find_bodies(figures.part(at))
            kind = camera_kind(cameras, [body.track for body in bodies])
            framing = framing_of(cameras, kind, figures.eye.size)
            near[at] = FRAMINGS[framing].startswith("close")
            parts.append((at, bodies))
            seen.append(Seen(begin, end, kind, framing, bodies))
        bodies = _joined(parts, last - first)
        takes.append(Take(first, last, put_together(figures, bodies, fps, near), seen))
    return takes


def score_shots(video: np.ndarray, item: Mapping[str, Any]) -> dict[str, float]:
    """`judge_shots` of what a clip (T, H, W, 3) uint8 shows."""
    return judge_shots(read_shots(video, float(item["truth"]["fps"])), item)


def judge_shots(takes: Sequence[Take], item: Mapping[str, Any]) -> dict[str, float]:
    """Scores a reading against the truth of `item`, of which no positions and no paths are read.

    Returns fractions (SCORES), NaN where a clip has nothing of the kind: those of `judge_cuts`.
    Means over the true shots, each matched with the detected one of most shared frames: place,
    camera, framing; count, colour, shape, size, material (right for every character, and none too
    many; close-ups need only show who is fully in the picture throughout); course (where a take
    goes on, the share of characters that move as described). identity: all looks are right in every
    shot. Means over the true takes, matched in the same way: what `judge` returns.
    every_attribute: EVERY are all above .9.
    """
    truth = item["truth"]
    begins = [0, *np.flatnonzero(truth["cuts"]).tolist()]
    bounds, serial = [*begins, len(truth["shot"])], truth["take"][begins]
    shots = [shot for take in takes for shot in take.shots]
    result = judge_cuts([shot.begin for shot in shots], begins)
    rows: list[dict[str, float]] = []
    for index, (begin, end) in enumerate(itertools.pairwise(bounds)):
        shot = nearest(shots, begin, end)
        take = next((take for take in takes if shot in take.shots), None)
        rows.append(_judge_shot(shot, take, truth, index))
    result |= means(rows, OF_SHOTS)
    result["identity"] = float(all(result[name] == 1 for name in ("count", *LOOKS)))
    scores: list[dict[str, float]] = []
    for number in range(int(serial[-1]) + 1):
        mine = np.flatnonzero(serial == number)
        found = nearest(takes, bounds[mine[0]], bounds[mine[-1] + 1])
        if found is None:
            scores.append(dict.fromkeys(OF_TAKES, 0.0))
        else:
            told = take_truth(truth, mine.tolist(), found.begin, found.end)
            scores.append(judge(found.reading, {"truth": told}))
    result |= means(scores, OF_TAKES)
    every = [result[name] for name in EVERY if not math.isnan(result[name])]
    result["every_attribute"] = float(all(value > 0.9 for value in every))
    return {name: result[name] for name in SCORES}


def take_truth(
    truth: Mapping[str, np.ndarray], shots: Sequence[int], begin: int, end: int
) -> dict[str, np.ndarray]:
    """The truth of one take, of these `shots`, as `Playground` has it of a clip."""
    of_shot = ("place", "camera_kind", "built", "tower", "gravity", "motion")
    event, seen = (np.concatenate(truth[name][list(shots)]) for name in ("event", "seen"))
    there = event[:, 0] >= 0
    event = event[there] - (begin, 0, 0)
    return {
        **{name: truth[name] for name in ("fps", "room", "count", *LOOKS)},
        **{name: truth[name][shots[0]] for name in of_shot},
        "expression": truth["expression"][begin:end], "event": event, "seen": seen[there],
    }  # fmt: skip


def _judge_shot(
    shot: Seen | None, take: Take | None, truth: Mapping[str, np.ndarray], index: int
) -> dict[str, float]:
    """The scores OF_SHOTS of shot `index`."""
    goes_on = bool((truth["course"][index] >= 0).any())
    if shot is None or take is None:
        return {name: 0.0 if goes_on or name != "course" else math.nan for name in OF_SHOTS}
    count, fps = int(truth["count"]), float(truth["fps"])
    colours = truth["colour"][:count].tolist()
    close = FRAMINGS[int(truth["framing"][index])].startswith("close")
    shown = np.flatnonzero(truth["shown"][index, :count]).tolist()
    asked = shown if close else list(range(count))
    mine = {body.look[1]: body for body in shot.bodies}
    there = all(colours[n] in mine for n in asked) and set(mine) <= set(colours)
    row = {
        "place": float(take.reading.place == truth["place"][index]),
        "camera": float(shot.camera == truth["camera_kind"][index]),
        "framing": float(shot.framing == truth["framing"][index]),
        "count": float(len(asked) <= len(mine) <= count),
        "colour": float(there),
        "course": math.nan,
    }
    pairs = [(n, mine[colours[n]]) for n in asked if colours[n] in mine]
    row |= judge_looks(truth, pairs, len(asked))
    if goes_on and shown:
        tracks = [filled(mine[colours[n]].track) if colours[n] in mine else None for n in shown]
        does = [-1 if track is None else course(track, fps) for track in tracks]
        row["course"] = float(np.mean(does == truth["course"][index, shown]))
    return row


def aggregate_shots(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of `score_shots` over the clips where they are not NaN, and the number of clips."""
    return means(scores, SCORES)
