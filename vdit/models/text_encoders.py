"""Pretrained text encoders: T5 and UMT5, CLIP's, and MiniLM (BERT).

Each gives token ids (N, S) and their mask the last hidden state (N, S, D), zero where masked.

- T5 (Raffel et al. 2020, arXiv:1910.10683): the original has an MLP with ReLU, v1.1 and UMT5 a
  gated one (Shazeer 2020, arXiv:2002.05202). Positions are a bias on the attention logits by
  distance, one for all layers, or in UMT5 (arXiv:2304.09151) one per layer. Queries are not scaled,
  and no layer has a bias vector.
- CLIP (Radford et al. 2021, arXiv:2103.00020, section 2.4): pre-norm, learned positions, causal.
  So the last token of a text, its end token, has seen all of it: that is the pooled text.
- MiniLM (arXiv:2002.10957): BERT (Devlin et al. 2019), post-norm, learned positions.

Captions of CLIP and MiniLM may be in chunks (`chunks.py`), none longer than their `positions`.

Dimension key: N captions, S tokens of a caption (L as queries), D width, H heads, K head dim,
F mlp.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdit.models.chunks import chunk_places
from vdit.nn.dot_product import attend_biased
from vdit.nn.linear import LayerNorm, Linear, RMSNorm
from vdit.nn.product import Matmul
from vdit.nn.stack import stack

# config.json's hidden_act of CLIP. The quick one is Hendrycks and Gimpel's sigmoid form of GELU
# (arXiv:1606.08415, section 2).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}
# config.json's feed_forward_proj of T5: the activation, and whether it is applied to a gate.
MLPS = {"relu": (nn.relu, False), "gated-gelu": (lambda x: nn.gelu(x, approximate=True), True)}


def position_buckets(length: int, buckets: int, distance: int) -> np.ndarray:
    """The bucket of each (query, key), int32 (S, S): half of them for keys after the query.

    Of each half, the first half holds one distance each; the rest widen as logarithms up to
    `distance`, beyond which all is one bucket (section 2.1 of T5's paper). In float32, whose
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
    """Attention and an MLP, each with a norm before it or (`post`) after its sum."""

    heads: int
    head_dim: int
    hidden: int
    norm: Callable[..., nn.Module]
    activation: Callable[[jax.Array], jax.Array]
    gated: bool = False
    use_bias: bool = True  # of linear layers
    scale: float | None = None  # of queries; None: 1 / sqrt(K)
    post: bool = False
    position: tuple[int, int] | None = None  # buckets and distance of a bias of this layer
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(
        self, x_NSD: jax.Array, seen_NLS: jax.Array, bias_1HLS: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        batch, length, width = x_NSD.shape

        def linear(features: int, name: str, x: jax.Array) -> jax.Array:
            return Linear(features, self.use_bias, matmul=self.matmul, name=name)(x)

        def attention(x: jax.Array) -> jax.Array:
            shape = batch, length, self.heads, self.head_dim
            q, k, v = (linear(self.heads * self.head_dim, n, x).reshape(shape) for n in "qkv")
            bias = 0.0 if bias_1HLS is None else bias_1HLS
            if self.position is not None:
                bias = PositionBias(self.heads, *self.position, name="bias")(length)
            bias_NHLS = jnp.where(seen_NLS[:, None], bias, jnp.finfo(jnp.float32).min)
            scale = self.head_dim**-0.5 if self.scale is None else self.scale
            out = attend_biased(q, k, v, bias_NHLS, scale)
            return linear(width, "o", out.reshape(batch, length, -1))

        def mlp(x: jax.Array) -> jax.Array:
            up = linear(self.hidden, "up", x)
            if self.gated:
                return linear(width, "down", self.activation(linear(self.hidden, "gate", x)) * up)
            return linear(width, "down", self.activation(up))

        for layer, name in ((attention, "attention_norm"), (mlp, "mlp_norm")):
            norm = self.norm(name=name)
            x_NSD = norm(x_NSD + layer(x_NSD)) if self.post else x_NSD + layer(norm(x_NSD))
        return x_NSD, None


# Features of a prompt are computed once and stored in a cache: exact on every platform.
exact = partial(jax.default_matmul_precision, "highest")


class T5(nn.Module):
    """T5's encoder, or UMT5's."""

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
    own_bias: bool  # one bias of positions per layer: UMT5
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(self, ids_NS: jax.Array, mask_NS: jax.Array) -> jax.Array:
        position, norm = (self.buckets, self.distance), partial(RMSNorm, self.epsilon)
        activation, gated = MLPS[self.mlp]
        blocks = stack(Block, self.depth, shared=2)(
            self.heads, self.head_dim, self.hidden, norm=norm, activation=activation, gated=gated,
            use_bias=False, scale=1.0, position=position if self.own_bias else None,
            matmul=self.matmul, name="blocks",
        )  # fmt: skip
        bias = None
        if not self.own_bias:
            bias = PositionBias(self.heads, *position, name="bias")(ids_NS.shape[1])
        with exact():
            x_NSD = nn.Embed(self.vocab, self.width, name="tokens")(ids_NS).astype(jnp.float32)
            x_NSD, _ = blocks(x_NSD, mask_NS[:, None], bias)
            x_NSD = norm(name="norm")(x_NSD)
        return jnp.where(mask_NS[..., None], x_NSD, 0.0)


class CLIPText(nn.Module):
    """CLIP's text encoder."""

    vocab: int
    width: int
    depth: int
    heads: int
    hidden: int
    positions: int
    activation: str
    epsilon: float
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(self, ids_NS: jax.Array, mask_NS: jax.Array) -> jax.Array:
        chunk_NS, at_NS = chunk_places(mask_NS)
        norm = partial(LayerNorm, self.epsilon)
        blocks = stack(Block, self.depth, shared=1)(
            self.heads, self.width // self.heads, self.hidden, norm=norm,
            activation=ACTIVATIONS[self.activation], matmul=self.matmul, name="blocks",
        )  # fmt: skip
        tokens = nn.Embed(self.vocab, self.width, name="tokens")
        positions = nn.Embed(self.positions, self.width, name="positions")
        past_LS = jnp.tri(ids_NS.shape[1], dtype=jnp.bool_)
        seen_NLS = past_LS[None] & (chunk_NS[:, :, None] == chunk_NS[:, None])
        place_NSD = positions(at_NS).astype(jnp.float32)
        with exact():
            x_NSD, _ = blocks(tokens(ids_NS).astype(jnp.float32) + place_NSD, seen_NLS)
            x_NSD = norm(name="norm")(x_NSD)
        return jnp.where(mask_NS[..., None], x_NSD, 0.0)


class MiniLM(nn.Module):
    """BERT; by default MiniLM-L6."""

    vocab: int = 30522
    width: int = 384
    depth: int = 6
    heads: int = 12
    positions: int = 512
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(self, ids_NS: jax.Array, mask_NS: jax.Array) -> jax.Array:
        chunk_NS, at_NS = chunk_places(mask_NS)
        norm = partial(LayerNorm, 1e-12)
        blocks = stack(Block, self.depth, shared=1)(
            self.heads, self.width // self.heads, 4 * self.width, norm=norm,
            activation=ACTIVATIONS["gelu"], post=True, matmul=self.matmul, name="blocks",
        )  # fmt: skip
        words = nn.Embed(self.vocab, self.width, name="words")
        positions = nn.Embed(self.positions, self.width, name="positions")
        types = nn.Embed(2, self.width, name="types")  # sentence A or B of a pair: always A
        place_NSD = positions(at_NS) + types(jnp.zeros((1, 1), jnp.int32))
        # A chunk sees itself, and padding (0) sees padding, so no softmax is empty.
        seen_NLS = chunk_NS[:, :, None] == chunk_NS[:, None]
        with exact():
            x_NSD, _ = blocks(norm(name="norm")(words(ids_NS) + place_NSD), seen_NLS)
        return jnp.where(mask_NS[..., None], x_NSD, 0.0)


def pool_last(features_NSD: jax.Array, mask_NS: jax.Array) -> jax.Array:
    """The features of each caption's last token (N, D), its end token; zero for a null text.

    Of several chunks it is the mean of each one's last, weighted by their tokens.
    """
    _, at_NS = chunk_places(mask_NS)
    ends_NS = mask_NS & ~jnp.pad(mask_NS, ((0, 0), (0, 1)))[:, 1:]
    count_NS = jnp.where(ends_NS, at_NS + 1, 0).astype(features_NSD.dtype)
    share_NS = count_NS / jnp.maximum(count_NS.sum(1, keepdims=True), 1)  # of one chunk exactly 1
    return (features_NSD * share_NS[..., None]).sum(1)
