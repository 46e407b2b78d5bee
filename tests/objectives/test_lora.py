"""Adapters: the example of CONTRIBUTING.md, the update by its definition, what is trained, in
every network."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contributing import run
from flax.traverse_util import unflatten_dict
from test_mesh_models import made
from test_packed import FROZEN, SAMPLES, batch, objective, perturbed, value_and_grad

from vdit.config import default
from vdit.denoiser import Denoiser
from vdit.diffusion.schedule import process, sample_times
from vdit.errors import UserError
from vdit.models.dit import DiT
from vdit.nn.lora import SCALE, beside, flat, merged, narrowed
from vdit.objectives.diffusion import Dense, denoising_objective
from vdit.objectives.lora import lora
from vdit.published.text_folder import encoder
from vdit.tokens import pattern_shares, patterns
from vdit.train import init_state, make_step

TABLE = patterns(2, 2, 10.0)
OBJECTIVE = denoising_objective(
    Denoiser(
        DiT(width=16, depth=2, heads=2), process("flow"), "flow",
        encoder("learned", vocab=300, width=16, depth=1, heads=2),
    ),
    Dense(
        TABLE, pattern_shares(TABLE, {"text": 1.0}),
        functools.partial(sample_times, process("flow")), text_drop=0.1,
    ),
)  # fmt: skip
STATISTICS = {"mean": jnp.zeros(3), "std": jnp.ones(3)}
RNG = np.random.default_rng(0)
BATCH = {
    "latent": RNG.normal(size=(4, 2, 2, 2, 3)).astype(np.float32),
    "ids": RNG.integers(1, 300, (4, 5)).astype(np.int32),
    "mask": np.ones((4, 5), bool),
    "ordinal": np.arange(4).astype(np.uint32),
}


@pytest.fixture(scope="module")
def params() -> Any:
    start = jax.jit(OBJECTIVE.init)(jax.random.key(0), BATCH)
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), start)


def drawn(tree: Any) -> Any:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), tree)


def test_the_example_of_contributing_starts_as_the_base_to_the_bit(params: Any) -> None:
    names = {"objective": OBJECTIVE, "frozen": STATISTICS, "params": params, "batch": BATCH}
    space = run("An adapter", **names)
    want = OBJECTIVE.loss(params, STATISTICS, BATCH, jax.random.key(1))
    assert space["loss"] == want[0] and space["weight"] == want[1] and float(want[0]) > 0
    jax.tree.map(np.testing.assert_array_equal, space["whole"], params)
    chosen = space["adapters"]["lora"]["dit"]["blocks"]["joint"]
    assert set(chosen) == {"attention", "cross"} and set(chosen["cross"]) == {"q", "k", "v", "o"}
    adapter = chosen["cross"]["q"]
    assert adapter["lora_down"].shape == (2, 16, 4) and adapter["lora_up"].shape == (2, 4, 16)


def test_the_update_is_explicit_and_only_adapters_have_gradients(params: Any) -> None:
    adapted = lora(OBJECTIVE, r"^(dit/(.*mlp/(up|down)|out)|text/.*q)/kernel$", rank=3, alpha=6.0)
    frozen = STATISTICS | {"base": params}
    adapters = drawn(jax.eval_shape(adapted.init, jax.random.key(0), BATCH))
    low, explicit = flat(adapters["lora"]), flat(jax.tree.map(np.array, params))
    paths = [path.removesuffix("/lora_up") for path in low if path.endswith("lora_up")]
    assert {"dit/out", "dit/blocks/joint/mlp/up", "dit/blocks/joint/mlp/down"} < set(paths)
    assert any(path.startswith("text/") for path in paths)
    for path in paths:
        down, up = (np.asarray(low[f"{path}/lora_{name}"]) for name in ("down", "up"))
        explicit[f"{path}/kernel"] += 2.0 * np.einsum("...ir,...ro->...io", down, up)
    got = merged(params, adapters["lora"], 2.0)
    for path, value in flat(got).items():
        np.testing.assert_allclose(value, explicit[path], rtol=1e-5, atol=1e-6)

    def total(adapters: Any, frozen: Any) -> jax.Array:
        return adapted.loss(adapters, frozen, BATCH, jax.random.key(1))[0]

    loss, gradient = jax.jit(jax.value_and_grad(total))(adapters, frozen)
    whole, full = jax.jit(jax.value_and_grad(lambda p: OBJECTIVE.loss(
        p, STATISTICS, BATCH, jax.random.key(1))[0]))(got)  # fmt: skip
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    grads, to_kernel = flat(gradient["lora"]), flat(full)
    assert grads.keys() == low.keys()
    for path in paths:  # the chain rule, from the gradient of the merged kernel
        down, up = (np.asarray(low[f"{path}/lora_{name}"]) for name in ("down", "up"))
        kernel = np.asarray(to_kernel[f"{path}/kernel"])
        close(grads[f"{path}/lora_down"], 2.0 * np.einsum("...io,...ro->...ir", kernel, up))
        close(grads[f"{path}/lora_up"], 2.0 * np.einsum("...io,...ir->...ro", kernel, down))


def close(got: Any, want: Any, most: float = 1e-5) -> None:
    assert np.linalg.norm(want) > 0
    assert np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want) < most


def options(**changes: Any) -> Any:
    made = default().dit.train.copy_and_resolve_references()
    made.update({"optimizer": "adamw", "batch": 4, "accumulate": 1, "warmup": 0, **changes})
    return made


def test_the_base_has_neither_moments_nor_a_gradient(params: Any) -> None:
    """The state is that of the adapters; a frozen kernel's gradient is not computed either."""
    adapted = lora(OBJECTIVE, r"^dit/blocks/.*/kernel$", rank=2)
    state, ema = jax.eval_shape(functools.partial(init_state, adapted, options(), seed=0), BATCH)
    assert set(state["params"]) == set(state["opt"]) == set(ema) == {"lora"}
    size = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    assert size < 0.5 * sum(leaf.size for leaf in jax.tree.leaves(params))
    moments = [leaf for leaf in jax.tree.leaves(state["opt"]) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * size
    frozen = STATISTICS | {"base": params}

    def work(loss: Any, first: Any, *rest: Any) -> float:
        grad = jax.jit(jax.grad(lambda p, f: loss(p, f, BATCH, jax.random.key(1))[0]))
        cost: Any = grad.lower(first, *rest).compile().cost_analysis()
        return cost["flops"]

    assert work(adapted.loss, state["params"], frozen) < work(OBJECTIVE.loss, params, STATISTICS)


def test_dropout_is_a_step_s(params: Any) -> None:
    """Parts of a batch leave out the same features, another step others; none in the mean."""
    adapted = lora(OBJECTIVE, r"^dit/blocks/.*/q/kernel$", rank=2, dropout=0.5)
    frozen, made = STATISTICS | {"base": params}, []
    state, ema = init_state(adapted, options(), BATCH, 0)
    state["params"] = drawn(state["params"])
    step = {count: jax.jit(make_step(adapted, options(accumulate=count))) for count in (1, 2)}
    for count, number in ((1, 0), (2, 0), (1, 1)):
        state["step"] = jnp.int32(number)
        made.append(step[count](state, ema, frozen, BATCH))
    assert made[0][2]["loss"] != made[2][2]["loss"]
    for a, b in zip(*(jax.tree.leaves(new["params"]) for new, _, _ in made[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_packed_rows_are_the_sum_of_their_samples() -> None:
    base = objective()
    rows = [0, 1, 3, 4]
    params = perturbed(jax.jit(base.init)(jax.random.key(0), batch(rows)))
    adapted = lora(base, r"^dit/.*/kernel$", rank=2)
    adapters = drawn(jax.eval_shape(adapted.init, jax.random.key(0), batch(rows)))
    run = value_and_grad(adapted, FROZEN | {"base": params})
    (loss, weight), gradient = run(adapters, batch(rows))
    alone = [run(adapters, batch([i])) for i in rows]
    assert len(SAMPLES) > max(rows)
    np.testing.assert_allclose(loss, sum(part[0][0] for part in alone), rtol=1e-5)
    assert weight == sum(part[0][1] for part in alone)
    total = jax.tree.map(lambda *x: sum(x), *(part[1] for part in alone))
    jax.tree.map(lambda a, b: close(a, np.asarray(b)), gradient, total)


@pytest.mark.parametrize("stage", ["paper", "unet", "classify"])
def test_apart_as_merged_in_every_network(stage: str) -> None:
    """All kernels at once: linear layers, patches, convolutions, a learned text encoder's."""
    base, frozen, data = made(stage)
    data = {name: value[:2] for name, value in data.items()}
    shapes = jax.eval_shape(base.init, jax.random.key(0), data)
    params = drawn(shapes)
    adapted = lora(base, "/kernel$", rank=2, alpha=4.0)
    low = drawn(jax.eval_shape(adapted.init, jax.random.key(0), data))
    adapters = jax.tree.map(lambda x: 3 * x, low)
    kernels = [path for path in flat(shapes) if path.endswith("/kernel")]
    assert len(flat(adapters)) == 2 * len(kernels)

    @jax.jit
    def loss(params: Any) -> jax.Array:
        return base.loss(params, frozen, data, jax.random.key(1))[0]

    apart = jax.jit(adapted.loss)(adapters, frozen | {"base": params}, data, jax.random.key(1))[0]
    whole = merged(params, adapters["lora"], 2.0)
    np.testing.assert_allclose(apart, loss(whole), rtol=1e-4)
    assert abs(float(loss(params)) / float(apart) - 1) > 1e-3
    assert flat(beside(params, adapters["lora"])).keys() > flat(params).keys()


def test_int8_kernels_are_what_they_are_rounded_to(params: Any) -> None:
    """In every block, 127 steps to each output's largest weight; gradients are the adapters'."""
    narrow, rounded = flat(params), flat(params)
    for path in [path for path in narrow if path.startswith("dit/") and path.endswith("kernel")]:
        narrow |= narrowed(path, narrow[path], jnp.int8)
        if scale := [narrow[name] for name in [path[:-6] + SCALE] if name in narrow]:
            assert narrow[path].dtype == jnp.int8
            near = narrow[path] * scale[0][:, None]
            assert (abs(near - rounded[path]) <= 0.51 * scale[0][:, None]).all()
            rounded[path] = near
        else:
            rounded[path] = narrow[path]
    assert sum(path.endswith(SCALE) for path in narrow) == 11
    adapted = lora(OBJECTIVE, r"/(q|v|up)/kernel$", rank=2)
    adapters = drawn(jax.eval_shape(adapted.init, jax.random.key(0), BATCH))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(adapters: Any, base: Any) -> Any:
        done = adapted.loss(adapters, STATISTICS | {"base": base}, BATCH, jax.random.key(1))
        return done[0], done[1]

    got, want = (loss(adapters, unflatten_dict(base, sep="/")) for base in (narrow, rounded))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


def test_a_pattern_without_a_kernel_is_refused() -> None:
    with pytest.raises(UserError, match="no kernel matches 'nowhere'"):
        jax.eval_shape(lora(OBJECTIVE, "nowhere", rank=2).init, jax.random.key(0), BATCH)
