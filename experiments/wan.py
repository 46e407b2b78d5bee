"""Finetunes Wan 2.1 and 2.2: weights of tools.import_weights, on a folder of captioned videos.

python -m tools.import_weights --source=FOLDER --workdir=DIR
python -m vdit.main --config=experiments/wan.py:1.3b --workdir=DIR --config.data.path=CLIPS

Variants: 1.3b, 14b, a14b, 5b; smoke takes a network of any size, a few steps on small clips. What
the workdir knows is left to it: the networks, the shift of the times, the shape of clips, and how
to sample.

All weights are trained by AdamW with a constant rate of 1e-5, and times are logit-normal, then
shifted: the usual choices of Wan's public trainers.
"""

import re

from ml_collections import ConfigDict, config_dict

from vdit.config import default
from vdit.config.identity import flat, value_of
from vdit.errors import UserError

# Fields that are the imported workdir's unless a flag sets them.
LEFT = re.compile(
    r"(text|sample)\..*|data\.(frames|size|fps)|vae\.(?!train|chunk).*"
    r"|dit\.(model|preset|patch|axes|text|window|process|prediction|learned_variance|shift)"
    r"|dit\.(wan|paper|unet)\..*"
)
# The transformer of each variant: dit.preset
SIZES = {"1.3b": "1536x30x12", "14b": "5120x40x40", "a14b": "5120x40x40", "5b": "3072x30x24"}


def smoke(config: ConfigDict) -> None:
    """Twelve steps on clips of nine frames of 32x48 pixels."""
    config.data.frames = 9
    config.data.size = (32, 48)
    config.latents.batch = 4
    config.dit.train.steps = 12
    config.dit.train.batch = 4
    config.dit.train.warmup = 2
    config.run.remat = "none"
    config.run.log_every = 1
    config.run.save_every = 6


def get_config(variant: str = "1.3b") -> ConfigDict:
    """Finetuning of all weights."""
    if variant not in (*SIZES, "smoke"):
        known = ", ".join((*SIZES, "smoke"))
        raise UserError(f"experiments/wan.py:{variant}: known variants are {known}")
    config = default()
    for part in config:
        for name, value in flat(config[part], part).items():
            if LEFT.fullmatch(name):
                kind = tuple if isinstance(value, list) else type(value)
                section, field = name.rsplit(".", 1)
                value_of(config, section)[field] = config_dict.placeholder(kind)
    config.stages = ("latents", "dit", "low") if variant == "a14b" else ("latents", "dit")
    config.data.source = "folder"
    config.data.path = ""  # set by --config.data.path=CLIPS
    config.data.heldout = 0.0
    config.vae.chunk = 4
    config.latents.batch = 8
    config.latents.shard = 64
    for name in config.dit.given:
        config.dit.given[name] = float(name == "text")
    config.dit.logit_normal = (0.0, 1.0)
    train = config.dit.train
    train.steps = 1000
    train.batch = 8
    train.accumulate = 1
    train.optimizer = "adamw"
    train.learning_rate = 1e-5
    train.adam_learning_rate = 0.0
    train.weight_decay = 0.01
    train.warmup = 100
    train.schedule = "constant"
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.run.remat = "full"
    config.run.unroll = 1
    if variant == "smoke":
        smoke(config)
    else:
        config.dit.preset = SIZES[variant]
    if variant == "5b":  # a third continues an image
        config.dit.given.text, config.dit.given.image = 0.7, 0.3
    return config
