"""The oracle of playgrounds: reads cameras, places, characters and events, and scores them.

It reads by drawing: the empty place is aligned with each frame (`camera`), and each character,
found by its colour, is fitted by the renderer's own pictures of it (`bodies`). It knows the
renderer, and nothing else. `built` reads ramps, towers and the like, `reading` puts a clip
together, `physics` and `judge` score it; `shots` does so for clips of several shots.
"""

from vdit.worlds.playground.oracle.bodies import Body
from vdit.worlds.playground.oracle.judge import SCORES, aggregate, judge, score
from vdit.worlds.playground.oracle.reading import Reading, read
from vdit.worlds.playground.oracle.shots import (
           aggregate_shots,
           judge_shots,
           read_shots,
           score_shots,
)

__all__ = ["SCORES", "Body", "Reading", "aggregate", "aggregate_shots", "judge", "judge_shots",
           "read", "read_shots", "score", "score_shots"]  # fmt: skip
