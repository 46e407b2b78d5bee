"""Means and confidence intervals of scores."""

import math
from collections.abc import Mapping, Sequence

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
