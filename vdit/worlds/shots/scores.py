"""Scores of clips of several shots."""

from pathlib import Path
from typing import Any

import numpy as np

from vdit.evaluate import heldout
from vdit.runtime.progress import say
from vdit.sample import Model
from vdit.worlds.reword import paraphrase
from vdit.worlds.scores import reworded, score_rows
from vdit.worlds.shots import oracle


def score(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """Scores of clips of several shots, by their oracle, with 95% intervals (Wilson's)."""
    clips = heldout(model, workdir, model.config.eval.captions)
    prompts = [clip["caption"] for clip in clips]
    say(f"eval: {len(prompts)} held-out captions, of {model.config.data.shots[1]} shots at most")
    results = model.generate(prompts, seed=seed, shots=[clip["shots"] for clip in clips])
    made = {"generated": np.stack([result.video for result in results])}
    if some := clips[: model.config.eval.paraphrases]:
        words = [paraphrase(clip["caption"]) for clip in some]
        lists = [[(at, paraphrase(text)) for at, text in clip["shots"]] for clip in some]
        made["paraphrased"] = reworded(model, words, seed, lists)
    return score_rows(model, workdir, clips, made, oracle.score_shots,
                   oracle.aggregate_shots, oracle.SCORES)  # fmt: skip
