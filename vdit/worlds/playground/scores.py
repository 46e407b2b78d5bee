"""Scores of playgrounds."""

from pathlib import Path
from typing import Any

from vdit.data.sources import most_shots
from vdit.sample import Model
from vdit.worlds.playground import oracle
from vdit.worlds.playground.oracle.shots import SCORES as SCORES_OF_SHOTS
from vdit.worlds.scores import Oracle, score_captions

CLIP = Oracle(oracle.score, oracle.aggregate, oracle.SCORES)
SHOTS = Oracle(oracle.score_shots, oracle.aggregate_shots, SCORES_OF_SHOTS)


def score(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """The rows of the stage eval."""
    chosen = SHOTS if most_shots(model.config) else CLIP
    return score_captions(model, workdir, seed, chosen, _paraphrase)


def _paraphrase(clip: dict[str, Any]) -> Any:
    return clip["paraphrase"], clip.get("paraphrased_shots", ())
