"""Text encoders in transformers' folders, read by their family (`families.FAMILIES`), and the table
of all text encoders.

A folder holds config.json, tokenizer.json and safetensors (`weights.py`); the tokenizer may be in a
folder "tokenizer" beside it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
from tokenizers import Tokenizer

from vdit.errors import UserError
from vdit.models.text import TextEncoder, abstract, learned, no_text, pool_mean
from vdit.models.text_encoders import MiniLM, pool_last
from vdit.nn.product import Matmul
from vdit.published import families, family, weights
from vdit.published.minilm import load_minilm

TOKENIZER_BYTES = 2**26  # limit of a tokenizer.json; UMT5's has 2**24
FAMILIES = families.of(family.TextEncoder)


def _folder(name: str, path: str) -> Path:
    if not path:
        raise UserError(f"text.encoder={name} needs text.path, the folder of its weights")
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"text.path={path}: there is no such folder")
    return folder


def _network(name: str, folder: Path) -> Any:
    kind = FAMILIES[name]
    return kind.module(weights.read_config(folder, kind.classes), folder)


def read_module(name: str, path: str) -> tuple[nn.Module, weights.Plan]:
    """The network of a folder and the plan of its parameters; reads headers, no tensor data.

    `UserError` for another network, or tensors that do not fit.
    """
    folder, kind = _folder(name, path), FAMILIES[name]
    module = _network(name, folder)
    tensors = weights.read_headers(folder)
    return module, weights.plan(tensors, abstract(module), kind.rows, kind.others, folder)


def positions(name: str, path: str) -> int | None:
    """The most tokens that a folder's encoder takes at once; None for relative positions."""
    return getattr(_network(name, _folder(name, path)), "positions", None)


def _tokenizer_folder(folder: Path) -> Path:
    """The folder of an encoder's tokenizer: its own, or "tokenizer" beside it, as in pipelines."""
    beside = folder.absolute().parent / "tokenizer"
    inside = (folder / "tokenizer.json").exists() or not beside.is_dir()
    return folder if inside else beside


def content(name: str, path: str) -> str:
    """A digest of everything that the features depend on; cheap (see `weights.digest`)."""
    folder = _folder(name, path)
    tokenizer = weights.read_bytes(_tokenizer_folder(folder) / "tokenizer.json", TOKENIZER_BYTES)
    config = weights.read_bytes(folder / "config.json", weights.CONFIG_BYTES)
    return weights.digest(weights.read_headers(folder), (config, tokenizer))


def read_tokenizer(name: str, path: str) -> str:
    """A folder's tokenizer as JSON, without truncation and with the folder's padding token.

    `UserError` if it lacks a special token of its family, or does not put it around a text.
    """
    folder, kind = _tokenizer_folder(_folder(name, path)), FAMILIES[name]
    file = folder / "tokenizer.json"
    if not file.exists() and (folder / "spiece.model").exists():
        raise UserError(
            f"{folder} has spiece.model but no tokenizer.json, which is the one read here;"
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
    pad = _pad_token(folder) or kind.pad
    for token in (*kind.begin, kind.end, pad):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{file} lacks the token {token!r}, which {name} needs")
    first, last = tuple(probe.tokens[: len(kind.begin)]), probe.tokens[-1:]
    if first != kind.begin or last != [kind.end] or len(probe.ids) == len(first) + 1:
        raise UserError(
            f"{file} encodes 'a' as {' '.join(probe.tokens)!r}; allowed by {name}:"
            f" {' '.join((*kind.begin, '...', kind.end))!r}"
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


# --------------------------------------------------------------------------------------------------
# All text encoders


def _minilm(matmul: Matmul = Matmul()) -> TextEncoder:
    module = MiniLM(matmul=matmul.float32)
    return TextEncoder("minilm", module.width, frozen=True, module=module, load=load_minilm)


def _from_folder(name: str, path: str, vocab: int, matmul: Matmul = Matmul()) -> TextEncoder:
    """The encoder in the folder `path`, for a tokenizer of `vocab` ids."""
    module: Any
    module, plan = read_module(name, path)
    if vocab > module.vocab:
        raise UserError(
            f"{path}: tokenizer.json has ids up to {vocab - 1}; vocab_size of config.json allows:"
            f" {module.vocab - 1}"
        )
    pool = pool_last if FAMILIES[name].last_pools else pool_mean
    load, module = partial(weights.load, plan), module.clone(matmul=matmul.float32)
    return TextEncoder(name, module.width, frozen=True, module=module, load=load, pool=pool)


ENCODERS: dict[str, Callable[..., TextEncoder]] = {
    "learned": learned,  # trained with the denoiser
    "none": no_text,  # for a network that reads no text
    "minilm": _minilm,
    **{name: partial(_from_folder, name) for name in FAMILIES},
}


def encoder(name: str, **options: Any) -> TextEncoder:
    """The text encoder of that name: "learned" (vocab, width, depth, heads, unroll, matmul,
    gather), "minilm" (matmul), "none" (no options), or one of `FAMILIES` (path, vocab, matmul)."""
    if name not in ENCODERS:
        raise UserError(f"text encoder {name!r} given; known: {', '.join(ENCODERS)}")
    return ENCODERS[name](**options)
