"""The causal video autoencoder of Wan 2.1 and 2.2 as diffusers' AutoencoderKLWan."""

from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.models.vae_conv import ConvVAE
from vdit.published.family import CUBE, KERNEL, Autoencoder, Config, layer, pixel, res_block
from vdit.published.weights import Row, check_fixed, fields, numbers

NORM = ("gamma", (0, -1, -1, -1))  # a norm's scale: its name, and its axes


def _resample(path: str, name: str) -> tuple[Row, ...]:
    return (
        *layer(f"{path}/conv", f"{name}.resample.1", KERNEL),
        *layer(f"{path}/time", f"{name}.time_conv", CUBE),
    )


def rows(model: ConvVAE) -> tuple[Row, ...]:
    """Wan 2.1 numbers its blocks consecutively, 2.2 by level."""
    table = [
        *layer("quant", "quant_conv", pixel(CUBE)),
        *layer("post_quant", "post_quant_conv", pixel(CUBE)),
    ]
    for side in ("encoder", "decoder"):
        table += layer(f"{side}/stem/conv", f"{side}.conv_in", CUBE)
        table += layer(f"{side}/head/norm", f"{side}.norm_out", CUBE, *NORM)
        table += layer(f"{side}/head/conv", f"{side}.conv_out", CUBE)
        for i in (0, 1):
            table += res_block(f"{side}/middle{i}", f"{side}.mid_block.resnets.{i}", CUBE, *NORM)
        attention = f"{side}.mid_block.attentions.0"
        table += layer(f"{side}/attention/norm", f"{attention}.norm", CUBE, "gamma", (0, -1, -1))
        table += layer(f"{side}/attention/qkv", f"{attention}.to_qkv", pixel(KERNEL))
        table += layer(f"{side}/attention/o", f"{attention}.proj", pixel(KERNEL))
    block, there = r"level(\d+)/block(\d+)", r"blocks.\1.resnets.\2"
    table += res_block(f"decoder/{block}", f"decoder.up_{there}", CUBE, *NORM)
    if model.residual:
        table += res_block(f"encoder/{block}", f"encoder.down_{there}", CUBE, *NORM)
        table += _resample(r"encoder/level(\d+)/down", r"encoder.down_blocks.\1.downsampler")
        table += _resample(r"decoder/level(\d+)/up", r"decoder.up_blocks.\1.upsampler")
        return tuple(table)
    table += _resample(r"decoder/level(\d+)/up", r"decoder.up_blocks.\1.upsamplers.0")
    for level in range(len(model.widths)):
        first, ours = level * (model.blocks + 1), f"encoder/level{level}"
        for j in range(model.blocks):
            table += res_block(f"{ours}/block{j}", f"encoder.down_blocks.{first + j}", CUBE, *NORM)
        table += _resample(f"{ours}/down", f"encoder.down_blocks.{first + model.blocks}")
    return tuple(table)


def from_config(config: Config, folder: Path) -> ConvVAE:
    """The autoencoder that a config.json describes."""
    where = folder / "config.json"
    base, channels, blocks, pixels, decoder = (
        numbers(config, name, default, folder, 1)[0]
        for name, default in (
            ("base_dim", 96), ("z_dim", 16), ("num_res_blocks", 2), ("patch_size", 1),
            ("decoder_base_dim", config.get("base_dim", 96)),
        )
    )  # fmt: skip
    multipliers = numbers(config, "dim_mult", (1, 2, 4, 4), folder)
    if multipliers[0] != 1:
        raise UserError(f"{where}: dim_mult begins with {multipliers[0]}; allowed: 1")
    halvings = len(multipliers) - 1
    times = config.get("temperal_downsample", [False, True, True])
    count = sum(map(bool, times)) if isinstance(times, list) else 0
    given = {"temperal_downsample": times, "in_channels": 3, "out_channels": 3, **config}
    check_fixed(given, _fixed(halvings, count, pixels), where)
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
        residual=fields(config, {"is_residual": False}, folder)["is_residual"],
    )
    try:
        model.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return model


def _fixed(halvings: int, count: int, pixels: int) -> dict[str, Any]:
    """Fields of `halvings` in space, of which the last `count` also halve the frame rate."""
    return {
        "attn_scales": [], "temperal_downsample": [False] * (halvings - count) + [True] * count,
        "dropout": 0.0, "in_channels": 3 * pixels**2, "out_channels": 3 * pixels**2,
    }  # fmt: skip


def to_config(model: ConvVAE) -> dict[str, Any]:
    base, count = model.widths[0], model.patch[0].bit_length() - 1
    return {
        "base_dim": base,
        "decoder_base_dim": model.decoder_widths[0],
        "z_dim": model.channels,
        "dim_mult": [width // base for width in model.widths],
        "num_res_blocks": model.blocks,
        "is_residual": model.residual,
        **_fixed(len(model.widths) - 1, count, model.pixels),
        **({"patch_size": model.pixels} if model.pixels > 1 else {}),
    }


def statistics(config: Config, channels: int) -> tuple[Any, Any] | None:
    found = config.get("latents_mean"), config.get("latents_std")
    return None if found == (None, None) else found


def scaling(mean: list[float], std: list[float]) -> dict[str, Any]:
    return {"latents_mean": mean, "latents_std": std}


FAMILY = Autoencoder(("AutoencoderKLWan",), from_config, to_config, rows, statistics, scaling)
