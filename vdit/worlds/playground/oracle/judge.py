"""Scores of a reading against a clip's truth, and of its physical plausibility.

Dimension key: T frames, N characters.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vdit.worlds.playground import events as what
from vdit.worlds.playground.cast import EVENTS, MATERIAL_NAMES, MATERIALS, MOTIONS, SETS, form
from vdit.worlds.playground.oracle.bodies import Body, filled
from vdit.worlds.playground.oracle.reading import SLACK, Reading, read
from vdit.worlds.statistics import means

LOOKS = ("colour", "shape", "size", "material")
PHYSICS = ("gravity", "restitution", "energy", "penetration", "permanence")
CAST_SCORES = ("count", *LOOKS, "expression", "motion")
DRIFT = ("steady_colour", "steady_contrast", "steady_sharpness")
SCORES = ("place", "camera", "built", *CAST_SCORES, "events", "order", *PHYSICS, *DRIFT,
          "every_attribute")  # fmt: skip
EVERY = ("place", "camera", "built", *CAST_SCORES, "events")  # all 1: every attribute
CALM = ("none", "ramp", "platform")  # structures that store no energy
STRANGE = 0.02  # of the pixels, at most, that nothing explains
BOUNCE = 0.12  # largest error of restitution
DRIFTS = (0.03, 0.04, 0.06)  # shares of colour, contrast and sharpness a second, at most


def score(video: np.ndarray, item: Mapping[str, Any]) -> dict[str, float]:
    """Reads and scores a clip (T, H, W, 3) uint8."""
    return judge(read(video, float(item["truth"]["fps"])), item)


def judge(reading: Reading, item: Mapping[str, Any]) -> dict[str, float]:
    """Scores a reading against the truth of `item`.

    Of the truth only what a caption can describe is read, no positions and no camera path. Events
    outside the picture count neither as misses nor as false positives. Returns 1.0 or 0.0, or a
    share, or NaN where a clip has nothing of the kind:

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
    result |= judge_looks(truth, pairs, count)
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


def judge_looks(
    truth: Mapping[str, np.ndarray], pairs: Sequence[tuple[int, Body]], count: int
) -> dict[str, float]:
    """Whether shape, size and material are right of all `count` characters."""
    right = {
        name: all(body.look[index] == truth[name][n] for n, body in pairs)
        for index, name in ((0, "shape"), (2, "size"), (3, "material"))
    }
    return {name: float(len(pairs) == count and good) for name, good in right.items()}


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


def judge_physics(
    reading: Reading, truth: Mapping[str, np.ndarray], pairs: list[tuple[int, Body]], fps: float
) -> dict[str, float]:
    """The scores PHYSICS of a clip whose characters are the right ones."""
    gravity, built = float(truth["gravity"]), SETS[int(truth["built"])]
    room = float(truth["room"])
    bodies = [body for _, body in pairs]
    tracks = [filled(body.track) for body in bodies]
    forms = [form(body.look[0], body.look[2]) for body in bodies]
    stuff = [MATERIALS[MATERIAL_NAMES[int(truth["material"][n])]] for n, _ in pairs]
    seen = [body.inside for body in bodies]
    gaps = np.full((len(bodies), len(bodies), len(reading.camera)), np.inf)
    for one, two in itertools.permutations(range(len(bodies)), 2):
        apart = np.sqrt(np.square(tracks[one] - tracks[two]).sum(1))
        gaps[one, two] = np.where(
            seen[one] & seen[two], apart - forms[one].inner - forms[two].inner, np.inf
        )
    falls, bounces = [], []
    for number, (n, body) in enumerate(pairs):
        motion = MOTIONS[int(truth["motion"][n])]
        if motion != "falls" and not motion.startswith("thrown"):
            continue
        flight = what.landing(tracks[number], fps, gravity)
        if flight >= 5 and flight / fps >= 0.4 and body.whole[:flight].all():
            time = np.arange(flight) / fps
            falls.append(-2 * np.polyfit(time, tracks[number][:flight, 1], 2)[0] / gravity - 1)
        if built == "none" and not truth["tower"] and forms[number].radius:
            inner, x = forms[number].inner, tracks[number][:, 0]
            apart = np.minimum(gaps[number].min(0) / 2, np.minimum(x, room - x) - inner)
            free = body.whole & (apart > SLACK)
            bounce = _bounce(tracks[number], inner, flight, free, fps, gravity)
            bounces.append(bounce - stuff[number].elasticity)
    off = [abs(one) for one in bounces if not math.isnan(one)]
    deep = [
        bool((inside & ((track[:, 1] < shape.inner - SLACK) | (track[:, 0] < shape.inner - SLACK)
                        | (track[:, 0] > room - shape.inner + SLACK))).any())
        for track, shape, inside in zip(tracks, forms, seen, strict=True)
    ]  # fmt: skip
    whole = all((body.whole | ~body.inside).all() for body in bodies)
    return {
        "gravity": float(np.median(np.abs(falls)) < 0.15) if falls else math.nan,
        "restitution": float(max(off) < BOUNCE) if off else math.nan,
        "energy": _energy(tracks, forms, stuff, gravity, fps) if built in CALM else math.nan,
        "penetration": float(gaps.min() > -SLACK and not any(deep)),
        "permanence": float(whole and reading.strange.max() < STRANGE),
    }


def _bounce(
    track: np.ndarray, floor: float, landing: int, free: np.ndarray, fps: float, gravity: float
) -> float:
    """Restitution of a ball on track (T, 2), by its energy before and after its first landing; NaN
    where it comes down on something else or is not `free` (T,) then, or the clip ends too soon."""
    high, fall = track[:, 1] - floor, gravity / fps**2
    if not 3 <= landing < len(high) - 2 or not free[landing - 3 : landing + 3].all():
        return math.nan
    if 2 * high[landing - 1] - high[landing - 2] - fall > SLACK / 2:
        return math.nan  # the floor was not reached yet
    speed = np.diff(high) * fps
    energy = np.square(speed) / 2 + gravity * ((high[1:] + high[:-1]) / 2 + fall / 8)
    # Two steps, for a low bounce may end within the first. A landing that is hardly seen at its own
    # frame is found at the next: the step before is sure to be flight. A fall that ends right at
    # a frame is found at the next as well: then the first step up is the one between the two.
    first = landing - (high[landing - 1] < SLACK / 2 and speed[landing - 1] > 0)
    after = max(float(energy[first : first + 2].max()), 0.0)
    return math.sqrt(after / float(energy[landing - 3]))


def _energy(
    tracks: Sequence[np.ndarray], forms: Sequence[Any], stuff: Sequence[Any], gravity: float,
    fps: float
) -> float:  # fmt: skip
    """1 if all characters together never have much more energy than at first; NaN of few frames."""
    frames = len(tracks[0])
    if frames < 8:
        return math.nan
    total, mass = np.zeros(frames - 2), 0.0
    for track, shape, material in zip(tracks, forms, stuff, strict=True):
        weight = material.density * shape.area
        velocity = (track[2:] - track[:-2]) * fps / 2
        total += weight * (np.square(velocity).sum(1) / 2 + gravity * track[1:-1, 1])
        mass += weight
    # A ball's spin may become speed: at most half of what it has.
    return float(total.max() <= 1.15 * total[:2].mean() + 0.25 * mass)


def aggregate(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of `score` over the clips where they are not NaN, and the number of clips."""
    return means(scores, SCORES)
