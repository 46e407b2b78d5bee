"""What is imported: for each stage a folder, the plan of its parameters, what is said of it."""

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
    """What a stage is imported from: a folder, the plan of its parameters, what is said of it.

    The plan's paths begin with the stage's groups of parameters if it has `groups`; else they are
    of its first. `finish` makes the stage's parameters of those that are read.
    """

    folder: Path
    plan: weights.Plan
    meta: dict[str, Any]
    groups: bool = False
    finish: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Import:
    """All that goes into a workdir."""

    config: ConfigDict
    parts: dict[str, Part]  # by stage
    files: dict[str, str]  # others of the workdir: name, content


def part_of(
    config: ConfigDict, stage: str, folder: Path, plan: weights.Plan, **more: Any
) -> Part:
    """A part whose checkpoint says what one that was trained here would."""
    return Part(folder, plan, stages.stage_meta(config, stage), **more)


def configured(changes: Mapping[str, Any]) -> ConfigDict:
    """The default configuration with these fields ("dit.patch") changed."""
    config = default()
    config.update_from_flattened_dict(dict(changes))
    return config


def shapes(config: ConfigDict, text: int) -> Any:
    """The abstract parameters of a denoiser with `text` numbers of each token of its text."""
    model, patch = build_dit(config), config.dit.patch
    x = jax.ShapeDtypeStruct((1, 1, config.vae.channels * patch[0] * patch[1]), jnp.float32)

    def init(x: jax.Array) -> Any:
        one = jnp.ones((1, 1), jnp.int32)
        layout = Layout(jnp.zeros((1, 1, 3)), one, one, None, (1, 1, 1))
        features = jnp.zeros((1, 1, text))
        told = Condition(features, one, one > 0, features, jnp.zeros((1, 1)), one[0])
        return model.init(jax.random.key(0), x, layout, told)["params"]

    return jax.eval_shape(init, x)
