"""Events of a clip, as a pure function of simulated states, or of what the oracle reads.

Dimension key: T frames, N characters.
"""

from typing import NamedTuple

import numpy as np

from vdit.worlds.forms import Form
from vdit.worlds.playground import cast

KINK = 0.35  # m/s and more: a change of speed from frame to frame that only a touch explains
MOVED = 0.15  # metres from where it rested: a character has been moved
FALLEN = 0.7  # of its height: a tower below it has toppled
POURED = 0.3  # of the largest amount: from this share on it pours


class Event(NamedTuple):
    """At `frame` this happened to character `who` (-1: to the tower, or what pours)."""

    frame: int
    kind: str
    who: int


class Sight(NamedTuple):
    """The input of `find`; NaN where something is not seen."""

    position: np.ndarray  # (T, N, 2)
    forms: tuple[Form, ...]
    expression: np.ndarray  # (T, N), -1 without faces
    motions: tuple[str, ...]
    built: str
    side: int
    spot: float
    width: float
    gravity: float
    fps: float
    tower: np.ndarray  # (T,): the tower's height, 0 without one
    poured: np.ndarray  # (T,): how much has come out of the spout, in any unit


def landing(track: np.ndarray, fps: float, gravity: float) -> int:
    """The first frame of a track (T, 2) that the two before do not lead to in free flight, or T."""
    if len(track) < 3:
        return len(track)
    ahead = 2 * track[1:-1] - track[:-2]
    ahead[:, 1] -= gravity / fps**2
    off = np.abs(track[2:] - ahead).max(1) * fps
    hits = np.flatnonzero(~(off < KINK + 0.03 * fps))
    return int(hits[0]) + 2 if len(hits) else len(track)


def _first(mask: np.ndarray) -> int | None:
    hits = np.flatnonzero(mask)
    return int(hits[0]) if len(hits) else None


def find(sight: Sight) -> list[Event]:
    """The events in the order of their frames."""
    found: list[tuple[int | None, str, int]] = []
    for who, motion in enumerate(sight.motions):
        x, y = sight.position[:, who].T
        shape = sight.forms[who]
        if motion == "falls" or motion.startswith("thrown"):
            frame = landing(sight.position[:, who], sight.fps, sight.gravity)
            found.append((frame if frame < len(x) else None, "lands", who))
        if motion == "rests":
            away = np.hypot(x - x[0], y - y[0])
            found.append((_first(away > MOVED), "moved", who))
        if who == 0:
            along = x if sight.side > 0 else sight.width - x
            if sight.built == "ramp":
                found.append((_first(along > cast.RAMP_LENGTH + 0.2), "rolls_down", who))
            if sight.built == "platform":
                low = y < cast.PLATFORM_TOP + shape.inner - 0.25
                off = low & (along > cast.PLATFORM_LENGTH - 0.5)
                found.append((_first(off), "drops_off", who))
            if sight.built == "pendulum":
                found.append((_first(along > sight.width / 2), "swings", who))
            if sight.built == "spring":
                found.append((_springs(y, shape.inner), "springs", who))
        faces = sight.expression[:, who]
        if len(faces) > 1 and (faces >= 0).all():
            found.append((_first(faces != faces[0]), "face", who))
    if sight.tower[0] > 0:
        found.append((_first(sight.tower < FALLEN * sight.tower[0]), "topples", -1))
    if sight.built == "pour" and sight.poured.max() > 0:
        found.append((_first(sight.poured > POURED * sight.poured.max()), "pours", -1))
    events = [Event(frame, kind, who) for frame, kind, who in found if frame is not None]
    return sorted(events, key=lambda event: (event.frame, cast.EVENTS.index(event.kind), event.who))


def _springs(y: np.ndarray, inner: float) -> int | None:
    """The frame in which a character is thrown 0.35 m above its lowest place on the spring."""
    down = _first(y < cast.SPRING_TOP + inner + 0.1)
    if down is None:
        return None
    up = _first(y[down:] > np.minimum.accumulate(y[down:]) + 0.35)
    return None if up is None else down + up
