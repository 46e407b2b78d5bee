"""What the folder of a ViT or ViViT becomes: the classifier that it is, or the start of another."""

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

Finish = Callable[[Any], Any]  # from a folder's parameters to a network's


class Target(NamedTuple):
    """The classifier that an image model's weights are the start of."""

    config: ConfigDict
    start: Callable[[jax.Array, int], jax.Array]  # of a tubelet's kernel


STARTS = {"central": vivit.central_frame, "inflate": vivit.inflate}


def fields(found: vivit_folder.Found) -> dict[str, Any]:
    """The configuration of a folder's network as it is."""
    model = found.model
    return {
        "stages": ("classify",), "data.objects": (1, 1), "data.frames": found.frames,
        "data.size": found.size, "vae.patch": PLACE,
        "classify.preset": vivit.preset_name(model), "classify.activation": model.activation,
        "classify.mlp_ratio": model.mlp_ratio, "classify.epsilon": model.epsilon,
        "classify.classes": model.classes,
    }  # fmt: skip


def with_head(found: vivit_folder.Found, config: ConfigDict) -> Finish:
    """A folder's network as it is, with a new head where it has none."""
    answers = sum(answer_counts(config).values())

    def finish(params: Any) -> Any:
        made = vivit_folder.folded(params)
        if not found.model.classes:
            zeros = jnp.zeros((found.model.width, answers))
            made["head"] = {"kernel": zeros, "bias": zeros[0]}
        return made

    return finish


def started(folder: Path, found: vivit_folder.Found, target: Target) -> Finish:
    """From a folder's parameters to those of a network that starts from them.

    `UserError` for one that cannot.
    """
    config, theirs = target.config, found.model
    joined.check(config)
    ours = build_classifier(config)

    def times(model: vivit.ViViT, frames: int) -> tuple[int, int]:
        return model.patch[0], (model.samples or frames) // model.patch[0]

    alike: dict[str, tuple[Any, Any]] = {
        "width of classify.preset": (ours.width, theirs.width),
        "depth of classify.preset": (ours.depth, theirs.depth),
        "heads of classify.preset": (ours.heads, theirs.heads),
        "rows and columns of classify.preset's tubelet": (ours.patch[1:], theirs.patch[1:]),
        "classify.activation": (ours.activation, theirs.activation),
        "classify.mlp_ratio": (ours.mlp_ratio, theirs.mlp_ratio),
        "classify.epsilon": (ours.epsilon, theirs.epsilon),
    }  # fmt: skip
    if found.frames > 1:
        alike["frames of a tubelet, and tubelets in data.frames"] = (
            times(ours, config.data.frames), times(theirs, found.frames)
        )  # fmt: skip
    for name, (mine, other) in alike.items():
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
        return vivit.from_image(image, fresh, old, new, target.start)

    return finish
