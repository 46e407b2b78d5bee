"""Narrow products: their gradients against float32's, and how they reach the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.kernels import xla
from vdit.nn.product import product, transposed
from vdit.runtime.mesh import batch_sharding, make_mesh

X = jax.random.normal(jax.random.key(0), (24, 16))
KERNEL = jax.random.normal(jax.random.key(1), (16, 40))
COTANGENT = jax.random.normal(jax.random.key(2), (24, 40))


FLAT_AND_NOT = pytest.mark.parametrize("axes", [(24,), (2, 3, 4)], ids=str)


def pulled(
    dtype: jnp.dtype, axes: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def one(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return product(x.reshape(*axes, 16), kernel, dtype).reshape(24, 40)

    out, back = jax.vjp(one, X, KERNEL)
    return out, back(COTANGENT)


@FLAT_AND_NOT
def test_in_float32_it_is_the_plain_product_and_its_gradient(axes: tuple[int, ...]) -> None:
    out, (to_x, to_kernel) = pulled(jnp.float32, axes)
    np.testing.assert_allclose(out, X @ KERNEL, rtol=1e-6)
    np.testing.assert_allclose(to_x, COTANGENT @ KERNEL.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_kernel, X.T @ COTANGENT, rtol=1e-5, atol=1e-5)


@FLAT_AND_NOT
def test_narrow_operands_are_rounded_once_and_sums_not_at_all(axes: tuple[int, ...]) -> None:
    out, (to_x, to_kernel) = pulled(jnp.bfloat16, axes)
    x, kernel, cotangent = (
        np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (X, KERNEL, COTANGENT)
    )
    assert out.dtype == to_x.dtype == to_kernel.dtype == jnp.float32
    np.testing.assert_allclose(out, x @ kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_x, cotangent @ kernel.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_kernel, x.T @ cotangent, rtol=1e-4, atol=1e-5)


def test_the_gradient_keeps_the_dtype_of_what_came_in() -> None:
    grads = jax.grad(lambda x, k: product(x, k, jnp.bfloat16).sum(), (0, 1))(
        X.astype(jnp.bfloat16), KERNEL
    )
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transposed_operand_is_the_transpose(dtype: jnp.dtype) -> None:
    x = jax.random.normal(jax.random.key(3), (2, 3, 5)).astype(dtype)
    assert jnp.array_equal(jax.jit(transposed)(x), x.mT)
    assert jnp.array_equal(jax.vmap(transposed)(x), x.mT)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how the CPU backend compiles")
def test_no_transpose_is_folded_into_a_narrow_product() -> None:
    grad = jax.grad(lambda x, k: (product(x, k, jnp.bfloat16) * COTANGENT).sum(), (0, 1))
    text = jax.jit(grad).lower(X, KERNEL).compile().as_text()
    assert "lhs_contracting_dims={1}" in text
    assert "lhs_contracting_dims={0}" not in text and "rhs_contracting_dims={1}" not in text


def test_a_mesh_gathers_no_activations() -> None:
    mesh = make_mesh({"data": 8})
    rows = batch_sharding(mesh)

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = product(x.reshape(-1, 16), kernel, jnp.bfloat16).reshape(8, 4, 2, 8)
        return xla.attend(*[x.astype(jnp.bfloat16)] * 3).sum()

    x = jax.device_put(jnp.ones((8, 4, 16)), rows)
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(x, jnp.ones((16, 16))).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text
