"""The U-Net of Stable Diffusion 1 and 2 (arXiv:2112.10752) as diffusers' UNet2DConditionModel.

Source of the names: diffusers 0.42.
"""

from functools import partial
from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.published import stable_diffusion as sd
from vdit.published.family import KERNEL, Config, Denoiser, Sizes, layer, layers, pixel, res_block
from vdit.published.weights import TRANSPOSED, Row, numbers

# Blocks of a level, without and with transformers.
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
FIXED = {
    "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1,
    "downsample_padding": 1, "norm_eps": 1e-5, "dropout": 0.0, "only_cross_attention": False,
    "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "num_attention_heads": None, "class_embed_type": None, "num_class_embeds": None,
    "addition_embed_type": None, "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "time_embedding_dim": None,
    "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
    "reverse_transformer_layers_per_block": None, "cross_attention_norm": None,
}  # fmt: skip


def _transformer(path: str, name: str) -> tuple[Row, ...]:
    """A transformer, whose first and last layers are linear or 1x1 convolutions."""
    rows = layer(f"{path}/norm", f"{name}.norm")
    for kind, axes in (("linear", TRANSPOSED), ("conv", pixel(KERNEL))):
        for end in ("in", "out"):
            rows += layer(f"{path}/{kind}_{end}", f"{name}.proj_{end}", axes)
    path, name = f"{path}/blocks", f"{name}.transformer_blocks.{{}}"
    norms = {"attention_norm": "norm1", "text_norm": "norm2", "mlp_norm": "norm3"}
    return rows + layers(norms, f"{path}/", f"{name}.") + sd.transformer_block(path, name)


def _block(path: str, block: str, transformer: str) -> tuple[Row, ...]:
    """A residual block and a transformer."""
    return (
        *res_block(f"{path}/res", block, KERNEL),
        *layer(f"{path}/res/told", f"{block}.time_emb_proj"),
        *_transformer(f"{path}/transformer", transformer),
    )


_LEVEL = r"\1_blocks.\2"
ROWS: tuple[Row, ...] = (
    *layer("stem", "conv_in", KERNEL),
    *layers({"level_in": "time_embedding.linear_1", "level_out": "time_embedding.linear_2"}),
    *_block(r"(down|up)(\d+)_(\d+)", rf"{_LEVEL}.resnets.\3", rf"{_LEVEL}.attentions.\3"),
    *_block(r"middle(\d)", r"mid_block.resnets.\1", r"mid_block.attentions.\1"),
    *layer(r"halve(\d+)", r"down_blocks.\1.downsamplers.0.conv", KERNEL),
    *layer(r"double(\d+)", r"up_blocks.\1.upsamplers.0.conv", KERNEL),
    *layer("head/norm", "conv_norm_out"),
    *layer("head/conv", "conv_out", KERNEL),
)


# Fields that are the same as vdit's.
SAME = {
    "block_out_channels": "dit.unet.widths", "layers_per_block": "dit.unet.blocks",
    "attention_head_dim": "dit.unet.heads",  # diffusers' name for the number of heads
    "norm_num_groups": "dit.unet.groups", "use_linear_projection": "dit.unet.linear",
}  # fmt: skip


def _levels(config: Config, folder: Path) -> dict[str, Any]:
    """Fields with one value per level, or a single one for all levels."""
    widths = numbers(config, "block_out_channels", (320, 640, 1280, 1280), folder)
    fields: dict[str, Any] = {"block_out_channels": widths}
    for name, default in (("attention_head_dim", 8), ("transformer_layers_per_block", 1)):
        fields[name] = numbers(config, name, default, folder, len(widths))
    for name, known, plain in (("down_block_types", DOWN, -1), ("up_block_types", UP, 0)):
        kinds = [known[1]] * 4
        kinds[plain] = known[0]
        value = config.get(name)
        value = kinds if value is None else value
        fits = isinstance(value, list) and all(v in known for v in value)
        if not fits or len(value) != len(widths):
            raise UserError(
                f"{folder / 'config.json'}: {name} is {str(value)[:100]}; allowed:"
                f" {' or '.join(known)}, one for each of {len(widths)} levels"
            )
        fields[name] = tuple(value)
    return fields


def _to_vdit(config: Config) -> dict[str, Any]:
    side, channels = config["sample_size"], config["in_channels"]
    if config["out_channels"] != channels:
        raise UserError(f"out_channels is {config['out_channels']}; allowed: {channels}")
    kinds = [DOWN.index(name) for name in config["down_block_types"]]
    ups = [UP[kind] for kind in reversed(kinds)]
    if list(config["up_block_types"]) != ups:
        raise UserError(f"up_block_types is {list(config['up_block_types'])}; allowed: {ups}")
    depths = config["transformer_layers_per_block"]
    return sd.latent_fields(side, channels) | {
        "data.frames": 1,
        "dit.model": "unet",
        **{ours: config[theirs] for theirs, ours in SAME.items()},
        "dit.unet.depths": tuple(d * kind for d, kind in zip(depths, kinds, strict=True)),
        "dit.unet.middle": depths[-1],
        "dit.unet.temporal": False,
        "dit.process": "scaled_linear",
        "sample.guidance": 7.5,
        "text.encoder": "clip",
        "text.length": 77,
        "text.padding": True,  # the pipeline passes no mask to the U-Net
    }


def _from_vdit(fields: Config, sizes: Sizes) -> dict[str, Any]:
    kinds = [int(depth > 0) for depth in fields["dit.unet.depths"]]
    depths = [depth or 1 for depth in fields["dit.unet.depths"][:-1]]
    return {
        "in_channels": sizes.latent[3],
        "out_channels": sizes.latent[3],
        "sample_size": sizes.latent[1],
        "cross_attention_dim": sizes.text,
        **{theirs: fields[ours] for theirs, ours in SAME.items()},
        "transformer_layers_per_block": (*depths, fields["dit.unet.middle"]),
        "down_block_types": tuple(DOWN[kind] for kind in kinds),
        "up_block_types": tuple(UP[kind] for kind in reversed(kinds)),
    }


FAMILY = Denoiser(
    classes=("UNet2DConditionModel",),
    rows=ROWS,
    fixed=FIXED,
    defaults={
        "in_channels": 4, "out_channels": 4, "sample_size": 64, "layers_per_block": 2,
        "norm_num_groups": 32, "cross_attention_dim": 1280, "use_linear_projection": False,
    },
    more=_levels,
    to_vdit=_to_vdit,
    from_vdit=_from_vdit,
    schedule=partial(sd.table_schedule, process="scaled_linear"),
    latents=sd.sd_latents,
    folders=(("unet", ""),),
    text="cross_attention_dim",
    text_kernel="/text/k/kernel",
)  # fmt: skip
