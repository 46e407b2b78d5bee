"""Text to video of falling, thrown and rolling bodies, on two CPU cores.

python -m vdit.main --config=experiments/base.py            15 minutes, with AVX512-BF16
python -m vdit.main --config=experiments/base.py:long       about an hour
python -m vdit.main --config=experiments/base.py:fine       latents of 4x4 pixels
python -m vdit.main --config=experiments/base.py:ddpm       DDPM's Algorithms 1 and 2, T = 1000
python -m vdit.main --config=experiments/base.py:iddpm      learned variance, 100 sampling steps
python -m vdit.main --config=experiments/base.py:smoke      all stages in a minute, no quality
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vdit.config import default
from vdit.errors import UserError


def long(config: ConfigDict) -> None:
    """`fine` with a DiT three times as large, and more steps of both stages: about an hour."""
    fine(config)
    config.vae.train.steps = 4000
    config.latents.clips = 30_000
    config.dit.preset = "micro"
    config.dit.train.steps = 5500
    config.dit.train.ema = 0.998


def fine(config: ConfigDict) -> None:
    """Latents of 4x4 pixels, four per token, from an autoencoder of half the width.

    Bodies are seven pixels wide: one latent seldom covers two of them, as 8x8 pixels often do.
    """
    config.vae.patch = (4, 4, 4)
    config.vae.channels = 8
    config.vae.width = 64
    config.vae.heads = 2
    config.vae.detail = 256
    config.vae.kl_weight = 1e-4
    config.dit.patch = (2, 2)
    config.dit.train.steps = 2600


def ddpm(config: ConfigDict) -> None:
    """Ho et al. 2020: eps prediction, linear betas, T = 1000, ancestral sampling."""
    config.dit.process = "ddpm"
    config.dit.prediction = "eps"
    config.dit.logit_normal = ()
    config.dit.train.steps = 2600
    config.dit.shift = 1.0
    config.sample.shift = config.sample.push = 0.0
    config.sample.sampler = "ddpm"
    config.sample.steps = 1000
    config.sample.clips = 8
    config.eval.captions = 64
    config.eval.paraphrases = config.eval.given = 16


def iddpm(config: ConfigDict) -> None:
    """Nichol and Dhariwal 2021: variance learned with the hybrid loss, respaced sampling."""
    ddpm(config)
    config.dit.learned_variance = True
    config.sample.variance = "learned"
    config.sample.steps = 100


def smoke(config: ConfigDict) -> None:
    """All stages in a minute, too small to learn anything."""
    config.vae.width = 32
    config.vae.heads = 2
    config.vae.encoder_depth = config.vae.decoder_depth = 1
    config.vae.detail = 32
    config.vae.channels = 8
    config.vae.train.steps = config.dit.train.steps = 12
    config.vae.train.batch = config.dit.train.batch = 8
    config.dit.train.accumulate = 1
    config.vae.train.warmup = config.dit.train.warmup = 2
    config.latents.clips = 64
    config.latents.batch = config.latents.shard = 32
    config.text.width = 32
    config.text.heads = 2
    config.text.depth = 1
    config.text.vocab = 320
    config.text.length = 160
    config.dit.preset = "smoke"
    config.sample.steps = 3
    config.sample.push = 0.0
    config.sample.clips = 4
    config.sample.batch = 8
    config.eval.captions = 8
    config.eval.paraphrases = config.eval.given = 4
    config.run.log_every = 4
    config.run.save_every = 6
    config.run.unroll = 1


VARIANTS: dict[str, Callable[[ConfigDict], None]] = {
    "long": long,
    "fine": fine,
    "ddpm": ddpm,
    "iddpm": iddpm,
    "smoke": smoke,
}


def get_config(variant: str = "") -> ConfigDict:
    """The defaults with sampling times nearer to noise and autoguidance, changed by the variant.

    16 videos at a time: the activations of more do not fit the CPU's caches.
    """
    config = default()
    config.sample.eta = 0.0
    config.sample.steps = 12
    config.sample.shift = 8.0
    config.sample.push = 1.0
    config.sample.batch = 16
    if variant:
        if variant not in VARIANTS:
            raise UserError(f"experiments/base.py:{variant}: known variants are {sorted(VARIANTS)}")
        VARIANTS[variant](config)
    return config
