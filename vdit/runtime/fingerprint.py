"""The identity of parameters: a digest of their values, wherever they are."""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp


def fingerprint(tree: Any) -> str:
    """SHA-256 of the names, dtypes, shapes and checksums of arrays; the same on any mesh."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(jax.jit(_checksums)([leaf for _, leaf in paths]))
    rows = [
        [jax.tree_util.keystr(path, simple=True, separator="/"), str(leaf.dtype), leaf.shape]
        + [int(part) for part in value]
        for (path, leaf), value in zip(paths, sums, strict=True)
    ]
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def _checksums(leaves: list[jax.Array]) -> list[list[jax.Array]]:
    """Two sums, modulo 2^32, of each array's numbers as bits: plain, and weighted by their place.
    Their order does not matter, so that devices may each sum a part."""

    def one(x: jax.Array) -> list[jax.Array]:
        kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            step = math.prod(x.shape[axis + 1 :]) % 2**32
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(step)
        return [part.sum(dtype=jnp.uint32) for part in (bits, bits * (2 * place + 1))]

    return [one(leaf) for leaf in leaves]
