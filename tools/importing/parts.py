"""What is imported: for each stage a folder, the plan of its parameters, and metadata."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vdit import stages
from vdit.config import default
from vdit.config.denoiser import build_dit
from vdit.published import weights
from vdit.tokens import Condition, Layout


@dataclass(frozen=True)
class Part:
    """The source of a stage: a folder, the plan of its parameters, and its checkpoint's metadata.

    With `groups`, the plan's paths start with the stage's groups of parameters; else they belong to
    its first group. `finish` converts the parameters that are read to the stage's.
    """

    folder: Path
    plan: weights.Plan
    meta: dict[str, Any]
    groups: bool = False
    finish: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Import:
    """The contents of a workdir."""

    config: ConfigDict
    parts: dict[str, Part]  # by stage
    files: dict[str, str]  # further files: name, content


def part_of(config: ConfigDict, stage: str, folder: Path, plan: weights.Plan, **more: Any) -> Part:
    """A part with the metadata of a checkpoint that was trained here."""
    return Part(folder, plan, stages.stage_meta(config, stage), **more)


def configured(changes: Mapping[str, Any]) -> ConfigDict:
    """The default configuration with changed fields ("dit.patch")."""
    config = default()
    config.update_from_flattened_dict(dict(changes))
    return config


def denoiser_shapes(config: ConfigDict, text: int) -> Any:
    """The abstract parameters of a denoiser whose text features have width `text`."""
    model, patch = build_dit(config), config.dit.patch
    x = jax.ShapeDtypeStruct((1, 1, config.vae.channels * patch[0] * patch[1]), jnp.float32)

    def init(x: jax.Array) -> Any:
        one = jnp.ones((1, 1), jnp.int32)
        layout = Layout(jnp.zeros((1, 1, 3)), one, one, None, (1, 1, 1))
        features = jnp.zeros((1, 1, text))
        condition = Condition(features, one, one > 0, features, jnp.zeros((1, 1)), one[0])
        return model.init(jax.random.key(0), x, layout, condition)["params"]

    return jax.eval_shape(init, x)
