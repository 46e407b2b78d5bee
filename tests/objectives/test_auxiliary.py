"""Auxiliary losses: the example of CONTRIBUTING.md trains, and changes nothing else."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contributing import run as run_example

from vdit.denoiser import Denoised, Denoiser
from vdit.diffusion.schedule import process, sample_times
from vdit.errors import UserError
from vdit.models.dit import DiT
from vdit.models.unet import UNet
from vdit.objectives import auxiliary as module
from vdit.objectives.auxiliary import Drawn, auxiliary
from vdit.objectives.diffusion import Dense, denoising_objective
from vdit.objectives.objective import Objective
from vdit.objectives.packed import Packed
from vdit.published.text_folder import encoder
from vdit.runtime.mesh import make_mesh, sequence_constraint
from vdit.tokens import Budget, pattern_shares, patterns

N, P, FPS = 4, 2, 10.0
FROZEN = {"mean": jnp.array([0.5, -1.0, 0.0]), "std": jnp.array([2.0, 1.0, 0.5])}
KEY = jax.random.key(1)
NETWORK = DiT(width=16, depth=3, heads=2)
DENOISER = Denoiser(
    NETWORK, process("flow"), "flow", encoder("learned", vocab=300, width=16, depth=1, heads=2)
)
TIMES = functools.partial(sample_times, process("flow"))


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of CONTRIBUTING.md."""
    monkeypatch.setattr(module, "AUXILIARY", dict(module.AUXILIARY))
    run_example("An auxiliary loss")


def rows(given: dict[str, float]) -> Dense:
    table = patterns(N, P, FPS)
    return Dense(table, pattern_shares(table, given), TIMES, text_drop=0.5)


def dense(given: dict[str, float], *losses: tuple[str, float]) -> Objective:
    return denoising_objective(DENOISER, rows(given), auxiliary=auxiliary(losses, NETWORK))


def batch(count: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "latent": rng.normal(size=(count, N + 3, 2, 2, 3)).astype(np.float32),
        "ids": rng.integers(1, 300, (count, 5)).astype(np.int32),
        "mask": np.ones((count, 5), bool),
        "ordinal": np.arange(count).astype(np.uint32),
    }


BUDGET = Budget(tokens=24, samples=2, text=6, caption=3)


def packed_batch() -> dict[str, np.ndarray]:
    """Two samples of 8 and 12 tokens; the first four of the second are given."""
    rng = np.random.default_rng(0)
    segment = np.repeat([1, 2, 0], [8, 12, 4])[None].astype(np.int32)
    tokens = rng.normal(size=(1, 24, 3)).astype(np.float32)
    tokens[segment == 0] = np.nan
    return {
        "tokens": tokens,
        "position": rng.normal(size=(1, 24, 3)).astype(np.float32),
        "segment": segment,
        "given": np.isin(np.arange(24), range(8, 12))[None],
        "ordinal": np.array([[3, 4]], np.uint32),
        "text": np.array([[1, 1, 2, 2, 2, 0]], np.int32),
        "ids": rng.integers(1, 300, (1, 6)).astype(np.int32),
    }


def value_and_grad(objective: Objective) -> Any:
    def total(params: Any, data: Any) -> Any:
        loss, weight, metrics = objective.loss(params, FROZEN, data, KEY)
        return loss / weight, {name: value / weight for name, value in metrics.items()}

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def perturbed(params: Any) -> Any:
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)


def test_the_example_of_contributing_learns() -> None:
    objective, data = dense({"text": 0.5, "prefix": 0.5}, ("early", 0.5)), batch()
    params = jax.jit(objective.init)(jax.random.key(0), data)
    assert set(params) == {"dit", "text", "auxiliary"} and set(params["auxiliary"]) == {"early"}
    run, optimizer = value_and_grad(objective), optax.adam(3e-3)
    state, found = optimizer.init(params), []
    for _ in range(30):
        (_, metrics), gradient = run(params, data)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(float(metrics["early"]))
    assert found[-1] < 0.7 * found[0]


def test_the_sum_is_of_both_losses_and_weight_0_is_none() -> None:
    data = batch()
    plain, none, half = (
        dense({"prefix": 1.0}, *losses) for losses in ((), (("early", 0.0),), (("early", 0.5),))
    )
    params = perturbed(jax.jit(half.init)(jax.random.key(0), data))
    alone = {name: params[name] for name in ("dit", "text")}
    start = jax.jit(plain.init)(jax.random.key(0), data)
    jax.tree.map(np.testing.assert_array_equal, start, jax.jit(none.init)(jax.random.key(0), data))
    (loss, _), gradient = value_and_grad(plain)(alone, data)
    (same, metrics), again = value_and_grad(none)(alone, data)
    assert loss == same and not metrics
    jax.tree.map(np.testing.assert_array_equal, gradient, again)
    (both, metrics), _ = value_and_grad(half)(params, data)
    np.testing.assert_allclose(both, loss + 0.5 * metrics["early"], rtol=1e-5)


