"""The scan: what it returns, and that a sample depends on its own key and start alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.diffusion.sampler import (
    SAMPLERS,
    Sampler,
    initial_noise,
    sample,
    sampler,
    step_noise,
)
from vdit.diffusion.schedule import PROCESSES, process, timesteps
from vdit.errors import UserError

OPTIONS = {
    "ddpm": {"variance": "beta"}, "ddim": {"eta": 0.5}, "unipc": {"order": 3, "bh": "bh1"},
    "edm": {"churn": 0.2},
}  # fmt: skip


def make(name: str) -> Sampler:
    return sampler(name, **OPTIONS.get(name, {}))


def toy(x: jax.Array, t: jax.Array) -> tuple[jax.Array, dict]:
    """A nonlinear denoiser with an aux of its own shape and type."""
    return jnp.tanh(1.5 * x) * (1.0 - 0.3 * t), {"time": t, "half": x.astype(jnp.bfloat16)}


def keys_of(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(7), count)


def start(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# The noise is most of what a scan takes to compile: with it, one process is enough.
@pytest.mark.parametrize(
    ("name", "process_name"),
    [("ddpm", "ddpm"), ("ddim", "cosine"), ("heun", "flow"), ("edm", "cosine"), ("unipc", "flow")]
    + [("dpmpp_2m", name) for name in PROCESSES],
)
def test_scan_is_the_loop_and_lands_on_x0(name: str, process_name: str) -> None:
    p, chosen, keys = process(process_name), make(name), keys_of(3)
    x_init, times = start(3, 4), timesteps(p, 5)

    @jax.jit
    def scan(x_init: jax.Array, keys: jax.Array) -> tuple:
        return sample(toy, x_init, times, p, chosen, keys, every_step=True)

    @jax.jit
    def once(state, x, t, s, z):  # noqa: ANN001, ANN202
        return chosen.step(toy, p, state, x, t, s, z)

    x, made = scan(x_init, keys)
    assert x.shape == (3, 4) and made.x.shape == (5, 3, 4)
    np.testing.assert_array_equal(x, made.x[-1])
    np.testing.assert_array_equal(x, made.x0[-1])
    if name == "edm":  # adds noise before it evaluates, but not to pure noise
        assert (made.aux["time"][1:] > times[1:-1]).all() and made.aux["time"][0] == 1.0
    else:
        np.testing.assert_array_equal(made.aux["time"], times[:-1])
    state, looped = chosen.init(x_init), x_init
    for i in range(5):
        z = noise_of_step(keys, i + 1)
        one, state = once(state, looped, times[i], times[i + 1], z)
        looped = one.x
        np.testing.assert_allclose(made.x[i], looped, atol=2e-6)
        assert np.isfinite(looped).all()


@jax.jit
def noise_of_step(keys: jax.Array, number: int) -> jax.Array:
    return step_noise(keys, number, (4,))


def test_aux_is_the_last_steps() -> None:
    p, keys = process("flow"), keys_of(2)
    x, aux = sample(toy, start(2, 4), timesteps(p, 4), p, sampler("euler"), keys)
    assert aux["time"] == 0.25 and aux["half"].dtype == jnp.bfloat16
    assert aux["half"].shape == x.shape


def test_the_denoiser_is_traced_once_for_the_scan() -> None:
    p, keys, traces = process("cosine"), keys_of(2), []

    def counted(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        traces.append(t)
        return 0.5 * x, None

    def run(x: jax.Array) -> jax.Array:
        return sample(counted, x, timesteps(p, 100), p, sampler("ddpm"), keys)[0]

    jaxpr = jax.make_jaxpr(run)(start(2, 4))
    assert len(traces) == 2  # once for the shape of its aux, once for the body
    assert [equation.primitive.name for equation in jaxpr.eqns].count("scan") == 1


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])  # one with noise, one with a state
def test_a_sample_depends_on_its_key_and_not_on_its_neighbours(name: str) -> None:
    p, keys = process("cosine"), keys_of(4)

    @jax.jit
    def run(keys: jax.Array, x: jax.Array) -> jax.Array:
        return sample(toy, x, timesteps(p, 6), p, make(name), keys)[0]

    x, others = start(4, 3, 2), jax.random.split(jax.random.key(8), 4)
    whole, swapped = run(keys, x), run(keys[::-1], x[::-1])
    np.testing.assert_array_equal(whole, run(keys, x))
    np.testing.assert_array_equal(swapped[::-1], whole)
    strangers = start(4, 3, 2) + 1.0
    strangers[2] = x[2]
    np.testing.assert_array_equal(run(others.at[2].set(keys[2]), strangers)[2], whole[2])
    changed = np.abs(run(others, x) - whole).max((1, 2))
    assert (changed > 1e-2).all() if name == "ddim" else (changed == 0.0).all()


def test_noise_of_start_and_steps_are_all_different() -> None:
    keys = keys_of(2)
    steps = jax.jit(jax.vmap(lambda i: step_noise(keys, i, (500,))))(jnp.arange(3))
    np.testing.assert_array_equal(steps[0], jax.jit(initial_noise, static_argnums=1)(keys, (500,)))
    alone = jax.jit(lambda keys: step_noise(keys, 1, (500,)))(keys[1:])
    np.testing.assert_array_equal(alone[0], steps[1, 1])
    correlation = np.corrcoef(steps.reshape(6, 500))
    assert np.abs(correlation - np.eye(6)).max() < 4.5 / 500**0.5


def test_euler_is_ddim_without_noise() -> None:
    p, keys = process("flow"), keys_of(2)
    x, times = start(2, 4), timesteps(p, 5)
    ours = [sample(toy, x, times, p, one, keys)[0] for one in (sampler("euler"), sampler("ddim"))]
    np.testing.assert_array_equal(*ours)


def test_edm_is_the_papers_algorithm_2() -> None:
    """In NumPy as printed, with sigma as time, for x / alpha on the flow process."""
    p, gamma, noise, levels = process("flow"), 0.3, 1.1, (0.2, 3.0)
    sigmas = np.array([8.0, 2.5, 0.9, 0.15, 0.0])
    times = sigmas / (1.0 + sigmas)
    x, z = start(3, 4), np.random.default_rng(1).normal(size=(4, 3, 4)).astype(np.float32)
    one = sampler("edm", churn=gamma, churn_levels=levels, churn_noise=noise)

    def toy_x0(x: np.ndarray, sigma: float) -> np.ndarray:
        t = sigma / (1.0 + sigma)
        return np.tanh(1.5 * x * (1.0 - t)) * (1.0 - 0.3 * t)

    ours, theirs = jnp.asarray(x), x.astype(np.float64) / (1.0 - times[0])
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        t, s = jnp.float32(times[i]), jnp.float32(times[i + 1])
        ours = one.step(toy, p, None, ours, t, s, z[i])[0].x
        hat = sigma * (1.0 + (gamma if levels[0] <= sigma <= levels[1] else 0.0))
        theirs = theirs + np.sqrt(hat**2 - sigma**2) * noise * z[i]
        slope = (theirs - toy_x0(theirs, hat)) / hat
        euler = theirs + (after - hat) * slope
        if after > 0.0:
            slope = 0.5 * (slope + (euler - toy_x0(euler, after)) / after)
            euler = theirs + (after - hat) * slope
        theirs = euler
        np.testing.assert_allclose(ours, theirs / (1.0 + after), atol=2e-5)


def test_a_part_of_the_way_and_low_precision_inputs() -> None:
    """From t = 0.4 (no history left over from elsewhere), bfloat16 in, float32 out."""
    p, keys = process("flow"), keys_of(2)
    x, times = jnp.asarray(start(2, 4), jnp.bfloat16), jnp.array([0.4, 0.2, 0.1])

    def denoise(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        return (0.5 * x).astype(jnp.bfloat16), None

    first = [
        sample(denoise, x, times, p, sampler(name), keys, every_step=True)
        for name in ("euler", "dpmpp_2m")
    ]
    assert first[0][0].dtype == jnp.float32
    np.testing.assert_array_equal(first[0][1].x[0], first[1][1].x[0])
    assert (first[0][0] != first[1][0]).any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sampler("rk4"), f"'rk4': known are {', '.join(SAMPLERS)}"),
        (lambda: sampler("euler", eta=1.0), "'eta' of sampler 'euler': known are none"),
        (lambda: sampler("ddim", eta=-0.1), "eta was -0.1: 0 to 1"),
        (lambda: sampler("unipc", order=4), "order was 4, bh 'bh2': 1, 2, 3 and bh1 or bh2"),
        (lambda: sampler("unipc", bh="bh3"), "bh 'bh3'"),
        (lambda: sampler("edm", churn=0.5), "churn was 0.5"),
        (lambda: sampler("ddpm", variance="large"), "'large': known are posterior, beta"),
    ],
)
def test_what_is_refused(call, words: str) -> None:  # noqa: ANN001
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value)


def test_a_key_for_each_sample() -> None:
    p = process("flow")
    with pytest.raises(UserError, match="1 keys for 2 samples"):
        sample(toy, jnp.zeros((2, 4)), timesteps(p, 2), p, sampler("ddpm"), keys_of(1))
