"""The diffusion transformer of Wan 2.1 and 2.2 (Wan Team 2025, arXiv:2503.20314).

Tokens count latent frames, rows and columns for their rotary embedding, attend to the text and, in
Wan 2.1's image to video, to an image's CLIP features, with keys and values of their own. One
projection of the time is shared by all blocks, each with a table that is added to it (adaLN-single,
arXiv:2310.00426). Parameters of the stack lead with a layer axis.

Dimension key: B batch, L tokens, C token channels (q r Z: places of a patch, latent channels),
D width, S text or image tokens, E width of their features, K slots (distinct noise levels of a
row), N heads; t h w tokens along each axis.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vdit.errors import UserError
from vdit.models.dit import Hidden
from vdit.nn import dot_product
from vdit.nn.attention import Angles, Attend
from vdit.nn.axes import Grid
from vdit.nn.linear import MLP, LayerNorm, Linear, RMSNorm, layer_norm, zeros
from vdit.nn.modulation import embed_level, gate, modulate, scale_shift
from vdit.nn.product import Matmul
from vdit.nn.rotary import frequencies, rotate_neighbours, split_pairs
from vdit.nn.stack import Gather, stack
from vdit.tokens import Condition, Layout, one_level_grid


def grid_angles(grid: Grid, head_dim: int) -> Angles:
    """Cosine and sine (1, t·h·w, 1, K/2) of the rotary pairs' angles; tables in float64."""

    def table(curve: Any) -> jax.Array:
        parts = []
        for axis, (count, pairs) in enumerate(zip(grid, split_pairs(head_dim, 3), strict=True)):
            values = curve(np.outer(np.arange(count), frequencies(pairs))).astype(np.float32)
            shape = tuple(count if i == axis else 1 for i in range(3))
            parts.append(jnp.broadcast_to(values.reshape(*shape, pairs), (*grid, pairs)))
        return jnp.concatenate(parts, axis=-1).reshape(1, -1, 1, head_dim // 2)

    return table(np.cos), table(np.sin)


class WanAttention(nn.Module):
    """Attention of x_BLD over itself, or over a text and an image, whose outputs are added.

    Queries and keys are normalised over all heads together. Rotary pairs are neighbours.
    """

    heads: int
    attend: Attend
    matmul: Matmul

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, angles: Angles | None = None, text_BSD: jax.Array | None = None,
        image_BSD: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        width, dtype = x_BLD.shape[-1], self.matmul.dtype

        def linear(x: jax.Array, name: str) -> jax.Array:
            return Linear(width, name=name, matmul=self.matmul)(x)

        def heads(x: jax.Array, name: str = "") -> jax.Array:
            """The heads (B, L, N, K), normed if it is for queries or keys."""
            x = RMSNorm(name=name)(x) if name else x
            x = x.reshape(*x.shape[:-1], self.heads, -1)
            if name and angles is not None:
                x = rotate_neighbours(x, angles)
            return x.astype(dtype)

        q = heads(linear(x_BLD, "q"), "q_norm")

        def over(memory: jax.Array, end: str) -> jax.Array:
            k = heads(linear(memory, f"k{end}"), f"k{end}_norm")
            return self.attend(q, k, heads(linear(memory, f"v{end}")), None, None)

        out = over(x_BLD if text_BSD is None else text_BSD, "")
        if image_BSD is not None:
            out = out + over(image_BSD, "_image")
        return linear(out.reshape(x_BLD.shape), "o")


class Layer(nn.Module):
    """Self-attention, cross-attention and MLP; carries tokens and `Hidden` as `dit.Layer` does."""

    heads: int
    hidden: int
    activation: str
    attend: Attend
    matmul: Matmul

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Hidden], number: jax.Array | None, time_BKE: jax.Array,
        slot_BLK: jax.Array | None, angles: Angles, text_BSD: jax.Array,
        image_BSD: jax.Array | None,
    ) -> tuple[tuple[jax.Array, Hidden], None]:  # fmt: skip
        x, kept = carry
        shift1, scale1, gate1, shift2, scale2, gate2 = _shifted(self, time_BKE, 6)
        attention = WanAttention(self.heads, self.attend, self.matmul, name="attention")
        x = x + gate(attention(modulate(x, shift1, scale1, slot_BLK), angles), gate1, slot_BLK)
        cross = WanAttention(self.heads, self.attend, self.matmul, name="cross")
        x = x + cross(LayerNorm(name="cross_norm")(x), None, text_BSD, image_BSD)
        mlp = MLP(self.hidden, self.activation, matmul=self.matmul, name="mlp")
        x = x + gate(mlp(modulate(x, shift2, scale2, slot_BLK)), gate2, slot_BLK)
        return (x, {layer: jnp.where(number == layer, x, old) for layer, old in kept.items()}), None


