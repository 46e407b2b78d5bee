"""Six abilities in one model: characters with faces in several shots, by long captions, on a CPU.

python -m vdit.main --config=experiments/sora.py
python -m vdit.main --config=experiments/sora.py --config.init=sora    with the autoencoder of the
                                                                  package, which took an hour
python -m vdit.main --config=experiments/sora.py:smoke    all stages in a minute, no quality

Clips of four seconds at 64x64 pixels: one to four characters of four materials in four places, one
to three shots, five cameras; captions of five to some two hundred words, one for each shot and one
for the clip.
"""

from ml_collections import ConfigDict

from experiments import playground
from vdit.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """The playground with shots, in tokens of 4x16x16 pixels and 256 numbers, with the simulator's
    truth in the objectives of both stages."""
    if variant not in ("", "smoke"):
        raise UserError(f"experiments/sora.py:{variant}: the known variant is smoke")
    config = playground.get_config("shots_smoke" if variant else "shots")
    config.data.objects = (1, 4)
    config.vae.body_weight = 8.0
    config.data.fps = 8.0
    config.data.frames = 33 if not variant else 17
    config.vae.patch = (4, 4, 4)
    config.vae.channels = 16
    config.dit.patch = (4, 4)
    if not variant:
        config.vae.encoder_depth, config.vae.decoder_depth = 2, 3
        config.vae.detail = 384
        config.vae.kl_weight = 1e-4
        config.vae.crop = (32, 2)
        config.vae.train.batch = 4
        config.vae.train.steps = 6000
        config.latents.clips = 12_000
        config.dit.preset = "256x4x8"
        config.dit.train.steps = 6000
        config.dit.train.ema = 0.998
    return config
