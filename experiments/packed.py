"""Images and videos of several sizes, aspects, lengths and rates, packed into rows.

python -m vdit.main --config=experiments/packed.py
python -m vdit.main --config=experiments/packed.py:smoke    all stages in a minute, no quality

The autoencoder trains on clips of 17 frames of 32x32 pixels, the DiT on five shapes in turn.
"""

from ml_collections import ConfigDict

from experiments import base
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The base experiment on packed rows; "smoke" at the size of base:smoke."""
    if variant not in ("", "smoke"):
        raise UserError(f"experiments/packed.py:{variant}: the known variant is smoke")
    config = base.get_config(variant)
    config.data.shapes = (
        (17, 32, 32, 10.0), (1, 32, 32, 10.0), (9, 24, 40, 10.0), (17, 40, 24, 10.0),
        (13, 32, 32, 5.0),
    )  # fmt: skip
    config.dit.train.batch = 16 if not variant else 4  # rows
    return config
