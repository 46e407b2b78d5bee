"""The causal video autoencoder of Wan 2.1 and 2.2 (arXiv:2503.20314), read from a folder as
diffusers' AutoencoderKLWan writes it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.models.vae_conv import ConvVAE
from vdit.models.vae_kl import KERNEL, block, leaf, pixel
from vdit.models.weights import Row

CUBE = (2, 3, 4, 1, 0)  # (frames, rows, columns, in, out) here; out and in come first in torch
NORM = ("gamma", (0, -1, -1, -1))  # a norm's scale: its name, and its axes


def _resample(path: str, name: str) -> tuple[Row, ...]:
    return (
        *leaf(f"{path}/conv", f"{name}.resample.1", KERNEL),
        *leaf(f"{path}/time", f"{name}.time_conv", CUBE),
    )


def rows(model: ConvVAE) -> tuple[Row, ...]:
    """The names of a model's tensors: Wan 2.1 counts its blocks through, 2.2 level by level."""
    made = [
        *leaf("quant", "quant_conv", pixel(CUBE)),
        *leaf("post_quant", "post_quant_conv", pixel(CUBE)),
    ]
    for side in ("encoder", "decoder"):
        made += leaf(f"{side}/stem/conv", f"{side}.conv_in", CUBE)
        made += leaf(f"{side}/head/norm", f"{side}.norm_out", CUBE, *NORM)
        made += leaf(f"{side}/head/conv", f"{side}.conv_out", CUBE)
        for i in (0, 1):
            made += block(f"{side}/middle{i}", f"{side}.mid_block.resnets.{i}", CUBE, *NORM)
        attention = f"{side}.mid_block.attentions.0"
        made += leaf(f"{side}/attention/norm", f"{attention}.norm", CUBE, "gamma", (0, -1, -1))
        made += leaf(f"{side}/attention/qkv", f"{attention}.to_qkv", pixel(KERNEL))
        made += leaf(f"{side}/attention/o", f"{attention}.proj", pixel(KERNEL))
    made += block(
        r"decoder/level(\d+)/block(\d+)", r"decoder.up_blocks.\1.resnets.\2", CUBE, *NORM
    )
    if model.residual:
        made += block(
            r"encoder/level(\d+)/block(\d+)", r"encoder.down_blocks.\1.resnets.\2", CUBE, *NORM
        )
        made += _resample(r"encoder/level(\d+)/down", r"encoder.down_blocks.\1.downsampler")
        made += _resample(r"decoder/level(\d+)/up", r"decoder.up_blocks.\1.upsampler")
        return tuple(made)
    made += _resample(r"decoder/level(\d+)/up", r"decoder.up_blocks.\1.upsamplers.0")
    for level in range(len(model.widths)):
        first = level * (model.blocks + 1)
        for j in range(model.blocks):
            name = f"encoder.down_blocks.{first + j}"
            made += block(f"encoder/level{level}/block{j}", name, CUBE, *NORM)
        made += _resample(
            f"encoder/level{level}/down", f"encoder.down_blocks.{first + model.blocks}"
        )
    return tuple(made)


def from_config(config: Mapping[str, Any], folder: Path) -> ConvVAE:
    """The autoencoder that a config.json describes; `UserError` for one that is not known here."""
    where = folder / "config.json"
    base, channels = config.get("base_dim", 96), config.get("z_dim", 16)
    decoder = config.get("decoder_base_dim") or base
    multipliers = config.get("dim_mult", [1, 2, 4, 4])
    blocks, pixels = config.get("num_res_blocks", 2), config.get("patch_size") or 1
    counts = [base, channels, decoder, blocks, pixels]
    counts += multipliers if isinstance(multipliers, list) and multipliers else [None]
    if not all(type(n) is int and 0 < n <= 2**12 for n in counts) or len(multipliers) > 8:
        raise UserError(
            f"{where}: base_dim, decoder_base_dim, z_dim, dim_mult, num_res_blocks, patch_size are"
            f" {base}, {decoder}, {channels}, {multipliers}, {blocks}, {pixels}; allowed: numbers"
            " above 0"
        )
    times = config.get("temperal_downsample", [False, True, True])
    halvings = len(multipliers) - 1
    count = sum(map(bool, times)) if isinstance(times, list) else 0
    known = {
        "temperal_downsample": [False] * (halvings - count) + [True] * count,
        "attn_scales": [], "dropout": 0.0, "in_channels": 3 * pixels**2,
        "out_channels": 3 * pixels**2,
    }  # fmt: skip
    given = {"temperal_downsample": times, "in_channels": 3, "out_channels": 3, **config}
    for name, allowed in known.items():
        if given.get(name, allowed) != allowed:
            raise UserError(f"{where}: {name} is {given[name]!r}; allowed: {allowed!r}")
    if multipliers[0] != 1:
        raise UserError(f"{where}: dim_mult begins with {multipliers[0]}; allowed: 1")
    side = pixels * 2**halvings
    model = ConvVAE(
        patch=(2**count, side, side),
        channels=channels,
        widths=tuple(base * m for m in multipliers),
        decoder_widths=tuple(decoder * m for m in multipliers),
        blocks=blocks,
        causal=True,
        groups=0,
        pixels=pixels,
        residual=bool(config.get("is_residual", False)),
    )
    try:
        model.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return model


def to_config(model: ConvVAE) -> dict[str, Any]:
    """The config.json of an autoencoder; `from_config` says whether it is one of these."""
    halvings, base = len(model.widths) - 1, model.widths[0]
    count = model.patch[0].bit_length() - 1
    return {
        "base_dim": base,
        "decoder_base_dim": model.decoder_widths[0],
        "z_dim": model.channels,
        "dim_mult": [width // base for width in model.widths],
        "num_res_blocks": model.blocks,
        "attn_scales": [],
        "temperal_downsample": [False] * (halvings - count) + [True] * count,
        "dropout": 0.0,
        "is_residual": model.residual,
        "in_channels": 3 * model.pixels**2,
        "out_channels": 3 * model.pixels**2,
        **({"patch_size": model.pixels} if model.pixels > 1 else {}),
    }


def scaling(mean: list[float], std: list[float]) -> dict[str, Any]:
    """The fields of config.json by which pipelines scale latents."""
    return {"latents_mean": mean, "latents_std": std}
