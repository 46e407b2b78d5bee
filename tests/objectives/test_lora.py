"""Adapters: the example of CONTRIBUTING.md, the update by its definition, what is trained."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contributing import run

from vdit.denoiser import Denoiser
from vdit.diffusion.schedule import process, sample_times
from vdit.errors import UserError
from vdit.models.dit import DiT
from vdit.objectives.diffusion import Dense, denoising_objective
from vdit.objectives.lora import lora, merged
from vdit.published.text_folder import encoder
from vdit.tokens import pattern_shares, patterns

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
    made = run("An adapter", **names)
    want = OBJECTIVE.loss(params, STATISTICS, BATCH, jax.random.key(1))
    assert made["loss"] == want[0] and made["weight"] == want[1] and float(want[0]) > 0
    jax.tree.map(np.testing.assert_array_equal, made["whole"], params)
    chosen = made["factors"]["lora"]["dit"]["blocks"]["joint"]
    assert set(chosen) == {"attention", "cross"} and set(chosen["cross"]) == {"q", "k", "v", "o"}
    kernel = chosen["cross"]["q"]["kernel"]
    assert kernel["down"].shape == (2, 16, 4) and kernel["up"].shape == (2, 4, 16)


def test_the_update_is_explicit_and_only_factors_have_gradients(params: Any) -> None:
    adapted = lora(OBJECTIVE, r"^dit/(.*mlp/(up|down)|out)/kernel$", rank=3, alpha=6.0)
    frozen = STATISTICS | {"base": params}
    factors = drawn(jax.eval_shape(adapted.init, jax.random.key(0), BATCH))
    low = factors["lora"]["dit"]
    explicit = jax.tree.map(np.array, params)
    for kernel, both in (
        (explicit["dit"]["out"], low["out"]),
        (explicit["dit"]["blocks"]["joint"]["mlp"]["up"], low["blocks"]["joint"]["mlp"]["up"]),
        (explicit["dit"]["blocks"]["joint"]["mlp"]["down"], low["blocks"]["joint"]["mlp"]["down"]),
    ):
        down, up = (np.asarray(both["kernel"][name]) for name in ("down", "up"))
        kernel["kernel"] += 2.0 * np.einsum("...ir,...ro->...io", down, up)
    got = merged(params, factors["lora"], 2.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, explicit)

    def total(factors: Any, frozen: Any) -> jax.Array:
        return adapted.loss(factors, frozen, BATCH, jax.random.key(1))[0]

    loss, gradient = jax.jit(jax.value_and_grad(total))(factors, frozen)
    want = jax.jit(OBJECTIVE.loss)(got, STATISTICS, BATCH, jax.random.key(1))[0]
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert jax.tree.structure(gradient) == jax.tree.structure(factors) and set(gradient) == {"lora"}
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_a_pattern_without_a_kernel_is_refused() -> None:
    with pytest.raises(UserError, match="no kernel matches 'nowhere'"):
        jax.eval_shape(lora(OBJECTIVE, "nowhere", rank=2).init, jax.random.key(0), BATCH)
