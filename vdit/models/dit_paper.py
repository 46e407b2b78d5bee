"""The DiT of the paper (Peebles and Xie 2023, arXiv:2212.09748) and Latte (arXiv:2401.03048).

Tokens have fixed sine-cosine positions, and all tokens of a sample one noise level; the condition
is a class, or in Latte's published model a text. Latte alternates attention over space and over
time: axes "factorised". Parameters of the stack lead with a layer axis.

Dimension key: B batch, L tokens, C token channels (q r Z: places of a patch, latent channels),
D width, S text tokens, E text width; t h w tokens along each axis.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vdit.errors import UserError
from vdit.models.dit import AXES
from vdit.nn import dot_product
from vdit.nn.attention import Attend, Attention
from vdit.nn.axes import Grid, fold, unfold
from vdit.nn.linear import MLP, LayerNorm, Linear, zeros
from vdit.nn.modulation import Modulation, embed_level, modulate
from vdit.nn.product import Matmul
from vdit.nn.rotary import frequencies
from vdit.nn.stack import Gather, stack
from vdit.tokens import Condition, Layout, one_level_grid

# How blocks are conditioned on time and class (section 3.2), and the number of modulation vectors:
# shift and scale of two norms, and gates. adaln_single is adaLN-Zero with one projection for all
# blocks and a table per block (Chen et al. 2023, arXiv:2310.00426, section 2.3).
CONDITIONINGS: dict[str, int] = {
    "in_context": 0, "cross_attention": 0, "adaln": 4, "adaln_zero": 6, "adaln_single": 6,
}  # fmt: skip


def _features(position_P: np.ndarray, dim: int) -> np.ndarray:
    """Sines, then cosines (P, dim) of positions, in float64."""
    angle = np.outer(position_P, frequencies(dim // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


def place_features(height: int, width: int, dim: int, span: float) -> np.ndarray:
    """Features (h·w, dim) of the positions of a frame's tokens: of the column, then of the row.

    Positions count tokens from 0; with a `span` they go from 0 to it at any size.
    """
    rows, columns = (np.arange(n) * (span / n if span else 1.0) for n in (height, width))
    column, row = (grid.ravel() for grid in np.meshgrid(columns, rows))
    return np.concatenate([_features(column, dim // 2), _features(row, dim // 2)], axis=-1)


class Conditioning(NamedTuple):
    """Conditioning shared by all blocks."""

    vector: jax.Array  # (B, 1, D) time and class; adaln_single: (B, 1, 6 D), projected already
    tokens: jax.Array  # (B, 1 or 2, D) time, and class
    text: jax.Array | None  # (B, S, D)
    shot: jax.Array  # (B, S) 1 where the text token is seen
    time: jax.Array  # (t, D) positions in time


class Block(nn.Module):
    """Attention and MLP, conditioned by one of `CONDITIONINGS`; cross-attention to text between."""

    axes: str
    conditioning: str
    grid: Grid
    heads: int
    mlp_ratio: float
    activation: str
    epsilons: tuple[float, float]
    attend: Attend
    matmul: Matmul

    @nn.compact
    def __call__(self, x_BLD: jax.Array, cond: Conditioning) -> jax.Array:
        width = x_BLD.shape[-1]
        parts = CONDITIONINGS[self.conditioning]
        vectors: list[jax.Array] = []
        if self.conditioning == "adaln_single":
            normal = nn.initializers.normal(width**-0.5)
            table = self.param("table", normal, (parts, width), jnp.float32)
            given = jnp.split(cond.vector, parts, axis=-1)
            vectors = [table[i][None, None] + vector for i, vector in enumerate(given)]
        elif parts:
            vectors = Modulation(parts, self.matmul, name="adaln")(cond.vector)

        def norm(x: jax.Array, name: str, number: int) -> tuple[jax.Array, Any]:
            """x normed, and the gate of the branch."""
            epsilon = self.epsilons[number]
            if not vectors:
                return LayerNorm(epsilon, name=name)(x), 1.0
            shift, scale, *gate = vectors[number * parts // 2 : (number + 1) * parts // 2]
            return modulate(x, shift, scale, epsilon=epsilon), gate[0] if gate else 1.0

        def attention(name: str) -> Attention:
            kinds: dict[str, Any] = {"qk_norm": False, "qkv_bias": True, "matmul": self.matmul}
            return Attention(self.heads, self.attend, **kinds, name=name)

        normed, gate = norm(x_BLD, "attention_norm", 0)
        out = attention("attention")(fold(normed, self.axes, self.grid))
        x_BLD = x_BLD + gate * unfold(out, self.axes, self.grid)
        if self.conditioning == "cross_attention":
            x_BLD = x_BLD + attention("cross")(LayerNorm(name="cross_norm")(x_BLD), cond.tokens)
        if cond.text is not None and self.axes != "time":
            seen = jnp.ones(x_BLD.shape[:2], cond.shot.dtype)
            x_BLD = x_BLD + attention("text")(x_BLD, cond.text, q_id_BL=seen, k_id_BS=cond.shot)
        normed, gate = norm(x_BLD, "mlp_norm", 1)
        mlp = MLP(int(width * self.mlp_ratio), self.activation, matmul=self.matmul, name="mlp")
        return x_BLD + gate * mlp(normed)


class Layer(nn.Module):
    """A layer of the stack: a block for each of its axes."""

    blocks: tuple[str, ...]
    options: tuple[Any, ...]  # the others of Block's fields

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, first: jax.Array, cond: Conditioning
    ) -> tuple[jax.Array, None]:
        for axes in self.blocks:
            if axes == "time" and cond.time.shape[0] > 1:  # before the first such block
                places = x_BLD.shape[1] // cond.time.shape[0]
                x_BLD = x_BLD + first * jnp.repeat(cond.time, places, axis=0)[None]
            x_BLD = Block(axes, *self.options, name=axes)(x_BLD, cond)
        return x_BLD, None


class DiTPaper(nn.Module):
    """Predicts the noise of every token (B, L, q·r·Z), with `learned_variance` (B, L, 2·q·r·Z).

    After it is then each element's interpolation of the variance (as in `vdit.models.dit.DiT`).

    Args:
      patch: rows and columns q, r of a token.
      axes: "joint" (an image, or all tokens of a video), "factorised" (Latte, its Variant 1).
      conditioning: a row of `CONDITIONINGS`.
      classes: their number, without the null class behind them; 0 for a model without.
      text: whether blocks (not those over time) attend to a text.
      span: see `place_features`. Positions in time count frames, and a single frame has none; with
        "factorised" they are added before the first block over time, as in Latte.
      level_theta: the longest period of the time's features, over 2 pi.
      epsilons: of a block's norms, before attention and before the MLP.
      unroll, remat, gather (of a layer's parameters): do not change the parameters.

    Raises `UserError` for given tokens (there is one time for all), packed rows, and combinations
    that no such model has.
    """

    width: int
    depth: int
    heads: int
    patch: tuple[int, int] = (2, 2)
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    axes: str = "joint"
    conditioning: str = "adaln_zero"
    classes: int = 1000
    text: bool = False
    learned_variance: bool = True
    span: float = 0.0
    level_theta: float = 10_000.0
    epsilons: tuple[float, float] = (1e-6, 1e-6)
    one_time = True
    from_start = True
    beside = 0
    layers = 0
    attend: Attend = dot_product.attend
    unroll: int = 1
    remat: str = "none"
    matmul: Matmul = Matmul()
    gather: Gather = None

    @property
    def null_key(self) -> bool:
        return not self.text

    @nn.compact
    def __call__(self, x_BLC: jax.Array, layout: Layout, condition: Condition) -> jax.Array:
        check(self.conditioning, self.axes, self.width, self.depth, self.heads)
        grid = one_level_grid("paper", "positions are of a grid", layout, condition)
        (t, h, w), width, blocks = grid, self.width, AXES[self.axes]
        batch, length, channels = x_BLC.shape
        latent = channels // (self.patch[0] * self.patch[1])
        window = (*self.patch, latent)
        x = Linear(width, window=window, matmul=self.matmul, name="embed")(x_BLC)
        places = np.tile(place_features(h, w, width, self.span), (t, 1))
        times = _features(np.arange(t), width)
        if self.axes == "joint" and t > 1:
            places = places + np.repeat(times, h * w, axis=0)
        x = x + jnp.asarray(places, jnp.float32)[None]

        vector_B1D, cond = self._conditioning(condition, times)
        if self.conditioning == "in_context":
            x = jnp.concatenate([x, cond.tokens], axis=1)

        steps = self.depth // len(blocks)
        layers = stack(
            Layer, steps, scanned=1, shared=1, unroll=self.unroll, remat=self.remat,
            gather=self.gather,
        )  # fmt: skip
        options = (
            self.conditioning, grid, self.heads, self.mlp_ratio, self.activation,
            self.epsilons, self.attend, self.matmul,
        )  # fmt: skip
        first = (jnp.arange(steps) == 0).astype(jnp.float32)
        x, _ = layers(blocks, options, name="blocks")(x, first, cond)
        x = self._last_norm(x[:, :length], vector_B1D)
        kinds = 2 if self.learned_variance else 1
        out = Linear(channels * kinds, kernel_init=zeros, matmul=self.matmul.float32, name="out")(x)
        # From (place, output, channel) to outputs of all places, one after another.
        return rearrange(out, "B L (place kind Z) -> B L (kind place Z)", kind=kinds, Z=latent)

    def _conditioning(
        self, condition: Condition, times: np.ndarray
    ) -> tuple[jax.Array, Conditioning]:
        """The embedding (B, 1, D) of time and class, and the conditioning of all blocks."""
        width = self.width
        frequency = jnp.asarray(frequencies(128, self.level_theta), jnp.float32)
        angle = condition.level[..., None] * frequency[None, None]
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        level = embed_level(features, self.width, self.matmul)
        tokens = [level]
        if self.classes:
            assert condition.label is not None
            normal = nn.initializers.normal(0.02)
            table = self.param("classes", normal, (self.classes + 1, width), jnp.float32)
            label_B = jnp.where(condition.label < 0, self.classes, condition.label)
            tokens.append(table[label_B][:, None])
        vector_B1D, text = sum(tokens[1:], level), None
        shared = vector_B1D
        if self.conditioning == "adaln_single":
            single = Linear(6 * width, matmul=self.matmul.float32, name="single")
            shared = single(nn.silu(vector_B1D))
        if self.text:
            hidden = Linear(width, matmul=self.matmul, name="text_in")(condition.text)
            hidden = nn.gelu(hidden, approximate=True)
            text = Linear(width, matmul=self.matmul, name="text_out")(hidden)
        both, time = jnp.concatenate(tokens, axis=1), jnp.asarray(times, jnp.float32)
        return vector_B1D, Conditioning(shared, both, text, seen(condition), time)

    def _last_norm(self, x_BLD: jax.Array, vector_B1D: jax.Array) -> jax.Array:
        """The norm before the last layer, conditioned as those of the blocks."""
        width = self.width
        if self.conditioning == "adaln_single":
            normal = nn.initializers.normal(width**-0.5)
            table = self.param("table", normal, (2, width), jnp.float32)
            shift, scale = (row[None, None] + vector_B1D for row in table)
            return modulate(x_BLD, shift, scale)
        if CONDITIONINGS[self.conditioning]:
            shift, scale = Modulation(2, self.matmul, name="final")(vector_B1D)
            return modulate(x_BLD, shift, scale)
        return LayerNorm(name="final_norm")(x_BLD)


def seen(condition: Condition) -> jax.Array:
    """The text's mask (B, S): 1 for the caption's tokens, or the null key of a row without any."""
    caption = (condition.shot > 0) & ~condition.null
    alone = ~caption.any(axis=1, keepdims=True)
    return (caption | (condition.null & alone)).astype(jnp.int32)


def check(conditioning: str, axes: str, width: int, depth: int, heads: int) -> None:
    """Validates the sizes of a DiT of the paper."""
    if depth % len(AXES[axes]):
        raise UserError(f"dit depth {depth}: {axes} needs a multiple of {len(AXES[axes])}")
    if conditioning not in CONDITIONINGS:
        known = ", ".join(CONDITIONINGS)
        raise UserError(f"dit.paper.conditioning={conditioning!r}: known are {known}")
    if width % 4 or width % heads:
        raise UserError(
            f"dit width {width} with {heads} heads: 4 (positions) and the heads must divide it"
        )
    if conditioning == "in_context" and axes != "joint":
        raise UserError(f"dit.paper.conditioning=in_context with dit.axes={axes}: joint is allowed")
