"""The interface between the trainer and what it trains."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Batch = Mapping[str, jax.Array]
Params = dict[str, Any]
Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]  # of the loss, its weight, and metrics


class Objective(NamedTuple):
    """Two functions.

    `init(key, batch)` gives parameters in named groups. `loss(params, frozen, batch, key)` gives
    (weighted sum of the loss, sum of the weights, metrics as weighted sums): the trainer divides
    once by the weight of the global batch. `frozen` holds teachers and encoders that are not
    trained. `batch["ordinal"]` (B,) numbers the samples of the stream, and `key` is the stage's:
    noise is keyed by sample, so a sample's loss does not depend on its batch.
    """

    init: Callable[[jax.Array, Batch], Params]
    loss: Callable[[Params, Any, Batch, jax.Array], Sums]


def sample_keys(key: jax.Array, ordinal_B: jax.Array) -> jax.Array:
    """One random key for each sample of the stream."""
    return jax.vmap(lambda ordinal: jax.random.fold_in(key, ordinal))(ordinal_B)


def low_discrepancy(ordinal: jax.Array) -> jax.Array:
    """A low-discrepancy sequence in [0, 1): one number for each ordinal.

    Multiples of the golden ratio modulo 1 (Weyl's sequence). The times of a batch cover all noise
    levels as evenly as one draw for the batch would (Kingma et al. 2021, appendix I.1,
    "low-discrepancy sampler"), but a sample's time does not depend on its batch.
    """
    turn = ordinal.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)  # 2^32 / golden ratio; wraps round
    return (turn >> 8).astype(jnp.float32) * 2.0**-24  # as many bits as float32 has below 1
