"""Your own films, MP4, WebM, AVI or GIF, in a folder with captions, at 64x64 pixels.

python -m vdit.main --config=experiments/folder.py --config.data.path=FOLDER
python -m vdit.main --config=experiments/folder.py:smoke --config.data.path=FOLDER

Captions: a text file for each clip (clip.mp4, clip.txt), or one captions.jsonl or captions.csv with
the columns file, caption and, for parts of longer videos, start and end in seconds.
"""

from ml_collections import ConfigDict

from experiments import base
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The base experiment on a folder; "smoke" runs a few steps."""
    if variant not in ("", "smoke"):
        raise UserError(f"experiments/folder.py:{variant}: known variants are ['smoke']")
    config = base.get_config(variant)
    config.data.source = "folder"
    config.data.path = ""  # set by --config.data.path=FOLDER
    config.data.stride = 0.1
    config.text.length = 512  # 200 words; a training step reads as many as the longest caption has
    config.sample.clips = 4
    if not variant:
        config.data.size = (64, 64)
        config.sample.zoom = 4
        config.latents.clips = 20_000
        config.vae.channels = 32
        config.vae.train.steps = 1700
        config.dit.train.steps = 1700
        config.dit.train.batch = 12  # five times the tokens of the base experiment
    return config
