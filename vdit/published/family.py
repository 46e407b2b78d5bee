"""What a published family says of itself, by kind, and the rows of key tables that families share.

Each kind has the `classes` that its folders' config.json names, under the key `field`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from vdit.published.weights import TRANSPOSED, Row

Config = Mapping[str, Any]  # of a config.json, or vdit's fields ("dit.patch")


class Sizes(NamedTuple):
    """Sizes of a denoiser's input: latents (frames, rows, columns, channels), and text features."""

    latent: tuple[int, int, int, int]
    text: int


@dataclass(frozen=True)
class Denoiser:
    """Denoisers of one class, with the parts of their pipeline."""

    classes: tuple[str, ...]  # the first is written
    rows: Sequence[Row]
    fixed: Config  # fields of config.json that must have these values
    defaults: Config  # its other fields, with diffusers' defaults; see `weights.fields`
    to_vdit: Callable[[Config], dict[str, Any]]  # from the numbers of config.json to vdit's fields
    from_vdit: Callable[[Config, Sizes], dict[str, Any]]  # and back; see `layouts.to_layout`
    schedule: Callable[[Path], dict[str, Any]]  # vdit's fields by a scheduler_config.json
    latents: Callable[[int], dict[str, list[float]]]  # their statistics, without an autoencoder
    others: tuple[str, ...] = ()  # tensors that the network does without
    written: tuple[str, ...] = ()  # of `fixed`: fields that a config.json gets
    # Further fields of config.json, with what `fields` cannot check.
    more: Callable[[Config, Path], dict[str, Any]] = lambda config, folder: {}
    layers: Callable[[Config], int] = lambda config: 1  # repeats of a tensor with {*} in its name
    folder: str = "transformer"  # its folder in a pipeline's
    autoencoders: tuple[str, ...] = ("AutoencoderKL",)  # classes of its pipeline's autoencoder
    text: str = ""  # field of config.json: numbers in a token's text features
    text_kernel: str = ""  # end of the path of a kernel over them, whose axis -2 they are

    field: ClassVar[str] = "_class_name"


@dataclass(frozen=True)
class Autoencoder:
    """Autoencoders of one class: `ConvVAE`s."""

    classes: tuple[str, ...]
    from_config: Callable[[Config, Path], Any]  # the network; `UserError` if there is none
    to_config: Callable[[Any], dict[str, Any]]  # `from_config` says whether it is one of these
    rows: Callable[[Any], Sequence[Row]]
    # The latents' mean and deviation by which a denoiser sees them, if config.json has them, and
    # the fields that it has them in.
    statistics: Callable[[Config, int], tuple[Any, Any] | None]
    scaling: Callable[[list[float], list[float]], dict[str, Any]]

    field: ClassVar[str] = "_class_name"


@dataclass(frozen=True)
class TextEncoder:
    """Text encoders of one architecture."""

    classes: tuple[str, ...]
    module: Callable[[Config, Path], Any]  # the network of a config.json
    rows: Sequence[Row]
    others: tuple[str, ...]  # tensors that the encoder does without
    begin: tuple[str, ...]  # tokens that the tokenizer puts before a text
    end: str  # and after it
    pad: str  # and after that, if the folder's tokenizer_config.json names no other
    last_pools: bool = False  # the pooled text is the end token's features, not the mean

    field: ClassVar[str] = "model_type"


@dataclass(frozen=True)
class Classifier:
    """ViTs of one model_type; see `vivit_folder`."""

    classes: tuple[str, ...]
    architecture: str  # with a head, as it is written
    patch: tuple[str, int]  # the field with a patch's sizes, and how many there are
    defaults: Config  # of fields of config.json; see `weights.fields`

    field: ClassVar[str] = "model_type"


# --------------------------------------------------------------------------------------------------
# Rows of key tables

KERNEL = (2, 3, 1, 0)  # a convolution's (rows, columns, in, out); (out, in, rows, columns) in torch
CUBE = (2, 3, 4, 1, 0)  # and over frames, rows, columns


def layer(
    path: str,
    name: str,
    kernel: tuple[int, ...] = TRANSPOSED,
    scale: str = "weight",
    axes: tuple[int, ...] | None = None,
) -> tuple[Row, ...]:
    """A layer's kernel, or scale (with the scale's axes), and bias."""
    return (
        (f"{path}/kernel", f"{name}.weight", kernel),
        (f"{path}/scale", f"{name}.{scale}", axes),
        (f"{path}/bias", f"{name}.bias", None),
    )


def layers(pairs: Mapping[str, str], path: str = "", name: str = "") -> tuple[Row, ...]:
    """The rows of several linear layers and norms, behind common prefixes."""
    return tuple(
        row for ours, theirs in pairs.items() for row in layer(f"{path}{ours}", f"{name}{theirs}")
    )


def pixel(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a linear layer that torch has as a convolution of one pixel, beside `kernel`."""
    return TRANSPOSED + (-1,) * (len(kernel) - len(TRANSPOSED))


def res_block(path: str, name: str, kernel: tuple[int, ...], *scale: Any) -> tuple[Row, ...]:
    """A residual block, whose shortcut torch has as a convolution of one pixel."""
    rows = layer(f"{path}/shortcut", f"{name}.conv_shortcut", pixel(kernel))
    for half in (0, 1):
        for part in ("norm", "conv"):
            rows += layer(f"{path}/half{half}/{part}", f"{name}.{part}{half + 1}", kernel, *scale)
    return rows
