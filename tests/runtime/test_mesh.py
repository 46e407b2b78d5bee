"""A sharded train step is the one-device step, and what should be split really is split."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdit.errors import UserError
from vdit.runtime.mesh import (
    batch_sharding,
    make_mesh,
    param_sharding,
    replicated,
    sequence_constraint,
)

FAST = {"xla_backend_optimization_level": 0}  # compile time is this file's cost
LAYERS, BATCH, LENGTH, WIDTH, MLP, HEADS = 2, 8, 16, 64, 128, 4


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def toy_params() -> dict[str, Any]:
    shapes = {name: (WIDTH, WIDTH) for name in "qkvo"} | {"up": (WIDTH, MLP), "down": (MLP, WIDTH)}
    blocks = {name: {"kernel": random(LAYERS, *shape) * 0.1} for name, shape in shapes.items()}
    return {"blocks": blocks, "embed": {"kernel": random(WIDTH, WIDTH) * 0.1}}


def toy_loss(params: Any, batch: jax.Array, constrain: Callable[[jax.Array], jax.Array]) -> Any:
    """A scanned stack of attention and mlp over batch (B, L, D)."""

    def block(x: jax.Array, leaf: Any) -> tuple[jax.Array, None]:
        x = constrain(x)
        q, k, v = ((x @ leaf[n]["kernel"]).reshape(*x.shape[:2], HEADS, -1) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("blnk,bmnk->bnlm", q, k))
        mixed = jnp.einsum("bnlm,bmnk->blnk", weights, v).reshape(x.shape)
        x = x + mixed @ leaf["o"]["kernel"]
        return x + jax.nn.relu(x @ leaf["up"]["kernel"]) @ leaf["down"]["kernel"], None

    x, _ = jax.lax.scan(block, batch @ params["embed"]["kernel"], params["blocks"])
    return jnp.mean(jnp.square(x)) + jnp.mean(jnp.sin(x))


@pytest.fixture(scope="module")
def problem() -> tuple[Any, jax.Array, Any]:
    params = toy_params()
    batch = random(BATCH, LENGTH, WIDTH)
    loss = jax.value_and_grad(lambda p, b: toy_loss(p, b, lambda x: x))
    run = jax.jit(loss, compiler_options=FAST)
    return params, batch, jax.tree.map(np.asarray, run(params, batch))


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 8},
        {"fsdp": 8},
        {"tensor": 4, "data": 2},
        {"sequence": 8},
        {"fsdp": 2, "tensor": 2, "sequence": 2},
    ],
    ids=lambda axes: "x".join(axes),
)
def test_loss_and_gradients_equal_one_device(axes: dict[str, int], problem: Any) -> None:
    params, batch, expected = problem
    mesh = make_mesh(axes)
    places = param_sharding(mesh, params)
    constrain = sequence_constraint(mesh)
    run = jax.jit(
        jax.value_and_grad(lambda p, b: toy_loss(p, b, constrain)),
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(replicated(mesh), places),
        compiler_options=FAST,
    )
    got = jax.tree.map(np.asarray, run(params, batch))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(a - b)) < 1e-5


def shard_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    shards = [leaf.addressable_shards[0].data.shape for _, leaf in leaves]
    return dict(zip(names, shards, strict=True))


def test_parameters_and_moments_are_split_and_stay_so() -> None:
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    optimizer = optax.adam(1e-3)
    state = {"params": toy_params()}
    state["moments"] = optimizer.init(state["params"])
    places = param_sharding(mesh, state)

    def step(state: Any) -> Any:
        updates, moments = optimizer.update(state["params"], state["moments"])
        return {"params": optax.apply_updates(state["params"], updates), "moments": moments}

    run = jax.jit(step, out_shardings=places, compiler_options=FAST)
    state = run(jax.device_put(state, places))
    shapes = shard_shapes(state)
    for prefix in ("params", "moments/0/mu", "moments/0/nu"):
        blocks = f"{prefix}/blocks"
        for name in "qkv":  # columns over tensor, rows over fsdp, layers never
            assert shapes[f"{blocks}/{name}/kernel"] == (LAYERS, WIDTH // 2, WIDTH // 4)
        assert shapes[f"{blocks}/o/kernel"] == (LAYERS, WIDTH // 4, WIDTH // 2)
        assert shapes[f"{blocks}/up/kernel"] == (LAYERS, WIDTH // 2, MLP // 4)
        assert shapes[f"{blocks}/down/kernel"] == (LAYERS, MLP // 4, WIDTH // 2)
        assert shapes[f"{prefix}/embed/kernel"] == (WIDTH // 2, WIDTH)
    assert shapes["moments/0/count"] == ()


def test_fsdp_splits_parameters_over_the_tokens_axis_too() -> None:
    """Over both where they divide a dimension, over fsdp where that alone does; not without it."""
    tree = {
        "blocks": {"q": {"kernel": jnp.zeros((8, 64, 96))}, "k": {"kernel": jnp.zeros((8, 66, 66))}}
    }
    for axes, q, k in (
        ({"fsdp": 2, "tensor": 1, "sequence": 4}, (8, 64, 12), (8, 33, 66)),
        ({"fsdp": 2, "tensor": 2, "sequence": 2}, (8, 16, 48), (8, 33, 33)),
        ({"tensor": 2, "sequence": 4}, (8, 64, 48), (8, 66, 33)),
    ):
        mesh = make_mesh(axes)
        shapes = shard_shapes(jax.device_put(tree, param_sharding(mesh, tree)))
        assert shapes == {"blocks/q/kernel": q, "blocks/k/kernel": k}


def test_what_an_axis_does_not_divide_stays_whole() -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    tree = {
        "head": {"kernel": jnp.zeros((129, 64))},  # fsdp takes the largest dim that it divides
        "odd": {"kernel": jnp.zeros((129, 63))},
        "small": {"kernel": jnp.zeros((32, 64))},
        "blocks": {"q": {"kernel": jnp.zeros((8, 63, 129))}, "norm": jnp.zeros((4096, 3))},
    }
    shapes = shard_shapes(jax.device_put(tree, param_sharding(mesh, tree)))
    assert shapes == {
        "head/kernel": (129, 16),
        "odd/kernel": (129, 63),
        "small/kernel": (32, 64),
        "blocks/q/kernel": (8, 63, 129),
        "blocks/norm": (4096, 3),
    }


def test_tokens_are_split_over_sequence() -> None:
    constrain = jax.jit(sequence_constraint(make_mesh({"data": 2, "sequence": 4})))
    assert constrain(jnp.zeros((4, 8, 3))).addressable_shards[0].data.shape == (2, 2, 3)
    assert constrain(jnp.zeros((1, 8, 3))).addressable_shards[0].data.shape == (1, 2, 3)


def test_one_axis_fills() -> None:
    sizes = dict(make_mesh({"data": -1, "tensor": 2}).shape)
    assert sizes == {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1}
    assert make_mesh({"data": -1}, jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("axes", "line"),
    [
        ({"tensor": 3, "data": -1}, r"multiply to 3, but there are 8 .* one of \[1, 2, 4, 8\]"),
        ({"data": 4}, r"must be 8 \(or set one axis to -1\)"),
        ({"data": -1, "fsdp": -1}, "only one axis may be -1"),
        ({"model": 2}, "the axes are data, fsdp, tensor, sequence"),
        ({"data": 0}, "positive"),
    ],
)
def test_refusals(axes: dict[str, int], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        make_mesh(axes)
    assert "\n" not in str(caught.value)
