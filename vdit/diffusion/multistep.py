"""Multistep methods in half log-SNR: x0 of a whole step from the predictions beside it.

With data prediction each of them is the step of `step.py`, which is exact for a constant x0, with
D = x0 + sum_k w_k (x0_k - x0) / r_k for x0: r_k = (lambda_k - lambda_t) / h is the place of
prediction k and h = lambda_s - lambda_t the step's length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdit.diffusion.schedule import Process, half_log_snr

BH = ("bh1", "bh2")
PLACES, WEIGHTS = np.polynomial.legendre.leggauss(16)  # Gauss-Legendre quadrature on [-1, 1]


class History(NamedTuple):
    """Earlier predictions of x0 and their times, latest first; a time of 0 is of none."""

    x0s: tuple[jax.Array, ...]
    times: tuple[jax.Array, ...]

    @classmethod
    def of(cls, x: jax.Array, length: int) -> "History":
        return cls((jnp.zeros_like(x),) * length, (jnp.zeros((), x.dtype),) * length)

    def cut(self, first: int, length: int) -> "History":
        return History(*(values[first : first + length] for values in self))

    def after(self, x0: jax.Array, t: jax.Array) -> "History":
        return History((x0, *self.x0s), (t, *self.times)).cut(0, len(self.times))


def extrapolated(
    process: Process, t: jax.Array, s: jax.Array, x0: jax.Array, history: History,
    ahead: jax.Array | None = None, bh: str = "bh2", second: float = 1.0,
) -> jax.Array:  # fmt: skip
    """D of the step from t to s, () each, with x0 at t, those before it, and x0 `ahead`, at s.

    The polynomial in lambda through all of them, integrated over the step (UniPC: Zhao et al. 2023,
    Eq. 5). A straight line takes half its difference instead, with "bh1" times h / (1 - exp(-h)):
    B(h) of the paper, which cancels everywhere else. `second` scales the second-order moment.
    Predictions at infinite log-SNR are left out, and all but `ahead` if it is infinite at t or s.
    """
    (start, has_start), (end, has_end) = half_log_snr(process, t), half_log_snr(process, s)
    inside = has_start & has_end
    h = jnp.where(inside, end - start, 1.0)
    others, nodes, known = list(history.x0s), [], []
    for time in history.times:
        place, finite = half_log_snr(process, time)
        known.append(inside & finite & (time > t))
        nodes.append(jnp.where(known[-1], (place - start) / h, -1.0))
    if ahead is not None:
        others, nodes, known = [*others, ahead], [*nodes, jnp.ones_like(h)], [*known, has_end]
    if not others:
        return x0
    half = jnp.where(inside & (bh == "bh1"), 0.5 * h / -jnp.expm1(-h), 0.5)
    alone = sum(one.astype(jnp.int32) for one in known) == 1
    first, square, cube = _moments(h)
    weights = _fit(nodes, known, (first, second * square, cube))
    whole = x0
    for other, node, one, weight in zip(others, nodes, known, weights, strict=True):
        weight = jnp.where(one, jnp.where(alone, half, weight) / node, 0.0)
        whole = whole + weight * (other - x0)
    return whole


def _moments(h: jax.Array) -> list[jax.Array]:
    """Means of r, r^2 and r^3 over the step, weighted by exp(-h (1 - r)).

    By quadrature: the recursion of the papers cancels to nothing in float32.
    """
    r = 0.5 + 0.5 * PLACES
    share = WEIGHTS * jnp.exp(h * (r - 1.0))
    return [(share * r**power).sum() / share.sum() for power in (1, 2, 3)]


def _fit(
    nodes: list[jax.Array], known: list[jax.Array], moments: tuple[jax.Array, ...]
) -> list[jax.Array]:
    """Weights w_k of the known nodes with sum_k w_k r_k^i = moments[i], by Lagrange's basis."""
    weights = []
    for k, node in enumerate(nodes):
        # Coefficients of prod_j (r - r_j) / (r_k - r_j), lowest first.
        basis, zero = [jnp.ones_like(node)], jnp.zeros_like(node)
        for other, one in [pair for j, pair in enumerate(zip(nodes, known, strict=True)) if j != k]:
            both = one & known[k]
            slope = jnp.where(both, 1.0 / jnp.where(both, node - other, 1.0), 0.0)
            constant = jnp.where(both, -other * slope, 1.0)
            basis = [
                constant * low + slope * high
                for low, high in zip([*basis, zero], [zero, *basis], strict=True)
            ]
        weights.append(sum((a * b for a, b in zip(basis, moments, strict=False)), zero))
    return weights
