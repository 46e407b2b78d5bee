"""Pretrained image encoders: CLIP's vision transformer (Radford et al. 2021, arXiv:2103.00020).

Dimension key: B images, H W rows and columns of pixels, S tokens of an image (its class token,
then its patches in reading order), D width.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit.models.text_encoders import ACTIVATIONS, Block, exact
from vdit.nn.linear import LayerNorm, Linear
from vdit.nn.patch import patchify
from vdit.nn.product import Matmul
from vdit.nn.stack import stack


class CLIPVision(nn.Module):
    """Normalised pixels (B, H, W, 3) to the features (B, S, D) before the last of `depth` layers,
    which is not run, and without the norm behind it."""

    size: int  # rows and columns of pixels
    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(self, pixels_BHW3: jax.Array) -> jax.Array:
        batch, norm, side = len(pixels_BHW3), partial(LayerNorm, self.epsilon), self.patch
        patches = patchify(pixels_BHW3[:, None], (1, side, side))
        patches = patches.reshape(batch, -1, patches.shape[-1])
        embed = Linear(
            self.width, use_bias=False, window=(side, side, 3), matmul=self.matmul, name="patches"
        )
        positions = nn.Embed(1 + patches.shape[1], self.width, name="positions")
        blocks = stack(Block, self.depth - 1, shared=1)(
            self.heads, self.width // self.heads, self.hidden, norm=norm,
            activation=ACTIVATIONS[self.activation], matmul=self.matmul, name="blocks",
        )  # fmt: skip
        first = self.param("first", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        first = jnp.broadcast_to(first.astype(jnp.float32), (batch, 1, self.width))
        with exact():
            x = jnp.concatenate([first, embed(patches)], axis=1)
            places = jnp.arange(x.shape[1])[None]
            x = norm(name="norm")(x + positions(places).astype(jnp.float32))
            x, _ = blocks(x, jnp.ones((1, x.shape[1], x.shape[1]), jnp.bool_))
        return x
