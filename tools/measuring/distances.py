"""Distances between sets of features, and their intervals.

Dimension key: N, M videos of two sets, F features.
"""

from collections.abc import Callable

import numpy as np

SHARE = 0.95  # of an interval


def frechet(first_NF: np.ndarray, second_MF: np.ndarray) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^1/2) of means and covariances (Heusel et al. 2017; of I3D's
    logits FVD, Unterthiner et al. 2018).

    The root's trace is that of the singular values of A B^T / sqrt((N - 1)(M - 1)), for centred
    features A and B: no root of a matrix that has none is taken.
    """
    first, second = (np.asarray(x, np.float64) for x in (first_NF, second_MF))
    means = first.mean(0), second.mean(0)
    a = (first - means[0]) / np.sqrt(len(first) - 1)
    b = (second - means[1]) / np.sqrt(len(second) - 1)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    apart = np.square(means[0] - means[1]).sum()
    return float(apart + np.square(a).sum() + np.square(b).sum() - 2.0 * root)


def kernel(first_NF: np.ndarray, second_MF: np.ndarray) -> float:
    """The squared maximum mean discrepancy, unbiased, of the kernel (x y / F + 1)^3 (Binkowski et
    al. 2018; of I3D's logits KVD)."""
    first, second = (np.asarray(x, np.float64) for x in (first_NF, second_MF))
    n, m, width = len(first), len(second), first.shape[1]

    def cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        value: np.ndarray = (a @ b.T / width + 1.0) ** 3
        return value

    own = [(k.sum() - np.trace(k)) for k in (cubic(first, first), cubic(second, second))]
    mixed = cubic(first, second).mean()
    return float(own[0] / (n * (n - 1)) + own[1] / (m * (m - 1)) - 2.0 * mixed)


def interval(each: np.ndarray, times: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of `SHARE` of a mean over videos (bootstrap, Efron 1979)."""
    draws = np.random.default_rng(seed).integers(0, len(each), (times, len(each)))
    low, high = np.quantile(each[draws].mean(1), [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def jackknife(
    value: Callable[[np.ndarray, np.ndarray], float], *sets: np.ndarray, groups: int = 20
) -> tuple[float, float]:
    """The normal interval of `SHARE` for a distance of two sets of features.

    Its variance is the grouped jackknife's (Quenouille 1956): a bootstrap would draw videos twice,
    which such distances take for a difference.
    """
    variance = 0.0
    for number, rows in enumerate(sets):
        count = min(groups, len(rows))
        found = []
        for group in range(count):
            left = [*sets]
            left[number] = np.delete(rows, np.s_[group::count], axis=0)
            found.append(value(*left))
        variance += (count - 1) * float(np.var(found))
    middle, half = value(*sets), 1.96 * variance**0.5
    return middle - half, middle + half
