"""Matrix products of narrow operands with float32 sums, at full speed in both directions.

Dimension key: ... any leading axes, M rows, D features in, F features out.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def alone() -> bool:
    """Whether this is traced for one device: a step for many is traced under `jax.set_mesh`."""
    return jax.sharding.get_abstract_mesh().size <= 1


def rows(x: jax.Array) -> jax.Array:
    """x (..., D) as (M, D) on one device: on XLA's CPU backend what is done to it then, and above
    all its gradient, is faster.

    Under a mesh x as it is: where two of its axes are split, as rows and tokens are, a device's
    part of them flattened is no block, and all of x would be gathered on every device.
    """
    return x.reshape(-1, x.shape[-1]) if alone() else x


def row_major(x: jax.Array, dtype: Any) -> jax.Array:
    """x, stored row by row where that decides how fast a product of `dtype` operands is.

    That is for narrow operands on XLA's CPU backend, on one device: partitioning does not look
    into a layout constraint, so under a mesh it would gather x on every device.
    """
    if dtype == jnp.float32 or not alone():
        return x

    def stored(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    return jax.lax.platform_dependent(x, cpu=stored, default=lambda x: x)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b of operands as they are, summed and returned in float32.

    (Stored by columns, a narrow product has no kernel at all in the CPU backend of jax 0.10.)
    """
    return row_major(jnp.matmul(a, b, preferred_element_type=jnp.float32), a.dtype)


def transposed(x: jax.Array) -> jax.Array:
    """x (..., M, D) with its last axes swapped, as an operand of `matmul`.

    XLA folds a transpose into the product that reads it. On its CPU backend such a product of
    narrow operands leaves the fast path and takes about three times as long as a product of the
    transposed array, so there the transpose becomes one.
    """
    return row_major(x.mT, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel_DF: jax.Array, dtype: Any) -> jax.Array:
    """x (..., D) @ kernel of operands cast to `dtype`, summed in float32.

    So are both products of its gradient: the cotangent is cast as well, and what comes out has not
    been rounded to `dtype` (a gradient derived by JAX would be).
    """
    return matmul(x.astype(dtype), kernel_DF.astype(dtype))


def _forward(x: jax.Array, kernel: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    narrow = x.astype(dtype), kernel.astype(dtype)
    return matmul(*narrow), (*narrow, jnp.zeros((), x.dtype))


def _backward(dtype: Any, saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, like = saved
    gradient = gradient.astype(dtype)
    to_x = matmul(gradient, transposed(kernel)).astype(like.dtype)
    if x.ndim == 2:
        return to_x, matmul(transposed(x), gradient)
    leading = tuple(range(x.ndim - 1))
    sums = (leading, leading)
    return to_x, jnp.tensordot(x, gradient, sums, preferred_element_type=jnp.float32)


product.defvjp(_forward, _backward)
