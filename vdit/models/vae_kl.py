"""The image autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), read from a
folder as diffusers' AutoencoderKL writes it. A video is encoded frame by frame.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.models.vae_conv import ConvVAE
from vdit.models.weights import TRANSPOSED, Row

KERNEL = (2, 3, 1, 0)  # (rows, columns, in, out) here and (out, in, rows, columns) in torch


def leaf(
    path: str,
    name: str,
    kernel: tuple[int, ...],
    scale: str = "weight",
    axes: tuple[int, ...] | None = None,
) -> tuple[Row, ...]:
    """The rows of a layer's kernel, scale (and the scale's axes) and bias."""
    return (
        (f"{path}/kernel", f"{name}.weight", kernel),
        (f"{path}/scale", f"{name}.{scale}", axes),
        (f"{path}/bias", f"{name}.bias", None),
    )


def pixel(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a linear map that is in torch a convolution of one pixel, beside `kernel`."""
    return TRANSPOSED + (-1,) * (len(kernel) - len(TRANSPOSED))


def block(
    path: str,
    name: str,
    kernel: tuple[int, ...],
    scale: str = "weight",
    axes: tuple[int, ...] | None = None,
) -> tuple[Row, ...]:
    """The rows of a residual block; its shortcut is a convolution of one pixel in torch."""
    rows: tuple[Row, ...] = leaf(f"{path}/shortcut", f"{name}.conv_shortcut", pixel(kernel))
    for half in (0, 1):
        for part in ("norm", "conv"):
            ours, theirs = f"{path}/half{half}/{part}", f"{name}.{part}{half + 1}"
            rows += leaf(ours, theirs, kernel, scale, axes)
    return rows


def _half(side: str, levels: str, resample: tuple[str, str]) -> tuple[Row, ...]:
    """The rows of the encoder or of the decoder."""
    rows = leaf(f"{side}/stem/conv", f"{side}.conv_in", KERNEL)
    rows += leaf(f"{side}/head/norm", f"{side}.conv_norm_out", KERNEL)
    rows += leaf(f"{side}/head/conv", f"{side}.conv_out", KERNEL)
    for i in (0, 1):
        rows += block(f"{side}/middle{i}", f"{side}.mid_block.resnets.{i}", KERNEL)
    rows += block(rf"{side}/level(\d+)/block(\d+)", rf"{side}.{levels}.\1.resnets.\2", KERNEL)
    ours, theirs = resample
    rows += leaf(
        rf"{side}/level(\d+)/{ours}/conv", rf"{side}.{levels}.\1.{theirs}.0.conv", KERNEL
    )
    attention = f"{side}.mid_block.attentions.0"
    rows += leaf(f"{side}/attention/norm", f"{attention}.group_norm", KERNEL)
    # The first published folders have the older names.
    for part, names in (
        ("q", ("to_q", "query")), ("k", ("to_k", "key")), ("v", ("to_v", "value")),
        ("o", ("to_out.0", "proj_attn")),
    ):  # fmt: skip
        for name in names:
            rows += leaf(f"{side}/attention/{part}", f"{attention}.{name}", TRANSPOSED)
    return rows


ROWS: tuple[Row, ...] = (
    *_half("encoder", "down_blocks", ("down", "downsamplers")),
    *_half("decoder", "up_blocks", ("up", "upsamplers")),
    *leaf("quant", "quant_conv", pixel(KERNEL)),
    *leaf("post_quant", "post_quant_conv", pixel(KERNEL)),
)


def from_config(config: Mapping[str, Any], folder: Path) -> ConvVAE:
    """The autoencoder that a config.json describes; `UserError` for one that is not known here."""
    where = folder / "config.json"
    widths = config.get("block_out_channels", [64])
    blocks, groups = config.get("layers_per_block", 1), config.get("norm_num_groups", 32)
    channels = config.get("latent_channels", 4)
    counts = [*widths, blocks, groups, channels] if isinstance(widths, list) else [None]
    if not all(type(n) is int and 0 < n <= 2**16 for n in counts) or len(widths) > 8:
        raise UserError(
            f"{where}: block_out_channels, layers_per_block, norm_num_groups, latent_channels are"
            f" {widths}, {blocks}, {groups}, {channels}; allowed: numbers above 0"
        )
    known = {
        "in_channels": 3, "out_channels": 3, "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }  # fmt: skip
    for name, allowed in known.items():
        if config.get(name, allowed) != allowed:
            raise UserError(f"{where}: {name} is {config[name]!r}; allowed: {allowed!r}")
    if wrong := [width for width in widths if width % groups]:
        raise UserError(f"{where}: {groups} groups do not divide {wrong[0]} channels")
    side = 2 ** (len(widths) - 1)
    return ConvVAE(
        patch=(1, side, side),
        channels=channels,
        widths=tuple(widths),
        decoder_widths=tuple(widths),
        blocks=blocks,
        groups=groups,
        attention=bool(config.get("mid_block_add_attention", True)),
        quantise=(
            bool(config.get("use_quant_conv", True)), bool(config.get("use_post_quant_conv", True))
        ),
    )  # fmt: skip


def to_config(model: ConvVAE) -> dict[str, Any]:
    """The config.json of an autoencoder; `from_config` says whether it is one of these."""
    levels = len(model.widths)
    return {
        "block_out_channels": list(model.widths),
        "layers_per_block": model.blocks,
        "norm_num_groups": model.groups,
        "latent_channels": model.channels,
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def scaling(mean: list[float], std: list[float]) -> dict[str, Any]:
    """The fields of config.json by which pipelines scale latents: one number, or one a channel."""
    if len(set(mean)) == len(set(std)) == 1:
        return {"scaling_factor": 1 / std[0], **({"shift_factor": mean[0]} if mean[0] else {})}
    return {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": std}
