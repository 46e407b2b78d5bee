"""Shared by pipelines on the latents of Stable Diffusion's autoencoder: their statistics, vdit's
fields, noise schedules, and diffusers' transformer block.
"""

from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.published.family import layer, layers
from vdit.published.weights import CONFIG_BYTES, Row, check_fixed, read_json

PLACE = (1, 8, 8)  # frames, rows, columns of a latent place
ONE_TIME = ("prefix", "last", "first_last", "suffix", "between")  # of dit.given: no given tokens
# A scheduler's fields for each table, and vdit's names of predictions.
TABLES: dict[str, dict[str, Any]] = {
    "ddpm": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012
    },
}  # fmt: skip
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def sd_latents(channels: int) -> dict[str, list[float]]:
    """Mean and standard deviation of the latents, for denoisers without their autoencoder."""
    return {"mean": [0.0] * channels, "std": [1.0 / 0.18215] * channels}


def latent_fields(side: int, channels: int) -> dict[str, Any]:
    """vdit's fields for a denoiser of latents of `side` rows and columns."""
    return {
        "stages": ("dit",),
        "data.size": (side * PLACE[1], side * PLACE[2]),
        "vae.model": "kl",
        "vae.patch": PLACE,
        "vae.channels": channels,
        "dit.prediction": "eps",
        "dit.logit_normal": (),
        "dit.shift": 1.0,
        **{f"dit.given.{name}": 0.0 for name in ONE_TIME},
        "dit.given.text": 1.0,
        "sample.sampler": "ddim",
        "sample.eta": 0.0,
        "sample.steps": 50,
        "sample.batch": 4,
    }


def table_schedule(path: Path, process: str) -> dict[str, Any]:
    """vdit's fields from a scheduler_config.json, if it exists.

    `UserError` if its noise schedule is not vdit's `process`.
    """
    if not path.exists():
        return {"sample.spacing": "leading"}  # diffusers' default
    config = read_json(path, CONFIG_BYTES)
    fixed = {
        "num_train_timesteps": 1000, **TABLES[process], "clip_sample": False,
        "thresholding": False, "rescale_betas_zero_snr": False, "trained_betas": None,
    }  # fmt: skip
    check_fixed(config, fixed, path)
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in ("leading", "trailing"):
        raise UserError(f"{path}: timestep_spacing is {spacing!r}; allowed: leading, trailing")
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise UserError(f"{path}: prediction_type is {kind!r}; allowed: {', '.join(PREDICTIONS)}")
    return {"sample.spacing": spacing, "dit.prediction": PREDICTIONS[kind]}


def transformer_block(path: str, name: str) -> tuple[Row, ...]:
    """Self-attention, cross-attention to text, and MLP."""
    rows: tuple[Row, ...] = ()
    for ours, theirs in (("attention", "attn1"), ("text", "attn2")):
        rows += layer(f"{path}/{ours}/(?P<part>[qkv])", rf"{name}.{theirs}.to_\g<part>")
        rows += layer(f"{path}/{ours}/o", f"{name}.{theirs}.to_out.0")
    return rows + layers({"/up": "net.0.proj", "/down": "net.2"}, f"{path}/mlp", f"{name}.ff.")
