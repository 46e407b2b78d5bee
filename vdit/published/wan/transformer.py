"""The transformer of Wan 2.1 and 2.2 as diffusers' WanTransformer3DModel.

The original release's WanModel is read too, of text to video and TI2V.
Source of the names: diffusers 0.42, and Wan2.1's wan/modules/model.py.
"""

from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.models.dit import preset
from vdit.published.family import CUBE, Config, Denoiser, Sizes, layer, layers
from vdit.published.stable_diffusion import ONE_TIME
from vdit.published.weights import CONFIG_BYTES, Row, check_fixed, check_heads, fields, read_json

# Parameters by their names here, in diffusers and in the original release.
_NAMES = (
    ("level_in", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("level_out", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("time", "condition_embedder.time_proj", "time_projection.1"),
    ("text_in", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("text_out", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("image_in", "condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("image_mlp/up", "condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("image_mlp/down", "condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("image_out", "condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("out", "proj_out", "head.head"),
    ("blocks/mlp/up", "blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0"),
    ("blocks/mlp/down", "blocks.{}.ffn.net.2", "blocks.{}.ffn.2"),
    ("blocks/cross_norm", "blocks.{}.norm2", "blocks.{}.norm3"),
)
_PARTS = (
    ("q", "to_q", "q"), ("k", "to_k", "k"), ("v", "to_v", "v"), ("o", "to_out.0", "o"),
    ("q_norm", "norm_q", "norm_q"), ("k_norm", "norm_k", "norm_k"),
    ("k_image", "add_k_proj", "k_img"), ("v_image", "add_v_proj", "v_img"),
    ("k_image_norm", "norm_added_k", "norm_k_img"),
)  # fmt: skip
_ATTENTIONS = (("attention", "attn1", "self_attn"), ("cross", "attn2", "cross_attn"))


def _rows(column: int, table: str, last: str) -> tuple[Row, ...]:
    """The rows of diffusers' names (column 1) or the original's (2); `table` and `last` are those
    of the blocks' and the last norm's tables."""
    pairs = {names[0]: names[column] for names in _NAMES}
    for attention in _ATTENTIONS:
        for part in _PARTS:
            pairs[f"blocks/{attention[0]}/{part[0]}"] = (
                f"blocks.{{}}.{attention[column]}.{part[column]}"
            )
    return (
        *layer("embed", "patch_embedding", CUBE),
        *layers(pairs),
        ("blocks/table", f"blocks.{{}}.{table}", None),
        ("table", last, None),
    )


ROWS = (
    *_rows(1, "scale_shift_table", "scale_shift_table"),
    *_rows(2, "modulation", "head.modulation"),
)

# A scheduler's field of the shift, and further fields with the values that are read.
SHIFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "UniPCMultistepScheduler": ("flow_shift", {
        "use_flow_sigmas": True, "prediction_type": "flow_prediction", "thresholding": False,
    }),
    "FlowMatchEulerDiscreteScheduler": ("shift", {
        "use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False,
        "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
        "invert_sigmas": False,
    }),
}  # fmt: skip


_ORIGINAL = {
    "dim": 2048, "num_heads": 16, "in_dim": 16, "out_dim": 16, "model_type": ("t2v", "ti2v"),
}  # fmt: skip


def _original(config: Config, folder: Path) -> dict[str, Any]:
    """diffusers' fields from the original release's."""
    if config["_class_name"] != "WanModel":
        return {}
    width, heads, channels, out, _ = fields(config, _ORIGINAL, folder).values()
    check_heads(width, heads, folder)
    size = {"num_attention_heads": heads, "attention_head_dim": width // heads}
    return size | {"in_channels": channels, "out_channels": out}


def _schedule(path: Path) -> dict[str, Any]:
    """vdit's shift from a scheduler_config.json, if it exists."""
    if not path.exists():
        return {}
    config = read_json(path, CONFIG_BYTES)
    kind = config.get("_class_name")
    if kind not in SHIFTS:
        known = " or ".join(SHIFTS)
        raise UserError(f"{path}: _class_name is {str(kind)[:100]!r}; allowed: {known}")
    name, fixed = SHIFTS[kind]
    check_fixed(config, {"num_train_timesteps": 1000, **fixed}, path)
    return {"dit.shift": float(fields(config, {name: 1.0}, path.parent)[name])}


def _pipeline(config: Config) -> dict[str, Any]:
    """vdit's fields from a model_index.json."""
    if config.get("boundary_ratio") is not None:
        raise UserError("boundary_ratio is set: two experts; pipelines of one are allowed")
    return {"dit.wan.token_times": bool(config.get("expand_timesteps"))}


def _to_vdit(config: Config) -> dict[str, Any]:
    heads, channels = config["num_attention_heads"], config["out_channels"]
    width, beside = heads * config["attention_head_dim"], config["in_channels"] - channels
    if beside not in (0, channels + 4):
        allowed = f"{channels} or {2 * channels + 4}"
        raise UserError(f"in_channels is {config['in_channels']}; allowed: {allowed}")
    image = config["image_dim"] or 0
    if (config["added_kv_proj_dim"] or 0) != (width if image else 0):
        raise UserError(
            f"added_kv_proj_dim is {config['added_kv_proj_dim']} with image_dim {image}; allowed:"
            f" {width if image else None}"
        )
    large = channels == 48  # TI2V, on Wan 2.2's autoencoder
    frames, fps, size = (121, 24.0, (704, 1280)) if large else (81, 16.0, (480, 832))
    side, base, decoder = (16, 160, 256) if large else (8, 96, 0)
    return {
        "stages": ("dit",), "data.frames": frames, "data.fps": fps, "data.size": size,
        "vae.model": "causal", "vae.patch": (4, side, side), "vae.channels": channels,
        "vae.pixels": side // 8, "vae.residual": large, "vae.width": base,
        "vae.decoder_width": decoder,
        "text.encoder": "umt5", "text.length": 512,
        "dit.model": "wan", "dit.preset": f"{width}x{config['num_layers']}x{heads}",
        "dit.patch": (2, 2), "dit.wan.hidden": config["ffn_dim"], "dit.wan.beside": beside,
        "dit.wan.image": image, "dit.wan.token_times": large, "dit.shift": 5.0 if large else 3.0,
        "dit.logit_normal": (), **{f"dit.given.{name}": 0.0 for name in ONE_TIME},
        "dit.given.text": 1.0, "sample.sampler": "euler", "sample.steps": 50,
        "sample.guidance": 5.0, "sample.batch": 1, "sample.zoom": 1,
    }  # fmt: skip


def _from_vdit(fields: Config, sizes: Sizes) -> dict[str, Any]:
    size, channels = preset(fields["dit.preset"]), sizes.latent[-1]
    image = fields["dit.wan.image"]
    return {
        "num_attention_heads": size["heads"],
        "attention_head_dim": size["width"] // size["heads"],
        "num_layers": size["depth"],
        "ffn_dim": fields["dit.wan.hidden"],
        "in_channels": channels + fields["dit.wan.beside"],
        "out_channels": channels,
        "text_dim": sizes.text,
        "image_dim": image or None,
        "added_kv_proj_dim": size["width"] if image else None,
    }


FAMILY = Denoiser(
    classes=("WanTransformer3DModel", "WanModel"),
    rows=ROWS,
    fixed={
        "patch_size": [1, 2, 2], "freq_dim": 256, "cross_attn_norm": True, "eps": 1e-6,
        "qk_norm": "rms_norm_across_heads", "pos_embed_seq_len": None, "rope_max_seq_len": 1024,
    },
    defaults={
        "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
        "out_channels": 16, "text_dim": 4096, "ffn_dim": 13824, "num_layers": 40,
        "image_dim": 0, "added_kv_proj_dim": 0,
    },
    to_vdit=_to_vdit,
    from_vdit=_from_vdit,
    schedule=_schedule,
    pipeline=_pipeline,
    more=_original,
    latents=lambda channels: {},
    others=(r"blocks\.\d+\.attn2\.norm_added_q\.weight",),
    written=(
        "patch_size", "freq_dim", "cross_attn_norm", "eps", "qk_norm", "pos_embed_seq_len",
        "rope_max_seq_len",
    ),
    autoencoders=("AutoencoderKLWan",),
    text="text_dim",
    text_kernel="text_in/kernel",
    any_size=True,
)  # fmt: skip
