"""The U-Net of latent diffusion, with layers over time, trained as Stable Diffusion is: noise
prediction, 1,000 scaled-linear betas, text by cross-attention.

python -m vdit.main --config=experiments/unet.py
python -m vdit.main --config=experiments/unet.py:flow     with the base experiment's process
python -m vdit.main --config=experiments/unet.py:smoke    all stages, no quality

Data, autoencoder, text, training and scores are the base experiment's, and a clip takes about as
many multiplications as in its DiT. The U-Net has one noise level for all tokens, so no frames can
be given.
"""

from ml_collections import ConfigDict

from experiments import base
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The base experiment with the U-Net; variants "flow", "smoke", or "flow+smoke"."""
    names = variant.split("+") if variant else []
    if unknown := [name for name in names if name not in ("flow", "smoke")]:
        raise UserError(f"experiments/unet.py:{unknown[0]}: known variants are ['flow', 'smoke']")
    config = base.get_config("smoke" if "smoke" in names else "")
    dit = config.dit
    dit.model = "unet"
    dit.preset = "nano"  # the size of DiTs alone
    dit.unet.widths = (48, 96)  # latents are 4x4
    dit.unet.heads = (2, 4)
    dit.unet.depths = (1, 1)
    dit.unet.blocks = 1
    dit.unet.groups = 16
    dit.train.adam_learning_rate = 1e-3  # of convolutions
    for name in dit.given:
        dit.given[name] = float(name == "text")
    config.sample.push = 0.0
    if "flow" not in names:
        dit.process = "scaled_linear"
        dit.prediction = "eps"
        dit.logit_normal = ()
        dit.shift = 1.0
        config.sample.shift = 0.0
        config.sample.eta = 1.0
        config.sample.steps = 50
    if "smoke" in names:
        dit.unet.widths = (16, 16)
        dit.unet.heads = (2, 2)
        dit.unet.groups = 8
        config.sample.steps = 3
    return config
