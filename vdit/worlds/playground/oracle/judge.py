"""Scores of a reading against a clip's truth.

Dimension key: T frames, H height, W width, N characters.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vdit.worlds.playground.cast import EVENTS
from vdit.worlds.playground.oracle.bodies import Body
from vdit.worlds.playground.oracle.physics import PHYSICS, judge_physics
from vdit.worlds.playground.oracle.reading import Reading, read
from vdit.worlds.statistics import means

LOOKS = ("colour", "shape", "size", "material")
CAST_SCORES = ("count", *LOOKS, "expression", "motion")
DRIFT = ("steady_colour", "steady_contrast", "steady_sharpness")
SCORES = ("place", "camera", "built", *CAST_SCORES, "events", "order", *PHYSICS, *DRIFT,
          "every_attribute")  # fmt: skip
EVERY = ("place", "camera", "built", *CAST_SCORES, "events")  # all 1: every attribute
DRIFTS = (0.03, 0.04, 0.06)  # shares of colour, contrast and sharpness a second, at most


def score(video: np.ndarray, item: Mapping[str, Any]) -> dict[str, float]:
    """Reads and scores a clip (T, H, W, 3) uint8."""
    return judge(read(video, float(item["truth"]["fps"])), item)


def judge(reading: Reading, item: Mapping[str, Any]) -> dict[str, float]:
    """Scores a reading against the truth of `item`.

    Of the truth no positions and no camera path are read, only what a caption can describe: fps,
    count, looks, motions, place, kind of camera, structures, expressions, events. Events outside
    the picture count neither as misses nor as false positives.

    Returns 1.0 or 0.0, or a share, or NaN where a clip has nothing of the kind:

    - place, camera, built (with the tower); count; colour, shape, size, material, motion (right for
      every character); expression (share of frames and characters)
    - events: F1; a match has the same kind and character, within a sixth of a second
    - order: all true events are detected, and those a sixth of a second or more apart in order;
      NaN for less than two
    - gravity: that of the place, within 15%, by what flies
    - restitution: of balls that bounce on the floor undisturbed, within BOUNCE of their material's
    - energy: no more than at the start; NaN where a spring, a swing or pouring is built
    - penetration: nobody is inside another, the floor or a wall
    - permanence: exactly the right characters, intact whenever they are in the picture
    - steady_colour, steady_contrast, steady_sharpness: the drift a second is at most DRIFTS
    - every_attribute: EVERY are all 1

    Physics and steadiness are 0 where count or colours are wrong.
    """
    truth = item["truth"]
    fps = float(truth["fps"])
    count, bodies = int(truth["count"]), reading.bodies
    mine = {body.look[1]: body for body in bodies}
    told = truth["colour"][:count].tolist()
    pairs = [(n, mine[colour]) for n, colour in enumerate(told) if colour in mine]
    same = len(pairs) == count == len(bodies)
    result = {
        "place": float(reading.place == truth["place"]),
        "camera": float(reading.camera_kind == truth["camera_kind"]),
        "built": float(
            reading.built == truth["built"] and (reading.tower[0] > 0) == bool(truth["tower"])
        ),
        "count": float(len(bodies) == count),
        "colour": float(same),
    }
    for index, name in ((0, "shape"), (2, "size"), (3, "material")):
        right = [body.look[index] == truth[name][n] for n, body in pairs]
        result[name] = float(len(pairs) == count and all(right))
    right = [body.motion == truth["motion"][n] for n, body in pairs]
    result["motion"] = float(len(pairs) == count and all(right))
    result["expression"] = judge_faces(truth["expression"][:, :count], pairs)
    result["events"], result["order"] = judge_events(reading, truth, told, fps)
    result |= judge_physics(reading, truth, pairs, fps) if same else dict.fromkeys(PHYSICS, 0.0)
    for name, most, drift in zip(DRIFT, DRIFTS, reading.drift, strict=True):
        result[name] = float(same and abs(drift) <= most)
    every = [result[name] for name in EVERY if not math.isnan(result[name])]
    result["every_attribute"] = float(all(value > 0.9 for value in every))
    return {name: result[name] for name in SCORES}


def judge_faces(faces: np.ndarray, pairs: Sequence[tuple[int, Body]]) -> float:
    """The share of frames and characters whose expression is that of `faces` (T, N)."""
    if not (faces >= 0).any():
        return math.nan
    shares = [np.mean(body.expression[body.inside] == faces[body.inside, n])
              for n, body in pairs if body.inside.any()]  # fmt: skip
    missing = faces.shape[1] - len(pairs)
    return float(np.sum(shares) / max(len(shares) + missing, 1))


def judge_events(
    reading: Reading, truth: Mapping[str, np.ndarray], told: Sequence[int], fps: float
) -> tuple[float, float]:
    """F1 of the events, and whether all are detected in order (NaN for less than two)."""
    near = max(2, round(fps / 6))
    true, hidden = [], set()
    for (frame, kind, who), seen in zip(truth["event"].tolist(), truth["seen"], strict=True):
        if frame >= 0:
            event = frame, EVENTS[kind], told[who] if who >= 0 else -1
            true.append(event) if seen else hidden.add(event[1:])
    found = [
        (event.frame, event.kind, reading.bodies[event.who].look[1] if event.who >= 0 else -1)
        for event in reading.events
    ]
    found = [event for event in found if event[1:] not in hidden]
    if not true and not found:
        return 1.0, math.nan
    at = {(kind, who): frame for frame, kind, who in found}
    hits = [abs(at.get((kind, who), 10**6) - frame) <= near for frame, kind, who in true]
    f1 = 2 * sum(hits) / (len(true) + len(found))
    if len(true) < 2:
        return f1, math.nan
    if any((kind, who) not in at for _, kind, who in true):
        return f1, 0.0
    ordered = all(
        at[kind_a, who_a] <= at[kind_b, who_b]
        for (a, kind_a, who_a), (b, kind_b, who_b) in itertools.combinations(true, 2)
        if b - a >= near
    )
    return f1, float(ordered)


def aggregate(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of `score` over the clips where they are not NaN, and the number of clips."""
    return means(scores, SCORES)
