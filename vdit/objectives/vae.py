"""Learning to compress: reconstruction, KL and likeness to the eye.

Dimension key: B batch, T frames, H height, W width, C colours, Z latent channels.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vdit.models.autoencoder import Autoencoder
from vdit.models.lpips import LPIPS
from vdit.objectives.objective import Objective, sample_keys


def to_float(video: jax.Array) -> jax.Array:
    """uint8 pixels to [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: jax.Array) -> jax.Array:
    """[-1, 1] to uint8 pixels, rounded and clipped."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


class Perceptual(NamedTuple):
    """LPIPS beside the error of pixels, by its weight; its parameters are frozen["lpips"]."""

    model: LPIPS
    weight: float


def vae_objective(
    model: Autoencoder, kl_weight: float, l1_weight: float, perceptual: Perceptual | None = None
) -> Objective:
    """Mean squared (and, by its weight, absolute) error of pixels plus weighted KL to N(0, 1).

    The KL is a mean over latent elements (Kingma and Welling 2014, Appendix B), so its weight
    does not depend on the patch. LPIPS is a mean over frames.
    """
    axes = (1, 2, 3, 4)

    def noise(video_BTHWC: jax.Array, key: jax.Array, ordinal_B: jax.Array) -> jax.Array:
        shape = model.latent_shape(*video_BTHWC.shape[1:4])
        return jax.vmap(lambda k: jax.random.normal(k, shape))(sample_keys(key, ordinal_B))

    def init(key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        video = to_float(batch["video"][:1])
        return {"vae": model.init(key, video, noise(video, key, batch["ordinal"][:1]))["params"]}

    def apart(
        out: jax.Array, video: jax.Array, frozen: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """How far a reconstruction is from its video (B,), and that by parts."""
        parts = {"mse": jnp.square(out - video).mean(axes)}
        total_B = parts["mse"] + l1_weight * jnp.abs(out - video).mean(axes)
        if perceptual is not None:
            frames = (x.reshape(-1, *x.shape[2:]) for x in (out, video))
            made: Any = perceptual.model.apply({"params": frozen["lpips"]}, *frames)
            parts["lpips"] = made.reshape(video.shape[:2]).mean(1)
            total_B += perceptual.weight * parts["lpips"]
        return total_B, parts

    def loss(
        params: Mapping[str, Any], frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        video = to_float(batch["video"])
        noise_BthwZ = noise(video, key, batch["ordinal"])
        made: Any = model.apply({"params": params["vae"]}, video, noise_BthwZ)
        out, mean, log_variance = made
        total_B, parts = apart(out, video, frozen)
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        parts["kl"] = kl.mean(axes)
        total_B += kl_weight * parts["kl"]
        parts["psnr"] = -10.0 * jnp.log10(parts["mse"] / 4.0 + 1e-10)
        weight = jnp.float32(video.shape[0])
        return total_B.sum(), weight, {name: part.sum() for name, part in parts.items()}

    return Objective(init, loss)
