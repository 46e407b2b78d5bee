"""Imports a ViT or ViViT as a classifier, or as the initialisation of another one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vdit.config import joined
from vdit.config.classifier import answer_counts, build_classifier
from vdit.errors import UserError
from vdit.models import vivit
from vdit.published import vivit_folder
from vdit.published.stable_diffusion import PLACE
from vdit.runtime.progress import say

from . import inflation

Finish = Callable[[Any], Any]  # a folder's parameters to the network's


class Target(NamedTuple):
    """A classifier that is initialised from other weights."""

    config: ConfigDict
    start: Callable[[jax.Array, int], jax.Array]  # initialises the tubelet embedding


STARTS = {"central": inflation.central_frame, "inflate": inflation.inflate}


def preset_name(model: vivit.ViViT) -> str:
    """The name by which `vivit.preset` gives a model's sizes; its tubelets are square."""
    sizes = {"width": model.width, "depth": model.depth, "heads": model.heads}
    named = [name for name, row in vivit.SIZES.items() if sizes.items() <= row.items()]
    size = named[0] if named else "x".join(map(str, sizes.values()))
    return f"{size}/{model.patch[1]}x{model.patch[0]}"


def fields(found: vivit_folder.Found) -> dict[str, Any]:
    """vdit's fields for a folder's network."""
    model = found.model
    return {
        "stages": ("classify",), "data.objects": (1, 1), "data.frames": found.frames,
        "data.size": found.size, "vae.patch": PLACE,
        "classify.preset": preset_name(model), "classify.activation": model.activation,
        "classify.mlp_ratio": model.mlp_ratio, "classify.epsilon": model.epsilon,
        "classify.classes": model.classes,
    }  # fmt: skip


def with_head(found: vivit_folder.Found, config: ConfigDict) -> Finish:
    """Adds a zero head to a network without one."""
    answers = sum(answer_counts(config).values())

    def finish(params: Any) -> Any:
        folded = vivit_folder.folded(params)
        if not found.model.classes:
            zeros = jnp.zeros((found.model.width, answers))
            folded["head"] = {"kernel": zeros, "bias": zeros[0]}
        return folded

    return finish


def started(folder: Path, found: vivit_folder.Found, target: Target) -> Finish:
    """Initialises the target network from a folder's parameters.

    `UserError` if their architectures do not match.
    """
    config, theirs = target.config, found.model
    joined.check(config)
    ours = build_classifier(config)

    def times(model: vivit.ViViT, frames: int) -> tuple[int, int]:
        return model.patch[0], (model.samples or frames) // model.patch[0]

    pairs: dict[str, tuple[Any, Any]] = {
        "width of classify.preset": (ours.width, theirs.width),
        "depth of classify.preset": (ours.depth, theirs.depth),
        "heads of classify.preset": (ours.heads, theirs.heads),
        "rows and columns of classify.preset's tubelet": (ours.patch[1:], theirs.patch[1:]),
        "classify.activation": (ours.activation, theirs.activation),
        "classify.mlp_ratio": (ours.mlp_ratio, theirs.mlp_ratio),
        "classify.epsilon": (ours.epsilon, theirs.epsilon),
    }  # fmt: skip
    if found.frames > 1:
        pairs["frames of a tubelet, and tubelets in data.frames"] = (
            times(ours, config.data.frames), times(theirs, found.frames)
        )  # fmt: skip
    for name, (mine, other) in pairs.items():
        if mine != other:
            raise UserError(f"--config: {name} is {mine}; allowed by {folder}: {other}")

    old = theirs.position_grid(found.frames, *found.size)
    new = ours.position_grid(config.data.frames, *config.data.size)
    if old[1:] != new[1:]:
        say(f"{folder}: positions of {old[1:]} tubelets are interpolated to {new[1:]}")

    def finish(params: Any) -> Any:
        video = jnp.zeros((1, config.data.frames, *config.data.size, 3))
        fresh = ours.init(jax.random.key(config.seed), video)["params"]
        image = jax.tree.map(lambda x: x.astype(jnp.float32), vivit_folder.folded(params))
        return inflation.from_image(image, fresh, old, new, target.start)

    return finish
