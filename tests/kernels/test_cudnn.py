"""Which rows go to cuDNN and how; whether cuDNN is right only a GPU can show."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from beside import difference, inputs

from vdit.kernels import cudnn, xla


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
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(6, 9)[0])
    out = cudnn.attend(q, k, v)
    assert taken == [{"implementation": "cudnn"}]
    assert out.dtype == jnp.float32 and difference(out, xla.attend(q, k, v)) < 2**-7


@pytest.mark.parametrize(
    ("dtype", "width", "masked"),
    [(jnp.float32, 8, False), (jnp.bfloat16, 12, False), (jnp.bfloat16, 136, False),
     (jnp.bfloat16, 8, True)],
)  # fmt: skip
def test_all_others_go_in_chunks(taken: list[Any], dtype: Any, width: int, masked: bool) -> None:
    arrays, ids = inputs(6, 9, width)
    q, k, v, _ = (x.astype(dtype) for x in arrays)
    ids = ids if masked else ()
    assert difference(cudnn.attend(q, k, v, *ids), xla.attend(q, k, v, *ids)) < 2**-7
    assert taken == []
