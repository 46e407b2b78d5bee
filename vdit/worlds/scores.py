"""Oracle scores of real, reconstructed and generated clips.

Dimension key: N clips, T frames, H height, W width.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vdit.data.sources import most_shots
from vdit.errors import UserError
from vdit.evaluate import heldout, quality, reconstruct, write_reconstructions
from vdit.runtime.progress import say
from vdit.sample import Model
from vdit.worlds.statistics import wilson


@contextlib.contextmanager
def longer_texts(model: Model, texts: Sequence[str]) -> Iterator[None]:
    """Doubles the token budget inside the context if a text needs it: unseen words split into more
    tokens. Encoders take any length, except where padding is part of the text."""
    tokenizer = model.tokenizer
    try:
        tokenizer.encode(texts)
    except UserError:
        if not tokenizer.padding:
            model.tokenizer = copy.copy(tokenizer)
            model.tokenizer.length = 2 * tokenizer.length
    try:
        yield
    finally:
        model.tokenizer = tokenizer


def reworded(
    model: Model,
    prompts: Sequence[str],
    seed: int,
    shots: Sequence[Sequence[tuple[float, str]]] = (),
) -> np.ndarray:
    """Videos of prompts (and shot lists) in wordings that training never shows."""
    with longer_texts(model, [*prompts, *(text for listed in shots for _, text in listed)]):
        return np.stack([r.video for r in model.generate(prompts, seed=seed, shots=shots)])


class Oracle(NamedTuple):
    """The scores of a kind of clip."""

    score: Callable[[np.ndarray, Mapping[str, Any]], dict[str, float]]  # video, clip
    aggregate: Callable[[Sequence[Mapping[str, float]]], dict[str, float]]
    names: Sequence[str]  # of the scores: all are fractions


def score_captions(
    model: Model,
    workdir: Path,
    seed: int,
    oracle: Oracle,
    paraphrase: Callable[[dict[str, Any]], tuple[str, Sequence[tuple[float, str]]]],
) -> list[dict[str, Any]]:
    """Scores of held-out clips and of videos generated from their captions, with 95% intervals.

    The split "paraphrased" repeats the first eval.paraphrases in held-out wordings:
    `paraphrase(clip)` gives the caption and the shots.
    """
    clips = heldout(model, workdir, model.config.eval.captions)
    say(f"eval: {len(clips)} held-out captions, in seen and in unseen wordings")
    several = most_shots(model.config) > 0
    shots = [clip["shots"] for clip in clips] if several else ()
    results = model.generate([clip["caption"] for clip in clips], seed=seed, shots=shots)
    videos = {"generated": np.stack([result.video for result in results])}
    if some := clips[: model.config.eval.paraphrases]:
        prompts, lists = zip(*map(paraphrase, some), strict=True)
        videos["paraphrased"] = reworded(model, prompts, seed, lists if several else ())
    return score_rows(model, workdir, clips, videos, oracle)


def score_rows(
    model: Model,
    workdir: Path,
    clips: Sequence[dict[str, Any]],
    generated: Mapping[str, np.ndarray],
    oracle: Oracle,
) -> list[dict[str, Any]]:
    """Rows of the clips, of their reconstructions, and of videos generated from their captions."""
    real = np.stack([clip["video"] for clip in clips])
    again = reconstruct(model, real)
    shown = np.stack([real[:8], again[:8]], 1).reshape(-1, *real.shape[1:])
    write_reconstructions(workdir, shown, model.config)
    captions = len({clip["caption"] for clip in clips})
    rows = []
    for split, videos in {"real": real, "reconstructed": again, **generated}.items():
        scores = [oracle.score(video, clip) for video, clip in zip(videos, clips, strict=False)]
        row: dict[str, Any] = {
            "split": split, "objects": "all", "captions": min(captions, len(scores))
        } | oracle.aggregate(scores)  # fmt: skip
        for name in oracle.names:
            count = sum(not math.isnan(one[name]) for one in scores)
            # An upper bound where scores are fractions of a clip.
            row[f"{name}_low"], row[f"{name}_high"] = wilson(row[name], count)
        if split == "reconstructed":
            row |= quality(again, real)
        rows.append(row)
    return rows
