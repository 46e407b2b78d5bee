"""Positions of tokens: rotary embedding in (t, h, w), and sine-cosine features.

Positions are real numbers, so frame rate, size and aspect are native.
Dimension key: B batch, L tokens, N heads, K head dim, A axes (t, h, w).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def split_pairs(head_dim: int, axes: int) -> tuple[int, ...]:
    """Rotary pairs of each axis: equal shares, the first axis (time) takes the rest."""
    pairs = head_dim // 2
    share = pairs // axes
    return (pairs - share * (axes - 1),) + (share,) * (axes - 1)


def frequencies(count: int, theta: float = 10_000.0) -> np.ndarray:
    """theta^(-i / count), in float64: in float32 a time of 1000 loses four digits."""
    return theta ** (-np.arange(count) / count)


def rotary_angles(
    position_BLA: jax.Array, head_dim: int, theta: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine (B, L, 1, K/2) of each rotary pair's angle (Su et al. 2021, Eq. 15).

    Axis a has its own run of pairs with frequencies theta_a^(-i/n_a), i = 0 .. n_a - 1.
    """
    angles = []
    for axis, pairs in enumerate(split_pairs(head_dim, position_BLA.shape[-1])):
        frequency = theta[axis] ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
        angles.append(position_BLA[..., axis, None] * frequency[None, None])
    angle = jnp.concatenate(angles, axis=-1)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


@jax.custom_vjp
def rotate(x_BLNK: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + K/2}) by their token's angles, which have no gradient.

    The gradient is the rotation back; derived by JAX it would be pads and sums of halves. Written
    over whole rows: where halves are put together after their sums, XLA's CPU backend chooses a
    half anew for every number, and takes three times as long.
    """
    cos, sin = angles
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return x_BLNK * cos + jnp.roll(x_BLNK, x_BLNK.shape[-1] // 2, axis=-1) * sin


def _rotate_forward(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
    return rotate(x, angles), angles


def _rotate_backward(angles: Any, gradient: jax.Array) -> tuple[jax.Array, Any]:
    cos, sin = angles
    return rotate(gradient, (cos, -sin)), jax.tree.map(jnp.zeros_like, angles)


rotate.defvjp(_rotate_forward, _rotate_backward)


def _swapped(x: jax.Array) -> jax.Array:
    """Neighbours (x_2i, x_2i+1) of the last axis, swapped: two shifts, for an axis of pairs is slow
    on a TPU, and takes its memory for copies."""
    even = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) % 2 == 0
    return jnp.where(even, jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))


@jax.custom_vjp
def rotate_neighbours(x_BLNK: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x_2i, x_2i+1) by their token's angles, which have no gradient."""
    cos, sin = angles
    cos = jnp.repeat(cos, 2, axis=-1)
    sin = jnp.stack([-sin, sin], axis=-1).reshape(cos.shape)
    return x_BLNK * cos + _swapped(x_BLNK) * sin


def _neighbours_forward(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
    return rotate_neighbours(x, angles), angles


def _neighbours_backward(angles: Any, gradient: jax.Array) -> tuple[jax.Array, Any]:
    cos, sin = angles
    return rotate_neighbours(gradient, (cos, -sin)), jax.tree.map(jnp.zeros_like, angles)


rotate_neighbours.defvjp(_neighbours_forward, _neighbours_backward)


def sincos(value: jax.Array, dim: int, theta: float = 10_000.0) -> jax.Array:
    """Sine and cosine features (..., dim) of a real number (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = value[..., None] * frequency.reshape((1,) * value.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
