"""Chunked attention: xla's numbers, in memory that grows as the length does."""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside import beside_xla, difference, inputs

from vdit.kernels import chunked
from vdit.nn import dot_product
from vdit.runtime.products import inner_jaxprs

SMALL = functools.partial(chunked.attend, chunk=8)
LENGTHS = [(16, 16), (13, 22), (3, 41), (17, 8)]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "ids"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda pair: "-".join(map(str, pair)))
def test_output_and_gradients_are_xla_s(lengths: tuple[int, int], masked: bool) -> None:
    for mine, want in zip(*beside_xla(SMALL, *lengths, masked), strict=True):
        assert mine.dtype == jnp.float32 and mine.shape == want.shape
        assert difference(mine, want) < 1e-5


@pytest.mark.parametrize("masked", [False, True], ids=["all", "ids"])
def test_narrow_operands_are_within_their_rounding(masked: bool) -> None:
    mine, want = beside_xla(SMALL, 13, 22, masked, jnp.bfloat16)
    assert [x.dtype for x in mine] == [jnp.float32] + 3 * [jnp.bfloat16]
    assert all(difference(a, b) < 2**-7 for a, b in zip(mine, want, strict=True))


def test_large_logits_do_not_overflow_and_hidden_chunks_leave_no_trace() -> None:
    (q, k, v, _), _ = inputs(9, 24)
    k = k.at[:, :8].multiply(1e4)  # the first chunk would win every softmax, and no query sees it
    ids = jnp.ones((2, 9), jnp.int32), jnp.ones((2, 24), jnp.int32).at[:, :8].set(0)
    np.testing.assert_array_equal(
        SMALL(100 * q, k, v, *ids), SMALL(100 * q, k.at[:, :8].set(0.0), v, *ids)
    )
    assert difference(SMALL(1e4 * q, k, v), dot_product.attend(1e4 * q, k, v)) < 1e-5


@pytest.mark.parametrize(
    ("length", "most", "multiple", "want"),
    [(1, 512, 1, (1, 1, 1)), (512, 512, 1, (1, 512, 512)), (513, 512, 1, (2, 257, 514)),
     (513, 512, 128, (2, 384, 768)), (5, 512, 128, (1, 128, 128))],
)  # fmt: skip
def test_chunks_are_even_and_few(
    length: int, most: int, multiple: int, want: tuple[int, int, int]
) -> None:
    assert chunked.even_chunks(length, most, multiple) == want


def temporaries(attend, length: int) -> int:
    """Bytes that the compiled gradient needs besides its arguments and results."""
    x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    grad = jax.grad(lambda q, k, v, i: (attend(q, k, v, i, i) ** 2).sum(), (0, 1, 2))
    return jax.jit(grad).lower(x, x, x, ids).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_the_gradient_is_linear_in_length() -> None:
    half, whole = (temporaries(chunked.attend, length) for length in (2**13, 2**14))
    assert whole < 2.1 * half
    assert whole < 0.02 * temporaries(dot_product.attend, 2**14)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, ids: jax.Array) -> tuple[jax.Array, None]:
        return chunked.attend(x, x, x, ids, ids, chunk=8), None


def test_a_stack_of_layers_that_share_ids_has_no_mask_of_all_chunks() -> None:
    """Linen's scan computes ahead what depends on ids alone."""
    stack: Any = nn.scan(Layer, {}, {}, in_axes=(nn.broadcast,), length=2)()
    shapes = jax.ShapeDtypeStruct((1, 64, 1, 4), "float32"), jax.ShapeDtypeStruct((1, 64), "int32")
    traced = jax.make_jaxpr(jax.grad(lambda x, ids: stack.apply({}, x, ids)[0].sum()))(*shapes)

    def masks(jaxpr: Any) -> Iterator[int]:
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars if v.aval.dtype == bool)
            for part in inner_jaxprs(equation.params.values()):
                yield from masks(part)

    assert max(masks(traced.jaxpr)) == 8 * 8
