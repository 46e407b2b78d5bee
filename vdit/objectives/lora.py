"""Low-rank adapters (LoRA, Hu et al. 2022) around any objective.

Dimension key: I in, O out of a kernel, R rank; leading axes (of stacked layers) are kept.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vdit.errors import UserError
from vdit.objectives.objective import Batch, Objective, Params, Sums


def lora(base: Objective, paths: str, rank: int, alpha: float | None = None) -> Objective:
    """`base` with frozen parameters, which frozen["base"] holds by group: what is trained is the
    group "lora", factors of the kernels whose paths match the regex `paths`.

    A path is as "dit/blocks/joint/attention/q/kernel"; see `merged` for `alpha`, by default `rank`.
    """
    pattern, scale = re.compile(paths), (rank if alpha is None else alpha) / rank

    def init(key: jax.Array, batch: Batch) -> Params:
        shapes = flatten_dict(jax.eval_shape(base.init, key, batch), sep="/")
        kernels = {
            path: leaf.shape
            for path, leaf in shapes.items()
            if pattern.search(path) and path.endswith("/kernel")
        }
        if not kernels:
            raise UserError(f"lora: no kernel matches {paths!r}; there are {', '.join(shapes)}")
        factors: dict[str, jax.Array] = {}
        keys = jax.random.split(key, len(kernels))
        for down_key, (path, (*stack, width, out)) in zip(keys, kernels.items(), strict=True):
            down = jax.random.normal(down_key, (*stack, width, rank)) * width**-0.5
            factors |= {f"{path}/down": down, f"{path}/up": jnp.zeros((*stack, rank, out))}
        return {"lora": unflatten_dict(factors, sep="/")}

    def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array) -> Sums:
        return base.loss(merged(frozen["base"], params["lora"], scale), frozen, batch, key)

    return Objective(init, loss)


def merged(base: Params, factors: Mapping[str, Any], scale: float) -> Params:
    """The parameters with W + scale · down_IR @ up_RO for each kernel W_IO that has factors; with
    LoRA's `alpha`, scale is alpha / R."""
    flat, low = flatten_dict(base, sep="/"), flatten_dict(factors, sep="/")
    for path in dict.fromkeys(name.rpartition("/")[0] for name in low):
        update = jnp.matmul(low[f"{path}/down"], low[f"{path}/up"]) * scale
        flat[path] = flat[path] + update.astype(flat[path].dtype)
    return unflatten_dict(flat, sep="/")
