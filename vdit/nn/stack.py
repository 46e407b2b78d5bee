"""Layers that are scanned: what happens to the parameters of one before it is used."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

Gather = Callable[[Any], Any] | None  # of a layer's tree of parameters


def gathered(layer: Any, gather: Gather) -> Any:
    """The module class `layer`, whose parameters go through `gather` first (None: as they are).

    Inside of a scan and of rematerialisation: one layer at a time is gathered, again for the
    gradient.
    """
    if gather is None:
        return layer
    return nn.map_variables(layer, "params", trans_in_fn=gather, init=True)
