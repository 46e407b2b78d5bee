"""Attention in windows of space and time: work and memory linear in the number of tokens.

Tokens of a grid (t, h, w) are cut into tiles, and a tile attends to its neighbourhood: itself and
half of a tile to each side, rounded up (sliding tiles, as in arXiv:2502.04507). Neighbours of the
next layer overlap, so what is far apart meets after some layers.

Dimension key: B batch, L tokens of a grid, N heads, K head dim; n tiles, P tokens of a tile, S keys
of a tile's neighbourhood.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from vdit.nn.attention import Attend

Sizes = tuple[int, int, int]


def _tiled(x_Bthwx: jax.Array, tile: Sizes) -> jax.Array:
    """(B, t, h, w, ...) to (B, a, p, b, q, c, r, ...): tiles and tokens of a tile on each axis, the
    grid filled up with zeros."""
    sizes = x_Bthwx.shape[1:4]
    pads = [(0, -size % p) for size, p in zip(sizes, tile, strict=True)]
    x = jnp.pad(x_Bthwx, [(0, 0), *pads, *[(0, 0)] * (x_Bthwx.ndim - 4)])
    split = [part for size, p in zip(sizes, tile, strict=True) for part in (-(-size // p), p)]
    return x.reshape(x.shape[0], *split, *x.shape[4:])


def _joined(x: jax.Array) -> jax.Array:
    """(B, a, p, b, q, c, r, ...) to rows (B a b c, p q r, ...)."""
    return rearrange(x, "B a p b q c r ... -> (B a b c) (p q r) ...")


def _widened(x: jax.Array, tile: Sizes) -> jax.Array:
    """Tiles with half of their neighbours' tokens on both sides of each axis, zeros at the ends.

    Slices and not a gather: over devices only the neighbours' halves travel.
    """
    for axis, size in zip((1, 3, 5), tile, strict=True):
        half, count = -(-size // 2), x.shape[axis]
        if count == 1:
            continue
        ends = [(0, 0)] * x.ndim
        ends[axis] = (1, 1)
        padded = jnp.pad(x, ends)
        before = jax.lax.slice_in_dim(padded, 0, count, axis=axis)
        after = jax.lax.slice_in_dim(padded, 2, count + 2, axis=axis)
        before = jax.lax.slice_in_dim(before, size - half, size, axis=axis + 1)
        after = jax.lax.slice_in_dim(after, 0, half, axis=axis + 1)
        x = jnp.concatenate([before, x, after], axis=axis + 1)
    return x


def windowed(attend: Attend, grid: Sizes, window: Sizes) -> Attend:
    """`attend` over a row of a grid's tokens, each tile of `window` over its neighbourhood alone.

    A tile is no larger than the grid. Rows have no ids of their own.
    """
    t, h, w = grid
    tile: Any = tuple(min(sizes) for sizes in zip(window, grid, strict=True))

    def over(q_BLNK: jax.Array, k_BLNK: jax.Array, v_BLNK: jax.Array, *ids: None) -> jax.Array:
        assert all(x is None for x in ids)
        batch = q_BLNK.shape[0]
        q, k, v = (
            _tiled(rearrange(x, "B (t h w) N K -> B t h w N K", t=t, h=h, w=w), tile)
            for x in (q_BLNK, k_BLNK, v_BLNK)
        )
        there = _joined(_widened(_tiled(jnp.ones((1, *grid), jnp.int32), tile), tile))
        k_id_nS = jnp.tile(there, (batch, 1))
        q_nPNK = _joined(q)
        q_id_nP = jnp.ones(q_nPNK.shape[:2], jnp.int32)
        out_nPNK = attend(
            q_nPNK, _joined(_widened(k, tile)), _joined(_widened(v, tile)), q_id_nP, k_id_nS
        )
        a, b, c = q.shape[1:7:2]
        out = rearrange(
            out_nPNK, "(B a b c) (p q r) N K -> B (a p) (b q) (c r) N K",
            a=a, b=b, c=c, p=tile[0], q=tile[1], r=tile[2],
        )  # fmt: skip
        return out[:, :t, :h, :w].reshape(q_BLNK.shape)

    return over
