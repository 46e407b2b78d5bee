"""The transformer of Wan 2.1 and 2.2 as diffusers' WanTransformer3DModel.

The original release's WanModel is read too, of text to video, image to video and TI2V.
Source of the names: diffusers 0.42, and Wan2.1's wan/modules/model.py; of how to sample: diffusers'
schedulers and pipelines, and wan/configs of both releases.
"""

from pathlib import Path
from typing import Any, NamedTuple

from vdit.errors import UserError
from vdit.models.dit import preset
from vdit.published.family import CUBE, Config, Denoiser, Sizes, layer, layers
from vdit.published.stable_diffusion import ONE_TIME
from vdit.published.weights import (
    CONFIG_BYTES,
    Row,
    check_fixed,
    check_heads,
    fields,
    read_headers,
    read_json,
)

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

# vdit's sampler of a scheduler, its field of the shift, and further fields with the values that are
# read. Euler's grid is shifted once.
UNIPC = {"sample.sampler": "unipc", "sample.order": 2, "sample.spacing": "flow_sigmas"}
SCHEDULERS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "UniPCMultistepScheduler": (UNIPC, "flow_shift", {
        "use_flow_sigmas": True, "prediction_type": "flow_prediction", "thresholding": False,
        "solver_order": 2, "predict_x0": True, "lower_order_final": True, "disable_corrector": [],
        "solver_p": None, "use_karras_sigmas": False, "use_exponential_sigmas": False,
        "use_beta_sigmas": False, "final_sigmas_type": "zero", "use_dynamic_shifting": False,
        "shift_terminal": None,
    }),
    "FlowMatchEulerDiscreteScheduler": ({"sample.sampler": "euler"}, "shift", {
        "use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False,
        "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
        "invert_sigmas": False,
    }),
}  # fmt: skip


class Published(NamedTuple):
    """How a model was sampled in its release, where a folder does not say it."""

    steps: int
    shift: float
    guidance: float
    guidance_low: float = 0.0  # of the second expert
    boundary: float = 0.0  # the first expert's least noise level


# By whether an image's latents are beside the noisy ones.
ONE = {False: Published(50, 5.0, 5.0), True: Published(40, 5.0, 5.0)}
TWO = {False: Published(40, 12.0, 4.0, 3.0, 0.875), True: Published(40, 5.0, 3.5, 3.5, 0.9)}

_ORIGINAL = {
    "dim": 2048, "num_heads": 16, "in_dim": 16, "out_dim": 16,
    "model_type": ("t2v", "ti2v", "i2v"),
}  # fmt: skip


def _original(config: Config, folder: Path) -> dict[str, Any]:
    """diffusers' fields from the original release's."""
    if config["_class_name"] != "WanModel":
        return {}
    width, heads, channels, out, _ = fields(config, _ORIGINAL, folder).values()
    check_heads(width, heads, folder)
    size = {"num_attention_heads": heads, "attention_head_dim": width // heads, "original": True}
    image = read_headers(folder, "diffusion_pytorch_model").get("img_emb.proj.0.weight")
    if image is not None and image.shape:  # of 2.1 alone: config.json does not say so
        size |= {"image_dim": image.shape[0], "added_kv_proj_dim": width}
    return size | {"in_channels": channels, "out_channels": out}


def _schedule(path: Path) -> dict[str, Any]:
    """vdit's sampler and shift from a scheduler_config.json, if it exists."""
    if not path.exists():
        return {}
    config = read_json(path, CONFIG_BYTES)
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        known = " or ".join(SCHEDULERS)
        raise UserError(f"{path}: _class_name is {str(kind)[:100]!r}; allowed: {known}")
    sampler, name, fixed = SCHEDULERS[kind]
    check_fixed(config, {"num_train_timesteps": 1000, **fixed}, path)
    shift = float(fields(config, {name: 1.0}, path.parent)[name])
    found = {"sample.spacing": "trailing", **sampler, "dit.shift": shift}
    if sampler is UNIPC:
        solver = fields(config, {"solver_type": ("bh2", "bh1")}, path.parent)
        found["sample.bh"] = solver["solver_type"]
    return found


def _pipeline(index: Config | None, found: Config, two: bool) -> dict[str, Any]:
    """vdit's fields from a model_index.json, and the sampling of two experts."""
    published = TWO[found["dit.wan.beside"] > 0]
    boundary = published.boundary if index is None and two else (index or {}).get("boundary_ratio")
    if (boundary is not None) != two:
        there = "there is a second expert" if two else "there are no two experts"
        raise UserError(f"boundary_ratio is {boundary}, but {there} (transformer_2)")
    more: dict[str, Any] = {}
    if two:
        if not isinstance(boundary, float) or not 0.0 < boundary < 1.0:
            raise UserError(f"boundary_ratio is {boundary!r}; allowed: a number between 0 and 1")
        more = _sampling(published._replace(boundary=boundary))
    if index is not None:
        more["dit.wan.token_times"] = bool(index.get("expand_timesteps"))
    return more


def _sampling(published: Published) -> dict[str, Any]:
    return {
        "sample.steps": published.steps, "dit.shift": published.shift,
        "sample.guidance": published.guidance, "sample.guidance_low": published.guidance_low,
        "dit.wan.boundary": published.boundary,
    }  # fmt: skip


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
        "dit.wan.image": image, "dit.wan.token_times": large, "dit.logit_normal": (),
        **{f"dit.given.{name}": 0.0 for name in ONE_TIME}, "dit.given.text": 1.0,
        "sample.batch": 1, "sample.zoom": 1, **_sampling(ONE[beside > 0]), **UNIPC,
        **({"sample.spacing": "wan"} if config.get("original") else {}),
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
    folders=(("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")),
    any_size=True,
)  # fmt: skip
