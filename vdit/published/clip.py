"""CLIP's text encoder in transformers' folders, alone or with the image encoder."""

from pathlib import Path

from vdit.errors import UserError
from vdit.models.text_encoders import ACTIVATIONS, CLIPText
from vdit.published.family import Config, TextEncoder, layers
from vdit.published.weights import Row, check_heads, fields

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
    if config["model_type"] == "clip":
        config = config.get("text_config") or {}
        if not isinstance(config, dict):
            raise UserError(f"{folder / 'config.json'}: text_config is no JSON object")
    found = fields(config, FIELDS, folder)
    check_heads(found["hidden_size"], found["num_attention_heads"], folder)
    return CLIPText(*found.values())


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
