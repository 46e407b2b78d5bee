"""The oracle of shots: detects cuts, reads every shot, and scores it against the truth.

Each frame is matched with the empty rooms of every backdrop and camera; a change of the nearest one
is a cut. It relies on the renderer alone.

Dimension key: T frames, H height, W width, S shots, N objects.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vdit.worlds.bodies.oracle import Body, best_order, read, room
from vdit.worlds.bodies.physics import View
from vdit.worlds.bodies.render import framed
from vdit.worlds.cuts import judge_cuts
from vdit.worlds.shots.caption import course
from vdit.worlds.shots.source import BACKGROUNDS, CAMERAS
from vdit.worlds.statistics import means

ROOMS = tuple(itertools.product(range(len(BACKGROUNDS)), range(len(CAMERAS))))
FAR = 60.0  # RGB distance, the largest of the channels, that counts as wholly different
KNOWN = 0.6  # mean distance of a frame from its room, in FAR: more is no room of the world
LOOKS = ("colour", "shape", "size")
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
        parts = [
            scene._replace(begin=max(begin, scene.begin), end=min(end, scene.end))
            for scene in shown
            if scene.begin < end and scene.end > begin
        ]
        best = max(parts, key=lambda part: part.end - part.begin, default=None)
        rows.append(_score_shot(video, truth, index, begin, end, best))
    names = ("background", "framing", *LOOKS, "permanence", "motion")
    result |= {name: float(np.mean([row[name] for row in rows])) for name in names}
    result["identity"] = float(all(result[name] == 1 for name in LOOKS))
    every = [value for name, value in result.items() if name != "permanence"]
    result["every_attribute"] = float(all(value == 1 for value in every))
    return {name: result[name] for name in SCORES}


def _score_shot(
    video: np.ndarray,
    truth: Mapping[str, np.ndarray],
    index: int,
    begin: int,
    end: int,
    scene: Scene | None,
) -> dict[str, bool]:
    """The scores of shot `index`, frames `begin` to `end`, of which `scene` was detected."""
    names = ("background", "framing", *LOOKS, "permanence", "motion")
    if scene is None:
        return dict.fromkeys(names, False)
    fps, count = float(truth["fps"]), int(truth["count"])
    view = framed(View(*video.shape[1:3]), CAMERAS[scene.framing])
    clip = video[scene.begin : scene.end]
    reading = read(clip, fps, view, BACKGROUNDS[scene.background])
    bodies, same = reading.bodies, len(reading.bodies) == count
    right = _match(bodies, truth, index, fps)
    whole = reading.clean.all() and all(body.present.all() for body in bodies)
    return {
        "background": scene.background == truth["background"][begin],
        "framing": scene.framing == truth["framing"][begin],
        **{name: same and all(row[k] for row in right) for k, name in enumerate(LOOKS)},
        "permanence": same and bool(whole) and (scene.begin, scene.end) == (begin, end),
        "motion": same and all(row[-1] for row in right),
    }


def _match(
    bodies: Sequence[Body], truth: Mapping[str, np.ndarray], index: int, fps: float
) -> list[tuple[bool, ...]]:
    """Of each character: whether its body's looks and motion in shot `index` are right.

    Bodies are matched by colour, then by the rest; a character without one has nothing right.
    """
    objects = range(int(truth["count"]))
    hit = np.zeros((max(len(bodies), len(objects)), len(objects), len(LOOKS) + 1), bool)
    for row, body in zip(hit, bodies, strict=False):
        for n in objects:
            looks = [getattr(body, name) == truth[name][n] for name in LOOKS]
            row[n] = [*looks, _moves(body, truth, index, n, fps)]
    order = best_order(hit)
    return [tuple(hit[row, n].tolist()) for row, n in zip(order, objects, strict=True)]


def _moves(body: Body, truth: Mapping[str, np.ndarray], index: int, n: int, fps: float) -> bool:
    """Whether a body's motion in shot `index` is that of object n."""
    begins = int(truth["motion"][index, n])
    if begins >= 0:
        return body.motion == begins
    return not np.isnan(body.track).any() and course(body.track, fps) == truth["course"][index, n]


def aggregate_shots(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of `score_shots` over clips, and their number; NaN where there are none."""
    return means(scores, SCORES)
