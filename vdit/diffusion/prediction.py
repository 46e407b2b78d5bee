"""What a network predicts: y = a x0 + b eps, its target, its inverse and its loss weight.

With d = alpha b - sigma a: x0 = (b x_t - sigma y) / d and eps = (alpha y - a x_t) / d. Times have
the leading axes of the arrays: (), (B,) or (B, L) for arrays (B, L, ...). A level may be exactly
0 (a given token) or 1 (pure noise): where d is 0 the coefficients are set before the division, so
values and gradients stay finite.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vdit.diffusion.schedule import Process, choose, like

PREDICTIONS: dict[str, Callable[[Process, jax.Array], tuple[jax.Array, jax.Array]]] = {
    "eps": lambda process, t: (jnp.zeros_like(t), jnp.ones_like(t)),
    "x0": lambda process, t: (jnp.ones_like(t), jnp.zeros_like(t)),
    "v": lambda process, t: (-process.sigma(t), process.alpha(t)),
    "flow": lambda process, t: (process.d_alpha(t), process.d_sigma(t)),
}
"""(a, b) of y = a x0 + b eps at times t."""


def target(
    prediction: str, process: Process, t: jax.Array, x0: jax.Array, eps: jax.Array
) -> jax.Array:
    """y = a x0 + b eps, the training target at times t; of x0's shape."""
    a, b = choose(PREDICTIONS, "prediction", prediction)(process, like(t, x0))
    return a * x0 + b * eps


def to_x0_eps(
    prediction: str, process: Process, t: jax.Array, x_t: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(x0, eps) of a network's output y at x_t; both of x_t's shape.

    Clean tokens (sigma = 0) have x0 = x_t to the bit. What y and x_t do not determine is 0: eps of
    a clean token from an x0 prediction, and x0 of pure noise (alpha = 0) from an eps prediction (0
    is the mean of normalised latents).
    """
    t = like(t, x_t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    a, b = choose(PREDICTIONS, "prediction", prediction)(process, t)
    d = alpha * b - sigma * a
    singular = d == 0.0
    d = jnp.where(singular, 1.0, d)
    clean = jnp.where(sigma == 0.0, 1.0, 0.0)
    # x0 = x0_x x_t + x0_y y; eps = eps_x x_t + eps_y y
    x0_x = jnp.where(singular, clean, b / d)
    x0_y = jnp.where(singular, 0.0, -sigma / d)
    eps_x = jnp.where(singular, 1.0 - clean, -a / d)
    eps_y = jnp.where(singular, 0.0, alpha / d)
    return x0_x * x_t + x0_y * y, eps_x * x_t + eps_y * y


def _uniform(prediction: str, process: Process, t: jax.Array) -> jax.Array:
    return jnp.ones_like(t)


def _min_snr(prediction: str, process: Process, t: jax.Array, gamma: float = 5.0) -> jax.Array:
    """min(SNR, gamma) on the error of x0 (Hang et al. 2023, section 3.4), as a weight of y's."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    a, b = PREDICTIONS[prediction](process, t)
    d = alpha * b - sigma * a
    limit = jnp.where(sigma == 0.0, gamma, 1.0)
    # x0's error is sigma / d times y's, and SNR sigma^2 = alpha^2.
    return jnp.where(
        d == 0.0, limit, jnp.minimum(alpha**2, gamma * sigma**2) / jnp.where(d == 0.0, 1.0, d) ** 2
    )


WEIGHTS: dict[str, Callable[[str, Process, jax.Array], jax.Array]] = {
    "uniform": _uniform,
    "min_snr": _min_snr,
}


def weight(name: str, prediction: str, process: Process, t: jax.Array) -> jax.Array:
    """Weight of the squared error of y at times t, of t's shape.

    "uniform" is DDPM's simple loss (Eq. 14) for eps and plain mean squares for the others.
    """
    choose(PREDICTIONS, "prediction", prediction)
    return choose(WEIGHTS, "loss weight", name)(prediction, process, t)
