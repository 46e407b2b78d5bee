"""The U-Net of latent diffusion (Rombach et al. 2022, arXiv:2112.10752; Stable Diffusion 1 and 2,
as diffusers' UNet2DConditionModel computes it), and a video form of it.

Levels of residual blocks at ever half the height and width, then back up with skip connections. A
residual block is conditioned on the time; the spatial transformer after it attends within its frame
and to the text. In the video form each of the two is followed by a temporal layer, zero at the
start: a convolution over three frames, and attention over time at each place (Blattmann et al.
2023, arXiv:2304.08818, section 3.1). So the untrained video form of an image model is that model,
frame by frame.

Dimension key: B batch, T frames, H W places, C channels; L tokens of a clip, S text tokens, E width
of the text or of the time's vector.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vdit.errors import UserError
from vdit.models.dit_paper import seen
from vdit.nn import dot_product
from vdit.nn.attention import Angles, Attend, Attention
from vdit.nn.conv import Conv, GroupNorm, NormConv, ResBlock
from vdit.nn.linear import MLP, LayerNorm, Linear, zeros
from vdit.nn.modulation import embed_level
from vdit.nn.product import Matmul
from vdit.nn.rotary import rotary_angles, sincos
from vdit.nn.stack import rematerialised, stack
from vdit.tokens import Condition, Layout, one_level_grid

EPSILON = 1e-5  # of all norms but a transformer's first, which has 1e-6


class Conditioning(NamedTuple):
    """Conditioning shared by all steps."""

    level: jax.Array  # (B, E)
    text: jax.Array  # (B, S, E)
    seen: jax.Array  # (B, S) the text's mask
    time: jax.Array  # (B, T, 1) of each frame, in 1/24 s


class Block(nn.Module):
    """Attention within a frame, cross-attention to the text, and an MLP."""

    heads: int
    frames: int
    attend: Attend
    matmul: Matmul

    @nn.compact
    def __call__(
        self, x_BLC: jax.Array, text_BSE: jax.Array, seen_BS: jax.Array
    ) -> tuple[jax.Array, None]:
        def norm(x: jax.Array, name: str) -> jax.Array:
            return LayerNorm(EPSILON, name=f"{name}_norm")(x)

        def attention(name: str) -> Attention:
            return Attention(self.heads, self.attend, qk_norm=False, matmul=self.matmul, name=name)

        rows = rearrange(norm(x_BLC, "attention"), "B (T P) C -> (B T) P C", T=self.frames)
        x_BLC = x_BLC + attention("attention")(rows).reshape(x_BLC.shape)
        sees = jnp.ones(x_BLC.shape[:2], seen_BS.dtype)
        text = attention("text")
        x_BLC = x_BLC + text(norm(x_BLC, "text"), text_BSE, q_id_BL=sees, k_id_BS=seen_BS)
        mlp = MLP(4 * x_BLC.shape[-1], "gelu_erf", matmul=self.matmul, gated=True, name="mlp")
        return x_BLC + mlp(norm(x_BLC, "mlp")), None


class Transformer(nn.Module):
    """`depth` blocks between two linear maps, with a residual connection.

    `linear`: whether public weights store these maps as linear layers, or as convolutions.
    """

    depth: int
    heads: int
    groups: int
    linear: bool
    attend: Attend
    unroll: int
    matmul: Matmul

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, cond: Conditioning) -> jax.Array:
        batch, frames, _, _, channels = x_BTHWC.shape
        kind = "linear" if self.linear else "conv"
        x = GroupNorm(self.groups, name="norm")(x_BTHWC).reshape(batch, -1, channels)
        x = Linear(channels, matmul=self.matmul, name=f"{kind}_in")(x)
        blocks = stack(Block, self.depth, shared=2, unroll=self.unroll)
        options = self.heads, frames, self.attend, self.matmul
        x, _ = blocks(*options, name="blocks")(x, cond.text, cond.seen)
        x = Linear(channels, kernel_init=zeros, matmul=self.matmul, name=f"{kind}_out")(x)
        return x_BTHWC + x.reshape(x_BTHWC.shape)


class TimeConv(nn.Module):
    """A convolution over three frames, with a residual connection; zero at the start."""

    groups: int
    matmul: Matmul

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        x = nn.silu(GroupNorm(self.groups, EPSILON, name="norm")(x_BTHWC))
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        conv = Conv(x.shape[-1], 3, 1, matmul=self.matmul, kernel_init=zeros, name="conv")
        return x_BTHWC + conv(x)


class TimeAttention(nn.Module):
    """Attention over time at each place, with a residual connection; zero at the start."""

    heads: int
    groups: int
    attend: Attend
    matmul: Matmul

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, time_BT1: jax.Array) -> jax.Array:
        _, _, height, width, channels = x_BTHWC.shape
        x = GroupNorm(self.groups, EPSILON, name="norm")(x_BTHWC)
        x = rearrange(x, "B T H W C -> (B H W) T C")
        one = rotary_angles(time_BT1, channels // self.heads, (10_000.0,))
        cos, sin = (jnp.repeat(part, height * width, axis=0) for part in one)
        angles: Angles = cos, sin
        attention = Attention(
            self.heads, self.attend, out_init=zeros, matmul=self.matmul, name="attention"
        )
        x = rearrange(attention(x, angles=angles), "(B H W) T C -> B T H W C", H=height, W=width)
        return x_BTHWC + x


class Step(nn.Module):
    """A residual block, a transformer of `depth` blocks (0: none), and their temporal layers."""

    features: int
    depth: int
    heads: int
    temporal: bool
    options: dict[str, Any]  # of Transformer

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, cond: Conditioning) -> jax.Array:
        groups, attend, matmul = (self.options[name] for name in ("groups", "attend", "matmul"))
        block = ResBlock(self.features, 1, groups, matmul, EPSILON, name="res")
        x, _ = block(x_BTHWC, None, cond.level)
        if self.temporal:
            x = TimeConv(groups, matmul, name="time_conv")(x)
        if self.depth:
            x = Transformer(self.depth, self.heads, **self.options, name="transformer")(x, cond)
            if self.temporal:
                x = TimeAttention(self.heads, groups, attend, matmul, name="time")(x, cond.time)
        return x


class UNet(nn.Module):
    """Predicts eps, x0, v or flow of every token (B, L, C); see `vdit.models.dit.DiT`.

    Tokens are places of latent frames of any size and number (an image is one frame). With
    `learned_variance` (B, L, 2 C) as there.

    Args:
      widths: channels of the levels, from full size on.
      blocks: steps of a level on the way down; there is one more on the way up.
      heads: attention heads of each level; the middle has the last level's.
      depths: blocks of each level's transformers, 0 for none.
      middle: blocks of the middle's transformer.
      groups: of the group norms.
      linear: whether a transformer's first and last map are linear in public weights, as in Stable
        Diffusion 2, or convolutions of one pixel. They compute the same.
      temporal: whether there are temporal layers.
      unroll, remat: do not change the parameters.

    Raises `UserError` for given tokens (there is one time for all), packed rows, and sizes that no
    such model has.
    """

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    heads: tuple[int, ...] = (8, 8, 8, 8)
    depths: tuple[int, ...] = (1, 1, 1, 0)
    middle: int = 1
    groups: int = 32
    linear: bool = False
    temporal: bool = False
    learned_variance: bool = False
    one_time = True
    from_start = True
    beside = 0
    layers = 0
    null_key = False
    attend: Attend = dot_product.attend
    unroll: int = 1
    remat: str = "none"
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(self, x_BLC: jax.Array, layout: Layout, condition: Condition) -> jax.Array:
        check(
            self.widths, self.blocks, self.heads, self.depths, self.middle, self.groups,
            self.temporal,
        )  # fmt: skip
        grid = one_level_grid("unet", "it sees frames of one size", layout, condition)
        batch, _, channels = x_BLC.shape
        level = sincos(condition.level[:, 0], self.widths[0])
        cond = Conditioning(
            level=nn.silu(embed_level(level, 4 * self.widths[0], self.matmul)),
            text=condition.text,
            seen=seen(condition),
            time=layout.position.reshape(batch, grid[0], -1, 3)[:, :, 0, :1],
        )

        options = {
            "groups": self.groups, "linear": self.linear, "attend": self.attend,
            "unroll": self.unroll, "matmul": self.matmul,
        }  # fmt: skip
        step = functools.partial(
            rematerialised(Step, self.remat), temporal=self.temporal, options=options
        )
        last = len(self.widths) - 1
        levels = list(zip(self.widths, self.depths, self.heads, strict=True))
        conv = functools.partial(Conv, matmul=self.matmul)
        x = conv(self.widths[0], name="stem")(x_BLC.reshape(batch, *grid, channels))
        skips = [x]
        for i, sizes in enumerate(levels):
            for j in range(self.blocks):
                x = step(*sizes, name=f"down{i}_{j}")(x, cond)
                skips.append(x)
            if i < last:
                x = conv(sizes[0], stride=2, symmetric=True, name=f"halve{i}")(x)
                skips.append(x)
        x = step(self.widths[-1], self.middle, self.heads[-1], name="middle0")(x, cond)
        x = step(self.widths[-1], 0, self.heads[-1], name="middle1")(x, cond)
        for i, sizes in enumerate(levels[::-1]):
            for j in range(self.blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = step(*sizes, name=f"up{i}_{j}")(x, cond)
            if i < last:  # cropped to the skip connection's size, where that is odd
                rows, columns = skips[-1].shape[2:4]
                x = x.repeat(2, axis=2).repeat(2, axis=3)[:, :, :rows, :columns]
                x = conv(sizes[0], name=f"double{i}")(x)
        features = channels * (2 if self.learned_variance else 1)
        head = NormConv(features, 1, self.groups, self.matmul, EPSILON, zeros, name="head")
        return head(x, None)[0].reshape(batch, -1, features)


def check(
    widths: tuple[int, ...], blocks: int, heads: tuple[int, ...], depths: tuple[int, ...],
    middle: int, groups: int, temporal: bool,
) -> None:  # fmt: skip
    """Validates the sizes of a U-Net."""
    if not len(widths) == len(heads) == len(depths) > 0:
        raise UserError(
            f"dit.unet.widths, heads and depths are {widths}, {heads}, {depths}: one number of each"
            " for each level is allowed"
        )
    if min(*widths, *heads, blocks, groups) < 1 or min(*depths, middle) < 0:
        raise UserError(
            f"dit.unet: widths {widths}, heads {heads}, blocks {blocks} and groups {groups} must be"
            f" above 0, depths {depths} and middle {middle} at least 0"
        )
    wrong = [w for w, n in zip(widths, heads, strict=True) if w % n or w % groups or w % 2]
    if wrong:
        raise UserError(
            f"dit.unet.widths has {wrong[0]}: 2, its heads ({heads}) and the groups ({groups}) must"
            " divide it"
        )
    if temporal and any(w // n % 2 for w, n in zip(widths, heads, strict=True)):
        raise UserError(
            f"dit.unet.heads is {heads} for widths {widths}: heads of an even width are allowed"
            " with dit.unet.temporal"
        )
