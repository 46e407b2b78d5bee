"""Classifier-free guidance as a wrapper of the denoiser."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vdit.diffusion.schedule import like


def guided(
    denoise_batched: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
    scale: float | jax.Array,
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]:
    """denoise(x_t (B, ...), t) whose x0 is null + scale (cond - null), by one call on 2 B samples.

    `denoise_batched` holds the conditions of B samples followed by their B null conditions, and is
    given x_t twice. scale: a number or one a sample (B,); 1 is the conditional x0, 0 the null one.
    aux is the conditional half of the denoiser's. (Ho and Salimans 2022, Eq. 6, with scale = 1 + w;
    mixing x0 is mixing eps or v, for at one x_t each is affine in the other.)
    """

    def denoise(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        x0, aux = denoise_batched(jnp.concatenate([x_t, x_t]), t)
        cond, null = jnp.split(x0, 2)
        aux = jax.tree.map(lambda leaf: leaf[: x_t.shape[0]], aux)
        # null + scale (cond - null), written so that scale 1 is cond to the bit.
        return cond + like(jnp.asarray(scale) - 1.0, cond) * (cond - null), aux

    return denoise
