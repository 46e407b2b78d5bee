"""Stacks of one layer, scanned: rematerialisation, and gathering of a layer's parameters."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

Gather = Callable[[Any], Any] | None  # of a layer's tree of parameters

# Leaves under `blocks/` lead with a layer axis.
STACKED = re.compile(r"(^|/)blocks/")

# What the backward pass keeps of a layer's forward pass: everything, nothing, matmul outputs.
REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(layer: Any, remat: str) -> Any:
    """The module class `layer` under a policy of `REMAT`."""
    if remat == "none":
        return layer
    return nn.remat(layer, prevent_cse=False, policy=REMAT[remat])


def stack(
    layer: Any, depth: int, *, scanned: int = 0, shared: int = 0, unroll: int = 1,
    remat: str = "none", gather: Gather = None,
) -> Any:  # fmt: skip
    """The module class `layer` applied `depth` times; parameters lead with a layer axis.

    layer(carry, *inputs) gives (carry, its own output, which is stacked). The first `scanned`
    inputs lead with a layer axis, the `shared` ones behind them are the same for all layers. With
    `gather` a layer's parameters go through it first: inside the scan and the rematerialisation, so
    one layer at a time is gathered, again for the gradient.
    """
    if gather is not None:
        layer = nn.map_variables(layer, "params", trans_in_fn=gather, init=True)
    return nn.scan(
        rematerialised(layer, remat),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0,) * scanned + (nn.broadcast,) * shared,
        length=depth,
        unroll=min(unroll, depth),
    )
