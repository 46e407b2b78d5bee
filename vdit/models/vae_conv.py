"""Convolutional autoencoders of images, and causal ones of video.

Levels of residual blocks at ever half the height and width (the last ones also at half the frame
rate), attention in the middle. With 2D kernels and group norm it is latent diffusion's autoencoder;
with causal kernels over three frames and RMS norm it is Wan's. The interface is that of `vae.VAE`:
1 + k·p frames become 1 + k latent frames, and a clip of any length can be streamed in chunks that
carry a state.

Dimension key: B batch, T frames, H height, W width, C channels; t h w latent frames and places,
Z latent channels.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vdit.errors import UserError
from vdit.models.autoencoder import Autoencoder, State
from vdit.nn import conv, dot_product
from vdit.nn.attention import Attend
from vdit.nn.linear import Linear
from vdit.nn.patch import pad_to_multiple
from vdit.nn.product import Matmul


class Level(nn.Module):
    """Residual blocks of one width, then down- or upsampling to `features` channels.

    `residual`: with a parameter-free shortcut, the input averaged or duplicated to the output's
    shape.
    """

    width: int
    features: int
    resize: tuple[bool, bool]  # time, space
    up: bool
    blocks: int
    residual: bool
    options: dict[str, Any]  # of ResBlock

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, state: State) -> tuple[jax.Array, State]:
        (time, space), matmul = self.resize, self.options["matmul"]
        layers: list[conv.Layer] = [
            conv.ResBlock(self.width, **self.options, name=f"block{j}") for j in range(self.blocks)
        ]
        if space and self.up:
            layers.append(conv.Upsample(self.features, time, matmul, name="up"))
        elif space:
            layers.append(conv.Downsample(time, matmul, name="down"))
        out, after = conv.chain(layers, x_BTHWC, state)
        if self.residual and (space or not self.up):
            beside = conv.duplicated if self.up else conv.averaged
            factors = 1 + time, 1 + space, 1 + space
            out = out + beside(x_BTHWC, self.features, factors, state is None)
        return out, after


class Stem(nn.Module):
    """The first convolution of a network."""

    features: int
    time: int
    matmul: Matmul

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, state: State) -> tuple[jax.Array, State]:
        stem = conv.Conv(self.features, self.time, matmul=self.matmul, name="conv")
        return conv.causal(stem, x_BTHWC, state)


class Half(nn.Module):
    """The encoder, or with `up` the decoder: levels, and attention at the smallest size.

    `levels` in their order here: (width, features, (time, space) that it resizes).
    """

    features: int
    levels: tuple[tuple[int, int, tuple[bool, bool]], ...]
    up: bool
    blocks: int
    residual: bool
    options: dict[str, Any]  # of ResBlock
    attention: dict[str, Any] | None  # options of the one in the middle

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, state: State) -> tuple[jax.Array, State]:
        time, groups, matmul = (self.options[name] for name in ("time", "groups", "matmul"))
        same: Any = (self.up, self.blocks, self.residual, self.options)
        levels: list[conv.Layer] = [
            Level(*level, *same, name=f"level{i}") for i, level in enumerate(self.levels)
        ]
        width = self.levels[0 if self.up else -1][0]
        middle: list[conv.Layer] = [
            conv.ResBlock(width, **self.options, name=f"middle{i}") for i in range(2)
        ]
        if self.attention is not None:
            kinds = {**self.attention, "matmul": matmul}
            middle.insert(1, conv.FrameAttention(groups, **kinds, name="attention"))
        layers: list[conv.Layer] = [
            Stem(self.levels[0][0], time, matmul, name="stem"),
            *(middle + levels if self.up else levels + middle),
            conv.NormConv(self.features, **self.options, name="head"),
        ]
        return conv.chain(layers, x_BTHWC, state)


class ConvVAE(Autoencoder):
    """Video (B, T, H, W, 3) in [-1, 1] to latents (B, t, h, w, Z) and back.

    `patch` (p, q, q) are the downsampling factors, powers of two. There are as many levels as
    `widths`: q = pixels · 2^(levels - 1), and the last log2(p) of them halve the frame rate too.
    """

    LAST = ("decoder", "head", "conv", "kernel")

    widths: tuple[int, ...]  # of the encoder's levels
    decoder_widths: tuple[int, ...]  # of the same levels in the decoder
    blocks: int = 2  # residual blocks of a level; the decoder has one more
    causal: bool = False  # kernels over three frames, not one
    groups: int = 32  # of the group norm; 0: RMS norm
    pixels: int = 1  # side of the squares of pixels that are folded into channels first
    residual: bool = False  # parameter-free shortcuts around levels (Wan 2.2)
    attention: bool = True  # in the middle
    quantise: tuple[bool, bool] = (True, True)  # linear maps after the encoder, before the decoder
    attend: Attend = dot_product.attend
    matmul: Matmul = Matmul()

    def halves(self) -> list[tuple[bool, bool]]:
        """Whether each level of the encoder halves time, and space."""
        levels = len(self.widths)
        first = levels - 1 - int(math.log2(self.patch[0]))  # the first that halves the rate
        return [(first <= i < levels - 1, i < levels - 1) for i in range(levels)]

    def check(self) -> None:
        """Validates the widths of residual levels: shortcuts average and duplicate channels."""
        halves = self.halves()
        down, up = self.widths, self.decoder_widths[::-1]
        levels = [*zip((down[0], *down), down, halves, strict=False)]
        # A level of the decoder is one of the encoder turned round.
        levels += [*zip(up, (up[0], *up), halves[-2::-1], strict=False)]
        for more, fewer, (time, space) in levels if self.residual else ():
            places = 2 ** (time + 2 * space)  # that become one
            if more * places % fewer:
                raise UserError(
                    f"residual levels have {self.widths} channels, {self.decoder_widths} in the"
                    f" decoder: allowed are those of which {places} times {more} is a multiple of"
                    f" {fewer}"
                )

    def setup(self) -> None:
        options = {"time": 3 if self.causal else 1, "groups": self.groups, "matmul": self.matmul}
        attention = {"fused": self.causal, "attend": self.attend} if self.attention else None
        halves = self.halves()
        down = tuple(zip(self.widths, self.widths, halves, strict=True))
        narrows = self.causal and not self.residual  # a level of the decoder to half its width
        widths, doubles = self.decoder_widths[::-1], [*halves[-2::-1], (False, False)]
        fewer = [width // 2 if narrows else width for width in widths]
        up = tuple(zip(widths, fewer, doubles, strict=True))
        kinds = self.residual, options, attention
        self.encoder = Half(2 * self.channels, down, False, self.blocks, *kinds)
        self.decoder = Half(3 * self.pixels**2, up, True, self.blocks + 1, *kinds)
        if self.quantise[0]:
            self.quant = Linear(2 * self.channels, matmul=self.matmul.float32)
        if self.quantise[1]:
            self.post_quant = Linear(self.channels, matmul=self.matmul.float32)

    def encode(
        self, video_BTHWC: jax.Array, state: State = None
    ) -> tuple[jax.Array, jax.Array, State]:
        video = pad_to_multiple(video_BTHWC, self.patch[1:])
        # The order of a square's pixels is Wan's: columns before rows.
        fold = "B T (H q) (W r) C -> B T H W (C r q)"
        x = rearrange(video, fold, q=self.pixels, r=self.pixels)
        x, state = self.encoder(x, state)
        moments = self.quant(x) if self.quantise[0] else x
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0), state

    def decode(self, latent_BthwZ: jax.Array, state: State = None) -> tuple[jax.Array, State]:
        x = self.post_quant(latent_BthwZ) if self.quantise[1] else latent_BthwZ
        x, state = self.decoder(x, state)
        fold = "B T H W (C r q) -> B T (H q) (W r) C"
        return rearrange(x, fold, q=self.pixels, r=self.pixels), state
