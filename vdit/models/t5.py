"""T5's encoder (Raffel et al. 2020, arXiv:1910.10683): original, v1.1, and UMT5.

The original has an MLP with ReLU; v1.1 and UMT5 one with a gate (Shazeer 2020, arXiv:2002.05202).
Positions are a bias of attention by distance, one for all layers, or in UMT5 (arXiv:2304.09151) one
for each. Queries are not scaled, no layer has a bias of its own.

Dimension key: N captions, S tokens of a caption (L as queries), D width, H heads, K head dim,
F mlp.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdit.errors import UserError
from vdit.kernels.xla import attend_biased
from vdit.models.weights import TRANSPOSED, Row, fields
from vdit.nn.linear import Linear, RMSNorm

# config.json's feed_forward_proj: the activation, and whether a gate takes it.
MLPS = {"relu": (nn.relu, False), "gated-gelu": (lambda x: nn.gelu(x, approximate=True), True)}

FIELDS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
UMT5_FIELDS = FIELDS | {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}

_ATTENTION, _MLP = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
_BIAS = f"{_ATTENTION}.SelfAttention.relative_attention_bias.weight"
ROWS: tuple[Row, ...] = (
    # One table under two names; a file holds either or both.
    ("tokens/embedding", "shared.weight", None),
    ("tokens/embedding", "encoder.embed_tokens.weight", None),
    ("bias/embedding", _BIAS.format(0), None),
    ("blocks/bias/embedding", _BIAS, None),
    ("blocks/([qkvo])/kernel", rf"{_ATTENTION}.SelfAttention.\1.weight", TRANSPOSED),
    ("blocks/attention_norm/scale", f"{_ATTENTION}.layer_norm.weight", None),
    ("blocks/gate/kernel", f"{_MLP}.DenseReluDense.wi_0.weight", TRANSPOSED),
    ("blocks/up/kernel", f"{_MLP}.DenseReluDense.wi_1.weight", TRANSPOSED),
    ("blocks/up/kernel", f"{_MLP}.DenseReluDense.wi.weight", TRANSPOSED),
    ("blocks/down/kernel", f"{_MLP}.DenseReluDense.wo.weight", TRANSPOSED),
    ("blocks/mlp_norm/scale", f"{_MLP}.layer_norm.weight", None),
    ("norm/scale", "encoder.final_layer_norm.weight", None),
)
OTHERS = (r"decoder\..*", r"lm_head\.weight", r"(shared|encoder\.embed_tokens)\.weight")


def position_buckets(length: int, buckets: int, distance: int) -> np.ndarray:
    """The bucket of each (query, key), int32 (S, S): half of them for keys after the query.

    Of each half, the first half holds one distance each; the rest widen as logarithms up to
    `distance`, beyond which all is one bucket (section 2.1 of the paper). In float32, whose
    rounding at the edges is part of the published models.
    """
    offset_LS = np.arange(length)[None] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    away_LS = np.abs(offset_LS)
    ratio = np.log(np.maximum(away_LS, 1).astype(np.float32) / np.float32(exact))
    share = ratio / np.float32(math.log(distance / exact)) * np.float32(half - exact)
    far_LS = np.minimum(exact + share.astype(np.int32), half - 1)
    near_LS = np.where(away_LS < exact, away_LS, far_LS)
    return (near_LS + np.where(offset_LS > 0, half, 0)).astype(np.int32)


class PositionBias(nn.Module):
    """A learned number for each head and bucket: (1, H, L, S)."""

    heads: int
    buckets: int
    distance: int

    @nn.compact
    def __call__(self, length: int) -> jax.Array:
        shape = self.buckets, self.heads
        table = self.param("embedding", nn.initializers.normal(1.0), shape, jnp.float32)
        bucket_LS = position_buckets(length, self.buckets, self.distance)
        return table.astype(jnp.float32)[bucket_LS].transpose(2, 0, 1)[None]


class Block(nn.Module):
    """Pre-norm attention with a bias of positions, and an MLP; no layer has a bias vector."""

    heads: int
    head_dim: int
    hidden: int
    mlp: str
    epsilon: float
    position: tuple[int, int] | None  # buckets and distance of a bias of its own: UMT5

    @nn.compact
    def __call__(
        self, x_NSD: jax.Array, mask_NS: jax.Array, bias_1HLS: jax.Array | None
    ) -> tuple[jax.Array, None]:
        batch, length, width = x_NSD.shape

        def linear(features: int, name: str, x: jax.Array) -> jax.Array:
            return Linear(features, use_bias=False, name=name)(x)

        def heads(name: str) -> jax.Array:
            out = linear(self.heads * self.head_dim, name, normed)
            return out.reshape(batch, length, self.heads, self.head_dim)

        normed = RMSNorm(self.epsilon, name="attention_norm")(x_NSD)
        if self.position is not None:
            bias_1HLS = PositionBias(self.heads, *self.position, name="bias")(length)
        assert bias_1HLS is not None
        lowest = jnp.finfo(jnp.float32).min
        bias_NHLS = jnp.where(mask_NS[:, None, None, :], bias_1HLS, lowest)
        out = attend_biased(heads("q"), heads("k"), heads("v"), bias_NHLS, scale=1.0)
        x_NSD = x_NSD + linear(width, "o", out.reshape(batch, length, -1))
        normed = RMSNorm(self.epsilon, name="mlp_norm")(x_NSD)
        activation, gated = MLPS[self.mlp]
        up = linear(self.hidden, "up", normed)
        hidden = activation(linear(self.hidden, "gate", normed)) * up if gated else activation(up)
        return x_NSD + linear(width, "down", hidden), None


class T5(nn.Module):
    """Token ids (N, S) and their mask to the last hidden state (N, S, D), zero where masked."""

    vocab: int
    width: int
    depth: int
    heads: int
    head_dim: int
    hidden: int
    mlp: str
    buckets: int
    distance: int
    epsilon: float
    own_bias: bool  # of positions, in each layer: UMT5

    @nn.compact
    def __call__(self, ids_NS: jax.Array, mask_NS: jax.Array) -> jax.Array:
        position = self.buckets, self.distance
        own, shared = (position, None) if self.own_bias else (None, position)
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.depth,
        )
        options = self.heads, self.head_dim, self.hidden, self.mlp, self.epsilon
        blocks = stack(*options, own, name="blocks")
        bias = PositionBias(self.heads, *shared, name="bias")(ids_NS.shape[1]) if shared else None
        # A prompt's features are made once and are a cache's contents: exact on every platform.
        with jax.default_matmul_precision("highest"):
            x_NSD = nn.Embed(self.vocab, self.width, name="tokens")(ids_NS).astype(jnp.float32)
            x_NSD, _ = blocks(x_NSD, mask_NS, bias)
            x_NSD = RMSNorm(self.epsilon, name="norm")(x_NSD)
        return jnp.where(mask_NS[..., None], x_NSD, 0.0)


def from_config(
    config: Mapping[str, Any], folder: Path, *, defaults: Mapping[str, Any], own_bias: bool
) -> T5:
    """The encoder that a config.json describes; `UserError` for one that is not known here."""
    found = fields(config, defaults, folder)
    mlp, buckets = found["feed_forward_proj"], found["relative_attention_num_buckets"]
    distance = found["relative_attention_max_distance"]
    where = folder / "config.json"
    if mlp not in MLPS:
        known = ", ".join(MLPS)
        raise UserError(f"{where}: feed_forward_proj is {mlp!r}; known: {known}")
    if buckets < 4 or distance <= buckets // 4:
        raise UserError(
            f"{where}: {buckets} buckets of relative attention up to distance {distance}; allowed:"
            " 4 or more, and a distance above a quarter of them"
        )
    return T5(
        vocab=found["vocab_size"],
        width=found["d_model"],
        depth=found["num_layers"],
        heads=found["num_heads"],
        head_dim=found["d_kv"],
        hidden=found["d_ff"],
        mlp=mlp,
        buckets=buckets,
        distance=distance,
        epsilon=found["layer_norm_epsilon"],
        own_bias=own_bias,
    )
