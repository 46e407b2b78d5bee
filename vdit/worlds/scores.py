"""Scores of what is generated of a world's held-out captions, by its oracle.

Dimension key: N clips, T frames, H height, W width.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vdit.errors import UserError
from vdit.evaluate import quality, reconstruct, write_reconstructions
from vdit.sample import Model
from vdit.worlds.statistics import wilson


@contextlib.contextmanager
def longer_texts(model: Model, texts: Sequence[str]) -> Iterator[None]:
    """Meanwhile twice the budget of tokens, if some text needs it: encoders take any number, but
    where padding is text. (What a tokenizer was not made from falls into more tokens.)"""
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
    """Videos of prompts in wordings that training never shows, and of as many shot lists."""
    with longer_texts(model, [*prompts, *(text for listed in shots for _, text in listed)]):
        return np.stack([made.video for made in model.generate(prompts, seed=seed, shots=shots)])


def score_rows(
    model: Model,
    workdir: Path,
    clips: Sequence[dict[str, Any]],
    made: Mapping[str, np.ndarray],
    score: Callable[[np.ndarray, Mapping[str, Any]], dict[str, float]],
    aggregate: Callable[[Sequence[Mapping[str, float]]], dict[str, float]],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """A row for the real clips, their reconstructions, and each of those that were `made`."""
    real = np.stack([clip["video"] for clip in clips])
    again = reconstruct(model, real)
    shown = np.stack([real[:8], again[:8]], 1).reshape(-1, *real.shape[1:])
    write_reconstructions(workdir, shown, model.config)
    captions = len({clip["caption"] for clip in clips})
    rows = []
    for split, videos in {"real": real, "reconstructed": again, **made}.items():
        scores = [score(video, clip) for video, clip in zip(videos, clips, strict=False)]
        told = min(captions, len(scores))
        row: dict[str, Any] = {"split": split, "objects": "all", "captions": told}
        row |= aggregate(scores)
        for name in names:
            judged = sum(not math.isnan(one[name]) for one in scores)
            low, high = wilson(row[name], judged)  # of shares it is an upper bound
            row |= {f"{name}_low": low, f"{name}_high": high}
        if split == "reconstructed":
            row |= quality(again, real)
        rows.append(row)
    return rows
