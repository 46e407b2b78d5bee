"""Row by row, as a CPU goes where logits are many: the same as all rows at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.nn import dot_product
from vdit.runtime import attention
from vdit.runtime.mesh import make_mesh


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_row_by_row_is_the_same(dtype: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(random.standard_normal((6, length, 2, 16)), dtype) for length in (32, 48, 48)
    )
    ids = None, None
    if masked:
        seen = random.integers(0, 2, (6, 48))
        seen[:, 0] = 1
        ids = jnp.ones((6, 32), jnp.int32), jnp.asarray(seen, jnp.int32)

    def loops(function: object, *given: object) -> bool:
        return "while" in jax.jit(function).lower(*given).as_text()  # type: ignore[arg-type]

    def out(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dot_product.attend(q, k, v, *ids, on_cpu=True)

    def loss(*given: jax.Array) -> jax.Array:
        return jnp.square(out(*given)).sum()

    at_once, gradient = jax.jit(out)(q, k, v), jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert not loops(out, q, k, v)
    monkeypatch.setattr(dot_product, "ALL_LOGITS", 6 * 32 * 2 * 48)
    monkeypatch.setattr(dot_product, "ROW_LOGITS", 32 * 2 * 48)
    jax.clear_caches()
    assert loops(out, q, k, v) and not loops(jax.grad(loss, (0, 1, 2)), q, k, v)
    np.testing.assert_allclose(jax.jit(out)(q, k, v), at_once, rtol=1e-4, atol=1e-6)
    for one, other in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v), gradient, strict=True):
        np.testing.assert_array_equal(one, other)
    # On several devices rows may be split, and elsewhere the logits fit.
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    for attend in (attention.kernel("xla", mesh), attention.kernel("xla", None, "tpu")):
        assert not loops(lambda *qkv, attend=attend: attend(*qkv, *ids), q, k, v)
