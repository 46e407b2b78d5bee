"""Learning to compress: reconstruction and KL of an autoencoder.

Dimension key: B batch, T frames, H height, W width, C colours, Z latent channels.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vdit.models.autoencoder import Autoencoder
from vdit.objectives.objective import Objective, sample_keys


def to_float(video: jax.Array) -> jax.Array:
    """uint8 pixels to [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: jax.Array) -> jax.Array:
    """[-1, 1] to uint8 pixels, rounded and clipped."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def vae_objective(model: Autoencoder, kl_weight: float, l1_weight: float) -> Objective:
    """Mean squared (and, by its weight, absolute) error of pixels plus weighted KL to N(0, 1).

    The KL is a mean over latent elements (Kingma and Welling 2014, Appendix B), so its weight
    does not depend on the patch.
    """

    def noise(video_BTHWC: jax.Array, key: jax.Array, ordinal_B: jax.Array) -> jax.Array:
        shape = model.latent_shape(*video_BTHWC.shape[1:4])
        return jax.vmap(lambda k: jax.random.normal(k, shape))(sample_keys(key, ordinal_B))

    def init(key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        video = to_float(batch["video"][:1])
        return {"vae": model.init(key, video, noise(video, key, batch["ordinal"][:1]))["params"]}

    def loss(
        params: Mapping[str, Any], frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        del frozen
        video = to_float(batch["video"])
        noise_BthwZ = noise(video, key, batch["ordinal"])
        made: Any = model.apply({"params": params["vae"]}, video, noise_BthwZ)
        out, mean, log_variance = made
        axes = (1, 2, 3, 4)
        squared_B = jnp.square(out - video).mean(axes)
        absolute_B = jnp.abs(out - video).mean(axes)
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        total_B = squared_B + l1_weight * absolute_B + kl_weight * kl.mean(axes)
        psnr_B = -10.0 * jnp.log10(squared_B / 4.0 + 1e-10)
        weight = jnp.float32(video.shape[0])
        metrics = {"psnr": psnr_B.sum(), "kl": kl.mean(axes).sum(), "mse": squared_B.sum()}
        return total_B.sum(), weight, metrics

    return Objective(init, loss)
