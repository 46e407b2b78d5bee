"""Predictions: y = a x0 + b eps, its inverse, and both at the singular ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.diffusion.prediction import PREDICTIONS, WEIGHTS, target, to_x0_eps, weight
from vdit.diffusion.schedule import PROCESSES, add_noise, process, sample_times
from vdit.errors import UserError


def pair(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("name", PROCESSES)
def test_round_trip_with_one_level_a_token(name: str) -> None:
    p = process(name)
    x0, eps = pair((2, 3, 5))
    t = jnp.array([[0.1, 0.25, 0.4], [0.6, 0.75, 0.9]])

    @jax.jit
    def back(x0: jax.Array, eps: jax.Array) -> list:
        x_t = add_noise(p, x0, eps, t)
        return [
            to_x0_eps(prediction, p, t, x_t, target(prediction, p, t, x0, eps))
            for prediction in PREDICTIONS
        ]

    for made in back(x0, eps):
        np.testing.assert_allclose(made[0], x0, atol=2e-5)  # from eps at alpha 0.02: 50 ulp
        np.testing.assert_allclose(made[1], eps, atol=2e-5)


def test_targets_are_what_their_names_say() -> None:
    x0, eps = pair((3, 4))
    t = jnp.array([0.1, 0.5, 0.8])
    cosine, flow = process("cosine"), process("flow")
    np.testing.assert_array_equal(target("eps", cosine, t, x0, eps), eps)
    np.testing.assert_array_equal(target("x0", cosine, t, x0, eps), x0)
    np.testing.assert_allclose(target("flow", flow, t, x0, eps), eps - x0, rtol=1e-6)
    # v = alpha eps - sigma x0 (Salimans and Ho 2022), and on the arc the flow is pi / 2 times v
    v = target("v", cosine, t, x0, eps)
    angle = np.pi / 2 * t[:, None]
    np.testing.assert_allclose(v, np.cos(angle) * eps - np.sin(angle) * x0, atol=1e-6)
    np.testing.assert_allclose(target("flow", cosine, t, x0, eps), np.pi / 2 * v, atol=2e-6)


def test_d_is_the_designs() -> None:
    """d = alpha b - sigma a: alpha (eps), -sigma (x0), 1 (v on an arc, flow on the line)."""

    @jax.jit
    def all_d(t: jax.Array) -> dict:
        d = {}
        for name in PROCESSES:
            p = process(name)
            d[name, "alpha"], d[name, "sigma"] = p.alpha(t), p.sigma(t)
            for prediction, coefficients in PREDICTIONS.items():
                a, b = coefficients(p, t)
                d[name, prediction] = p.alpha(t) * b - p.sigma(t) * a
        return d

    d = all_d(np.linspace(0.0, 1.0, 1001, dtype=np.float32))
    for name in PROCESSES:
        np.testing.assert_array_equal(d[name, "eps"], d[name, "alpha"])
        np.testing.assert_array_equal(d[name, "x0"], -d[name, "sigma"])
    for name in ("cosine", "ddpm"):
        np.testing.assert_allclose(d[name, "v"], 1.0, atol=2e-7)
    np.testing.assert_allclose(d["flow", "flow"], 1.0, atol=2e-7)
    np.testing.assert_allclose(d["cosine", "flow"], np.pi / 2, atol=1e-6)
    assert (np.asarray(d["ddpm", "flow"]) > 0).all()


@pytest.mark.parametrize("name", PROCESSES)
def test_ends_are_finite_with_their_gradients(name: str) -> None:
    """At t = 0 and 1, values and gradients by x_t, y and t; clean tokens are x_t to the bit."""
    p = process(name)
    x_t, y = pair((2, 5))
    t = jnp.array([0.0, 1.0])

    def total(x_t, y, t, prediction):  # noqa: ANN001, ANN202
        x0, eps = to_x0_eps(prediction, p, t, x_t, y)
        return (x0**2).sum() + (eps**2).sum(), (x0, eps)

    @jax.jit
    def run(*arguments: jax.Array) -> list:
        with_gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
        return [with_gradients(*arguments, prediction) for prediction in PREDICTIONS]

    for (value, (x0, eps)), gradients in run(x_t, y, t):
        for array in (value, x0, eps, *gradients):
            assert np.isfinite(array).all()
        np.testing.assert_array_equal(x0[0], x_t[0])
        if p.points is None:
            np.testing.assert_allclose(eps[1], x_t[1], atol=1e-6)  # pure noise is its own eps


def test_loss_is_ddpms_algorithm_1() -> None:
    """|| eps - net(sqrt(ab) x0 + sqrt(1 - ab) eps, t) ||^2 with t of 1 .. T, from the betas."""
    p = process("ddpm")
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x0, eps = pair((64, 7))
    u = np.random.default_rng(1).uniform(size=64).astype(np.float32)
    t = jax.jit(sample_times, static_argnums=0)(p, u)
    index = np.round(np.asarray(t) * 1000).astype(int)
    assert index.min() >= 1 and index.max() <= 1000

    def net(x, public):  # noqa: ANN001, ANN202
        return np.tanh(np.asarray(x)) * np.cos(0.01 * np.asarray(public))[:, None]

    ab = alpha_bar[index - 1][:, None]
    paper = np.mean((eps - net(np.sqrt(ab) * x0 + np.sqrt(1 - ab) * eps, index - 1)) ** 2, -1)
    x_t, seen, answer, weights = jax.jit(
        lambda: (
            add_noise(p, x0, eps, t),
            p.network_time(t),
            target("eps", p, t, x0, eps),
            weight("uniform", "eps", p, t),
        )
    )()
    ours = ((np.asarray(answer) - net(x_t, seen)) ** 2).mean(-1) * weights
    np.testing.assert_allclose(ours, paper, rtol=1e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_min_snr_weighs_the_error_of_x0(name: str) -> None:
    p = process(name)
    t = jnp.linspace(0.02, 0.98, 13)
    x_t, y = pair((13, 1))

    @jax.jit
    def run(x_t: jax.Array, y: jax.Array) -> list:
        return [
            (
                weight("min_snr", prediction, p, t),
                to_x0_eps(prediction, p, t, x_t, y + 0.5)[0]
                - to_x0_eps(prediction, p, t, x_t, y)[0],
            )
            for prediction in PREDICTIONS
        ]

    snr = (p.alpha(t) / p.sigma(t)) ** 2
    for ours, error in run(x_t, y):
        expected = np.minimum(snr, 5.0) * error[:, 0] ** 2
        np.testing.assert_allclose(ours * 0.5**2, expected, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_weights_are_finite_at_the_ends(name: str) -> None:
    p, t = process(name), jnp.array([0.0, 1e-3, 0.999, 1.0])
    values = jax.jit(
        lambda t: [weight(scheme, one, p, t) for scheme in WEIGHTS for one in PREDICTIONS]
    )(t)
    assert all(np.isfinite(value).all() and (value >= 0).all() for value in values)


def test_unknown_names_list_the_known() -> None:
    x, t = jnp.zeros((2, 3)), jnp.zeros(2)
    with pytest.raises(UserError, match="'score': known are eps, x0, v, flow"):
        target("score", process("flow"), t, x, x)
    with pytest.raises(UserError, match="'score': known are eps, x0, v, flow"):
        weight("uniform", "score", process("flow"), t)
    with pytest.raises(UserError, match="'snr': known are uniform, min_snr"):
        weight("snr", "eps", process("flow"), t)
