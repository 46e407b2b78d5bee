"""What the kernels' tests share: inputs, and a kernel beside plain attention, with gradients."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vdit.nn import dot_product


def inputs(
    length: int, keys: int, width: int = 8, heads: int = 3, batch: int = 2
) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
    """q, k, v and the output's gradient; ids 0, 1 and 2 (0: as padding has), all of them seen."""
    shapes = [(batch, n, heads, width) for n in (length, keys, keys, length)]
    arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    rng = np.random.default_rng(0)
    q_id = rng.integers(0, 3, (batch, length))
    k_id = np.concatenate([rng.integers(0, 3, (batch, keys - 3)), [[2, 0, 1]] * batch], 1)
    return arrays, (jnp.asarray(q_id), jnp.asarray(k_id))


@functools.partial(jax.jit, static_argnums=0)
def pulled(attend: Callable[..., jax.Array], q, k, v, gradient, q_id=None, k_id=None):
    """The output, and the gradients of q, k and v."""
    out, back = jax.vjp(lambda *arrays: attend(*arrays, q_id, k_id), q, k, v)
    return [out, *back(gradient)]


def beside_xla(
    attend: Callable[..., jax.Array], length: int, keys: int, masked: bool, dtype=jnp.float32
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Output and gradients of a kernel whose operands are `dtype`, and those of float32 ones."""
    (q, k, v, gradient), ids = inputs(length, keys)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    ids = ids if masked else ()
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    plain = pulled(dot_product.attend, *wide, gradient, *ids)
    return pulled(attend, q, k, v, gradient, *ids), plain


def difference(mine: jax.Array, want: jax.Array) -> float:
    """The norm of the difference over that of what is wanted."""
    a, b = (np.asarray(x, np.float64) for x in (mine, want))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
