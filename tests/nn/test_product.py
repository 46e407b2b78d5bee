"""Narrow products: their gradients against float32's, and how they reach the compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.nn import dot_product
from vdit.nn.product import Matmul, product, transposed
from vdit.runtime.machine import matmul
from vdit.runtime.mesh import batch_sharding, make_mesh

CPU = jax.default_backend() == "cpu"
ONE = Matmul(jnp.bfloat16, on_cpu=CPU)
X = jax.random.normal(jax.random.key(0), (24, 16))
KERNEL = jax.random.normal(jax.random.key(1), (16, 40))
COTANGENT = jax.random.normal(jax.random.key(2), (24, 40))


FLAT_AND_NOT = pytest.mark.parametrize("axes", [(24,), (2, 3, 4)], ids=str)


def pulled(
    dtype: jnp.dtype, axes: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def one(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return product(x.reshape(*axes, 16), kernel, Matmul(dtype, on_cpu=CPU)).reshape(24, 40)

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
    grads = jax.grad(lambda x, k: product(x, k, ONE).sum(), (0, 1))(X.astype(jnp.bfloat16), KERNEL)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transposed_operand_is_the_transpose(dtype: jnp.dtype) -> None:
    x = jax.random.normal(jax.random.key(3), (2, 3, 5)).astype(dtype)
    one = functools.partial(transposed, on_cpu=CPU)
    assert jnp.array_equal(jax.jit(one)(x), x.mT)
    assert jnp.array_equal(jax.vmap(one)(x), x.mT)


@pytest.mark.skipif(not CPU, reason="how the CPU backend compiles")
def test_no_transpose_is_folded_into_a_narrow_product() -> None:
    grad = jax.grad(lambda x, k: (product(x, k, ONE) * COTANGENT).sum(), (0, 1))
    text = jax.jit(grad).lower(X, KERNEL).compile().as_text()
    assert "lhs_contracting_dims={1}" in text
    assert "lhs_contracting_dims={0}" not in text and "rhs_contracting_dims={1}" not in text


def test_a_mesh_gathers_no_activations() -> None:
    mesh = make_mesh({"data": 8})
    rows, many = batch_sharding(mesh), matmul("bfloat16", mesh)

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = product(x.reshape(-1, 16), kernel, many).reshape(8, 4, 2, 8)
        return dot_product.attend(*[x.astype(jnp.bfloat16)] * 3).sum()

    x = jax.device_put(jnp.ones((8, 4, 16)), rows)
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(x, jnp.ones((16, 16))).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text
