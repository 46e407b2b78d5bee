"""Matrix products of narrow operands with float32 sums, at full speed in both directions.

Dimension key: ... any leading axes, M rows, D features in, F features out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


@dataclasses.dataclass(frozen=True)
class Matmul:
    """How the machine that a module runs on multiplies matrices: `vdit.runtime.machine.matmul`.

    By default as plain JAX on one device.
    """

    dtype: Any = jnp.float32  # of the operands; sums are float32
    flatten: bool = True  # leading axes to rows: on one device alone, see `rows`
    on_cpu: bool = False  # one device of XLA's CPU backend, see `row_major`

    @property
    def float32(self) -> "Matmul":
        """The same of float32 operands."""
        return dataclasses.replace(self, dtype=jnp.float32)

    def rows(self, x: jax.Array) -> jax.Array:
        """x (..., D) as (M, D) on one device: on XLA's CPU backend what follows, and above all its
        gradient, is faster.

        On several devices x as it is: where two of its axes are split, as rows and tokens are, a
        device's part of them flattened is no block, and all of x would be gathered on every device.
        """
        return x.reshape(-1, x.shape[-1]) if self.flatten else x


def row_major(x: jax.Array, dtype: Any, on_cpu: bool) -> jax.Array:
    """x, stored row by row where that decides how fast a product of `dtype` operands is.

    That is for narrow operands on XLA's CPU backend, on one device: partitioning does not look
    into a layout constraint, so on several it would gather x on every device.
    """
    if dtype == jnp.float32 or not on_cpu:
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def dot(a: jax.Array, b: jax.Array, on_cpu: bool = False) -> jax.Array:
    """a @ b of operands as they are, summed and returned in float32.

    (Stored by columns, a narrow product has no kernel at all in the CPU backend of jax 0.10.)
    """
    out = jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return row_major(out, a.dtype, on_cpu)


def transposed(x: jax.Array, on_cpu: bool = False) -> jax.Array:
    """x (..., M, D) with its last axes swapped, as an operand of `dot`.

    XLA folds a transpose into the product that reads it. On its CPU backend such a product of
    narrow operands leaves the fast path and takes about three times as long as a product of the
    transposed array, so there the transpose becomes one.
    """
    return row_major(x.mT, x.dtype, on_cpu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel_DF: jax.Array, matmul: Matmul) -> jax.Array:
    """x (..., D) @ kernel of operands cast to `matmul.dtype`, summed in float32.

    So are both products of its gradient: the cotangent is cast as well, and what comes out has not
    been rounded to that dtype (a gradient derived by JAX would be).
    """
    return dot(x.astype(matmul.dtype), kernel_DF.astype(matmul.dtype), matmul.on_cpu)


def _forward(x: jax.Array, kernel: jax.Array, matmul: Matmul) -> tuple[jax.Array, Any]:
    narrow = x.astype(matmul.dtype), kernel.astype(matmul.dtype)
    return dot(*narrow, matmul.on_cpu), (*narrow, jnp.zeros((), x.dtype))


def _backward(matmul: Matmul, saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, like = saved
    gradient, on_cpu = gradient.astype(matmul.dtype), matmul.on_cpu
    to_x = dot(gradient, transposed(kernel, on_cpu), on_cpu).astype(like.dtype)
    if x.ndim == 2:
        return to_x, dot(transposed(x, on_cpu), gradient, on_cpu)
    leading = tuple(range(x.ndim - 1))
    sums = (leading, leading)
    return to_x, jnp.tensordot(x, gradient, sums, preferred_element_type=jnp.float32)


product.defvjp(_forward, _backward)
