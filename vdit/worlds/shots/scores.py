"""Scores of clips of several shots."""

from pathlib import Path
from typing import Any

from vdit.sample import Model
from vdit.worlds.reword import paraphrase
from vdit.worlds.scores import Oracle, score_captions
from vdit.worlds.shots.oracle import SCORES, aggregate_shots, score_shots


def score(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """The rows of the stage eval."""

    def unseen(clip: dict[str, Any]) -> Any:
        return paraphrase(clip["caption"]), [(at, paraphrase(text)) for at, text in clip["shots"]]

    oracle = Oracle(score_shots, aggregate_shots, SCORES)
    return score_captions(model, workdir, seed, oracle, unseen)
