"""The oracle of shots: detects cuts, reads every shot, and scores it against the truth.

A cut is a change of the empty room, of all backdrops and cameras, that is nearest to a frame.

Dimension key: T frames, H height, W width, S shots, N objects.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vdit.worlds.bodies.oracle import Body, match, read, room
from vdit.worlds.bodies.physics import View
from vdit.worlds.bodies.render import framed
from vdit.worlds.shots.caption import course
from vdit.worlds.shots.source import BACKGROUNDS, CAMERAS
from vdit.worlds.statistics import judge_cuts, means, nearest

ROOMS = tuple(itertools.product(range(len(BACKGROUNDS)), range(len(CAMERAS))))
FAR = 60.0  # RGB distance, the largest of the channels, that counts as wholly different
KNOWN = 0.6  # mean distance of a frame from its room, in FAR: more is no room of the world
LOOKS = ("colour", "shape", "size")
OF_SHOTS = ("background", "framing", *LOOKS, "permanence", "motion")
SCORES = (
    "cut_precision", "cut_recall", "shots", "background", "framing", *LOOKS, "identity",
    "permanence", "motion", "every_attribute",
)  # fmt: skip


class Scene(NamedTuple):
    """Frames `begin` to `end` that show one room: indices into BACKGROUNDS and CAMERAS."""

    begin: int
    end: int
    background: int
    framing: int


def rooms(video: np.ndarray) -> np.ndarray:
    """Index (T,) into ROOMS of the room that each frame (T, H, W, 3) shows, -1 for none."""
    view, picture = View(*video.shape[1:3]), video.astype(np.float32)
    cost = np.empty((len(ROOMS), len(video)))
    for index, (background, framing) in enumerate(ROOMS):
        empty = room(framed(view, CAMERAS[framing]), BACKGROUNDS[background])
        off = np.abs(picture - empty[None]).max(3)
        cost[index] = np.minimum(off, FAR).mean((1, 2)) / FAR
    return np.where(cost.min(0) < KNOWN, cost.argmin(0), -1)


def scenes(video: np.ndarray) -> list[Scene]:
    """The detected shots, in order; frames that show no room belong to none."""
    shown = rooms(video)
    bounds = [0, *(np.flatnonzero(np.diff(shown)) + 1).tolist(), len(video)]
    return [
        Scene(begin, end, *ROOMS[shown[begin]])
        for begin, end in itertools.pairwise(bounds)
        if shown[begin] >= 0
    ]


def score_shots(video: np.ndarray, item: Mapping[str, Any]) -> dict[str, float]:
    """Scores a clip (T, H, W, 3) uint8 against the truth of `item`, of which no positions are read.

    Returns fractions (SCORES): those of `judge_cuts`. Means over the true shots, each compared with
    the longest part that shows one room: `background`, `framing`; `colour`, `shape`, `size` (right
    for every character, and none too many); `permanence` (intact bodies and nothing else in every
    frame); `motion` (how each character begins, or its course where a take goes on). And, 1 or 0 of
    the clip: `identity` (every character looks right in every shot), `every_attribute` (all the
    above but permanence is 1).
    """
    truth = item["truth"]
    begins = [0, *np.flatnonzero(truth["cuts"]).tolist()]
    bounds = [*begins, len(video)]
    shown = scenes(video)
    result = judge_cuts([scene.begin for scene in shown], begins)
    rows = []
    for index, (begin, end) in enumerate(itertools.pairwise(bounds)):
        best = nearest(shown, begin, end)
        if best is not None:
            best = best._replace(begin=max(begin, best.begin), end=min(end, best.end))
        rows.append(_score_shot(video, truth, index, begin, end, best))
    result |= {name: float(np.mean([row[name] for row in rows])) for name in OF_SHOTS}
    result["identity"] = float(all(result[name] == 1 for name in LOOKS))
    every = [value for name, value in result.items() if name != "permanence"]
    result["every_attribute"] = float(all(value == 1 for value in every))
    return {name: result[name] for name in SCORES}


def _score_shot(
    video: np.ndarray, truth: Mapping[str, np.ndarray], index: int, begin: int, end: int,
    scene: Scene | None
) -> dict[str, bool]:  # fmt: skip
    """The scores of shot `index`, frames `begin` to `end`, of which `scene` was detected."""
    if scene is None:
        return dict.fromkeys(OF_SHOTS, False)
    fps, count = float(truth["fps"]), int(truth["count"])
    view = framed(View(*video.shape[1:3]), CAMERAS[scene.framing])
    clip = video[scene.begin : scene.end]
    reading = read(clip, fps, view, BACKGROUNDS[scene.background])
    bodies, same = reading.bodies, len(reading.bodies) == count

    def compare(body: Body, n: int) -> list[bool]:
        looks = [getattr(body, name) == truth[name][n] for name in LOOKS]
        begins = int(truth["motion"][index, n])
        if begins >= 0:
            return [*looks, body.motion == begins]
        seen = not np.isnan(body.track).any()
        return [*looks, seen and course(body.track, fps) == truth["course"][index, n]]

    right: np.ndarray = np.all(match(bodies, count, compare)[1], axis=0)
    whole = reading.clean.all() and all(body.present.all() for body in bodies)
    return {
        "background": scene.background == truth["background"][begin],
        "framing": scene.framing == truth["framing"][begin],
        **{name: same and right[k] for k, name in enumerate(LOOKS)},
        "permanence": same and bool(whole) and (scene.begin, scene.end) == (begin, end),
        "motion": same and right[-1],
    }


def aggregate_shots(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of `score_shots` over clips, and their number; NaN where there are none."""
    return means(scores, SCORES)
