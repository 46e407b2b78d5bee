"""The oracle of playgrounds, by analysis by synthesis with the renderer alone: the empty place is
aligned with each frame (`camera`), each character, detected by its colour, is fitted (`bodies`);
`reading` reads structures and the rest, `judge` scores a clip, `shots` those of several shots."""

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
