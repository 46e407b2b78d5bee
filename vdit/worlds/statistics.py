"""What the oracles share: means and confidence intervals of scores, and scores of cuts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def means(scores: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """The number of clips, and the mean of each score over the clips where it is not NaN."""
    result: dict[str, float] = {"clips": len(scores)}
    for name in names:
        values = [one[name] for one in scores if not math.isnan(one[name])]
        result[name] = float(np.mean(values)) if values else math.nan
    return result


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a fraction `mean` of `count` trials."""
    share = z * z / max(count, 1)
    middle = (mean + share / 2) / (1 + share)
    half = math.sqrt(share * (mean * (1 - mean) + share / 4)) / (1 + share)
    return middle - half, middle + half


def judge_cuts(found: Sequence[int], true: Sequence[int]) -> dict[str, float]:
    """Scores of the first frames of detected and of true shots: `cut_precision` and `cut_recall`
    (both 1 for one shot without detected cuts, 0 if none is detected), `shots` (as many)."""
    detected, cuts = set(found) - {0}, set(true) - {0}
    hits = len(detected & cuts)
    return {
        "cut_precision": hits / len(detected) if detected else float(bool(found) and not cuts),
        "cut_recall": hits / len(cuts) if cuts else float(bool(found) and not detected),
        "shots": float(len(found) == len(true)),
    }


def nearest(spans: Sequence[Any], begin: int, end: int) -> Any:
    """Of spans that have `begin` and `end` the one with most of these frames; None without any."""
    shared = [min(end, span.end) - max(begin, span.begin) for span in spans]
    return spans[int(np.argmax(shared))] if max(shared, default=0) > 0 else None
