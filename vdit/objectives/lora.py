"""Training low-rank adapters (LoRA, Hu et al. 2022) of any objective's network: `vdit.nn.lora`."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from vdit.errors import UserError
from vdit.nn.lora import DOWN, beside, flat, scaled, shapes
from vdit.objectives.objective import Batch, Objective, Params, Sums


def lora(
    base: Objective, paths: str, rank: int, alpha: float = 0.0, dropout: float = 0.0
) -> Objective:
    """`base` with frozen parameters, frozen["base"] by group; the only group that is trained is
    "lora", adapters of the kernels whose paths, as "dit/blocks/joint/attention/q/kernel", match the
    regex `paths`.

    Updates are scaled by `alpha` / `rank`; alpha 0 stands for the rank. `dropout`: the share of an
    adapter's input features that a step, frozen["step"], leaves out.
    """
    pattern, scale = re.compile(paths), (alpha or rank) / rank

    def init(key: jax.Array, batch: Batch) -> Params:
        there = {
            path: leaf.shape
            for path, leaf in flat(jax.eval_shape(base.init, key, batch)).items()
            if path.endswith("/kernel")
        }
        chosen = {path: shape for path, shape in there.items() if pattern.search(path)}
        if not chosen:
            raise UserError(f"lora: no kernel matches {paths!r}; there are {', '.join(there)}")
        adapters: dict[str, jax.Array] = {}
        for i, (path, kernel) in enumerate(chosen.items()):
            (down, shape), (up, zero) = shapes(path, kernel, rank).items()
            width = math.prod(shape[len(zero) - 2 : -1])  # behind the axis of stacked layers
            drawn = jax.random.normal(jax.random.fold_in(key, i), shape)
            adapters |= {down: drawn * width**-0.5, up: jnp.zeros(zero)}
        return {"lora": unflatten_dict(adapters, sep="/")}

    def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array) -> Sums:
        adapters = scaled(params["lora"], scale)
        if dropout:
            adapters = _dropped(adapters, dropout, jax.random.fold_in(key, frozen["step"]))
        return base.loss(beside(frozen["base"], adapters), frozen, batch, key)

    return Objective(init, loss)


def _dropped(adapters: Any, share: float, key: jax.Array) -> Any:
    """Adapters that see a random part of their input features, the same for a step's samples."""
    low = flat(adapters)
    for i, path in enumerate(low):
        if path.endswith(DOWN):
            rows = (*low[path].shape[:-1], 1)
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - share, rows)
            low[path] = jnp.where(kept, low[path] / (1 - share), 0.0)
    return unflatten_dict(low, sep="/")
