"""Denoisers in diffusers' folders: which layouts are known, and how each is read and written.

A layout is a row of `LAYOUTS`: the class that its config.json names, the names of its tensors, what
the configuration of vdit is for it, and what it is for one of vdit's. A pipeline's folder has a
folder of each of its parts.

Source of the names: diffusers 0.42, DiTTransformer2DModel, LatteTransformer3DModel and
UNet2DConditionModel.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vdit.errors import UserError
from vdit.models import vae_kl
from vdit.models.dit import PRESETS, preset
from vdit.models.weights import CONFIG_BYTES, LARGEST, TRANSPOSED, Row, fields, read_json

STEM = "diffusion_pytorch_model"  # of the weights' files
SCALING = 0.18215  # of the latents of Stable Diffusion's autoencoder, where its folder says nothing
ROOM = (1, 8, 8)  # frames, rows, columns of its latent places
# Folders of a pipeline that are read. (An autoencoder's layouts are in vae_folder.py, a text
# encoder's in text_folder.py.)
PARTS = ("transformer", "unet", "vae", "text_encoder")
UNGIVEN = ("prefix", "last", "first_last", "suffix", "between")  # of dit.given: one time for all

Config = Mapping[str, Any]
DIT_THETA = 10_000.0 ** (128 / 127)  # diffusers spreads DiT's 128 frequencies over 127 steps


class Sizes(NamedTuple):
    """Of what a denoiser is given: latents (frames, rows, columns, channels), and text features."""

    latent: tuple[int, int, int, int]
    text: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Networks of one class: how their folders are read and written."""

    classes: tuple[str, ...]  # _class_name in config.json; the first is written
    stage: str  # the stage whose checkpoint it becomes, and its group of parameters
    rows: Sequence[Row]
    others: tuple[str, ...]  # tensors that the network does without
    fixed: Mapping[str, Any]  # fields of config.json that have to have these values
    defaults: Mapping[str, Any]  # numbers of config.json, with diffusers' defaults
    to_vdit: Callable[[Config], dict[str, Any]]  # fields of vdit's configuration
    layers: Callable[[Config], int]  # how often a tensor of every layer is there
    # config.json's numbers for fields of vdit's configuration; see `to_layout`.
    from_vdit: Callable[[Config, "Sizes"], dict[str, Any]]
    # Fields of config.json that have a value for each level, or one for all, with their defaults.
    lists: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()  # fields that are true or, if they are not there, false


_LINEAR = {"kernel": ("weight", TRANSPOSED), "bias": ("bias", None)}


def linear(ours: str, theirs: str) -> tuple[Row, ...]:
    """Rows of a linear layer."""
    return tuple(
        (f"{ours}/{leaf}", f"{theirs}.{name}", axes) for leaf, (name, axes) in _LINEAR.items()
    )


def _block(ours: str, theirs: str) -> tuple[Row, ...]:
    """Rows of a block's self-attention, attention to a text, and MLP."""
    rows: list[Row] = []
    for name, there in (("attention", "attn1"), ("text", "attn2")):
        rows += linear(f"{ours}/{name}/(?P<part>[qkv])", rf"{theirs}.{there}.to_\g<part>")
        rows += linear(f"{ours}/{name}/o", f"{theirs}.{there}.to_out.0")
    rows += linear(f"{ours}/mlp/up", f"{theirs}.ff.net.0.proj")
    rows += linear(f"{ours}/mlp/down", f"{theirs}.ff.net.2")
    return tuple(rows)


