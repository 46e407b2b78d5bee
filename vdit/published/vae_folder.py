"""Autoencoders in diffusers' folders, read by their family (`families.FAMILIES`)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdit.errors import UserError
from vdit.models.vae_conv import ConvVAE
from vdit.published import families, weights
from vdit.published.family import Autoencoder

STEM = "diffusion_pytorch_model"
FAMILIES = {name: family for family in families.of(Autoencoder).values() for name in family.classes}

# Fields that determine the architecture.
FIELDS = (
    "patch", "channels", "widths", "decoder_widths", "blocks", "causal", "groups", "pixels",
    "residual", "attention", "quantise",
)  # fmt: skip


def _read(folder: Path) -> tuple[dict[str, Any], Autoencoder, ConvVAE]:
    """A folder's config.json, its family and the network."""
    config = weights.read_config(folder, tuple(FAMILIES), "_class_name")
    family = FAMILIES[config["_class_name"]]
    return config, family, family.from_config(config, folder)


def read_module(folder: str | Path) -> tuple[ConvVAE, weights.Plan]:
    """The network of a folder and the plan of its parameters; reads headers, no tensor data.

    `UserError` for another network, or tensors that do not fit.
    """
    folder = Path(folder)
    _, family, module = _read(folder)
    video = jax.ShapeDtypeStruct((1, 1, *module.patch[1:], 3), jnp.float32)
    noise = jax.ShapeDtypeStruct((1, 1, 1, 1, module.channels), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), video, noise)["params"]
    tensors = weights.read_headers(folder, STEM)
    return module, weights.plan(tensors, shapes, family.rows(module), (), folder)


def read_statistics(folder: str | Path) -> dict[str, np.ndarray] | None:
    """Mean and standard deviation (Z,) by which latents are normalised for a denoiser.

    As `vdit.data.latents.Latents.statistics` gives them; None if the folder has none; `UserError`
    if they are not numbers.
    """
    folder = Path(folder)
    config, family, module = _read(folder)
    try:
        found = family.statistics(config, module.channels)
        if found is None:
            return None
        mean, std = (np.asarray(x, np.float64).reshape(module.channels) for x in found)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.json'}: the latents' mean and deviation are not"
            f" {module.channels} numbers"
        ) from error
    mean, std = mean.astype(np.float32), std.astype(np.float32)
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise UserError(f"{folder / 'config.json'}: the latents' deviation must be above 0")
    return {"mean": mean, "std": std}
