"""A prepared TensorFlow Datasets video set of ArrayRecord files, read without TensorFlow.

python -m vdit.main --config=experiments/tfds.py --config.data.path=DATA_DIR
python -m vdit.main --config=experiments/tfds.py:smoke --config.data.path=DATA_DIR

If DATA_DIR holds several sets, --config.data.name=SET chooses one; a set without a frame rate needs
--config.data.native_fps=RATE. A set of the world's clips is written by:

python -m tools.tfds_export --config=experiments/base.py --out=DATA_DIR --clips=12000
"""

from ml_collections import ConfigDict

from experiments import base
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The base experiment on a TFDS set; "smoke" runs a few steps."""
    if variant not in ("", "smoke"):
        raise UserError(f"experiments/tfds.py:{variant}: known variants are ['smoke']")
    config = base.get_config(variant)
    config.data.source = "tfds"
    config.data.path = ""  # set by --config.data.path=DATA_DIR
    config.text.length = 512  # 200 words; a training step reads as many as the longest caption has
    return config
