"""Ten billion parameters: text to video, five seconds at 720x1280, 75,600 tokens per clip.

python -m tools.plan --config=experiments/ten_b.py --topology=v5p:4x4x8 --mesh=fsdp:32,sequence:4
python -m vdit.main --config=experiments/ten_b.py --config.data.path=FOLDER
python -m vdit.main --config=experiments/ten_b.py:smoke     all stages in a minute, no quality
"""

from ml_collections import ConfigDict

from experiments import base, two_b
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The two-billion experiment with a larger denoiser and larger frames; "smoke" is base's."""
    if variant == "smoke":
        return base.get_config("smoke")
    if variant:
        raise UserError(f"experiments/ten_b.py:{variant}: known variants are ['smoke']")
    config = two_b.get_config()
    config.data.size = (720, 1280)
    config.dit.preset = "10B"
    config.dit.train.batch = 128
    config.dit.train.accumulate = 4
    config.dit.train.steps = 200_000
    return config
