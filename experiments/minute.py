"""Sixty seconds of the base world in one pass, on two CPU cores: 2,416 tokens per clip.

python -m vdit.main --config=experiments/minute.py          two hours on one core
python -m vdit.main --config=experiments/minute.py:smoke    all stages in a minute, no quality

301 frames of 32x32 pixels at 5 per second: few enough for a few thousand tokens, enough to see a
body fall. Besides base's scores, `eval` generates the same held-out clips in one pass and in chunks
of six seconds, each conditioned on the second half of the one before, and measures for both how
long bodies persist and how far the picture drifts per second (rows "length" of metrics.jsonl, and
length.png).
"""

from ml_collections import ConfigDict

from experiments import base
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The base experiment on long clips; "smoke" has clips of six seconds in chunks of two."""
    if variant not in ("", "smoke"):
        raise UserError(f"experiments/minute.py:{variant}: known variants are ['smoke']")
    config = base.get_config(variant)
    config.data.fps = 5.0
    config.vae.patch = (2, 8, 8)
    if variant == "smoke":
        config.data.frames = 31
        config.eval.chunk = 2.0
        config.eval.given = 2
        return config
    config.data.frames = 301
    config.vae.channels = 16
    config.vae.train.batch = 1  # clips, with the frames of two batches of base
    config.vae.train.steps = 1500
    config.latents.clips = 2500
    config.latents.batch = 4
    config.latents.shard = 100
    config.dit.axes = "factorised"  # a step takes .3 of the time of joint attention
    config.dit.train.batch = 8
    config.dit.train.accumulate = 8
    config.dit.train.steps = 1200
    config.sample.batch = 4
    config.eval.captions = 32
    config.eval.given = 16
    config.eval.chunk = 6.0
    return config
