"""DiT (arXiv:2212.09748) and Latte (arXiv:2401.03048) as diffusers' DiTTransformer2DModel and
LatteTransformer3DModel.

Source of the names: diffusers 0.42.
"""

from functools import partial
from typing import Any

from vdit.errors import UserError
from vdit.models.dit import PRESETS, preset
from vdit.published import stable_diffusion as sd
from vdit.published.family import Config, Denoiser, Sizes, layers
from vdit.published.weights import Row

THETA = 10_000.0 ** (128 / 127)  # diffusers spreads DiT's 128 frequencies over 127 steps

_EMBED: tuple[Row, ...] = (
    ("embed/kernel", "pos_embed.proj.weight", (2, 3, 1, 0)),  # a convolution's (D, Z, q, r)
    ("embed/bias", "pos_embed.proj.bias", None),
)
_LEVEL = {"level_in": "timestep_embedder.linear_1", "level_out": "timestep_embedder.linear_2"}
_EMB = "transformer_blocks.{*}.norm1.emb"  # every block stores a copy of the embedder
_SPACE, _TIME = "transformer_blocks.{}", "temporal_transformer_blocks.{}"
DIT_ROWS: tuple[Row, ...] = (
    *_EMBED,
    *layers(_LEVEL, name=f"{_EMB}."),
    ("classes", f"{_EMB}.class_embedder.embedding_table.weight", None),
    *layers({"blocks/joint/adaln/modulation": f"{_SPACE}.norm1.linear"}),
    *sd.transformer_block("blocks/joint", _SPACE),
    *layers({"final/modulation": "proj_out_1", "out": "proj_out_2"}),
)
LATTE_ROWS: tuple[Row, ...] = (
    *_EMBED,
    *layers(_LEVEL, name="adaln_single.emb."),
    *layers({
        "single": "adaln_single.linear", "text_in": "caption_projection.linear_1",
        "text_out": "caption_projection.linear_2", "out": "proj_out",
    }),
    ("blocks/space/table", f"{_SPACE}.scale_shift_table", None),
    ("blocks/time/table", f"{_TIME}.scale_shift_table", None),
    *sd.transformer_block("blocks/space", _SPACE),
    *sd.transformer_block("blocks/time", _TIME),
    ("table", "scale_shift_table", None),
)  # fmt: skip


def _to_vdit(config: Config, depth: int) -> dict[str, Any]:
    """Fields that both families have, for `depth` blocks."""
    heads, patch, channels, side = (
        config[n] for n in ("num_attention_heads", "patch_size", "in_channels", "sample_size")
    )
    sizes = {"width": heads * config["attention_head_dim"], "depth": depth, "heads": heads}
    named = [name for name, row in PRESETS.items() if row == sizes]
    out = config.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        raise UserError(f"out_channels is {out}; allowed: {channels} or {2 * channels}")
    fields = sd.latent_fields(side, channels)
    return fields | {
        "dit.model": "paper",
        "dit.preset": named[0] if named else "x".join(map(str, sizes.values())),
        "dit.patch": (patch, patch),
        "dit.process": "ddpm",
        "dit.learned_variance": out != channels,
        "sample.zoom": max(1, 256 // fields["data.size"][0]),
    }


def _from_vdit(fields: Config, sizes: Sizes) -> dict[str, Any]:
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


def _dit_to_vdit(config: Config) -> dict[str, Any]:
    return _to_vdit(config, config["num_layers"]) | {
        "data.frames": 1,
        "text.encoder": "none",
        "sample.guidance": 4.0,
        "dit.paper.classes": config["num_embeds_ada_norm"],
        "dit.paper.span": float(config["sample_size"] // config["patch_size"]),
        "dit.paper.level_theta": THETA,
        "dit.paper.epsilons": (1e-6, float(config["norm_eps"])),
    }


def _dit_from_vdit(fields: Config, sizes: Sizes) -> dict[str, Any]:
    return _from_vdit(fields, sizes) | {
        "num_embeds_ada_norm": fields["dit.paper.classes"],
        "norm_eps": fields["dit.paper.epsilons"][1],
    }


def _latte_to_vdit(config: Config) -> dict[str, Any]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config["cross_attention_dim"] != width:
        raise UserError(f"cross_attention_dim is {config['cross_attention_dim']}; allowed: {width}")
    side = config["sample_size"]
    return _to_vdit(config, 2 * config["num_layers"]) | {
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


def _latte_from_vdit(fields: Config, sizes: Sizes) -> dict[str, Any]:
    size = preset(fields["dit.preset"])
    return _from_vdit(fields, sizes) | {
        "num_layers": size["depth"] // 2,
        "norm_eps": fields["dit.paper.epsilons"][0],
        "video_length": sizes.latent[0],
        "caption_channels": sizes.text,
        "cross_attention_dim": size["width"],
    }


_FIXED = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False,
    "upcast_attention": False, "only_cross_attention": False, "double_self_attention": False,
    "use_linear_projection": False,
}  # fmt: skip
_DEFAULTS = {
    "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "in_channels": 4,
    "out_channels": 0, "sample_size": 32, "patch_size": 2, "norm_eps": 1e-5,
}  # fmt: skip
_family = partial(
    Denoiser,
    schedule=partial(sd.table_schedule, process="ddpm"),
    latents=sd.sd_latents,
    layers=lambda config: config["num_layers"],
    written=("activation_fn", "attention_bias", "norm_elementwise_affine", "norm_type"),
)
DIT = _family(
    classes=("DiTTransformer2DModel", "Transformer2DModel"),
    rows=DIT_ROWS,
    fixed=_FIXED | {"norm_type": "ada_norm_zero"},
    defaults=_DEFAULTS | {"num_embeds_ada_norm": 1000},
    to_vdit=_dit_to_vdit,
    from_vdit=_dit_from_vdit,
)
LATTE = _family(
    classes=("LatteTransformer3DModel",),
    rows=LATTE_ROWS,
    fixed=_FIXED | {"norm_type": "ada_norm_single"},
    defaults=_DEFAULTS
    | {"video_length": 16, "caption_channels": 4096, "cross_attention_dim": 1152},
    to_vdit=_latte_to_vdit,
    from_vdit=_latte_from_vdit,
    text="caption_channels",
    text_kernel="text_in/kernel",
)
