"""Physical plausibility of a reading.

Dimension key: T frames, N characters.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vdit.worlds.playground import events as what
from vdit.worlds.playground.cast import MATERIAL_NAMES, MATERIALS, MOTIONS, SETS, form
from vdit.worlds.playground.oracle.bodies import Body, filled
from vdit.worlds.playground.oracle.reading import SLACK, Reading

PHYSICS = ("gravity", "restitution", "energy", "penetration", "permanence")
CALM = ("none", "ramp", "platform")  # structures that store no energy
STRANGE = 0.02  # of the pixels, at most, that nothing explains
BOUNCE = 0.12  # largest error of restitution


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
    """Restitution of a ball on track (T, 2), by its energy of height and fall before and after its
    first landing.

    NaN where it comes down on something else, is not `free` (T,) of others and walls then, or the
    clip ends too soon.
    """
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
    tracks: Sequence[np.ndarray],
    forms: Sequence[Any],
    stuff: Sequence[Any],
    gravity: float,
    fps: float,
) -> float:
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
