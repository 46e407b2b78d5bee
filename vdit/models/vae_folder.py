"""Pretrained autoencoders from a folder as diffusers writes it, and back: config.json and
diffusion_pytorch_model.safetensors (or shards of it).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdit.errors import UserError
from vdit.models import vae_causal, vae_kl, weights
from vdit.models.vae_conv import ConvVAE

STEM = "diffusion_pytorch_model"
# config.json's _class_name: the network, and the names of its tensors.
FAMILIES: dict[
    str,
    tuple[
        Callable[[Mapping[str, Any], Path], ConvVAE], Callable[[ConvVAE], tuple[weights.Row, ...]]
    ],
] = {
    "AutoencoderKL": (vae_kl.from_config, lambda model: vae_kl.ROWS),
    "AutoencoderKLWan": (vae_causal.from_config, vae_causal.rows),
}

# What two networks of one architecture share.
FIELDS = (
    "patch", "channels", "widths", "decoder_widths", "blocks", "causal", "groups", "pixels",
    "residual", "attention", "quantise",
)  # fmt: skip


def read_module(folder: str | Path) -> tuple[ConvVAE, weights.Plan]:
    """The network of a folder and the plan of its parameters; headers are read, no tensor.

    `UserError` for a folder of another model, or whose tensors do not fit.
    """
    folder = Path(folder)
    config = weights.read_config(folder, tuple(FAMILIES), "_class_name")
    make, rows = FAMILIES[config["_class_name"]]
    module = make(config, folder)
    video = jax.ShapeDtypeStruct((1, 1, *module.patch[1:], 3), jnp.float32)
    noise = jax.ShapeDtypeStruct((1, 1, 1, 1, module.channels), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), video, noise)["params"]
    tensors = weights.read_headers(folder, STEM)
    return module, weights.plan(tensors, shapes, rows(module), (), folder)


def read_statistics(folder: str | Path) -> dict[str, np.ndarray] | None:
    """Mean and deviation (Z,) by which a denoiser of this autoencoder's latents sees them.

    As `vdit.data.latents.Latents.statistics` gives them; None where a causal one's folder says
    neither; `UserError` for what are no numbers.
    """
    folder = Path(folder)
    config = weights.read_config(folder, tuple(FAMILIES), "_class_name")
    channels = FAMILIES[config["_class_name"]][0](config, folder).channels
    made: tuple[Any, Any]
    if config["_class_name"] == "AutoencoderKL":
        # One number for all channels, or one for each beside it.
        shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor", 0.18215)
        spread = config.get("latents_std") or [1.0] * channels
        made = config.get("latents_mean") or [shift] * channels, spread
    else:
        made = config.get("latents_mean"), config.get("latents_std")
        if made == (None, None):
            return None
    try:
        mean, std = (np.asarray(values, np.float64).reshape(channels) for values in made)
        if config["_class_name"] == "AutoencoderKL":
            std = std / np.float64(scale) if scale else np.zeros_like(std)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.json'}: the latents' mean and deviation are not {channels} numbers"
        ) from error
    mean, std = mean.astype(np.float32), std.astype(np.float32)
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise UserError(f"{folder / 'config.json'}: the latents' deviation must be above 0")
    return {"mean": mean, "std": std}


def to_folder(
    module: ConvVAE, statistics: Mapping[str, Any] | None
) -> tuple[dict[str, Any], tuple[weights.Row, ...]] | None:
    """The config.json and the names of the tensors of an autoencoder; None if diffusers has none.

    `statistics` are the latents' "mean" and "std" as lists, if they are known.
    """
    name, family = ("AutoencoderKLWan", vae_causal) if module.causal else ("AutoencoderKL", vae_kl)
    config = {"_class_name": name, **family.to_config(module)}
    make, rows = FAMILIES[name]
    try:
        theirs = make(config, Path())
    except UserError:
        return None
    if any(getattr(module, field) != getattr(theirs, field) for field in FIELDS):
        return None
    if statistics is not None:
        config |= family.scaling(list(statistics["mean"]), list(statistics["std"]))
    return config, rows(module)
