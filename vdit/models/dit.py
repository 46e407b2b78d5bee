"""The diffusion transformer (Peebles and Xie 2023) over space-time tokens.

Tokens have real-valued positions (3D rotary embedding and sine-cosine features) and noise levels of
their own (adaLN-Zero), and attend to the text of their shot by cross-attention. Parameters of the
stack lead with a layer axis.

Dimension key: B batch rows, L tokens, C token channels, D width, S text tokens, E text width,
K slots (distinct noise levels of a row).
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vdit.errors import UserError
from vdit.nn import dot_product
from vdit.nn.attention import Angles, Attend, Attention
from vdit.nn.axes import Grid, fold, unfold
from vdit.nn.linear import MLP, Linear, layer_norm, zeros
from vdit.nn.modulation import Modulation, embed_level, gate, modulate, scale_shift
from vdit.nn.product import Matmul
from vdit.nn.rotary import rotary_angles, sincos
from vdit.nn.stack import Gather, stack
from vdit.nn.window import windowed
from vdit.tokens import Condition, Layout

# smoke is for tests, nano and micro are for CPUs (a quarter of an hour, an hour), S to XL are
# Table 1 of the DiT paper; the largest two have heads as wide as a TPU's lanes.
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"width": 32, "depth": 2, "heads": 2},
    "nano": {"width": 128, "depth": 4, "heads": 4, "activation": "relu2"},
    "micro": {"width": 192, "depth": 6, "heads": 6, "activation": "relu2"},
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
    "2B": {"width": 2048, "depth": 22, "heads": 16},
    "10B": {"width": 4096, "depth": 28, "heads": 32},
}


def preset(name: str) -> dict[str, Any]:
    """Width, depth and heads of a row of `PRESETS`, or of WIDTHxDEPTHxHEADS."""
    if name in PRESETS:
        return PRESETS[name]
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,3}x[1-9]\d{0,3}", name):
        known = ", ".join(PRESETS)
        raise UserError(f"dit.preset={name!r}: known are {known}, and WIDTHxDEPTHxHEADS")
    return dict(zip(("width", "depth", "heads"), map(int, name.split("x")), strict=True))


# The blocks of a layer of the stack, in turn: the axes that each attends over.
AXES: dict[str, tuple[str, ...]] = {
    "joint": ("joint",),
    "factorised": ("space", "time"),
    "windowed": ("window",),
}

# How blocks see the text: cross-attention, or text tokens in the row beside the video's.
TEXTS = ("cross", "context")


class Block(nn.Module):
    """Self-attention and MLP with adaLN-Zero; between them cross-attention to the text where `text`
    is "cross"."""

    axes: str
    text: str
    heads: int
    mlp_ratio: float
    activation: str
    attend: Attend
    window: Grid
    matmul: Matmul

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, text_BSD: jax.Array, condition_BKD: jax.Array, slot_BLK: jax.Array,
        angles: Angles, layout: Layout, text_shot_BS: jax.Array,
    ) -> jax.Array:  # fmt: skip
        width = x_BLD.shape[-1]
        vectors = Modulation(6, self.matmul, name="adaln")(condition_BKD)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        attend = self.attend
        if self.axes == "window":
            assert layout.grid is not None
            attend = windowed(attend, layout.grid, self.window)
        attention = Attention(self.heads, attend, matmul=self.matmul, name="attention")
        x = fold(modulate(x_BLD, shift1, scale1, slot_BLK), self.axes, layout.grid)
        cos, sin = (fold(a, self.axes, layout.grid) for a in angles)
        segment = layout.segment if self.axes == "joint" else None
        out = attention(x, angles=(cos, sin), q_id_BL=segment, k_id_BS=segment)
        x_BLD = x_BLD + gate(unfold(out, self.axes, layout.grid), gate1, slot_BLK)
        if self.text == "cross":
            cross = Attention(
                self.heads, self.attend, out_init=zeros, matmul=self.matmul, name="cross"
            )
            x_BLD = x_BLD + cross(layer_norm(x_BLD), text_BSD, None, layout.shot, text_shot_BS)
        mlp = MLP(int(width * self.mlp_ratio), self.activation, matmul=self.matmul, name="mlp")
        return x_BLD + gate(mlp(modulate(x_BLD, shift2, scale2, slot_BLK)), gate2, slot_BLK)


Hidden = dict[int, jax.Array]  # tokens (B, L, D) after a layer, by its number from 1


class Layer(nn.Module):
    """A layer of the stack: a block for each of its axes.

    Carries the tokens, and copies of them after the layers whose numbers are keys of `hidden`.
    """

    blocks: tuple[str, ...]
    options: dict[str, Any]  # the others of Block's fields

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Hidden], number: jax.Array | None, *shared: Any
    ) -> tuple[tuple[jax.Array, Hidden], None]:
        x_BLD, hidden = carry
        for axes in self.blocks:
            x_BLD = Block(axes, **self.options, name=axes)(x_BLD, *shared)
        kept = {layer: jnp.where(number == layer, x_BLD, old) for layer, old in hidden.items()}
        return (x_BLD, kept), None


class DiT(nn.Module):
    """Predicts eps, x0, v or flow of every token (B, L, C).

    With `learned_variance` (B, L, 2 C): after it each element's interpolation v between the
    posterior variance and beta (Nichol and Dhariwal 2021, Eq. 15).
    `axes`: "joint" attends over all tokens of a sample; "factorised" alternates attention within a
    latent frame and over time at a place; "windowed" attends in tiles of `window` tokens (t, h, w)
    and half a tile around (the last two for dense batches with a grid only).
    `text`: "cross" is cross-attention in every block; "context" appends the text's tokens to the
    video's (section 3.2; for "joint" and one caption a sample only).
    `unroll`, `remat` and `gather` (of a layer's parameters) do not change the parameters.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    axes: str = "joint"
    window: Grid = (4, 8, 8)
    text: str = "cross"
    learned_variance: bool = False
    theta: tuple[float, float, float] = (10_000.0, 100.0, 100.0)
    one_time = False
    from_start = False
    beside = 0
    null_key = True
    attend: Attend = dot_product.attend
    unroll: int = 1
    remat: str = "none"
    matmul: Matmul = Matmul()
    gather: Gather = None

    @property
    def layers(self) -> int:
        return self.depth // len(AXES[self.axes])

    @nn.compact
    def __call__(
        self, x_BLC: jax.Array, layout: Layout, condition: Condition, hidden: tuple[int, ...] = ()
    ) -> Any:
        """(B, L, C), or (B, L, 2 C); with `hidden` also the tokens after those layers, from 1."""
        blocks = AXES[self.axes]
        if self.depth % len(blocks):
            raise UserError(
                f"dit depth {self.depth}: {self.axes} needs a multiple of {len(blocks)}"
            )
        if layout.grid is None and blocks != ("joint",):
            raise UserError(f"dit.axes {self.axes} needs dense batches; packed rows go joint")
        if self.text == "context":
            _check_context(self.axes, layout, condition)
        matmul, wide = self.matmul, self.matmul.float32
        x = Linear(self.width, name="embed", matmul=matmul)(x_BLC)
        place = [sincos(layout.position[..., axis], 64, self.theta[axis]) for axis in range(3)]
        position = Linear(self.width, matmul=wide, name="embed_position")
        x = x + position(jnp.concatenate(place, axis=-1))

        level = embed_level(sincos(condition.level, 256), self.width, matmul)
        condition_BKD = level + Linear(self.width, matmul=wide, name="pooled")(condition.pooled)
        text = Linear(self.width, name="embed_text", matmul=matmul)(condition.text)
        null = self.param("null_text", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        text = layer_norm(jnp.where(condition.null[..., None], null[None, None], text))

        length, channels = x_BLC.shape[1:]
        if self.text == "context":
            x, layout = jnp.concatenate([x, text], axis=1), with_text(layout, condition)
        slots = jnp.arange(condition.level.shape[1])
        slot_BLK = (layout.slot[..., None] == slots[None, None]).astype(jnp.float32)
        angles = rotary_angles(layout.position, self.width // self.heads, self.theta)
        options = {
            "text": self.text, "heads": self.heads, "mlp_ratio": self.mlp_ratio,
            "activation": self.activation, "attend": self.attend, "window": self.window,
            "matmul": matmul,
        }  # fmt: skip
        layers = stack(
            Layer, self.layers, scanned=1, shared=6, unroll=self.unroll, remat=self.remat,
            gather=self.gather,
        )(blocks, options, name="blocks")  # fmt: skip
        numbers = jnp.arange(1, self.layers + 1) if hidden else None
        carry = x, {layer: jnp.zeros_like(x) for layer in hidden}
        shared = text, condition_BKD, slot_BLK, angles, layout, condition.shot
        (x, kept), _ = layers(carry, numbers, *shared)
        x, slot_BLK = x[:, :length], slot_BLK[:, :length]
        shift, scale = Modulation(2, matmul, name="final")(condition_BKD)
        kinds = 2 if self.learned_variance else 1
        out = Linear(channels * kinds, kernel_init=zeros, matmul=wide, name="out")(
            scale_shift(layer_norm(x), shift, scale, slot_BLK)
        )
        return (out, jax.tree.map(lambda x: x[:, :length], kept)) if hidden else out


def skipped(depth: int, part: tuple[float, float]) -> list[int]:
    """The layers 0 .. depth - 1 whose midpoints are in [first, last) of the depth."""
    first, last = part
    return [i for i in range(depth) if first <= (i + 0.5) / depth < last]


def without_attention(params: Mapping[str, Any], part: tuple[float, float]) -> dict[str, Any]:
    """A DiT's parameters with self-attention skipped in `part` of the depth (see `skipped`).

    As in spatiotemporal skip guidance (Hyung et al. 2024, section 3.2).
    """
    flat = traverse_util.flatten_dict(dict(params))
    for path, leaf in flat.items():
        if path[0] == "blocks" and path[2:4] == ("attention", "o"):
            kept = np.ones((len(leaf), *[1] * (leaf.ndim - 1)), leaf.dtype)
            kept[skipped(len(leaf), part)] = 0
            flat[path] = leaf * kept
    return traverse_util.unflatten_dict(flat)


def _check_context(axes: str, layout: Layout, condition: Condition) -> None:
    """Validates text in the row of the video's tokens."""
    if axes != "joint":
        raise UserError(f"dit.text=context with dit.axes={axes}: joint is allowed")
    if layout.segment is None and condition.level.shape[1] > 2:
        raise UserError(
            "dit.text=context knows one caption a sample: clips of several shots are not allowed"
        )


def with_text(layout: Layout, condition: Condition) -> Layout:
    """The layout of rows with their text appended.

    A sample's tokens and caption are one segment, the shot's number. Text tokens are at the origin
    and have the noise level of wanted tokens.
    """
    shot_BS = condition.shot
    segment = jnp.concatenate([layout.shot, shot_BS], axis=1)
    slot_BS = jnp.maximum(2 * (shot_BS - 1), 0)
    return Layout(
        position=jnp.pad(layout.position, ((0, 0), (0, shot_BS.shape[1]), (0, 0))),
        slot=jnp.concatenate([layout.slot, slot_BS], axis=1),
        shot=segment,
        segment=segment,
        grid=layout.grid,
    )