_EMBED: tuple[Row, ...] = (
    ("embed/kernel", "pos_embed.proj.weight", (2, 3, 1, 0)),  # a convolution's (D, Z, q, r)
    ("embed/bias", "pos_embed.proj.bias", None),
)
_EMB = "transformer_blocks.{*}.norm1.emb"  # each block has its copy of the one embedder
_DIT = (
    *_EMBED,
    *linear("level_in", f"{_EMB}.timestep_embedder.linear_1"),
    *linear("level_out", f"{_EMB}.timestep_embedder.linear_2"),
    ("classes", f"{_EMB}.class_embedder.embedding_table.weight", None),
    *linear("blocks/joint/adaln/modulation", "transformer_blocks.{}.norm1.linear"),
    *_block("blocks/joint", "transformer_blocks.{}"),
    *linear("final/modulation", "proj_out_1"),
    *linear("out", "proj_out_2"),
)
_LATTE = (
    *_EMBED,
    *linear("level_in", "adaln_single.emb.timestep_embedder.linear_1"),
    *linear("level_out", "adaln_single.emb.timestep_embedder.linear_2"),
    *linear("single", "adaln_single.linear"),
    *linear("text_in", "caption_projection.linear_1"),
    *linear("text_out", "caption_projection.linear_2"),
    ("blocks/space/table", "transformer_blocks.{}.scale_shift_table", None),
    ("blocks/time/table", "temporal_transformer_blocks.{}.scale_shift_table", None),
    *_block("blocks/space", "transformer_blocks.{}"),
    *_block("blocks/time", "temporal_transformer_blocks.{}"),
    ("table", "scale_shift_table", None),
    *linear("out", "proj_out"),
)


def _transformer(ours: str, theirs: str) -> tuple[Row, ...]:
    """Rows of a U-Net's transformer, whose first and last map are linear or convolutions."""
    rows: list[Row] = list(vae_kl.leaf(f"{ours}/norm", f"{theirs}.norm", vae_kl.KERNEL))
    for kind, axes in (("linear", TRANSPOSED), ("conv", (*TRANSPOSED, -1, -1))):
        for end in ("in", "out"):
            rows += vae_kl.leaf(f"{ours}/{kind}_{end}", f"{theirs}.proj_{end}", axes)
    blocks, there = f"{ours}/blocks", f"{theirs}.transformer_blocks.{{}}"
    for i, norm in enumerate(("attention", "text", "mlp"), start=1):
        rows += vae_kl.leaf(f"{blocks}/{norm}_norm", f"{there}.norm{i}", vae_kl.KERNEL)
    return (*rows, *_block(blocks, there))


def _step(ours: str, block: str, transformer: str) -> tuple[Row, ...]:
    """Rows of a U-Net's residual block and transformer."""
    return (
        *vae_kl.block(f"{ours}/res", block, vae_kl.KERNEL),
        *linear(f"{ours}/res/told", f"{block}.time_emb_proj"),
        *_transformer(f"{ours}/transformer", transformer),
    )


_LEVEL = r"\1_blocks.\2"
_UNET = (
    *vae_kl.leaf("stem", "conv_in", vae_kl.KERNEL),
    *linear("level_in", "time_embedding.linear_1"),
    *linear("level_out", "time_embedding.linear_2"),
    *_step(r"(down|up)(\d+)_(\d+)", rf"{_LEVEL}.resnets.\3", rf"{_LEVEL}.attentions.\3"),
    *_step(r"middle(\d)", r"mid_block.resnets.\1", r"mid_block.attentions.\1"),
    *vae_kl.leaf(r"halve(\d+)", r"down_blocks.\1.downsamplers.0.conv", vae_kl.KERNEL),
    *vae_kl.leaf(r"double(\d+)", r"up_blocks.\1.upsamplers.0.conv", vae_kl.KERNEL),
    *vae_kl.leaf("head/norm", "conv_norm_out", vae_kl.KERNEL),
    *vae_kl.leaf("head/conv", "conv_out", vae_kl.KERNEL),
)

_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "upcast_attention": False,
    "only_cross_attention": False,
    "double_self_attention": False,
    "use_linear_projection": False,
}
# Those that a network of either class has: written with its numbers.
WRITTEN = ("activation_fn", "attention_bias", "norm_elementwise_affine", "norm_type")
_DEFAULTS = {
    "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "in_channels": 4,
    "out_channels": 0, "sample_size": 32, "patch_size": 2, "norm_eps": 1e-5,
}  # fmt: skip


