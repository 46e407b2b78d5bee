"""Classifier-free guidance and autoguidance, as wrappers of the denoiser."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vdit.diffusion.sampler import Denoise
from vdit.diffusion.schedule import like

Push = Callable[[jax.Array], jax.Array]  # time to autoguidance scale minus 1, () or (B,)


def guided(
    denoise_batched: Denoise, scale: float | jax.Array, weak: Denoise | None = None,
    push: Push = jnp.zeros_like,
) -> Denoise:  # fmt: skip
    """Classifier-free guidance: x0 = null + scale (cond - null), by one call on 2 B samples.

    `denoise_batched` has the conditions of B samples followed by their B null conditions, and is
    called with x_t twice. scale: a number or one a sample (B,); 1 is the conditional x0, 0 the null
    one. aux is the conditional half of the denoiser's. (Ho and Salimans 2022, Eq. 6, with scale =
    1 + w; guiding x0 is guiding eps or v: at one x_t each is affine in the other.) With `weak`,
    autoguidance on top, see `pushed`.
    """

    def denoise(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        x0, aux = denoise_batched(jnp.concatenate([x_t, x_t]), t)
        cond, null = jnp.split(x0, 2)
        aux = jax.tree.map(lambda leaf: leaf[: x_t.shape[0]], aux)
        # null + scale (cond - null), written so that scale 1 is cond to the bit.
        x0 = cond + like(jnp.asarray(scale) - 1.0, cond) * (cond - null)
        return (x0 if weak is None else x0 + _difference(cond, weak, push, x_t, t)), aux

    return denoise


def pushed(denoise: Denoise, weak: Denoise, push: Push) -> Denoise:
    """Autoguidance: x0 + push(t) (x0 - x0 of `weak`), a degraded denoiser with the same condition.

    (Karras et al. 2024, "Guiding a diffusion model with a bad version of itself"; push is their
    w - 1.)
    """

    def autoguided(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        x0, aux = denoise(x_t, t)
        return x0 + _difference(x0, weak, push, x_t, t), aux

    return autoguided


def _difference(
    x0: jax.Array, weak: Denoise, push: Push, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    return like(push(t), x0) * (x0 - weak(x_t, t)[0])
