"""A ViViT classifies clips: how their one body moves, and how often it hits something.

python -m vdit.main --config=experiments/vivit.py
python -m vdit.main --config=experiments/vivit.py --config.classify.model=factorised_encoder
python -m vdit.main --config=experiments/vivit.py:smoke     a few steps, no quality

Held-out bodies have combinations of shape, colour, size and motion that training never shows. Their
accuracy is heldout_accuracy_NAME in metrics.jsonl, next to that of the most frequent answer.
"""

from ml_collections import ConfigDict

from vdit.config import default
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """Stage classify alone, on one-object clips; "smoke" runs a few steps."""
    if variant not in ("", "smoke"):
        raise UserError(f"experiments/vivit.py:{variant}: known variants are ['smoke']")
    config = default()
    config.stages = ("classify",)
    config.data.objects = (1, 1)
    if variant == "smoke":
        config.classify.preset = "smoke/8x4"
        config.classify.heldout = 16
        config.classify.train.steps = 8
        config.classify.train.batch = 8
        config.classify.train.warmup = 2
        config.run.log_every = 4
        config.run.save_every = 4
        config.run.unroll = 1
    return config
