"""Several shots in one clip: the same characters, other places and cameras, hard cuts.

python -m vdit.main --config=experiments/shots.py
python -m vdit.main --config=experiments/shots.py:smoke    all stages in a minute, no quality

Each shot has a caption, and so has the clip: a token attends to its shot's and the clip's.
"""

from ml_collections import ConfigDict

from experiments import base
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The base experiment on clips of one to three shots; "smoke" at the size of base:smoke."""
    if variant not in ("", "smoke"):
        raise UserError(f"experiments/shots.py:{variant}: the known variant is smoke")
    config = base.get_config(variant)
    config.data.source = "shots"
    config.data.shots = (1, 3)
    config.data.frames = 33
    config.text.length = 160 if not variant else 700  # the clip's caption may hold all of them
    config.dit.caption_drop = 0.1
    config.vae.train.batch = 4  # clips of about twice the length
    if not variant:
        config.dit.train.batch = 16
        config.dit.train.accumulate = 2
    return config
