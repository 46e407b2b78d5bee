"""The base world for sixty seconds in one pass, on two CPU cores: 2,416 tokens a clip.

python -m vdit.main --config=experiments/minute.py          two hours of one core
python -m vdit.main --config=experiments/minute.py:smoke    moments: every stage, no quality

301 frames of 32x32 at 5 a second: low enough a rate that a minute is a few thousand tokens, high
enough that a fall is seen. Beside base's scores `eval` makes the same held-out clips in one pass
and six seconds at a time, each chunk given the later half of the one before, and says for both how
long bodies stay whole and what the picture drifts by in a second (rows "length" of metrics.jsonl;
length.png shows them).
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
    config.vae.train.batch = 1  # clips: as many frames as two of base's batches have
    config.vae.train.steps = 1500
    config.latents.clips = 2500
    config.latents.batch = 4
    config.latents.shard = 100
    config.dit.axes = "factorised"  # a step takes .3 of the time that it takes by joint attention
    config.dit.train.batch = 8
    config.dit.train.accumulate = 8
    config.dit.train.steps = 1200
    config.sample.batch = 4
    config.eval.captions = 32
    config.eval.given = 16
    config.eval.chunk = 6.0
    return config
