"""All stages with networks that are traced in a moment: a start of the program costs its imports.

python -m vdit.main --config=tools/torturing/small.py

Dimension key: B batch, T frames, H height, W width, C channels, L video tokens, K noise levels,
D width; t h w latent frames and places, Z latent channels.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from experiments import base
from vdit.config.autoencoder import AUTOENCODERS
from vdit.config.autoencoder import Row as AutoencoderRow
from vdit.config.denoiser import DENOISERS, Row
from vdit.models.autoencoder import Autoencoder, State
from vdit.nn.linear import Linear
from vdit.nn.patch import patchify, unpatchify
from vdit.tokens import Condition, Layout

WIDTH = 48


class PlainVAE(Autoencoder):
    """Linear in the pixels of each patch; frames are independent."""

    LAST: ClassVar[tuple[str, ...]] = ("down", "kernel")

    def setup(self) -> None:
        pixels = 3 * self.patch[1] * self.patch[2]
        self.up, self.q = Linear(WIDTH), Linear(2 * self.channels)
        self.k, self.down = Linear(WIDTH), Linear(pixels)

    def encode(
        self, video_BTHWC: jax.Array, state: State = None
    ) -> tuple[jax.Array, jax.Array, State]:
        out = self.q(jnp.tanh(self.up(patchify(video_BTHWC, self.patch))))
        mean, log_variance = jnp.split(out, 2, axis=-1)
        return mean, jnp.clip(log_variance, -10.0, 10.0), None

    def decode(self, latent_BthwZ: jax.Array, state: State = None) -> tuple[jax.Array, State]:
        return unpatchify(self.down(jnp.tanh(self.k(latent_BthwZ))), self.patch), None


class Plain(nn.Module):
    """Predicts a token (B, L, C) from itself, its noise level and the caption."""

    one_time = from_start = learned_variance = False
    beside = 0
    null_key = True
    layers = 0

    @nn.compact
    def __call__(self, x_BLC: jax.Array, layout: Layout, condition: Condition) -> jax.Array:
        known_BKD = Linear(WIDTH, name="k")(condition.pooled) + condition.level[..., None]
        x = Linear(WIDTH, name="q")(x_BLC)
        x += jnp.take_along_axis(known_BKD, layout.slot[..., None], axis=1)
        x = jnp.tanh(Linear(3 * WIDTH, name="up")(x))
        return Linear(x_BLC.shape[-1], name="down")(x)


def _autoencoder(config: ConfigDict, machine: Any) -> PlainVAE:
    return PlainVAE(patch=tuple(config.vae.patch), channels=config.vae.channels)


AUTOENCODERS["plain"] = AutoencoderRow(lambda config: None, _autoencoder)
DENOISERS["plain"] = Row(lambda config, **options: Plain())


def get_config(variant: str = "") -> ConfigDict:
    """The smoke run with these networks; a save after every step."""
    config = base.get_config("smoke")
    config.vae.model = config.dit.model = "plain"
    config.vae.patch, config.vae.channels = (1, 8, 8), 8
    config.data.frames, config.data.size = 4, (16, 16)
    config.text.width, config.text.heads = 16, 2
    for stage in (config.vae, config.dit):
        stage.train.steps, stage.train.warmup, stage.train.optimizer = 8, 1, "adamw"
    config.latents.clips, config.latents.shard, config.latents.batch = 48, 4, 4
    config.sample.clips = config.sample.batch = 2
    config.sample.steps = config.sample.zoom = 1
    config.eval.captions = config.eval.paraphrases = config.eval.given = 2
    config.run.log_every = config.run.save_every = 1
    config.run.dtype, config.run.lost = "float32", 10.0
    return config
