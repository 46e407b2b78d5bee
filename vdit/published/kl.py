"""The image autoencoder of latent diffusion (arXiv:2112.10752) as diffusers' AutoencoderKL; it
encodes a video frame by frame.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vdit.errors import UserError
from vdit.models.vae_conv import ConvVAE
from vdit.published.family import KERNEL, Autoencoder, Config, layer, pixel, res_block
from vdit.published.weights import Row, check_fixed, fields, numbers


def _side(side: str, levels: str, ours: str, theirs: str) -> tuple[Row, ...]:
    """The encoder or the decoder."""
    rows = layer(f"{side}/stem/conv", f"{side}.conv_in", KERNEL)
    rows += layer(f"{side}/head/norm", f"{side}.conv_norm_out")
    rows += layer(f"{side}/head/conv", f"{side}.conv_out", KERNEL)
    for i in (0, 1):
        rows += res_block(f"{side}/middle{i}", f"{side}.mid_block.resnets.{i}", KERNEL)
    level = rf"{side}.{levels}.\1"
    rows += res_block(rf"{side}/level(\d+)/block(\d+)", rf"{level}.resnets.\2", KERNEL)
    rows += layer(rf"{side}/level(\d+)/{ours}/conv", f"{level}.{theirs}.0.conv", KERNEL)
    attention = f"{side}.mid_block.attentions.0"
    rows += layer(f"{side}/attention/norm", f"{attention}.group_norm")
    # Early published folders have the older names.
    for part, *names in (
        ("q", "to_q", "query"), ("k", "to_k", "key"), ("v", "to_v", "value"),
        ("o", "to_out.0", "proj_attn"),
    ):  # fmt: skip
        for name in names:
            rows += layer(f"{side}/attention/{part}", f"{attention}.{name}")
    return rows


ROWS: tuple[Row, ...] = (
    *_side("encoder", "down_blocks", "down", "downsamplers"),
    *_side("decoder", "up_blocks", "up", "upsamplers"),
    *layer("quant", "quant_conv", pixel(KERNEL)),
    *layer("post_quant", "post_quant_conv", pixel(KERNEL)),
)


def _fixed(levels: int) -> dict[str, Any]:
    return {
        "in_channels": 3, "out_channels": 3, "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip


def from_config(config: Config, folder: Path) -> ConvVAE:
    """The autoencoder that a config.json describes."""
    where = folder / "config.json"
    widths = numbers(config, "block_out_channels", 64, folder)
    blocks, groups, channels = (
        numbers(config, name, default, folder, 1)[0]
        for name, default in (
            ("layers_per_block", 1), ("norm_num_groups", 32), ("latent_channels", 4)
        )
    )  # fmt: skip
    check_fixed(config, _fixed(len(widths)), where)
    if wrong := [width for width in widths if width % groups]:
        raise UserError(f"{where}: {groups} groups do not divide {wrong[0]} channels")
    flags = ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv")
    attention, *quantise = fields(config, dict.fromkeys(flags, True), folder).values()
    side = 2 ** (len(widths) - 1)
    return ConvVAE(
        patch=(1, side, side), channels=channels, widths=widths, decoder_widths=widths,
        blocks=blocks, groups=groups, attention=attention, quantise=tuple(quantise),
    )  # fmt: skip


def to_config(model: ConvVAE) -> dict[str, Any]:
    return {
        "block_out_channels": list(model.widths),
        "layers_per_block": model.blocks,
        "norm_num_groups": model.groups,
        "latent_channels": model.channels,
        **_fixed(len(model.widths)),
    }


def statistics(config: Config, channels: int) -> tuple[Any, Any]:
    """One number for all channels, or one per channel."""
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor", 0.18215)
    spread = np.asarray(config.get("latents_std") or [1.0] * channels, np.float64)
    mean = config.get("latents_mean") or [shift] * channels
    return mean, spread / np.float64(scale) if scale else np.zeros_like(spread)


def scaling(mean: list[float], std: list[float]) -> dict[str, Any]:
    """One number for all channels, or one per channel."""
    if len(set(mean)) == len(set(std)) == 1:
        return {"scaling_factor": 1 / std[0], **({"shift_factor": mean[0]} if mean[0] else {})}
    return {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": std}


FAMILY = Autoencoder(
    ("AutoencoderKL",), from_config, to_config, lambda model: ROWS, statistics, scaling
)
