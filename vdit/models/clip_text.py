"""CLIP's text encoder (Radford et al. 2021, arXiv:2103.00020, section 2.4).

A pre-norm transformer with learned positions, in which a token sees itself and what comes before.
So the last token of a text, its end token, has seen all of it: that is the pooled text.

Dimension key: N captions, S tokens of a caption (L as queries), D width, H heads, K head dim,
F mlp.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit.errors import UserError
from vdit.kernels.xla import attend_biased
from vdit.models.chunks import chunk_places
from vdit.models.weights import TRANSPOSED, Row, fields
from vdit.nn.linear import LayerNorm, Linear

# config.json's hidden_act. The quick one is Hendrycks and Gimpel's sigmoid form of GELU
# (arXiv:1606.08415, section 2).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}

FIELDS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

_LAYER = "encoder.layers.{}"
_NAMES: tuple[Row, ...] = (
    ("tokens/embedding", "embeddings.token_embedding.weight", None),
    ("positions/embedding", "embeddings.position_embedding.weight", None),
    ("blocks/([qkv])/kernel", rf"{_LAYER}.self_attn.\1_proj.weight", TRANSPOSED),
    ("blocks/([qkv])/bias", rf"{_LAYER}.self_attn.\1_proj.bias", None),
    ("blocks/o/kernel", f"{_LAYER}.self_attn.out_proj.weight", TRANSPOSED),
    ("blocks/o/bias", f"{_LAYER}.self_attn.out_proj.bias", None),
    ("blocks/attention_norm/scale", f"{_LAYER}.layer_norm1.weight", None),
    ("blocks/attention_norm/bias", f"{_LAYER}.layer_norm1.bias", None),
    ("blocks/up/kernel", f"{_LAYER}.mlp.fc1.weight", TRANSPOSED),
    ("blocks/up/bias", f"{_LAYER}.mlp.fc1.bias", None),
    ("blocks/down/kernel", f"{_LAYER}.mlp.fc2.weight", TRANSPOSED),
    ("blocks/down/bias", f"{_LAYER}.mlp.fc2.bias", None),
    ("blocks/mlp_norm/scale", f"{_LAYER}.layer_norm2.weight", None),
    ("blocks/mlp_norm/bias", f"{_LAYER}.layer_norm2.bias", None),
    ("norm/scale", "final_layer_norm.weight", None),
    ("norm/bias", "final_layer_norm.bias", None),
)
# Saved with or without the name of the part that it is of a whole CLIP.
ROWS: tuple[Row, ...] = tuple(
    (path, f"{part}{name}", axes) for part in ("text_model.", "") for path, name, axes in _NAMES
)
OTHERS = (
    r"(text_model\.)?embeddings\.position_ids",
    r"vision_model\..*",
    r"(visual|text)_projection\.weight",
    r"logit_scale",
)


class Block(nn.Module):
    """Pre-norm attention over the tokens of a chunk up to one's own, and an MLP."""

    heads: int
    hidden: int
    activation: str
    epsilon: float

    @nn.compact
    def __call__(self, x_NSD: jax.Array, chunk_NS: jax.Array) -> tuple[jax.Array, None]:
        batch, length, width = x_NSD.shape

        def heads(name: str) -> jax.Array:
            return Linear(width, name=name)(normed).reshape(batch, length, self.heads, -1)

        normed = LayerNorm(self.epsilon, name="attention_norm")(x_NSD)
        past_LS = jnp.tri(length, dtype=jnp.bool_)
        seen_NLS = past_LS[None] & (chunk_NS[:, :, None] == chunk_NS[:, None])
        bias_N1LS = jnp.where(seen_NLS, 0.0, jnp.finfo(jnp.float32).min)[:, None]
        scale = (width // self.heads) ** -0.5
        out = attend_biased(heads("q"), heads("k"), heads("v"), bias_N1LS, scale)
        x_NSD = x_NSD + Linear(width, name="o")(out.reshape(x_NSD.shape))
        normed = LayerNorm(self.epsilon, name="mlp_norm")(x_NSD)
        hidden = ACTIVATIONS[self.activation](Linear(self.hidden, name="up")(normed))
        return x_NSD + Linear(width, name="down")(hidden), None


class CLIPText(nn.Module):
    """Token ids (N, S) and their mask to the last hidden state (N, S, D), zero where masked.

    No chunk of a row (`chunks.chunk_places`) may be longer than `positions`.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    hidden: int
    positions: int
    activation: str
    epsilon: float

    @nn.compact
    def __call__(self, ids_NS: jax.Array, mask_NS: jax.Array) -> jax.Array:
        chunk_NS, at_NS = chunk_places(mask_NS)
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        blocks = stack(self.heads, self.hidden, self.activation, self.epsilon, name="blocks")
        tokens = nn.Embed(self.vocab, self.width, name="tokens")
        positions = nn.Embed(self.positions, self.width, name="positions")
        place_NSD = positions(at_NS).astype(jnp.float32)
        # A prompt's features are made once and are a cache's contents: exact on every platform.
        with jax.default_matmul_precision("highest"):
            x_NSD, _ = blocks(tokens(ids_NS).astype(jnp.float32) + place_NSD, chunk_NS)
            x_NSD = LayerNorm(self.epsilon, name="norm")(x_NSD)
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


def from_config(config: Mapping[str, Any], folder: Path) -> CLIPText:
    """The encoder that a config.json describes: CLIP's text model, or the one of a whole CLIP."""
    where = folder / "config.json"
    if config["model_type"] == "clip":
        config = config.get("text_config") or {}
        if not isinstance(config, dict):
            raise UserError(f"{where}: text_config is no JSON object")
    found = fields(config, FIELDS, folder)
    width, heads, activation = (
        found[name] for name in ("hidden_size", "num_attention_heads", "hidden_act")
    )
    if width % heads:
        raise UserError(f"{where}: {heads} heads do not cut the width {width} into even shares")
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{where}: hidden_act is {activation!r}; known: {known}")
    return CLIPText(
        vocab=found["vocab_size"],
        width=width,
        depth=found["num_hidden_layers"],
        heads=heads,
        hidden=found["intermediate_size"],
        positions=found["max_position_embeddings"],
        activation=activation,
        epsilon=found["layer_norm_eps"],
    )
