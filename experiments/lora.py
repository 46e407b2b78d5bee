"""Low-rank adapters (LoRA) of a trained or imported workdir, learned from a folder of videos.

python -m vdit.main --config=experiments/lora.py:WORKDIR --workdir=NEW --config.data.path=FOLDER

The networks, the shape of clips and the sampling are those of WORKDIR/config.json. WORKDIR is only
read, and NEW refers to it.
"""

from ml_collections import ConfigDict

from vdit.config import default
from vdit.config.identity import read_config
from vdit.errors import UserError
from vdit.shipped import find


def wan(config: ConfigDict) -> None:
    """What experiments/wan.py changes for networks of billions of parameters, at ten times its
    rate."""
    config.dit.train.learning_rate = 1e-4
    config.dit.logit_normal = (0.0, 1.0)
    config.vae.chunk = 4
    config.latents.batch = 8
    config.latents.shard = 64
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.run.remat = "full"
    config.run.unroll = 1
    if config.dit.wan.boundary:  # two experts
        config.stages = ("latents", "dit", "low", "sample")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of the workdir `variant`, to train adapters of its denoiser."""
    if not variant:
        raise UserError("experiments/lora.py:WORKDIR needs the workdir of a trained denoiser")
    config = read_config(find(variant))
    data, trained = default().data, config.data
    data.frames, data.size, data.fps = trained.frames, trained.size, trained.fps
    data.source = "folder"
    data.stride = 0.1
    data.heldout = 0.0  # a handful of clips: all are learned from
    config.data = data
    config.init = ""
    config.stages = ("latents", "dit", "sample")
    config.dit.auxiliary = ()
    config.sample.ema = 0.0
    config.dit.lora = default().dit.lora
    config.dit.lora.base = variant
    config.dit.lora.rank = 16
    config.dit.train = default().dit.train
    config.dit.train.optimizer = "adamw"
    config.dit.train.learning_rate = 1e-3
    config.dit.train.adam_learning_rate = 0.0  # the same
    config.dit.train.steps = 300
    config.dit.train.batch = 8
    config.dit.train.accumulate = 1
    config.dit.train.schedule = "constant"
    config.dit.train.ema = 0.98
    if config.dit.model == "wan":
        wan(config)
    return config
