"""The oracle of playgrounds: reads cameras, places, characters and events, and scores them.

Analysis by synthesis: the empty place is aligned with each frame (`camera`), and each character,
detected by its colour, is fitted with the renderer (`bodies`). `built` detects structures,
`reading` collects a clip's reading, `physics` and `judge` score it, `shots` does all that for clips
of several shots. It relies on the renderer alone.
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
