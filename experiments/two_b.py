"""Two billion parameters: five seconds at 480x832, 32,760 tokens per clip.

python -m tools.plan --config=experiments/two_b.py --topology=v5p:4x4x8
python -m vdit.main --config=experiments/two_b.py --config.data.path=FOLDER
"""

from ml_collections import ConfigDict

from experiments import xl
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The XL experiment with a larger denoiser and longer, larger clips."""
    if variant:
        raise UserError(f"experiments/two_b.py:{variant}: it has no variants")
    config = xl.get_config()
    config.data.frames = 81
    config.data.size = (480, 832)
    config.dit.preset = "2B"
    config.sample.batch = 1
    return config
