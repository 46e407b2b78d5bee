"""How far an imported denoiser is from stored activations of a reference, block by block.

A file of activations is what `tools/golden/activations.py` writes where the reference runs: inputs
("x" (B, n, h, w, Z), "time" (B,), and "label" (B,), or "text" (B, S, E) with "mask" (B, S)), and of
these what came out of each block ("space/0" (B, L, D), ...) and of the network ("out").
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdit.errors import UserError
from vdit.models.dit import AXES
from vdit.models.dit_paper import DiTPaper
from vdit.nn.patch import unpatchify
from vdit.objectives.diffusion import dense_tokens
from vdit.tokens import Condition, class_condition, text_condition


class Row(NamedTuple):
    """One block: the largest and mean absolute difference, and the largest reference."""

    name: str
    largest: float
    mean: float
    reference: float


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of activations; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    needed = {"x", "time", "out"} | ({"label"} if "label" in stored else {"text", "mask"})
    if absent := sorted(needed - stored.keys()):
        raise UserError(f"{path} holds no activations: {', '.join(absent)} is not there")
    return stored


def told(stored: Mapping[str, np.ndarray]) -> Condition:
    """The condition of stored inputs."""
    time = jnp.asarray(stored["time"], jnp.float32)
    if "label" in stored:
        return class_condition(jnp.asarray(stored["label"], jnp.int32), time)
    text, mask = jnp.asarray(stored["text"]), jnp.asarray(stored["mask"])
    pooled = jnp.zeros((len(text), 1, text.shape[-1]))
    return text_condition(text[:, None], mask[:, None], pooled, time[:, None])


def activations(model: DiTPaper, params: Any, stored: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the model makes of stored inputs, under the reference's names."""
    x = jnp.asarray(stored["x"])
    zeros = jnp.zeros(x.shape[:2])
    tokens, layout = dense_tokens(x, model.patch, zeros, zeros > 0)

    assert layout.grid is not None
    apply: Any = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
    out, found = apply({"params": params}, tokens, layout, told(stored))
    kinds = jnp.split(out, 1 + model.learned_variance, axis=-1)
    back = [unpatchify(k.reshape(len(x), *layout.grid, -1), (1, *model.patch)) for k in kinds]
    made = {"out": jnp.concatenate(back, axis=-1)}
    for axes in AXES[model.axes]:
        (blocks,) = found["intermediates"]["blocks"][f"{axes}_out"]
        made |= {f"{axes}/{i}": block for i, block in enumerate(blocks)}
    return made


def compare(model: DiTPaper, params: Any, path: Path) -> Iterator[Row]:
    """A row for each block, in the network's order, and one for its answer."""
    stored = read(path)
    made = activations(model, params, stored)
    steps = model.depth // len(AXES[model.axes])
    for name in [*(f"{axes}/{i}" for i in range(steps) for axes in AXES[model.axes]), "out"]:
        if name not in stored or stored[name].shape != made[name].shape:
            there = stored[name].shape if name in stored else "not there"
            raise UserError(f"{path}: {name} is {there}; {made[name].shape} is expected")
        difference = np.abs(np.asarray(made[name], np.float64) - stored[name])
        reference = float(np.abs(stored[name]).max())
        yield Row(name, float(difference.max()), float(difference.mean()), reference)
