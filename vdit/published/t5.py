"""T5's encoder (original and v1.1) and UMT5's in transformers' folders."""

from functools import partial
from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.models.text_encoders import MLPS, T5
from vdit.published.family import Config, TextEncoder, layers
from vdit.published.weights import TRANSPOSED, Row, fields

FIELDS = {  # in the order of the network's
    "vocab_size": 32128, "d_model": 512, "num_layers": 6, "num_heads": 8, "d_kv": 64, "d_ff": 2048,
    "feed_forward_proj": tuple(MLPS), "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
UMT5_FIELDS = FIELDS | {
    "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6,
    "feed_forward_proj": tuple(reversed(MLPS)),
}  # fmt: skip

_ATTENTION, _MLP = "layer.0.SelfAttention", "layer.1.DenseReluDense"
_BIAS = f"{_ATTENTION}.relative_attention_bias.weight"
ROWS: tuple[Row, ...] = (
    # One table under two names; a file holds either or both.
    ("tokens/embedding", "shared.weight", None),
    ("tokens/embedding", "encoder.embed_tokens.weight", None),
    ("bias/embedding", f"encoder.block.0.{_BIAS}", None),
    ("blocks/bias/embedding", f"encoder.block.{{}}.{_BIAS}", None),
    *layers(
        {
            "([qkvo])": rf"{_ATTENTION}.\1", "attention_norm": "layer.0.layer_norm",
            "gate": f"{_MLP}.wi_0", "down": f"{_MLP}.wo", "mlp_norm": "layer.1.layer_norm",
        },
        "blocks/", "encoder.block.{}.",
    ),
    ("blocks/up/kernel", f"encoder.block.{{}}.{_MLP}.wi_1.weight", TRANSPOSED),
    ("blocks/up/kernel", f"encoder.block.{{}}.{_MLP}.wi.weight", TRANSPOSED),
    ("norm/scale", "encoder.final_layer_norm.weight", None),
)  # fmt: skip


def from_config(config: Config, folder: Path, *, defaults: Config, own_bias: bool) -> T5:
    """The encoder that a config.json describes."""
    found = fields(config, defaults, folder)
    buckets = found["relative_attention_num_buckets"]
    distance = found["relative_attention_max_distance"]
    if buckets < 4 or distance <= buckets // 4:
        raise UserError(
            f"{folder / 'config.json'}: {buckets} buckets of relative attention up to distance"
            f" {distance}; allowed: 4 or more, and a distance above a quarter of them"
        )
    sizes: Any = (*found.values(), own_bias)
    return T5(*sizes)


_family = partial(
    TextEncoder,
    rows=ROWS,
    others=(r"decoder\..*", r"lm_head\.weight", r"(shared|encoder\.embed_tokens)\.weight"),
    begin=(),
    end="</s>",
    pad="<pad>",
)
T5_FAMILY = _family(("t5",), partial(from_config, defaults=FIELDS, own_bias=False))
UMT5 = _family(("umt5",), partial(from_config, defaults=UMT5_FIELDS, own_bias=True))
