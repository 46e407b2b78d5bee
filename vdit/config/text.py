"""config.text: the text encoder and its tokenizer, a row of `ENCODERS`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config import shared
from vdit.config.run import Machine, machine
from vdit.errors import UserError
from vdit.models.text import TextEncoder, Tokenizer, learned_tokenizer, no_tokenizer
from vdit.models.text_encoders import MiniLM
from vdit.published import text_folder, weights
from vdit.published.minilm import minilm_tokenizer
from vdit.runtime.files import write_text


def fields() -> ConfigDict:
    """config.text."""
    text = ConfigDict()
    # learned: trained with the denoiser; minilm, t5, umt5, clip: pretrained, frozen; none: no text
    text.encoder = "learned"
    text.path = ""  # t5, umt5, clip: folder with config.json, tokenizer.json and safetensors
    # Most tokens per caption; longer ones are refused. minilm and clip encode captions beyond their
    # number of positions in chunks.
    text.length = 40
    text.padding = False  # clip with dit.model=unet: attend to padding, as Stable Diffusion does
    text.vocab = 1024  # learned: vocabulary size of the byte-level BPE
    text.width = 128  # learned: hidden width
    text.depth = 2  # learned: layers
    text.heads = 4  # learned: attention heads
    return text


def check(config: ConfigDict) -> None:
    """Checks the encoder, its folder, and fields that only some encoders read."""
    shared.check_names(config, {"text.encoder": ENCODERS})
    shared.check_positive(config, "text.length")
    shared.check_only(config, ("text.path",), "text.encoder", text_folder.FAMILIES)
    if config.text.encoder in text_folder.FAMILIES:
        build_text_encoder(config, build_tokenizer(config, Path()))  # reads no tensors yet
    if config.text.encoder == "learned":
        shared.check_positive(config, *(f"text.{n}" for n in ("vocab", "width", "depth", "heads")))
        build_text_encoder(config, Vocabulary(config.text.vocab))


SECTION = shared.Section(fields, check, free=("path",))  # a folder counts by its content


class Vocabulary(NamedTuple):
    """A tokenizer's vocabulary size, which sets the shapes of a text encoder."""

    vocab: int


Tokens = Tokenizer | Vocabulary
Captions = Callable[[], Iterable[str]] | None


class Row(NamedTuple):
    """Tokenizer and options of a text encoder in `text_folder.ENCODERS`."""

    tokenizer: Callable[[ConfigDict, Path, Captions], Tokenizer]
    options: Callable[[ConfigDict, Tokens, Machine], dict[str, Any]] = lambda *given: {}


def _stored(
    config: ConfigDict, workdir: Path, make: Callable[[], str] | None, chunk: int | None = None
) -> Tokenizer:
    """The tokenizer in a workdir; `make` is called if it is missing."""
    path = workdir / "tokenizer.json"
    if not path.exists():
        if make is None:
            raise UserError(f"{path} is missing: the workdir holds no trained text model")
        write_text(path, make())
    return Tokenizer(path.read_text(encoding="utf-8"), config.text.length, chunk=chunk)


def _learned(config: ConfigDict, workdir: Path, captions: Captions) -> Tokenizer:
    make = captions and (lambda: learned_tokenizer(captions(), config.text.vocab))
    return _stored(config, workdir, make)


def _learned_options(config: ConfigDict, tokens: Tokens, machine: Machine) -> dict[str, Any]:
    text, unroll = config.text, min(config.run.unroll, config.text.depth)
    sizes = {"vocab": tokens.vocab, "width": text.width, "depth": text.depth, "heads": text.heads}
    return {**sizes, "unroll": unroll, "matmul": machine.matmul, "gather": machine.gather}


def _minilm(config: ConfigDict, workdir: Path, captions: Captions) -> Tokenizer:
    return _stored(config, workdir, captions and minilm_tokenizer, MiniLM.positions)


def _folder(config: ConfigDict, workdir: Path, captions: Captions) -> Tokenizer:
    """The tokenizer in the encoder's folder."""
    name, path, length = config.text.encoder, config.text.path, config.text.length
    read, chunk = text_folder.read_tokenizer(name, path), text_folder.positions(name, path)
    if config.text.padding and chunk is not None and length > chunk:
        raise UserError(
            f"text.length is {length} with text.padding: {chunk}, the positions of"
            f" text.path={path}, are allowed"
        )
    return Tokenizer(read, length, config.text.padding, chunk)


def _folder_options(config: ConfigDict, tokens: Tokens, machine: Machine) -> dict[str, Any]:
    return {"path": config.text.path, "vocab": tokens.vocab, "matmul": machine.matmul}


ENCODERS = {
    "learned": Row(_learned, _learned_options),
    "minilm": Row(_minilm, lambda config, tokens, machine: {"matmul": machine.matmul}),
    "none": Row(lambda *given: Tokenizer(no_tokenizer(), 1)),
    **dict.fromkeys(text_folder.FAMILIES, Row(_folder, _folder_options)),
}


def build_tokenizer(config: ConfigDict, workdir: Path, captions: Captions = None) -> Tokenizer:
    """The workdir's tokenizer; learned from `captions()` and saved if it is missing."""
    row = shared.choose(ENCODERS, "text.encoder", config.text.encoder)
    return row.tokenizer(config, workdir, captions)


def build_text_encoder(
    config: ConfigDict, tokens: Tokens, mesh: Mesh | None = None, platform: str | None = None
) -> TextEncoder:
    """The text encoder, on one device or on a mesh."""
    row = shared.choose(ENCODERS, "text.encoder", config.text.encoder)
    options = row.options(config, tokens, machine(config, mesh, platform))
    return text_folder.encoder(config.text.encoder, **options)


def look_through_text(config: ConfigDict) -> None:
    """Reads all weights of a text encoder's folder; `UserError` if one is not finite."""
    if config.text.encoder in text_folder.FAMILIES:
        _, plan = text_folder.read_module(config.text.encoder, config.text.path)
        weights.look_through(plan)


def text_content(config: ConfigDict) -> dict[str, str]:
    """The digest of a text encoder's folder, which identifies it along with the fields."""
    if config.text.encoder not in text_folder.FAMILIES:
        return {}
    return {"text.content": text_folder.content(config.text.encoder, config.text.path)}
