"""Tiled processing of large frames: overlapping tiles, blended at their seams, as in diffusers.

Dimension key: B batch, T frames, H height, W width, C channels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _blend(before: jax.Array, after: jax.Array, extent: int, axis: int) -> jax.Array:
    """`after`, with its first `extent` pixels faded in over the last ones of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if not extent:
        return after
    shape = [-1 if i == axis else 1 for i in range(after.ndim)]
    share = (jnp.arange(extent) / extent).reshape(shape)
    tail = jax.lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    head = jax.lax.slice_in_dim(after, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(after, extent, after.shape[axis], axis=axis)
    return jnp.concatenate([tail * (1 - share) + head * share, rest], axis=axis)


def tiled(
    run: Callable[[jax.Array], jax.Array], x_BTHWC: jax.Array, tile: int, stride: int,
    output: tuple[tuple[int, int], tuple[int, int]],
) -> jax.Array:  # fmt: skip
    """`run` on tiles of side `tile`, one every `stride`, blended where they overlap.

    `output` is (tile, stride) in pixels of the output, for rows and for columns. Call it outside of
    jit: then one tile is in memory at a time.
    """
    (size_h, step_h), (size_w, step_w) = output
    height, width = x_BTHWC.shape[2:4]
    rows: list[jax.Array] = []
    above: list[jax.Array] = []
    for top in range(0, height, stride):
        row: list[jax.Array] = []
        for j, left in enumerate(range(0, width, stride)):
            part = run(x_BTHWC[:, :, top : top + tile, left : left + tile])
            if above:
                part = _blend(above[j], part, size_h - step_h, 2)
            if row:
                part = _blend(row[-1], part, size_w - step_w, 3)
            row.append(part)
        above = row
        rows.append(jnp.concatenate([part[:, :, :step_h, :step_w] for part in row], axis=3))
    return jnp.concatenate(rows, axis=2)
