"""Guidance as a wrapper of the denoiser: towards a condition, and away from a weaker denoiser."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vdit.diffusion.sampler import Denoise
from vdit.diffusion.schedule import like

Push = Callable[[jax.Array], jax.Array]  # of a time; one number, or one a sample


def guided(
    denoise_batched: Denoise, scale: float | jax.Array, weak: Denoise | None = None,
    push: Push = jnp.zeros_like,
) -> Denoise:  # fmt: skip
    """denoise(x_t (B, ...), t) whose x0 is null + scale (cond - null), by one call on 2 B samples.

    `denoise_batched` holds the conditions of B samples followed by their B null conditions, and is
    given x_t twice. scale: a number or one a sample (B,); 1 is the conditional x0, 0 the null one.
    aux is the conditional half of the denoiser's. (Ho and Salimans 2022, Eq. 6, with scale = 1 + w;
    mixing x0 is mixing eps or v, for at one x_t each is affine in the other.) With `weak`, see
    `pushed`.
    """

    def denoise(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        x0, aux = denoise_batched(jnp.concatenate([x_t, x_t]), t)
        cond, null = jnp.split(x0, 2)
        aux = jax.tree.map(lambda leaf: leaf[: x_t.shape[0]], aux)
        # null + scale (cond - null), written so that scale 1 is cond to the bit.
        x0 = cond + like(jnp.asarray(scale) - 1.0, cond) * (cond - null)
        return (x0 if weak is None else x0 + _away(cond, weak, push, x_t, t)), aux

    return denoise


def pushed(denoise: Denoise, weak: Denoise, push: Push) -> Denoise:
    """denoise(x_t (B, ...), t) whose x0 is x0 + push(t) (x0 - that of `weak`).

    `weak` is told the same and is wrong in the same places, only more so: what the two differ in
    points away from the errors of both. (Karras et al. 2024, "Guiding a diffusion model with a bad
    version of itself"; push is their w - 1.)
    """

    def away(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        x0, aux = denoise(x_t, t)
        return x0 + _away(x0, weak, push, x_t, t), aux

    return away


def _away(x0: jax.Array, weak: Denoise, push: Push, x_t: jax.Array, t: jax.Array) -> jax.Array:
    return like(push(t), x0) * (x0 - weak(x_t, t)[0])
