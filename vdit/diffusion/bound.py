"""The variational bound as the loss of a learned variance (Nichol and Dhariwal 2021).

One term of L_vlb (their Eq. 4 to 7) in bits per element; the gradient of the mean is stopped, so
that it trains the variance alone (section 3.1).
"""

import math

import jax
import jax.numpy as jnp

from vdit.diffusion.schedule import Process, like
from vdit.diffusion.step import between, mean_coefficient
from vdit.errors import UserError

BIN = 1.0 / 255.0  # half the width of a bin of 8-bit values in [-1, 1]


def bound(
    process: Process, t: jax.Array, x0: jax.Array, predicted_x0: jax.Array, share: jax.Array
) -> jax.Array:
    """L_{t-1} in bits, of x0's shape: from a table's point t to the one before it.

    t has the leading axes of x0 (B, ...); share is the network's v (`step.between`). At the table's
    first point it is the decoder's negative log-likelihood of x0 in bins of 2/255 in [-1, 1] (DDPM,
    Eq. 13), which the public code and DiT apply to latents as to pixels; above it, the KL
    divergence of the model's step from the posterior. Raises `UserError` for a process that is no
    table.
    """
    if process.points is None:
        raise UserError(f"learned variance needs a table as ddpm, not process {process.name!r}")
    t = like(t, x0)
    s = t - 1.0 / process.points
    s = jnp.where(jnp.round(t * process.points) <= 1.0, 0.0, s)
    learned = between(process, t, s, share)
    true = between(process, t, s, jnp.full_like(share, -1.0))
    # At one x_t, with eps = (x_t - alpha_t x0) / sigma_t, the means differ only through x0.
    sigma = process.sigma(t)
    sigma = jnp.where(sigma == 0.0, 1.0, sigma)  # a clean token has no loss, and must not give NaN
    weight = process.alpha(s) - mean_coefficient(process, t, s) * process.alpha(t) / sigma
    difference = weight * (x0 - jax.lax.stop_gradient(predicted_x0))
    divergence = 0.5 * (learned - true + jnp.exp(true - learned) - 1.0)
    divergence += 0.5 * jnp.square(difference) * jnp.exp(-learned)
    nats = jnp.where(s == 0.0, discretized_nll(x0, x0 - difference, learned), divergence)
    return nats / math.log(2.0)


def discretized_nll(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Negative log-likelihood of x's bin of 2/255 under a Gaussian, in nats (DDPM, Eq. 13).

    The outer bins reach to infinity; probabilities are clipped at 1e-12. Of x's shape.
    """
    scale = jnp.exp(-0.5 * log_variance)
    high = jax.scipy.special.ndtr((x - mean + BIN) * scale)
    low = jax.scipy.special.ndtr((x - mean - BIN) * scale)
    high, low = jnp.where(x > 0.999, 1.0, high), jnp.where(x < -0.999, 0.0, low)
    return -jnp.log(jnp.maximum(high - low, 1e-12))
