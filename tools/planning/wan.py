"""Wan's published networks, to plan with before any weights are at hand.

python -m tools.plan --config=tools/planning/wan.py:14b-720p --topology=v5p:2x2x1 --mode=sample
python -m tools.plan --config=tools/planning/wan.py:1.3b-480p --topology=v6e:2x4

A variant is a network of `NETWORKS` and a size of `SIZES`; 5b has one size. Training is finetuning
of all weights, as in experiments/wan.py, on cached latents and text features.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from vdit.config import default
from vdit.errors import UserError
from vdit.published.wan.transformer import FAMILY


class Published(NamedTuple):
    """A transformer's config.json, and the steps of its pipeline."""

    heads: int  # of 128 channels
    layers: int
    hidden: int
    channels: tuple[int, int] = (16, 16)  # in and out
    image: int = 0  # width of CLIP's features
    steps: int = 50


# github.com/Wan-Video/Wan2.1 and Wan2.2, wan/configs
NETWORKS = {
    "1.3b": Published(12, 30, 8960),
    "14b": Published(40, 40, 13_824),
    "i2v": Published(40, 40, 13_824, (36, 16), 1280, 40),
    "a14b": Published(40, 40, 13_824, steps=40),  # one of the two experts, which take turns
    "5b": Published(24, 30, 14_336, (48, 48)),
}
SIZES = {"480p": (480, 832), "720p": (720, 1280)}


def get_config(variant: str = "14b-480p") -> ConfigDict:
    """The configuration of an import, with the training of a finetune."""
    name, _, size = variant.partition("-")
    if name not in NETWORKS or size not in (("",) if name == "5b" else SIZES):
        known = ", ".join(f"{name}-SIZE" for name in NETWORKS if name != "5b")
        raise UserError(f"wan.py:{variant}: known are {known} of {' or '.join(SIZES)}, and 5b")
    network = NETWORKS[name]
    config = default()
    config.update_from_flattened_dict(
        FAMILY.to_vdit({
            "num_attention_heads": network.heads, "attention_head_dim": 128,
            "num_layers": network.layers, "ffn_dim": network.hidden,
            "in_channels": network.channels[0], "out_channels": network.channels[1],
            "image_dim": network.image,
            "added_kv_proj_dim": 128 * network.heads if network.image else 0,
        })
    )  # fmt: skip
    config.data.size = SIZES.get(size, config.data.size)
    config.sample.steps = network.steps
    config.data.source, config.data.path = "folder", "clips"
    config.run.remat, config.run.unroll = "full", 1
    train = config.dit.train
    train.steps, train.batch, train.accumulate = 1000, 8, 1
    train.optimizer, train.learning_rate, train.adam_learning_rate = "adamw", 1e-5, 0.0
    train.schedule = "constant"
    return config