def _shifted(module: nn.Module, time_BKE: jax.Array, parts: int) -> list[jax.Array]:
    """`parts` vectors (B, K, D) of the time, shifted by a table of the module's."""
    width = time_BKE.shape[-1] // parts
    normal = nn.initializers.normal(width**-0.5)
    table = module.param("table", normal, (1, parts, width), jnp.float32)
    vectors = jnp.split(time_BKE, parts, axis=-1)
    return [table[:, i, None] + vector for i, vector in enumerate(vectors)]


class Wan(nn.Module):
    """Predicts the flow of every token (B, L, C).

    Args:
      hidden: width of the MLPs.
      patch: rows and columns q, r of a token.
      text_length: text tokens that blocks attend to; those beyond a caption are zero, not masked.
      beside: latent channels that `Condition.beside` adds to a place's noisy ones: of image to
        video a mask and a video's latents.
      image: width of the features `Condition.image`; 0: none.
      token_times: given tokens have a noise level of their own (TI2V).
      unroll, remat, gather (of a layer's parameters): do not change the parameters.

    Raises `UserError` for packed rows, several captions, conditions that are missing and, without
    `token_times`, given tokens.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    activation: str = "gelu"
    patch: tuple[int, int] = (2, 2)
    text_length: int = 512
    beside: int = 0
    image: int = 0
    token_times: bool = False
    learned_variance = False
    null_key = False
    from_start = True
    attend: Attend = dot_product.attend
    unroll: int = 1
    remat: str = "none"
    matmul: Matmul = Matmul()
    gather: Gather = None

    @property
    def one_time(self) -> bool:
        return not self.token_times

    @property
    def layers(self) -> int:
        return self.depth

    @nn.compact
    def __call__(
        self, x_BLC: jax.Array, layout: Layout, condition: Condition, hidden: tuple[int, ...] = ()
    ) -> Any:
        """(B, L, C); with `hidden` also the tokens after those layers, from 1."""
        check(self.width, self.heads)
        matmul, wide, channels = self.matmul, self.matmul.float32, x_BLC.shape[-1]
        most = 2 if self.token_times else 1
        grid = one_level_grid("wan", "positions are of a grid", layout, condition, most)
        x = Linear(
            self.width, window=(1, *self.patch, self._latent(channels)), matmul=matmul, name="embed"
        )(self._inputs(x_BLC, condition))

        angle = condition.level[..., None] * jnp.asarray(frequencies(128), jnp.float32)[None, None]
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        level_BKD = embed_level(waves, self.width, matmul)
        time = Linear(6 * self.width, matmul=wide, name="time")(nn.silu(level_BKD))
        levels = condition.level.shape[1]
        slot = None
        if levels > 1:
            slot = (layout.slot[..., None] == jnp.arange(levels)[None, None]).astype(jnp.float32)

        options = self.heads, self.hidden, self.activation, self.attend, matmul
        layers = stack(
            Layer, self.depth, scanned=1, shared=5, unroll=self.unroll, remat=self.remat,
            gather=self.gather,
        )(*options, name="blocks")  # fmt: skip
        numbers = jnp.arange(1, self.depth + 1) if hidden else None
        carry = x, {layer: jnp.zeros_like(x) for layer in hidden}
        angles = grid_angles(grid, self.width // self.heads)
        (x, kept), _ = layers(
            carry, numbers, time, slot, angles, self._text(condition), self._image(condition)
        )
        both = jnp.concatenate([level_BKD, level_BKD], axis=-1)
        shift, scale = _shifted(self, both, 2)
        x = scale_shift(layer_norm(x), shift, scale, slot)
        out = Linear(channels, kernel_init=zeros, matmul=wide, name="out")(x)
        return (out, kept) if hidden else out

    def _latent(self, channels: int) -> int:
        return channels // (self.patch[0] * self.patch[1]) + self.beside

    def _inputs(self, x_BLC: jax.Array, condition: Condition) -> jax.Array:
        """Each place's noisy channels and those beside them."""
        if not self.beside:
            return x_BLC
        places = self.patch[0] * self.patch[1]
        beside = self._given(condition.beside, (*x_BLC.shape[:2], places * self.beside))
        parts = [rearrange(x, "B L (p Z) -> B L p Z", p=places) for x in (x_BLC, beside)]
        return rearrange(jnp.concatenate(parts, axis=-1), "B L p Z -> B L (p Z)")

    def _text(self, condition: Condition) -> jax.Array:
        """The caption's tokens (B, S, D), zero behind it, without the null key in front."""
        caption = (condition.shot > 0) & ~condition.null
        text = jnp.where(caption[..., None], condition.text, 0.0)[:, 1:]
        more = max(0, self.text_length - text.shape[1])
        text = jnp.pad(text, ((0, 0), (0, more), (0, 0)))
        text = Linear(self.width, matmul=self.matmul, name="text_in")(text)
        text = nn.gelu(text, approximate=True)
        return Linear(self.width, matmul=self.matmul, name="text_out")(text)

    def _image(self, condition: Condition) -> jax.Array | None:
        """The image's tokens (B, S, D)."""
        if not self.image:
            return None
        image = self._given(condition.image, (condition.text.shape[0], 1, self.image))
        mlp = MLP(self.image, "gelu_erf", matmul=self.matmul, features=self.width, name="image_mlp")
        image = mlp(LayerNorm(1e-5, name="image_in")(image))
        return LayerNorm(1e-5, name="image_out")(image)

    def _given(self, value: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
        """A condition's value; zeros while parameters are initialised."""
        if value is None and not self.is_initializing():
            raise UserError("dit.model=wan for image to video needs an image's latents")
        return jnp.zeros(shape) if value is None else value


def check(width: int, heads: int) -> None:
    """Validates the sizes of a Wan transformer."""
    if width % heads or width // heads % 2 or width // heads < 6:
        raise UserError(
            f"dit width {width} with {heads} heads: heads of an even size of at least 6 are allowed"
        )


def begun_with(image_BHW3: np.ndarray, frames: int) -> np.ndarray:
    """The videos (B, T, H, W, 3), values 0 to 255, whose latents stand beside the noisy ones: the
    image that the video begins with, then grey."""
    video = np.full((len(image_BHW3), frames, *image_BHW3.shape[1:]), 127.5, np.float32)
    video[:, 0] = image_BHW3
    return video


def with_mask(latent_BnhwZ: jax.Array, channels: int) -> jax.Array:
    """`Condition.beside` as latents (B, n, h, w, `channels`): in front of those of such videos a
    mask, 1 where the image is."""
    shape = (*latent_BnhwZ.shape[:-1], channels - latent_BnhwZ.shape[-1])
    return jnp.concatenate([jnp.zeros(shape).at[:, 0].set(1.0), latent_BnhwZ], axis=-1)
