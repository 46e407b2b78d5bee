"""Which rows go to cuDNN and how; on a GPU also whether they come back right."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from beside import beside_xla, difference, inputs

from vdit.kernels import chunked, cudnn
from vdit.nn import dot_product


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls to JAX's attention, which are answered by its own implementation for any device."""
    calls: list[Any] = []
    plain = jax.nn.dot_product_attention

    def record(*arrays: jax.Array, **options: Any) -> jax.Array:
        calls.append(options)
        return plain(*arrays)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return calls


def test_dense_narrow_rows_go_to_cudnn(taken: list[Any]) -> None:
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(6, 10)[0])
    out = cudnn.attend(q, k, v)
    assert taken == [{"implementation": "cudnn"}]
    assert out.dtype == jnp.float32 and difference(out, dot_product.attend(q, k, v)) < 2**-7


@pytest.mark.parametrize(
    ("dtype", "width", "length", "masked"),
    [(jnp.float32, 8, 6, False), (jnp.bfloat16, 12, 6, False), (jnp.bfloat16, 136, 6, False),
     (jnp.bfloat16, 8, 7, False), (jnp.bfloat16, 8, 6, True)],
)  # fmt: skip
@pytest.mark.parametrize("room", [0, cudnn.ROOM], ids=["chunked", "xla"])
def test_all_others_go_another_way(
    taken: list[Any], dtype: Any, width: int, length: int, masked: bool, room: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cudnn, "ROOM", room)
    arrays, ids = inputs(length, 10, width)
    q, k, v, _ = (x.astype(dtype) for x in arrays)
    ids = ids if masked else ()
    assert cudnn.fallback(q, k) is (dot_product.attend if room else chunked.attend)
    assert difference(cudnn.attend(q, k, v, *ids), dot_product.attend(q, k, v, *ids)) < 2**-7
    assert taken == []


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize(("length", "keys"), [(64, 64), (300, 77), (1000, 1000)])
def test_on_a_gpu_it_is_xlas_attention(length: int, keys: int) -> None:
    mine, want = beside_xla(cudnn.attend, length, keys, masked=False, dtype=jnp.bfloat16)
    assert all(difference(a, b) < 2**-6 for a, b in zip(mine, want, strict=True))
