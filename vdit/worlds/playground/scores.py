"""Scores of playgrounds."""

from pathlib import Path
from typing import Any

import numpy as np

from vdit.data.sources import most_shots
from vdit.evaluate import heldout
from vdit.runtime.progress import say
from vdit.sample import Model
from vdit.worlds.playground import oracle
from vdit.worlds.playground.oracle import shots as playshots
from vdit.worlds.scores import reworded, score_rows


def score(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """Scores of playgrounds, by their oracle; "paraphrased": of the same in unseen wordings."""
    clips = heldout(model, workdir, model.config.eval.captions)
    say(f"eval: {len(clips)} held-out captions, in seen and in unseen wordings")
    several = most_shots(model.config) > 0
    listed = [clip["shots"] for clip in clips] if several else ()
    results = model.generate([clip["caption"] for clip in clips], seed=seed, shots=listed)
    made = {"generated": np.stack([result.video for result in results])}
    if some := clips[: model.config.eval.paraphrases]:
        listed = [clip["paraphrased_shots"] for clip in some] if several else ()
        made["paraphrased"] = reworded(model, [clip["paraphrase"] for clip in some], seed, listed)
    of_one = oracle.score, oracle.aggregate, oracle.SCORES
    of_shots = playshots.score_shots, playshots.aggregate_shots, playshots.SCORES
    return score_rows(model, workdir, clips, made, *(of_shots if several else of_one))
