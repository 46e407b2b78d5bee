"""Windowed attention: a dense mask's numbers, and work and memory linear in length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.nn import dot_product
from vdit.nn.window import windowed
from vdit.runtime.products import flops

Sizes = tuple[int, int, int]


def seen(grid: Sizes, window: Sizes) -> np.ndarray:
    """(L, L): whether a query sees a key, by their places alone."""
    length = int(np.prod(grid))
    place = np.stack(np.unravel_index(np.arange(length), grid), -1)
    found = np.ones((length, length), bool)
    for axis in range(3):
        size = min(window[axis], grid[axis])
        first = place[:, axis, None] // size * size
        near = place[None, :, axis] - first
        found &= (near >= -((size + 1) // 2)) & (near < size + (size + 1) // 2)
    return found


@pytest.mark.parametrize(
    ("grid", "window"),
    [((5, 6, 7), (2, 3, 4)), ((3, 4, 4), (1, 2, 2)), ((2, 3, 4), (8, 8, 8))],
    ids=str,
)
def test_output_and_gradients_are_those_of_a_dense_mask(grid: Sizes, window: Sizes) -> None:
    mask = seen(grid, window)
    assert mask.all() == (window == (8, 8, 8))
    shape = (2, len(mask), 2, 8)
    q, k, v, gradient = (jax.random.normal(jax.random.key(i), shape) for i in range(4))
    bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)[None, None]

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> list[list[jax.Array]]:
        made = []
        for attend in (
            windowed(dot_product.attend, grid, window),
            lambda q, k, v: dot_product.attend_biased(q, k, v, bias, 8**-0.5),
        ):
            out, back = jax.vjp(attend, q, k, v)
            made.append([out, *back(gradient)])
        return made

    for mine, want in zip(*both(q, k, v), strict=True):
        assert np.linalg.norm(mine - want) / np.linalg.norm(want) < 1e-5


def test_work_and_memory_are_linear_in_length() -> None:
    def needed(frames: int) -> tuple[int, int]:
        x = jax.ShapeDtypeStruct((1, frames * 64, 1, 8), jnp.float32)
        attend = windowed(dot_product.attend, (frames, 8, 8), (2, 4, 4))
        grad = jax.grad(lambda q, k, v: (attend(q, k, v) ** 2).sum(), (0, 1, 2))
        memory = jax.jit(grad).lower(x, x, x).compile().memory_analysis()
        return flops(jax.make_jaxpr(grad)(x, x, x).jaxpr), memory.temp_size_in_bytes

    (work, memory), (more_work, more_memory) = needed(16), needed(64)
    assert more_work == 4 * work
    assert more_memory < 4.2 * memory
