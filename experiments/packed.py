"""Images and videos of several sizes, aspects, lengths and rates, packed side by side.

python -m vdit.main --config=experiments/packed.py
python -m vdit.main --config=experiments/packed.py:smoke    every stage in about a minute

The autoencoder learns on clips of 17 frames at 32x32; the DiT's data are five shapes in turn.
"""

from ml_collections import ConfigDict

from experiments import base
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The base experiment on packed rows; variant "smoke" at its size."""
    if variant not in ("", "smoke"):
        raise UserError(f"experiments/packed.py:{variant}: the known variant is smoke")
    config = base.get_config(variant)
    config.data.shapes = (
        (17, 32, 32, 10.0), (1, 32, 32, 10.0), (9, 24, 40, 10.0), (17, 40, 24, 10.0),
        (13, 32, 32, 5.0),
    )  # fmt: skip
    config.dit.train.batch = 16 if not variant else 4  # rows
    return config
