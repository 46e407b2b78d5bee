"""Guidance as wrappers of the denoiser: classifier-free, projected, in an interval, by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vdit.diffusion.sampler import Denoise
from vdit.diffusion.schedule import Process, like
from vdit.errors import UserError

Push = Callable[[jax.Array], jax.Array]  # time to autoguidance scale minus 1, () or (B,)


def check_guidance(levels: Sequence[float], parallel: float, radius: float) -> None:
    """Validates the interval of `within`, and the options of `projected`."""
    if len(levels) != 2 or not 0.0 <= levels[0] < levels[1] <= 1.0:
        raise UserError(
            f"guidance_levels was {tuple(levels)}: two rising noise levels from 0 to 1 are allowed"
        )
    if not (0.0 <= parallel <= 1.0 and radius >= 0.0):
        raise UserError(
            f"guidance_parallel was {parallel}, guidance_radius {radius}: 0 to 1, and 0 (off) or"
            " more, are allowed"
        )


def guided(
    denoise_batched: Denoise, scale: float | jax.Array, weak: Denoise | None = None,
    push: Push = jnp.zeros_like, project: Callable[..., jax.Array] | None = None,
) -> Denoise:  # fmt: skip
    """Classifier-free guidance: x0 = null + scale (cond - null), by one call on 2 B samples.

    `denoise_batched` has the conditions of B samples followed by their B null conditions, and is
    called with x_t twice. scale: a number or one a sample (B,); 1 is the conditional x0, 0 the null
    one. aux is the conditional half of the denoiser's. (Ho and Salimans 2022, Eq. 6, with scale =
    1 + w; guiding x0 is guiding eps or v: at one x_t each is affine in the other.) `project` takes
    (cond - null, cond) to the difference to use, see `projected`. With `weak`, autoguidance on top,
    see `pushed`.
    """

    def denoise(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        x0, aux = denoise_batched(jnp.concatenate([x_t, x_t]), t)
        cond, null = jnp.split(x0, 2)
        aux = jax.tree.map(lambda leaf: leaf[: x_t.shape[0]], aux)
        # null + scale (cond - null), written so that scale 1 is cond to the bit.
        difference = project(cond - null, cond) if project else cond - null
        x0 = cond + like(jnp.asarray(scale) - 1.0, cond) * difference
        return (x0 if weak is None else x0 + _difference(cond, weak, push, x_t, t)), aux

    return denoise


def projected(difference: jax.Array, cond: jax.Array, parallel: float, radius: float) -> jax.Array:
    """The guidance direction of APG (Sadat et al. 2024, section 4) without momentum.

    Of cond - null (B, ...), limited to root mean square `radius` in each sample (0: no limit), the
    part along the conditional x0, which saturates, is kept at the share `parallel`.
    """
    axes = tuple(range(1, cond.ndim))
    if radius > 0.0:
        size = jnp.sqrt(jnp.square(difference).mean(axes, keepdims=True))
        difference = difference * (radius / jnp.maximum(size, radius))
    norm = jnp.square(cond).sum(axes, keepdims=True)
    share = (difference * cond).sum(axes, keepdims=True) / jnp.where(norm > 0.0, norm, 1.0)
    return difference - (1.0 - parallel) * share * cond


def within(
    process: Process, levels: tuple[float, float], inside: Denoise, outside: Denoise
) -> Denoise:
    """`inside` where levels[0] < sigma(t) <= levels[1], else `outside`; only one of them runs.

    (Kynkäänniemi et al. 2024, Eq. 6, with the guided and the conditional denoiser.)
    """

    def denoise(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        sigma = process.sigma(t)
        applies = (sigma > levels[0]) & (sigma <= levels[1])
        return jax.lax.cond(applies, inside, outside, x_t, t)

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
