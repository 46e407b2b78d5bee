"""Pretrained text encoders from a folder: which families are known, and how each is read.

A family is a row of `FAMILIES`: its network, the names of its tensors, and what its tokenizer must
know. A folder holds config.json, tokenizer.json and safetensors (`weights.py`); the tokenizer may
lie beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from vdit.errors import UserError
from vdit.models import clip_text, t5, weights

TOKENIZER_BYTES = 2**26  # a larger tokenizer.json is refused; UMT5's has 2**24


@dataclass(frozen=True)
class Family:
    """Text encoders of one architecture: how their folders are read."""

    types: tuple[str, ...]  # model_type in config.json
    module: Callable[[Mapping[str, Any], Path], Any]
    rows: Sequence[weights.Row]
    others: tuple[str, ...]  # tensors that the encoder does without
    begin: tuple[str, ...]  # tokens that the tokenizer puts before a text
    end: str  # and after it
    pad: str  # and after that, if the folder's tokenizer_config.json names no other
    last_pools: bool  # the pooled text is the end token's features, not the mean


_T5 = partial(
    Family,
    rows=t5.ROWS,
    others=t5.OTHERS,
    begin=(),
    end="</s>",
    pad="<pad>",
    last_pools=False,
)
FAMILIES: dict[str, Family] = {
    "t5": _T5(("t5",), partial(t5.from_config, defaults=t5.FIELDS, own_bias=False)),
    "umt5": _T5(("umt5",), partial(t5.from_config, defaults=t5.UMT5_FIELDS, own_bias=True)),
    "clip": Family(
        ("clip_text_model", "clip"),
        clip_text.from_config,
        rows=clip_text.ROWS,
        others=clip_text.OTHERS,
        begin=("<|startoftext|>",),
        end="<|endoftext|>",
        pad="<|endoftext|>",
        last_pools=True,
    ),
}


def _folder(name: str, path: str) -> Path:
    if not path:
        raise UserError(f"text.encoder={name} needs text.path, the folder of its weights")
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"text.path={path}: there is no such folder")
    return folder


def read_module(name: str, path: str) -> tuple[nn.Module, weights.Plan]:
    """The network of a folder and the plan of its parameters; headers are read, no tensor.

    `UserError` for a folder of another model, or whose tensors do not fit.
    """
    folder, family = _folder(name, path), FAMILIES[name]
    module = family.module(weights.read_config(folder, family.types), folder)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids, mask)["params"]
    tensors = weights.read_headers(folder)
    return module, weights.plan(tensors, shapes, family.rows, family.others, folder)


def positions(name: str, path: str) -> int | None:
    """How many tokens a folder's encoder takes at once; None where its positions have no end."""
    folder, family = _folder(name, path), FAMILIES[name]
    module = family.module(weights.read_config(folder, family.types), folder)
    return getattr(module, "positions", None)


def _words(folder: Path) -> Path:
    """Where a folder's tokenizer is: inside, or beside it in "tokenizer", as pipelines have it."""
    beside = folder.absolute().parent / "tokenizer"
    inside = (folder / "tokenizer.json").exists() or not beside.is_dir()
    return folder if inside else beside


def content(name: str, path: str) -> str:
    """A digest of all that a folder's features depend on; cheap (see `weights.digest`)."""
    folder = _folder(name, path)
    tokenizer = weights.read_bytes(_words(folder) / "tokenizer.json", TOKENIZER_BYTES)
    config = weights.read_bytes(folder / "config.json", weights.CONFIG_BYTES)
    return weights.digest(weights.read_headers(folder), (config, tokenizer))


def read_tokenizer(name: str, path: str) -> str:
    """A folder's tokenizer as JSON: without truncation, padding with the token that it names.

    `UserError` if it lacks a token, or does not begin and end a text as the family does.
    """
    folder, family = _words(_folder(name, path)), FAMILIES[name]
    file = folder / "tokenizer.json"
    if not file.exists() and (folder / "spiece.model").exists():
        raise UserError(
            f"{folder} has spiece.model and no tokenizer.json, which alone is read here;"
            " transformers adds it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    data = weights.read_bytes(file, TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer.from_str(data.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        probe = tokenizer.encode("a", add_special_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"cannot read {file}: {error}") from error
    pad = _pad_token(folder) or family.pad
    for token in (*family.begin, family.end, pad):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{file} lacks the token {token!r}, which {name} needs")
    first, last = tuple(probe.tokens[: len(family.begin)]), probe.tokens[-1:]
    if first != family.begin or last != [family.end] or len(probe.ids) == len(first) + 1:
        raise UserError(
            f"{file} makes 'a' the tokens {' '.join(probe.tokens)!r}; allowed by {name}:"
            f" {' '.join((*family.begin, '...', family.end))!r}"
        )
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer.to_str()


def _pad_token(folder: Path) -> str | None:
    """The padding token that a folder's tokenizer_config.json names, if it does."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    token = weights.read_json(path, weights.CONFIG_BYTES).get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
