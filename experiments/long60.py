"""Sixty seconds in one pass: 1,441 frames of 720x1280 pixels at 24 per second.

python -m tools.plan --config=experiments/long60.py --topology=v5p:4x4x8 --mesh=fsdp:16,sequence:8
python -m tools.plan --config=experiments/long60.py:fine --topology=v5p:8x8x8
python -m vdit.main --config=experiments/long60.py --config.data.path=FOLDER
python -m vdit.main --config=experiments/long60.py:smoke     all stages in a minute, no quality

The autoencoder compresses 8 frames, 32 rows and 32 columns into 128 channels: 192 times fewer
numbers, as in LTX-Video (HaCohen et al. 2025, arXiv:2501.00103). That sets the cost of a minute in
one pass, since attention is quadratic in the tokens: 181 x 23 x 40 = 166,520, without patches.
Half the spatial strides would be 4 times the tokens and 16 times the attention. 8 frames are a
third of a second, whose motion 128 channels can hold. 32 does not divide 720 rows: they are padded
to 736, and the decoder's output is cropped.

:fine has latents of 4x8x8 with 16 channels and patches of 2x2: 361 x 45 x 80 = 1,299,600 tokens, 61
times the attention, for 512 chips; keys also pass round a ring.
"""

from ml_collections import ConfigDict

from experiments import base, two_b
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The two-billion experiment on one-minute clips."""
    if variant not in ("", "fine", "smoke"):
        raise UserError(f"experiments/long60.py:{variant}: known variants are ['fine', 'smoke']")
    if variant == "smoke":
        return smoke()
    config = two_b.get_config()
    config.data.frames = 1441
    config.data.size = (720, 1280)
    config.data.fps = 24.0
    config.data.stride = 30.0
    config.text.length = 256
    config.latents.batch = 1
    config.latents.shard = 16
    config.dit.train.steps = 100_000
    config.dit.train.batch = 64
    if variant == "fine":
        config.vae.patch = (4, 8, 8)
        config.vae.channels = 16
        config.dit.train.batch = 2
        return config
    config.vae.patch = (8, 32, 32)
    config.vae.channels = 128
    config.dit.patch = (1, 1)
    return config


def smoke() -> ConfigDict:
    """base:smoke with the same strides, and rows that they do not divide."""
    config = base.get_config("smoke")
    config.data.size = (40, 64)
    config.vae.patch = (8, 32, 32)
    config.vae.channels = 32
    return config