def test_hidden_tokens_are_those_of_a_shallower_network() -> None:
    """After layer 2 of 3: what a network of its first two layers has at its end, whose output the
    same last layers make; and the output does not depend on what is read."""
    first = {name: value[:1] for name, value in batch().items()}
    first["features"] = np.zeros((1, 5, 16), np.float32)
    drawn = jax.jit(functools.partial(rows({"text": 1.0}).draw, DENOISER))({}, FROZEN, first, KEY)
    inputs = drawn.x0, drawn.layout, drawn.condition
    params = perturbed(jax.jit(NETWORK.init)(KEY, *inputs)["params"])

    def run(network: DiT, params: Any, hidden: tuple[int, ...]) -> Denoised:
        denoiser = Denoiser(network, process("flow"), "flow", DENOISER.encoder)
        denoised = denoiser(params, drawn.x0, drawn.t, *inputs[1:], hidden)
        return denoised.raw, denoised.hidden

    out, found = jax.jit(functools.partial(run, NETWORK, hidden=(1, 2, 3)))(params)
    assert {layer: x.shape for layer, x in found.items()} == dict.fromkeys((1, 2, 3), (1, 16, 16))
    np.testing.assert_allclose(run(NETWORK, params, ())[0], out, rtol=1e-5, atol=1e-5)
    two = params | {"blocks": jax.tree.map(lambda x: x[:2], params["blocks"])}
    _, shallow = run(DiT(width=16, depth=2, heads=2), two, (2,))
    np.testing.assert_allclose(shallow[2], found[2], rtol=1e-4, atol=1e-4)
    plain = jax.make_jaxpr(functools.partial(run, NETWORK, hidden=()))(params)
    kept = jax.make_jaxpr(functools.partial(run, NETWORK, hidden=(1,)))(params)
    assert "select_n" in str(kept) and len(str(plain)) < len(str(kept))


def test_targets_lie_where_their_tokens_do() -> None:
    """An entry that is the latent itself comes out as the tokens, given or not, packed or dense."""
    data, row = batch(), packed_batch()
    text = DENOISER.encoder.init(jax.random.key(0), data["ids"], data["mask"])
    for source, given in (
        (rows({"suffix": 1.0}), data | {"twin": data["latent"]}),
        (Packed(BUDGET, TIMES, 0.5), row | {"twin": row["tokens"]}),
    ):
        draw = jax.jit(functools.partial(source.draw, DENOISER, targets=("twin",)))
        drawn: Drawn = draw({"text": text}, FROZEN, given, KEY)
        want = np.asarray(drawn.x0) * np.asarray(FROZEN["std"]) + np.asarray(FROZEN["mean"])
        if drawn.layout.segment is not None:
            want = np.where(drawn.layout.segment[..., None] > 0, want, 0.0)
        np.testing.assert_allclose(drawn.targets["twin"], want, rtol=1e-5, atol=1e-5)


def test_packed_rows_have_it_too_and_padding_has_no_part() -> None:
    objective = denoising_objective(
        DENOISER, Packed(BUDGET, TIMES, 0.5), auxiliary=auxiliary((("early", 0.5),), NETWORK)
    )
    data = packed_batch()
    params = perturbed(jax.jit(objective.init)(jax.random.key(0), data))
    run = value_and_grad(objective)
    (loss, metrics), gradient = run(params, data)
    assert jnp.isfinite(loss) and metrics["early"] > 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert jnp.abs(gradient["auxiliary"]["early"]["down"]["kernel"]).max() > 0
    other = data | {"tokens": np.where(data["segment"][..., None] > 0, data["tokens"], 5.0)}
    (same, _), _ = run(params, other)
    assert same == loss


def test_it_is_the_same_on_a_mesh() -> None:
    mesh = make_mesh({"data": 2, "sequence": 4})
    split = Denoiser(
        NETWORK, process("flow"), "flow", DENOISER.encoder, multiple=4,
        constrain=sequence_constraint(mesh),
    )  # fmt: skip
    given, data = {"suffix": 0.5, "text": 0.5}, batch()
    losses = auxiliary((("early", 0.5),), NETWORK)
    one, many = (
        denoising_objective(each, rows(given), auxiliary=losses) for each in (DENOISER, split)
    )
    params = perturbed(jax.jit(one.init)(jax.random.key(0), data))
    want = value_and_grad(one)(params, data)
    with jax.set_mesh(mesh):
        got = value_and_grad(many)(params, data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), got, want)


@pytest.mark.parametrize(
    "losses, words",
    [
        ((("late", 1.0),), "dit.auxiliary='late': known are truth, early"),
        ((("early", 1.0), ("early", 2.0)), "named once"),
        ((("early", -1.0),), "WEIGHT of 0 or more"),
        ((("early",),), "WEIGHT of 0 or more"),
        ((("early", 1.0, 4),), r"after layers \(4,\): the denoiser gives those of 3 layers"),
    ],
)
def test_losses_that_are_not_there_are_refused(losses: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        auxiliary(losses, NETWORK)


def test_a_network_without_layers_to_read_is_refused() -> None:
    unet: Any = UNet(widths=(8,), blocks=1, heads=(1,), depths=(0,), middle=0, groups=2)
    with pytest.raises(UserError, match="those of 0 layers"):
        auxiliary((("early", 1.0),), unet)
