"""The DiT paper's XL on videos: four seconds at 256x256, 4,352 tokens per clip.

python -m tools.plan --config=experiments/xl.py --topology=v5e:8x8
python -m vdit.main --config=experiments/xl.py --config.data.path=FOLDER

Optimizer, batch and steps are those of Peebles and Xie 2023, section 4.
"""

from ml_collections import ConfigDict

from experiments import base
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The base experiment with DiT-XL, on a folder of videos."""
    if variant:
        raise UserError(f"experiments/xl.py:{variant}: it has no variants")
    config = base.get_config()
    config.sample.shift = config.sample.push = 0.0
    config.sample.steps = 25
    config.sample.eta = 1.0
    config.data.source = "folder"  # set by --config.data.path=FOLDER
    config.data.frames = 65
    config.data.size = (256, 256)
    config.data.fps = 16.0
    config.text.encoder = "minilm"
    config.text.length = 128
    config.vae.channels = 16
    config.vae.width = 512
    config.vae.heads = 8
    config.vae.encoder_depth = 4
    config.vae.decoder_depth = 8
    config.latents.clips = 1_000_000
    config.dit.preset = "XL"
    config.dit.patch = (2, 2)
    config.dit.train.steps = 400_000
    config.dit.train.batch = 256
    config.dit.train.accumulate = 1
    config.dit.train.optimizer = "adamw"
    config.dit.train.learning_rate = 1e-4
    config.dit.train.adam_learning_rate = 0.0
    config.dit.train.schedule = "constant"
    config.dit.train.ema = 0.9999
    config.sample.batch = 8
    config.run.unroll = 1
    config.run.remat = "full"
    config.run.save_every = 2000
    return config
