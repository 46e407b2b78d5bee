"""CLIP's text encoder and image encoder in transformers' folders, alone or in a whole CLIP."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.models.image_encoders import CLIPVision
from vdit.models.text_encoders import ACTIVATIONS, CLIPText
from vdit.published.family import KERNEL, Config, ImageEncoder, TextEncoder, layers
from vdit.published.weights import Row, check_fixed, check_heads, fields

FIELDS = {  # in the order of the network's
    "vocab_size": 49408, "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
    "intermediate_size": 2048, "max_position_embeddings": 77, "hidden_act": tuple(ACTIVATIONS),
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_LAYER = {
    "([qkv])": r"self_attn.\1_proj", "o": "self_attn.out_proj", "attention_norm": "layer_norm1",
    "up": "mlp.fc1", "down": "mlp.fc2", "mlp_norm": "layer_norm2",
}  # fmt: skip


def _rows(prefix: str) -> tuple[Row, ...]:
    """With or without the name of the part of a CLIP that it is."""
    return (
        ("tokens/embedding", f"{prefix}embeddings.token_embedding.weight", None),
        ("positions/embedding", f"{prefix}embeddings.position_embedding.weight", None),
        *layers(_LAYER, "blocks/", f"{prefix}encoder.layers.{{}}."),
        *layers({"norm": f"{prefix}final_layer_norm"}),
    )


def from_config(config: Config, folder: Path) -> CLIPText:
    """The encoder that a config.json describes: CLIP's text model, or the one of a whole CLIP."""
    return CLIPText(*_part(config, "text_config", FIELDS, folder))


def _part(config: Config, part: str, names: Config, folder: Path) -> Iterable[Any]:
    """The fields `names` of a config.json, or of that `part` of a whole CLIP's."""
    if config["model_type"] == "clip":
        config = config.get(part) or {}
        if not isinstance(config, dict):
            raise UserError(f"{folder / 'config.json'}: {part} is no JSON object")
    check_fixed(config, {"num_channels": 3}, folder / "config.json")
    found = fields(config, names, folder)
    check_heads(found["hidden_size"], found["num_attention_heads"], folder)
    return found.values()


FAMILY = TextEncoder(
    ("clip_text_model", "clip"),
    from_config,
    rows=_rows("text_model.") + _rows(""),
    others=(
        r"(text_model\.)?embeddings\.position_ids", r"vision_model\..*",
        r"(visual|text)_projection\.weight", r"logit_scale",
    ),
    begin=("<|startoftext|>",),
    end="<|endoftext|>",
    pad="<|endoftext|>",
    last_pools=True,
)  # fmt: skip

VISION_FIELDS = {
    "image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": tuple(ACTIVATIONS),
    "layer_norm_eps": 1e-5,
}  # fmt: skip


def _vision_rows(prefix: str) -> tuple[Row, ...]:
    norm = {"norm": f"{prefix}pre_layrnorm"}  # sic
    return (
        ("patches/kernel", f"{prefix}embeddings.patch_embedding.weight", KERNEL),
        ("first", f"{prefix}embeddings.class_embedding", None),
        ("positions/embedding", f"{prefix}embeddings.position_embedding.weight", None),
        *layers(_LAYER, "blocks/", f"{prefix}encoder.layers.{{}}."),
        *layers(norm),
    )


def vision_from_config(config: Config, folder: Path) -> CLIPVision:
    """The encoder that a config.json describes: CLIP's vision model, or the one of a whole CLIP."""
    module = CLIPVision(*_part(config, "vision_config", VISION_FIELDS, folder))
    if module.size % module.patch or module.depth < 2:
        raise UserError(
            f"{folder / 'config.json'}: image_size {module.size}, patch_size {module.patch},"
            f" num_hidden_layers {module.depth}: a multiple, and at least 2, are allowed"
        )
    return module


VISION = ImageEncoder(
    ("clip_vision_model", "clip"),
    vision_from_config,
    rows=_vision_rows("vision_model.") + _vision_rows(""),
    # Of the last layer no features are read.
    others=(
        r"(vision_model\.)?(embeddings\.position_ids|encoder\.layers\.\d+\..*)",
        r"(vision_model\.)?post_layernorm\..*", r"text_model\..*",
        r"(visual|text)_projection\.weight", r"logit_scale",
    ),
)  # fmt: skip
