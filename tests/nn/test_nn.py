"""Layers against their definitions: rotary relativity, attention masks, causal time, patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.nn import dot_product
from vdit.nn.attention import Attention, CausalTimeAttention, TimeState
from vdit.nn.linear import ACTIVATIONS, MLP, Linear, RMSNorm, layer_norm
from vdit.nn.patch import pad_to_multiple, patchify, unpatchify
from vdit.nn.product import Matmul
from vdit.nn.rotary import rotary_angles, rotate, split_pairs

CPU = jax.default_backend() == "cpu"


def test_rotary_products_depend_on_differences_of_positions_only() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 24))

    def product(a: list[float], b: list[float]) -> jax.Array:
        turn = [rotary_angles(jnp.array([[x]]), 24, (100.0, 10.0, 10.0)) for x in (a, b)]
        return (rotate(q, turn[0]) * rotate(k, turn[1])).sum()

    near = product([0.5, 1.0, 2.0], [3.0, 2.5, 2.0])
    far = product([10.5, -4.0, 7.0], [13.0, -2.5, 7.0])
    np.testing.assert_allclose(near, far, rtol=1e-4)
    assert abs(product([0.5, 1.0, 2.0], [3.0, 3.5, 2.0]) - near) > 1e-3


def test_rotary_pairs_are_shared_out_whole() -> None:
    assert sum(split_pairs(32, 3)) == 16 and split_pairs(32, 1) == (16,)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_kernel_is_the_softmax_of_its_definition(masked: bool) -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 8)) for i in range(3))
    ids = np.array([[1, 1, 2, 2, 0], [1, 2, 1, 2, 1]])
    out = dot_product.attend(q, k, v, *([jnp.asarray(ids)] * 2 if masked else []))
    for b in range(2):
        for n in range(3):
            logits = np.asarray(q[b, :, n]) @ np.asarray(k[b, :, n]).T / np.sqrt(8)
            if masked:
                logits = np.where(ids[b][:, None] == ids[b][None], logits, -np.inf)
            weight = np.exp(logits - logits.max(1, keepdims=True))
            want = weight / weight.sum(1, keepdims=True) @ np.asarray(v[b, :, n])
            np.testing.assert_allclose(out[b, :, n], want, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_kernel_has_the_gradient_of_its_definition(
    dtype: jnp.dtype, masked: bool
) -> None:
    arrays = [
        jax.random.normal(jax.random.key(i), (2, n, 3, 8)).astype(dtype)
        for i, n in enumerate((5, 7, 7, 5))
    ]
    q_id = jnp.array([[1, 1, 2, 2, 0], [1, 2, 1, 2, 1]])
    k_id = jnp.array([[1, 1, 2, 2, 0, 0, 1], [1, 2, 1, 2, 1, 2, 2]])
    ids = (q_id, k_id) if masked else (None, None)

    def defined(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask = (q_id[:, None, :, None] == k_id[:, None, None, :]) if masked else None
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    *inputs, gradient = arrays
    out, back = jax.vjp(lambda *a: dot_product.attend(*a, *ids, on_cpu=CPU), *inputs)
    wide = [a.astype(jnp.float32) for a in inputs]
    want_out, want_back = jax.vjp(defined, *wide)
    atol = 2e-5 if dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(out, want_out, atol=atol)
    got = jax.jit(back)(gradient.astype(jnp.float32))
    for mine, want in zip(got, want_back(gradient.astype(jnp.float32)), strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(mine.astype(jnp.float32), want, atol=atol)


def test_cross_attention_ignores_keys_of_other_ids() -> None:
    layer = Attention(2, dot_product.attend)
    x, memory = jnp.ones((1, 3, 8)), jax.random.normal(jax.random.key(0), (1, 4, 6))
    q_id, k_id = jnp.array([[1, 2, 1]]), jnp.array([[1, 2, 0, 1]])
    params = layer.init(jax.random.key(1), x, memory, None, q_id, k_id)

    def first(memory: jax.Array) -> jax.Array:
        return layer.apply(params, x, memory, None, q_id, k_id)[0, 0].sum()

    seen = jnp.abs(jax.grad(first)(memory)).sum(-1)[0] > 0
    assert seen.tolist() == [True, False, False, True]


def test_causal_time_attention_against_a_dense_mask() -> None:
    frames, window, heads, width = 6, 3, 2, 8
    layer = CausalTimeAttention(heads, window)
    x = jax.random.normal(jax.random.key(0), (1, frames, 1, width))
    none = jnp.zeros((1, window - 1, 1, heads, width // heads))
    state = TimeState(none, none)
    params = layer.init(jax.random.key(1), x, jnp.int32(0), state)
    out, _ = layer.apply(params, x, jnp.int32(0), state)

    def attend(q, k, v, q_id=None, k_id=None):
        logits = jnp.einsum("BLNK,BSNK->BNLS", q, k) * q.shape[-1] ** -0.5
        back = jnp.arange(frames)[:, None] - jnp.arange(frames)[None]
        seen = (back >= 0) & (back < window)
        weights = jax.nn.softmax(jnp.where(seen[None, None], logits, -jnp.inf), axis=-1)
        return jnp.einsum("BNLS,BSNK->BLNK", weights, v)

    dense = Attention(heads, attend)
    time = jnp.arange(frames, dtype=jnp.float32)[None, :, None]
    angles = rotary_angles(time, width // heads, (100.0,))
    want = dense.apply(params, x[:, :, 0], angles=angles)
    np.testing.assert_allclose(out[:, :, 0], want, atol=1e-5)


def test_patches_round_trip_and_keep_their_order() -> None:
    video = jnp.arange(2 * 4 * 6 * 8 * 3).reshape(2, 4, 6, 8, 3)
    tokens = patchify(video, (2, 3, 4))
    assert tokens.shape == (2, 2, 2, 2, 2 * 3 * 4 * 3)
    np.testing.assert_array_equal(unpatchify(tokens, (2, 3, 4)), video)
    np.testing.assert_array_equal(tokens[0, 1, 0, 1].reshape(2, 3, 4, 3), video[0, 2:4, 0:3, 4:8])
    assert pad_to_multiple(video, (4, 8)).shape == (2, 4, 8, 8, 3)


def test_linear_keeps_leading_axes_and_its_bfloat16_operands_give_float32() -> None:
    layer = Linear(5, matmul=Matmul(jnp.bfloat16))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    params = layer.init(jax.random.key(1), x)
    out = layer.apply(params, x)
    kernel = params["params"]["kernel"]
    assert out.shape == (2, 3, 5) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, jnp.einsum("abd,df->abf", x, kernel), atol=0.05)


def test_mlp_and_layer_norm() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 8)) * 5 + 2
    normed = layer_norm(x)
    np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(normed.std(-1), 1, atol=1e-3)
    layer = MLP(16, "relu2")
    params = layer.init(jax.random.key(1), x)["params"]
    want = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"][None, None]) ** 2
    want = want @ params["down"]["kernel"] + params["down"]["bias"][None, None]
    np.testing.assert_allclose(layer.apply({"params": params}, x), want, rtol=1e-4, atol=1e-4)


def plain_norm(x: jax.Array, centre: bool) -> jax.Array:
    """The norm as JAX derives its gradient."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True) if centre else x
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_norms_have_the_gradient_that_jax_derives(name: str, dtype) -> None:
    x = (jax.random.normal(jax.random.key(0), (3, 5, 8)) * 3 + 2).astype(dtype)
    x = x.at[0, 0].set(1.5)  # a row that its mean makes zero
    weight = jax.random.normal(jax.random.key(1), x.shape)

    def rms(x: jax.Array) -> jax.Array:
        return RMSNorm().apply({"params": {"scale": jnp.ones(8)}}, x)

    ours, theirs = {"layer": layer_norm, "rms": rms}[name], name == "layer"
    value, gradient = jax.value_and_grad(lambda x: (ours(x) * weight).sum())(x)
    wanted = jax.value_and_grad(lambda x: (plain_norm(x, theirs) * weight).sum())(x)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(value, wanted[0], rtol=1e-6)
    scale = np.abs(np.asarray(wanted[1], np.float32)).max(-1, keepdims=True)
    off = np.abs(np.asarray(gradient, np.float32) - np.asarray(wanted[1], np.float32)) / scale
    assert off.max() < (1e-5 if dtype == jnp.float32 else 1e-2)


def kept(function, *arguments) -> list[tuple[int, ...]]:
    """Shapes of what a function keeps for its gradient."""
    return [leaf.shape for leaf in jax.tree.leaves(jax.vjp(function, *arguments)[1])]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
def test_of_an_activation_its_input_alone_is_kept(activation: str, gated: bool) -> None:
    x = jax.random.normal(jax.random.key(0), (6, 8))
    layer = MLP(16, activation, gated=gated)
    params = layer.init(jax.random.key(1), x)
    # What the second product reads, and what the first gave.
    wide = [shape for shape in kept(layer.apply, params, x) if shape[:1] == (6,) and shape[-1] > 8]
    assert sorted(wide) == sorted([(6, 16), (6, 32 if gated else 16)])


def test_of_a_norm_its_result_is_kept() -> None:
    x = jax.random.normal(jax.random.key(0), (6, 8))
    assert kept(layer_norm, x).count((6, 8)) == 1