def _common(config: Config, depth: int) -> dict[str, Any]:
    """What both layouts say of a model of `depth` blocks."""
    heads, patch, channels = (
        config[n] for n in ("num_attention_heads", "patch_size", "in_channels")
    )
    sizes = {"width": heads * config["attention_head_dim"], "depth": depth, "heads": heads}
    named = [name for name, row in PRESETS.items() if row == sizes]
    pixels = config["sample_size"] * ROOM[1]
    out = config.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        raise UserError(f"out_channels is {out}; allowed: {channels} or {2 * channels}")
    return {
        "stages": ("dit",),
        "data.size": (pixels, pixels),
        "vae.model": "kl",
        "vae.patch": ROOM,
        "vae.channels": channels,
        "dit.model": "paper",
        "dit.preset": named[0] if named else "x".join(map(str, sizes.values())),
        "dit.patch": (patch, patch),
        "dit.process": "ddpm",
        "dit.prediction": "eps",
        "dit.logit_normal": (),
        "dit.shift": 1.0,
        "dit.learned_variance": out != channels,
        **{f"dit.given.{name}": 0.0 for name in UNGIVEN},
        "dit.given.text": 1.0,
        "sample.sampler": "ddim",
        "sample.eta": 0.0,
        "sample.steps": 50,
        "sample.batch": 4,
        "sample.zoom": max(1, 256 // pixels),
    }


def _dit_to_vdit(config: Config) -> dict[str, Any]:
    return _common(config, config["num_layers"]) | {
        "data.frames": 1,
        "text.encoder": "none",
        "sample.guidance": 4.0,
        "dit.paper.classes": config["num_embeds_ada_norm"],
        "dit.paper.span": float(config["sample_size"] // config["patch_size"]),
        "dit.paper.level_theta": DIT_THETA,
        "dit.paper.epsilons": (1e-6, float(config["norm_eps"])),
    }


def _latte_to_vdit(config: Config) -> dict[str, Any]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config["cross_attention_dim"] != width:
        raise UserError(
            f"cross_attention_dim is {config['cross_attention_dim']}; allowed: {width}"
        )
    side = config["sample_size"]
    return _common(config, 2 * config["num_layers"]) | {
        "data.frames": config["video_length"],
        "data.fps": 8.0,
        "dit.axes": "factorised",
        "dit.paper.conditioning": "adaln_single",
        "dit.paper.classes": 0,
        "dit.paper.text": True,
        "dit.paper.span": side // config["patch_size"] / max(side // 64, 1),
        "dit.paper.epsilons": (float(config["norm_eps"]),) * 2,
        "text.encoder": "t5",
        "text.length": 120,
        "sample.guidance": 7.5,
    }


# A U-Net's levels, without and with transformers.
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
MOST_LEVELS = 16
_UNET_FIXED = {
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


def _unet_to_vdit(config: Config) -> dict[str, Any]:
    side, channels, widths = (
        config[n] for n in ("sample_size", "in_channels", "block_out_channels")
    )
    if config["out_channels"] != channels:
        raise UserError(f"out_channels is {config['out_channels']}; allowed: {channels}")
    kinds = [DOWN.index(name) for name in config["down_block_types"]]
    ups = [UP[kind] for kind in reversed(kinds)]
    if list(config["up_block_types"]) != ups:
        raise UserError(f"up_block_types is {list(config['up_block_types'])}; allowed: {ups}")
    depths = config["transformer_layers_per_block"]
    return {
        "stages": ("dit",),
        "data.size": (side * ROOM[1], side * ROOM[2]),
        "data.frames": 1,
        "vae.model": "kl",
        "vae.patch": ROOM,
        "vae.channels": channels,
        "dit.model": "unet",
        "dit.unet.widths": tuple(widths),
        "dit.unet.blocks": config["layers_per_block"],
        "dit.unet.heads": tuple(config["attention_head_dim"]),  # diffusers' name for their number
        "dit.unet.depths": tuple(d * kind for d, kind in zip(depths, kinds, strict=True)),
        "dit.unet.middle": depths[-1],
        "dit.unet.groups": config["norm_num_groups"],
        "dit.unet.linear": config["use_linear_projection"],
        "dit.unet.temporal": False,
        "dit.process": "scaled_linear",
        "dit.prediction": "eps",
        "dit.logit_normal": (),
        "dit.shift": 1.0,
        **{f"dit.given.{name}": 0.0 for name in UNGIVEN},
        "dit.given.text": 1.0,
        "sample.sampler": "ddim",
        "sample.eta": 0.0,
        "sample.steps": 50,
        "sample.guidance": 7.5,
        "sample.batch": 4,
        "text.encoder": "clip",
        "text.length": 77,
        "text.padding": True,  # its pipeline tells the U-Net of no mask
    }


def _common_from_vdit(fields: Config, sizes: Sizes) -> dict[str, Any]:
    size, (_, rows, _, channels) = preset(fields["dit.preset"]), sizes.latent
    return {
        "num_attention_heads": size["heads"],
        "attention_head_dim": size["width"] // size["heads"],
        "num_layers": size["depth"],
        "in_channels": channels,
        **({"out_channels": 2 * channels} if fields["dit.learned_variance"] else {}),
        "sample_size": rows,
        "patch_size": fields["dit.patch"][0],
    }


def _dit_from_vdit(fields: Config, sizes: Sizes) -> dict[str, Any]:
    return _common_from_vdit(fields, sizes) | {
        "num_embeds_ada_norm": fields["dit.paper.classes"],
        "norm_eps": fields["dit.paper.epsilons"][1],
    }


def _latte_from_vdit(fields: Config, sizes: Sizes) -> dict[str, Any]:
    size = preset(fields["dit.preset"])
    return _common_from_vdit(fields, sizes) | {
        "num_layers": size["depth"] // 2,
        "norm_eps": fields["dit.paper.epsilons"][0],
        "video_length": sizes.latent[0],
        "caption_channels": sizes.text,
        "cross_attention_dim": size["width"],
    }


def _unet_from_vdit(fields: Config, sizes: Sizes) -> dict[str, Any]:
    unet = {name.removeprefix("dit.unet."): value for name, value in fields.items()}
    kinds = [int(depth > 0) for depth in unet["depths"]]
    depths = [depth or 1 for depth in unet["depths"][:-1]]
    return {
        "in_channels": sizes.latent[3],
        "out_channels": sizes.latent[3],
        "sample_size": sizes.latent[1],
        "layers_per_block": unet["blocks"],
        "norm_num_groups": unet["groups"],
        "cross_attention_dim": sizes.text,
        "use_linear_projection": unet["linear"],
        "block_out_channels": tuple(unet["widths"]),
        "attention_head_dim": tuple(unet["heads"]),
        "transformer_layers_per_block": (*depths, unet["middle"]),
        "down_block_types": tuple(DOWN[kind] for kind in kinds),
        "up_block_types": tuple(UP[kind] for kind in reversed(kinds)),
    }


LAYOUTS: dict[str, Layout] = {
    "dit": Layout(
        classes=("DiTTransformer2DModel", "Transformer2DModel"),
        stage="dit",
        rows=_DIT,
        others=(),
        fixed=_FIXED | {"norm_type": "ada_norm_zero"},
        defaults=_DEFAULTS | {"num_embeds_ada_norm": 1000},
        to_vdit=_dit_to_vdit,
        from_vdit=_dit_from_vdit,
        layers=lambda config: config["num_layers"],
    ),
    "latte": Layout(
        classes=("LatteTransformer3DModel",),
        stage="dit",
        rows=_LATTE,
        others=(),
        fixed=_FIXED | {"norm_type": "ada_norm_single"},
        defaults=_DEFAULTS
        | {"video_length": 16, "caption_channels": 4096, "cross_attention_dim": 1152},
        to_vdit=_latte_to_vdit,
        from_vdit=_latte_from_vdit,
        layers=lambda config: config["num_layers"],
    ),
    "unet": Layout(
        classes=("UNet2DConditionModel",),
        stage="dit",
        rows=_UNET,
        others=(),
        fixed=_UNET_FIXED,
        defaults={
            "in_channels": 4, "out_channels": 4, "sample_size": 64, "layers_per_block": 2,
            "norm_num_groups": 32, "cross_attention_dim": 1280,
        },
        to_vdit=_unet_to_vdit,
        from_vdit=_unet_from_vdit,
        layers=lambda config: 1,
        lists={
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": (8,),
            "transformer_layers_per_block": (1,),
            "down_block_types": (DOWN[1], DOWN[1], DOWN[1], DOWN[0]),
            "up_block_types": (UP[0], UP[1], UP[1], UP[1]),
        },
        flags=("use_linear_projection",),
    ),
}


def read_layout(folder: Path, others: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """The name of a folder's layout, and the numbers of its config.json.

    `UserError` for a class that is not known, or a variant of it that is not; it names `others` too
    as allowed.
    """
    path = folder / "config.json"
    config = read_json(path, CONFIG_BYTES)
    name = config.get("_class_name")
    found = [key for key, layout in LAYOUTS.items() if name in layout.classes]
    if not found:
        names = [c for layout in LAYOUTS.values() for c in layout.classes]
        known = " or ".join([*names, *others])
        raise UserError(f"{path}: _class_name is {str(name)[:100]!r}; allowed: {known}")
    layout = LAYOUTS[found[0]]
    for field, value in layout.fixed.items():
        if config.get(field, value) != value:
            shown = str(config[field])[:100]
            raise UserError(f"{path}: {field} is {shown!r}; allowed: {value!r}")
    optional = {field for field, value in layout.defaults.items() if value == 0}
    needed = {f: v for f, v in layout.defaults.items() if f not in optional}
    numbers = fields(config, needed, folder)
    for field in optional:  # null, or a number
        numbers[field] = 0
        if config.get(field) is not None:
            numbers |= fields(config, {field: 1}, folder)
    for field in layout.flags:
        numbers[field] = config.get(field) or False
        if not isinstance(numbers[field], bool):
            shown = str(config[field])[:100]
            raise UserError(f"{path}: {field} is {shown!r}; allowed: true or false")
    return found[0], numbers | _lists(config, layout.lists, path)


def _lists(config: Config, defaults: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of `defaults`, of as many values as the first has; one value is all levels'."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, default in defaults.items():
        value = config.get(name)
        values = default if value is None else tuple(value) if isinstance(value, list) else (value,)
        count = len(next(iter(found.values()), values))
        values = values * count if len(values) == 1 else values
        if isinstance(default[0], str):
            known = DOWN if default[0] in DOWN else UP
            fits, what = all(v in known for v in values), " or ".join(known)
        else:
            fits = all(type(v) is int and 0 < v <= LARGEST for v in values)
            what = f"numbers above 0, at most {LARGEST}"
        if not fits or len(values) != count or not 0 < count <= MOST_LEVELS:
            raise UserError(
                f"{path}: {name} is {str(value)[:100]}; allowed: {what}, one for each of at most"
                f" {MOST_LEVELS} levels"
            )
        found[name] = values
    return found


def architecture(fields: Config, sizes: Sizes) -> dict[str, Any]:
    """The fields that say what a denoiser computes, alike for what is alike."""
    said = ("dit.model", "dit.patch", "dit.axes", "dit.learned_variance")
    groups = ("dit.paper.", "dit.unet.")
    found = {k: v for k, v in fields.items() if k in said or k.startswith(groups)}
    if not found["dit.paper.span"]:  # positions that count tokens
        found["dit.paper.span"] = float(sizes.latent[1] // found["dit.patch"][0])
    if found["dit.model"] == "unet":  # whose size is not dit.preset's
        return {k: v for k, v in found.items() if not k.startswith("dit.paper.")}
    return found | {"preset": {"activation": "gelu"} | preset(fields["dit.preset"])}


def to_layout(
    fields: Config, sizes: Sizes, defaults: Config
) -> tuple[Layout, dict[str, Any]] | None:
    """The layout of a denoiser, and its config.json; None if diffusers has no such network.

    `fields` are the configuration's, flat ("dit.patch"), and `defaults` those of a new one.
    """
    if sizes.latent[1] != sizes.latent[2] or fields["dit.patch"][0] != fields["dit.patch"][1]:
        return None
    for layout in LAYOUTS.values():
        try:
            numbers = layout.from_vdit(fields, sizes)
            theirs = {**defaults, **layout.to_vdit(numbers)}
        except UserError:
            continue
        same = architecture(theirs, sizes) == architecture(fields, sizes)
        if same and theirs["data.frames"] == sizes.latent[0]:
            known = {k: layout.fixed[k] for k in WRITTEN if k in layout.fixed}
            return layout, {"_class_name": layout.classes[0], **known, **numbers}
    return None
