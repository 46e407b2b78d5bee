"""The ViViT autoencoder: tubelets, factorised space-time attention, causal in time.

A clip of 1 + k·p frames has 1 + k latent frames: the first frame as a tubelet of p copies of
itself, then tubelets of p frames; so an image is encoded as a still clip. Every block attends
within a latent frame, then, at every place, over the last `window` latent frames (ViViT's Model 3,
Arnab et al. 2021, with causal time). So the latents of a prefix do not depend on what follows, and
a clip of any length can be streamed in chunks that carry a `VAEState`.

Dimension key: B batch, T frames, H height, W width, C channels; t h w latent frames and places,
Z latent channels, P = h·w places, D width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from vdit.models.autoencoder import Autoencoder
from vdit.nn import dot_product
from vdit.nn.attention import Angles, Attend, Attention, CausalTimeAttention, TimeState
from vdit.nn.linear import MLP, Linear, RMSNorm, zeros
from vdit.nn.patch import pad_to_multiple, patchify, unpatchify
from vdit.nn.product import Matmul
from vdit.nn.rotary import rotary_angles
from vdit.nn.stack import Gather, stack

THETA = (100.0, 100.0)  # longest periods of rotary positions, in rows and columns


@struct.dataclass
class VAEState:
    """The streaming state of the encoder, or of the decoder."""

    frames: jax.Array  # () latent frames seen so far
    time: TimeState  # each leaf with a leading layer axis


class SpaceTimeBlock(nn.Module):
    """Spatial attention, causal temporal attention, MLP; pre-norm residuals."""

    heads: int
    window: int
    mlp_ratio: float
    activation: str
    attend: Attend
    matmul: Matmul

    @nn.compact
    def __call__(
        self, x_BTPD: jax.Array, state: TimeState, start: jax.Array, space: Angles
    ) -> tuple[jax.Array, TimeState]:
        batch, _, _, width = x_BTPD.shape
        rows = rearrange(RMSNorm(name="space_norm")(x_BTPD), "B T P D -> (B T) P D")
        rows = Attention(self.heads, self.attend, matmul=self.matmul, name="space")(
            rows, angles=space
        )
        x_BTPD = x_BTPD + rearrange(rows, "(B T) P D -> B T P D", B=batch)
        out, state = CausalTimeAttention(self.heads, self.window, matmul=self.matmul, name="time")(
            RMSNorm(name="time_norm")(x_BTPD), start, state
        )
        x_BTPD = x_BTPD + out
        hidden = int(width * self.mlp_ratio)
        mlp = MLP(hidden, self.activation, matmul=self.matmul, name="mlp")
        return x_BTPD + mlp(RMSNorm(name="mlp_norm")(x_BTPD)), state


class Trunk(nn.Module):
    """A stack of space-time blocks; parameters and state are stored with a leading layer axis."""

    width: int
    depth: int
    options: dict[str, Any]  # of SpaceTimeBlock
    run: dict[str, Any]  # of `stack`: unroll, gather

    def initial(self, batch: int, places: int) -> VAEState:
        """The state at the start of a clip."""
        heads, past = self.options["heads"], self.options["window"] - 1
        shape = (self.depth, batch, past, places, heads, self.width // heads)
        zero = jnp.zeros(shape, jnp.float32)
        return VAEState(jnp.zeros((), jnp.int32), TimeState(zero, zero))

    @nn.compact
    def __call__(self, x_BthwD: jax.Array, state: VAEState) -> tuple[jax.Array, VAEState]:
        _, frames, height, width, _ = x_BthwD.shape
        grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1)
        position = grid.reshape(1, -1, 2).astype(jnp.float32)
        space = rotary_angles(position, self.width // self.options["heads"], THETA)
        blocks = stack(SpaceTimeBlock, self.depth, scanned=1, shared=2, **self.run)
        x = rearrange(x_BthwD, "B t h w D -> B t (h w) D")
        x, time = blocks(**self.options, name="blocks")(x, state.time, state.frames, space)
        x = rearrange(RMSNorm(name="norm")(x), "B t (h w) D -> B t h w D", h=height)
        return x, VAEState(state.frames + frames, time)


class VAE(Autoencoder):
    """Video (B, T, H, W, 3) in [-1, 1] to latents (B, t, h, w, Z) and back.

    The linear map from `width` features to a tubelet's pixels has rank `width`, which bounds the
    reconstruction (for the world's tubelets rank 128 is 29.9 dB, by their covariance). With
    `detail`, an MLP of that hidden width, zero at the start, is added to it and lifts the bound.
    """

    LAST = ("pixels", "kernel")

    patch: tuple[int, int, int] = (4, 8, 8)
    channels: int = 24
    width: int = 192
    encoder_depth: int = 2
    decoder_depth: int = 2
    heads: int = 6
    window: int = 4
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    detail: int = 0
    attend: Attend = dot_product.attend
    unroll: int = 1
    matmul: Matmul = Matmul()
    gather: Gather = None

    def setup(self) -> None:
        p, q, r = self.patch
        options = {
            "heads": self.heads, "window": self.window, "mlp_ratio": self.mlp_ratio,
            "activation": self.activation, "attend": self.attend, "matmul": self.matmul,
        }  # fmt: skip
        run = {"unroll": self.unroll, "gather": self.gather}
        self.embed_video = Linear(self.width, matmul=self.matmul)
        self.encoder = Trunk(self.width, self.encoder_depth, options, run)
        self.moments = Linear(2 * self.channels, matmul=self.matmul.float32)
        self.embed_latent = Linear(self.width, matmul=self.matmul)
        self.decoder = Trunk(self.width, self.decoder_depth, options, run)
        self.pixels = Linear(p * q * r * 3, matmul=self.matmul)
        if self.detail:
            self.detail_pixels = MLP(
                self.detail, self.activation, zeros, self.matmul, features=p * q * r * 3
            )

    def encode(
        self, video_BTHWC: jax.Array, state: VAEState | None = None
    ) -> tuple[jax.Array, jax.Array, VAEState]:
        video = pad_to_multiple(video_BTHWC, self.patch[1:])
        if state is None:
            copies = jnp.repeat(video[:, :1], self.patch[0] - 1, axis=1)
            video = jnp.concatenate([copies, video], axis=1)
        x = self.embed_video(patchify(video, self.patch))
        if state is None:
            state = self.encoder.initial(x.shape[0], x.shape[2] * x.shape[3])
        x, state = self.encoder(x, state)
        mean, log_variance = jnp.split(self.moments(x), 2, axis=-1)
        return mean, jnp.clip(log_variance, -20.0, 4.0), state

    def decode(
        self, latent_BthwZ: jax.Array, state: VAEState | None = None
    ) -> tuple[jax.Array, VAEState]:
        begins = state is None
        if state is None:
            shape = latent_BthwZ.shape
            state = self.decoder.initial(shape[0], shape[2] * shape[3])
        x, state = self.decoder(self.embed_latent(latent_BthwZ), state)
        patches = self.pixels(x)
        if self.detail:
            patches = patches + self.detail_pixels(x)
        video = unpatchify(patches, self.patch)
        if begins:  # the first frame is the mean of its copies
            first = video[:, : self.patch[0]].mean(axis=1, keepdims=True)
            video = jnp.concatenate([first, video[:, self.patch[0] :]], axis=1)
        return video, state
