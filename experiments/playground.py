"""Characters, materials, four places, moving cameras, ramps, towers, springs and pours.

python -m vdit.main --config=experiments/playground.py
python -m vdit.main --config=experiments/playground.py:shots     one to three shots per clip
python -m vdit.main --config=experiments/playground.py:smoke     all stages in a minute, no quality
python -m vdit.main --config=experiments/playground.py:shots_smoke

Clips of four seconds at 64x64 pixels, with captions of five to about two hundred words; clips of
several shots have a caption for each shot and one for the clip.
"""

from ml_collections import ConfigDict

from experiments import base
from vdit.errors import UserError

VARIANTS = ("", "shots", "smoke", "shots_smoke")


def get_config(variant: str = "") -> ConfigDict:
    """The base experiment on playgrounds; "shots" with cuts; "smoke" small, with two seconds."""
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS[1:])
        raise UserError(f"experiments/playground.py:{variant}: known variants are {known}")
    shots, smoke = variant.startswith("shots"), variant.endswith("smoke")
    config = base.get_config("smoke" if smoke else "")
    config.data.source = "playground"
    config.data.objects = (1, 6)
    config.data.size = (64, 64)
    config.data.fps = 12.0
    config.data.frames = 49 if not smoke else 25
    config.data.detail = 2
    # In tokens: more with a small vocabulary, and for unseen words (paraphrases).
    config.text.length = 800 if not smoke else 1200
    config.vae.train.batch = 2
    config.latents.clips = 6000
    config.latents.batch = 16
    config.dit.patch = (2, 2)  # 208 tokens per clip
    config.dit.train.steps = 1600
    config.sample.batch = 8
    config.sample.zoom = 4
    config.eval.captions, config.eval.paraphrases, config.eval.given = 128, 64, 32
    if shots:
        config.data.shots = (1, 3) if not smoke else (1, 2)  # each at least a second long
        config.dit.caption_drop = 0.1
    if smoke:
        config.vae.train.steps = config.dit.train.steps = 8
        config.latents.clips = config.latents.shard = 16
        config.dit.train.batch = 4
        config.dit.train.accumulate = 1
        config.sample.clips, config.eval.captions, config.eval.given = 2, 4, 2
    return config
