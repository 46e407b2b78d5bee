"""Muon sees one matrix a layer and makes it orthogonal; schedules, decay and EMA do as they say."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdit.errors import UserError
from vdit.nn.product import Matmul
from vdit.runtime.mesh import make_mesh, param_sharding
from vdit.runtime.optimizer import (
    NEWTON_SCHULZ,
    ema_update,
    is_matrix,
    make_optimizer,
    make_schedule,
    muon,
    orthogonalize,
)

FLOORS = {3: 1e-2, 4: 3e-3, 5: 1e-3}
SPREAD = {3: 0.271, 4: 0.21, 5: 0.13}
CPU = jax.default_backend() == "cpu"
FAST = {"xla_backend_optimization_level": 0}  # compile time is this file's cost
orthogonal = jax.jit(orthogonalize, static_argnums=(1, 2), compiler_options=FAST)


def random(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def updates_of(optimizer: optax.GradientTransformation, gradients: Any, params: Any) -> Any:
    """The last update after a list of gradients, and the state."""
    state = optimizer.init(params)
    for g in gradients:
        update, state = optimizer.update(g, state, params)
    return update, state


def at(tree: Any, path: str) -> np.ndarray:
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree)


@pytest.mark.parametrize("iterations", NEWTON_SCHULZ)
def test_coefficients_reach_what_they_promise(iterations: int) -> None:
    values = np.geomspace(FLOORS[iterations], 1, 10_000)
    for a, b, c in NEWTON_SCHULZ[iterations]:
        values = a * values + b * values**3 + c * values**5
    assert np.max(np.abs(values - 1)) < SPREAD[iterations]


@pytest.mark.parametrize(
    ("iterations", "dtype"), [(3, "float32"), (3, "bfloat16"), (4, "float32"), (5, "bfloat16")]
)
def test_updates_are_orthogonal(iterations: int, dtype: str) -> None:
    """Singular values near 1, the singular vectors those of the input; also for hard spectra."""
    u, _ = np.linalg.qr(random((48, 48), 1))
    v, _ = np.linalg.qr(random((96, 48), 2))
    spectra = [np.ones(48), np.arange(1, 49) ** -1.0, np.r_[1, np.full(47, 0.05)]]
    x = np.stack([(u * s) @ v.T for s in spectra] + [np.asarray(random((48, 96)))]) * 1e-3
    matmul = Matmul(jnp.dtype(dtype), on_cpu=CPU)
    for matrices in (x, x.swapaxes(-2, -1)):  # wide and tall
        got = np.asarray(orthogonal(jnp.asarray(matrices, jnp.float32), iterations, matmul))
        values = np.linalg.svd(got, compute_uv=False)
        slack = 0.3 if dtype == "bfloat16" else 0.0  # the smallest values drown in its rounding
        assert np.max(np.abs(values - 1)) < SPREAD[iterations] + 0.01 + slack
        u_, _, vt_ = np.linalg.svd(matrices, full_matrices=False)
        cosine = np.sum(got * (u_ @ vt_), (-2, -1)) / np.linalg.norm(got, axis=(-2, -1)) / 48**0.5
        assert np.min(cosine) > 0.97


def test_zero_and_tiny_gradients_are_finite() -> None:
    x = random((1, 4, 8)) * jnp.array([0.0, 1e-15, 1.0, 1e15])[:, None, None]
    got = np.asarray(orthogonal(x, 3, Matmul()))
    assert np.all(np.isfinite(got)) and not np.any(got[0])
    np.testing.assert_allclose(got[2], got[3], rtol=1e-4, atol=1e-5)  # no matter how large


def test_a_layer_of_a_stack_gets_the_update_that_it_gets_alone() -> None:
    scale = jnp.array([1.0, 1e3, 1e-3])[:, None, None]
    g1, g2 = random((3, 16, 24), 1) * scale, random((3, 16, 24), 2) * scale
    direction = muon()
    together, _ = updates_of(direction, [g1, g2], g1)
    for layer in range(3):
        alone, _ = updates_of(direction, [g1[layer], g2[layer]], g1[layer])
        np.testing.assert_allclose(together[layer], alone, rtol=1e-5, atol=1e-6)
    neighbour = np.array(g1)
    neighbour[1] = 7.0
    other, _ = updates_of(
        direction, [jnp.asarray(neighbour), g2], g1
    )  # a neighbour changes nothing, to the bit
    np.testing.assert_array_equal(other[0], together[0])
    np.testing.assert_array_equal(other[2], together[2])


def test_momentum_is_nesterov_and_scaled_by_shape() -> None:
    g1, g2 = random((16, 64), 1), random((16, 64), 2)
    direction = muon(momentum=0.9)
    update, state = updates_of(direction, [g1, g2], g1)
    np.testing.assert_allclose(state.momentum, 0.9 * g1 + g2, rtol=1e-5, atol=1e-6)
    expected = 2 * orthogonal(0.9 * (0.9 * g1 + g2) + g2, 3, Matmul())  # 2 is sqrt(64 / 16)
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-5)
    tall, _ = updates_of(direction, [g1.T], g1.T)
    np.testing.assert_allclose(tall, orthogonal(g1, 3, Matmul()).T, rtol=1e-5, atol=1e-5)


PARAMS: dict[str, Any] = {
    "decoder": {"blocks": {"mlp": {"up": {"kernel": (2, 8, 16), "bias": (2, 16)}}}},
    "blocks": {
        "attention": {"q": {"kernel": (2, 8, 8)}, "norm": {"scale": (2, 4)}},
        "modulation": {"kernel": (2, 8, 48)},
    },
    "patch": {"kernel": (12, 8), "bias": (8,)},
    "embed": {"embedding": (10, 8)},
}


def params(seed: int = 0) -> Any:
    return jax.tree.map(lambda s: random(s, seed), PARAMS, is_leaf=lambda x: isinstance(x, tuple))


def test_only_stacked_linear_maps_are_matrices() -> None:
    matrices = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params())
        if is_matrix(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    ]
    assert matrices == ["blocks/attention/q/kernel", "decoder/blocks/mlp/up/kernel"]


def test_muon_leaves_the_rest_to_adamw() -> None:
    muon = make_optimizer(
        "muon", learning_rate=0.02, adam_learning_rate=1e-3, steps=9, schedule="constant", clip=None
    )
    tree, grads = params(), params(1)
    got, _ = updates_of(muon, [grads], tree)
    adam = optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.0)
    expected, _ = updates_of(adam, [grads], tree)
    for path in ("patch/kernel", "embed/embedding", "blocks/modulation/kernel"):
        np.testing.assert_allclose(at(got, path), at(expected, path), rtol=1e-4)
    values = np.linalg.svd(at(got, "blocks/attention/q/kernel"), compute_uv=False)
    assert np.all(np.abs(np.median(values, -1) / 0.02 - 1) < 0.3)


def test_weight_decay_shrinks_kernels_only() -> None:
    optimizer = make_optimizer(
        "muon",
        learning_rate=0.5,
        adam_learning_rate=0.25,
        steps=9,
        schedule="constant",
        weight_decay=0.1,
    )
    tree = params()
    got, _ = updates_of(optimizer, [jax.tree.map(jnp.zeros_like, tree)], tree)
    for path, share in (("blocks/attention/q/kernel", 0.05), ("patch/kernel", 0.025)):
        np.testing.assert_allclose(at(got, path), -share * at(tree, path), rtol=1e-5)
    assert not np.any(at(got, "patch/bias")) and not np.any(at(got, "embed/embedding"))


def test_clipping_bounds_the_global_norm() -> None:
    clipped = make_optimizer("adamw", learning_rate=1.0, steps=9, clip=1.0)
    _, state = updates_of(clipped, [params(1)], params())
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    moments = np.concatenate(
        [np.ravel(x) for name, (_, x) in zip(names, leaves, strict=True) if "/mu/" in name]
    )
    np.testing.assert_allclose(np.linalg.norm(moments), 0.1, rtol=1e-5)  # (1 - beta1) * 1


def test_sharded_updates_equal_one_device() -> None:
    kernel = {"blocks": {"up": {"kernel": random((2, 32, 128))}}}
    optimizer = make_optimizer("muon", learning_rate=1.0, steps=9, schedule="constant")
    place = param_sharding(make_mesh({"fsdp": 2, "tensor": 4}), kernel)
    split = jax.device_put(kernel, place)
    got, expected = (updates_of(optimizer, [x], x)[0] for x in (split, kernel))
    np.testing.assert_allclose(
        at(got, "blocks/up/kernel"), at(expected, "blocks/up/kernel"), rtol=1e-3, atol=1e-4
    )


def test_schedules() -> None:
    cosine = make_schedule("cosine", 110, 10)
    np.testing.assert_allclose([cosine(s) for s in (0, 9, 10, 60)], [0.1, 1, 1, 0.5], rtol=1e-5)
    assert 0 < float(cosine(109)) < 1e-3 and float(cosine(200)) == pytest.approx(0, abs=1e-7)
    linear = make_schedule("linear", 100, 0)
    np.testing.assert_allclose([linear(s) for s in (0, 50, 99)], [1, 0.5, 0.01], rtol=1e-4)
    assert float(make_schedule("constant", 1, 0)(10**6)) == 1


def test_ema_warms_up() -> None:
    ema, p = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    np.testing.assert_allclose(ema_update(ema, p, 0.999, 0)["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(ema_update(ema, p, 0.999, jnp.int32(10**6))["w"], 0.001, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"name": "sgd"}, "known are adamw, muon"),
        ({"schedule": "step"}, "known are cosine, linear, constant"),
        ({"warmup": 9}, "allowed are 0 to 8"),
        ({"newton_schulz": 2}, "allowed are 3, 4, 5"),
        ({"name": "adamw", "momentum": 0.9}, "does not know 'momentum'"),
    ],
)
def test_refusals(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        make_optimizer(**{"name": "muon", "learning_rate": 0.1, "steps": 9, **options})
