"""Attention along axes of a grid of tokens: which tokens (t, h, w) attend to one another.

Dimension key: B batch, L tokens of a grid, N heads, K head dim; t h w tokens along each axis.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from vdit.nn.attention import Attend

Grid = tuple[int, int, int]

# Tokens (B, L, ...) to rows that attend among themselves, and back. Axes that are not named here
# are rows as they come.
FOLDS: dict[str, tuple[str, str]] = {
    "space": ("B (t h w) ... -> (B t) (h w) ...", "(B t) (h w) ... -> B (t h w) ..."),
    "time": ("B (t h w) ... -> (B h w) t ...", "(B h w) t ... -> B (t h w) ..."),
}


def fold(x: jax.Array, axes: str, grid: Grid | None, back: bool = False) -> jax.Array:
    """Tokens (B, L, ...) as rows that attend among themselves; with `back` the inverse."""
    if axes not in FOLDS:
        return x
    assert grid is not None
    return rearrange(x, FOLDS[axes][back], **dict(zip("thw", grid, strict=True)))


unfold = functools.partial(fold, back=True)


def split_heads(attend: Attend, axes: tuple[str, ...], grid: Grid) -> Attend:
    """`attend` with the heads split evenly over `axes`, those of the first axis first."""

    def over(q_BLNK: jax.Array, k_BLNK: jax.Array, v_BLNK: jax.Array, *ids: Any) -> jax.Array:
        assert all(x is None for x in ids)
        shares = (jnp.split(x, len(axes), axis=2) for x in (q_BLNK, k_BLNK, v_BLNK))
        out = [
            unfold(attend(*(fold(x, axis, grid) for x in qkv)), axis, grid)
            for axis, *qkv in zip(axes, *shares, strict=True)
        ]
        return jnp.concatenate(out, axis=2)

    return over
