"""The kinds of published families, and rows of key tables that families share.

Every kind has `classes`: the values of `field` in config.json by which a folder is recognised.
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
    """Denoisers and their pipelines."""

    classes: tuple[str, ...]  # the first is written
    rows: Sequence[Row]
    fixed: Config  # fields of config.json that must have these values
    defaults: Config  # other fields that are read; see `weights.fields`
    to_vdit: Callable[[Config], dict[str, Any]]  # from these fields to vdit's
    from_vdit: Callable[[Config, Sizes], dict[str, Any]]  # the inverse; see `tools.exporting`
    schedule: Callable[[Path], dict[str, Any]]  # vdit's fields from a scheduler_config.json
    latents: Callable[[int], dict[str, list[float]]]  # default statistics for so many channels
    others: tuple[str, ...] = ()  # regexes for tensors that the network does not use
    written: tuple[str, ...] = ()  # the fields of `fixed` that are written
    # Reads further fields, which `weights.fields` cannot check.
    more: Callable[[Config, Path], dict[str, Any]] = lambda config, folder: {}
    layers: Callable[[Config], int] = lambda config: 1  # repeats of a tensor with {*} in its name
    # In a pipeline's folder: the network's folder, and that of a second one for low noise levels.
    folders: tuple[tuple[str, str], ...] = (("transformer", ""),)
    autoencoders: tuple[str, ...] = ("AutoencoderKL",)  # allowed classes in a pipeline
    text: str = ""  # field of config.json with the width of the text features
    text_kernel: str = ""  # suffix of a kernel's path whose axis -2 has that width
    # From a model_index.json (None: there is none), the fields of `to_vdit`, and whether there are
    # two networks.
    pipeline: Callable[[Config | None, Config, bool], dict[str, Any]] = lambda *given: {}
    any_size: bool = False  # config.json does not say the size and the length of clips

    field: ClassVar[str] = "_class_name"


@dataclass(frozen=True)
class Autoencoder:
    """Autoencoders: `ConvVAE`s."""

    classes: tuple[str, ...]
    from_config: Callable[[Config, Path], Any]  # the network; `UserError` if unsupported
    to_config: Callable[[Any], dict[str, Any]]  # of any network: valid if `from_config` inverts it
    rows: Callable[[Any], Sequence[Row]]
    # Mean and standard deviation of the latents for so many channels, None if config.json has none.
    statistics: Callable[[Config, int], tuple[Any, Any] | None]
    scaling: Callable[[list[float], list[float]], dict[str, Any]]  # their fields in config.json

    field: ClassVar[str] = "_class_name"


@dataclass(frozen=True)
class TextEncoder:
    """Text encoders."""

    classes: tuple[str, ...]
    module: Callable[[Config, Path], Any]  # the network of a config.json
    rows: Sequence[Row]
    others: tuple[str, ...]  # regexes for tensors that the encoder does not use
    begin: tuple[str, ...]  # special tokens before a text
    end: str  # special token after it
    pad: str  # padding token, unless tokenizer_config.json names another
    last_pools: bool = False  # pools by the end token instead of the mean

    field: ClassVar[str] = "model_type"


@dataclass(frozen=True)
class ImageEncoder:
    """Image encoders, whose features an image to video model reads."""

    classes: tuple[str, ...]
    module: Callable[[Config, Path], Any]  # the network of a config.json
    rows: Sequence[Row]
    others: tuple[str, ...]  # regexes for tensors that the encoder does not use

    field: ClassVar[str] = "model_type"


@dataclass(frozen=True)
class Classifier:
    """Vision transformers; see `vivit_folder`."""

    classes: tuple[str, ...]
    architecture: str  # the class with a head, which is written
    patch: tuple[str, int]  # the field of the patch size, and its number of axes
    defaults: Config  # fields of config.json that are read; see `weights.fields`

    field: ClassVar[str] = "model_type"


# --------------------------------------------------------------------------------------------------
# Rows of key tables

# A convolution's kernel is (rows, columns, in, out) here and (out, in, rows, columns) in torch.
KERNEL = (2, 3, 1, 0)
CUBE = (2, 3, 4, 1, 0)  # of a 3D convolution, with the frames before the rows


def layer(
    path: str, name: str, kernel: tuple[int, ...] = TRANSPOSED, scale: str = "weight",
    axes: tuple[int, ...] | None = None,
) -> tuple[Row, ...]:  # fmt: skip
    """Kernel, scale and bias of a layer or norm; `kernel` and `axes` are their axes."""
    return (
        (f"{path}/kernel", f"{name}.weight", kernel),
        (f"{path}/scale", f"{name}.{scale}", axes),
        (f"{path}/bias", f"{name}.bias", None),
    )


def layers(pairs: Mapping[str, str], path: str = "", name: str = "") -> tuple[Row, ...]:
    """Linear layers and norms by their names here and there, after common prefixes."""
    return tuple(
        row for ours, theirs in pairs.items() for row in layer(f"{path}{ours}", f"{name}{theirs}")
    )


def pixel(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a linear layer that torch stores as a 1x1 convolution of `kernel`'s rank."""
    return TRANSPOSED + (-1,) * (len(kernel) - len(TRANSPOSED))


def res_block(path: str, name: str, kernel: tuple[int, ...], *scale: Any) -> tuple[Row, ...]:
    """A residual block; torch stores its shortcut as a 1x1 convolution."""
    rows = layer(f"{path}/shortcut", f"{name}.conv_shortcut", pixel(kernel))
    for half in (0, 1):
        for part in ("norm", "conv"):
            rows += layer(f"{path}/half{half}/{part}", f"{name}.{part}{half + 1}", kernel, *scale)
    return rows
