"""Compares an imported network with stored activations of a reference, block by block.

`tools/golden/activations.py` writes the file of activations where the reference runs: the inputs
of the network ("in/x" and so on) and the outputs of its blocks, channels last, under the
reference's names ("out/transformer_blocks.0"). The import plan maps a block to a module here: the
one whose parameters are read from the block's tensors.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from vdit.errors import UserError
from vdit.models.dit_paper import DiTPaper
from vdit.models.unet import UNet
from vdit.models.vae_conv import ConvVAE
from vdit.models.vivit import ViViT
from vdit.published.weights import Plan
from vdit.tokens import Condition, class_condition, dense_tokens, text_condition


class Row(NamedTuple):
    """One block: the largest and mean absolute difference, and the largest reference."""

    name: str
    largest: float
    mean: float
    reference: float


class Stored(NamedTuple):
    """A file of activations."""

    path: Path
    given: dict[str, np.ndarray]
    blocks: dict[str, np.ndarray]  # in the reference's order


class Place(NamedTuple):
    """A module by its path, and the layer within a stack."""

    path: tuple[str, ...]
    layer: int | None


def read(path: Path) -> Stored:
    """Loads a file of activations without unpickling."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    given, blocks = (
        {name.removeprefix(kind): v for name, v in arrays.items() if name.startswith(kind)}
        for kind in ("in/", "out/")
    )
    if not given or not blocks:
        raise UserError(f"{path} holds no activations: arrays in/NAME and out/BLOCK are expected")
    return Stored(path, given, blocks)


def place(name: str, plan: Plan) -> Place | None:
    """The module with exactly the parameters read from a block's tensors; None if there is none."""
    paths, layers = [], set()
    for path, source in plan.items():
        if len(source.tensors) > 1 and not source.stacked:
            continue  # repeated in every block of the file, shared here
        for layer, (tensor, _) in enumerate(source.tensors):
            if tensor.startswith(f"{name}."):
                paths.append(path[:-1])
                layers.add(layer if source.stacked else None)
    if not paths:
        return None
    return Place(tuple(os.path.commonprefix(paths)), layers.pop() if len(layers) == 1 else None)


def fits(stored: Stored, plan: Plan) -> bool:
    """Whether the stored blocks belong to the network of a plan."""
    return all(place(name, plan) is not None for name in stored.blocks)


# --------------------------------------------------------------------------------------------------
# Inputs of each network

Call = tuple[str, tuple[Any, ...]]  # method name and arguments
Given = Mapping[str, np.ndarray]


def _told(given: Given) -> Condition:
    """The condition of stored inputs."""
    time = jnp.asarray(given["time"], jnp.float32)
    if "label" in given:
        return class_condition(jnp.asarray(given["label"], jnp.int32), time)
    text, mask = jnp.asarray(given["text"]), jnp.asarray(given["mask"])
    pooled = jnp.zeros((len(text), 1, text.shape[-1]))
    return text_condition(text[:, None], mask[:, None], pooled, time[:, None])


def _denoiser(patch: tuple[int, int], given: Given) -> list[Call]:
    """x (B, T, h, w, Z), time (B,), and label (B,), or text (B, S, E) with mask (B, S)."""
    x = jnp.asarray(given["x"])
    zeros = jnp.zeros(x.shape[:2])
    tokens, layout = dense_tokens(x, patch, zeros, zeros > 0)
    return [("__call__", (tokens, layout, _told(given)))]


def _paper(model: DiTPaper, given: Given) -> list[Call]:
    return _denoiser(model.patch, given)


def _unet(model: UNet, given: Given) -> list[Call]:
    del model
    return _denoiser((1, 1), given)


def _autoencoder(model: ConvVAE, given: Given) -> list[Call]:
    """video (B, T, H, W, 3) and latent (B, t, h, w, Z)."""
    del model
    video, latent = (jnp.asarray(given[name]) for name in ("video", "latent"))
    return [("encode", (video,)), ("decode", (latent,))]


def _classifier(model: ViViT, given: Given) -> list[Call]:
    """video (B, T, H, W, 3)."""
    del model
    return [("__call__", (jnp.asarray(given["video"]),))]


CALLS: dict[type, Callable[[Any, Given], list[Call]]] = {
    DiTPaper: _paper, UNet: _unet, ConvVAE: _autoencoder, ViViT: _classifier,
}  # fmt: skip


def activations(
    model: Any, params: Any, stored: Stored, places: Mapping[str, Place]
) -> dict[str, jax.Array]:
    """Outputs of the network here for the stored inputs, block by block."""
    wanted = {place.path for place in places.values()}
    try:
        calls = CALLS[type(model)](model, stored.given)
    except KeyError as error:
        raise UserError(f"{stored.path} has no input {error.args[0]}") from error

    def chosen(module: Any, method: str) -> bool:
        return method == "__call__" and module.path in wanted

    made: dict[tuple[str, ...], Any] = {}
    for method, arguments in calls:
        apply: Any = functools.partial(
            model.apply, method=method, capture_intermediates=chosen, mutable=["intermediates"]
        )
        try:
            _, found = jax.jit(apply)({"params": params}, *arguments)
        except (TypeError, ValueError, FlaxError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{stored.path}: its inputs do not fit: {reason}") from error
        for path in wanted:
            node: Any = found["intermediates"]
            for part in (*path, "__call__"):
                node = node.get(part, {})
            if node:
                out = node[0]
                made[path] = out[0] if isinstance(out, tuple) else out  # the rest is state
    return {
        name: made[at.path] if at.layer is None else made[at.path][at.layer]
        for name, at in places.items()
    }


def compare(model: Any, params: Any, plan: Plan, stored: Stored) -> Iterator[Row]:
    """A row for each stored block, in the reference's order.

    Args:
      model, params: a network of `CALLS` and its parameters, at the paths of `plan`.
    """
    found = {name: place(name, plan) for name in stored.blocks}
    places = {name: at for name, at in found.items() if at is not None}
    made = activations(model, params, stored, places)
    for name, want in stored.blocks.items():
        got = np.asarray(made[name], np.float64)
        if got.size != want.size or got.shape[-1] != want.shape[-1]:
            raise UserError(f"{stored.path}: {name} is {want.shape}; {got.shape} is expected")
        difference = np.abs(got.reshape(want.shape) - want)
        reference = float(np.abs(want).max())
        yield Row(name, float(difference.max()), float(difference.mean()), reference)
