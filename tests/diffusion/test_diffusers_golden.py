"""Our steps and samplers on the numbers of diffusers' schedulers (tools/golden/diffusion.py).

diffusers' public index i in 0 .. 999 is our time (i + 1) / 1000.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.diffusion.prediction import to_x0_eps
from vdit.diffusion.sampler import Sampler, ddim, ddpm, dpmpp_2m, euler, sample, sampler
from vdit.diffusion.schedule import Process, process, timesteps
from vdit.diffusion.step import step

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "diffusion.npz")
DDPM, FLOW = process("ddpm"), process("flow")
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {"fixed_small": "posterior", "fixed_large": "beta"}
ETAS = (0.0, 0.5, 1.0)
RELATIVE = 5e-6  # of the largest number of the array: float32's rounding of both sides


def near(ours: jax.Array, theirs: np.ndarray, relative: float = RELATIVE) -> None:
    difference = float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
    assert difference < relative, difference


def times_of(public: np.ndarray) -> np.ndarray:
    return ((public.astype(np.float64) + 1.0) / 1000.0).astype(np.float32)


def arrays(prefix: str, *names: str) -> list[np.ndarray]:
    return [GOLDEN[f"{prefix}/{name}"] for name in names]


@functools.cache
def ddpm_steps(grid: str) -> dict[tuple[str, str], tuple[jax.Array, jax.Array]]:
    """(x0, x_s) of every prediction and variance, in one compilation."""
    public, x, y, z = arrays(f"ddpm/{grid}", "t_int", "x", "y", "z")
    t = times_of(public)
    s = times_of(public - 1 if grid == "full" else np.append(public[1:], -1))

    @jax.jit
    def run(x: jax.Array, y: jax.Array, z: jax.Array) -> dict:
        made = {}
        for prediction, ours in PREDICTIONS.items():
            x0, _ = to_x0_eps(ours, DDPM, t, x, y)
            for variance in VARIANCES:
                x_s = step(DDPM, t, s, x, x0, z, eta=1.0, variance=VARIANCES[variance])
                made[prediction, variance] = x0, x_s
        return made

    return jax.tree.map(np.asarray, run(x, y, z))


@pytest.mark.parametrize("grid", ["full", "respaced"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_steps(grid: str, variance: str, prediction: str) -> None:
    made = ddpm_steps(grid)[prediction, variance]
    golden = arrays(f"ddpm/{grid}/{prediction}/{variance}", "x0", "prev")
    for ours, theirs in zip(made, golden, strict=True):
        for i in range(len(theirs)):
            near(ours[i], theirs[i])


def test_ddpm_as_shipped_differs_by_its_float32_table() -> None:
    _, x_s = ddpm_steps("full")["epsilon", "fixed_small"]
    near(x_s, GOLDEN["ddpm/shipped/prev"], relative=1e-4)


@pytest.mark.parametrize("grid", ["full", "respaced"])
def test_a_learned_variance(grid: str) -> None:
    public, x, y, v, z, golden = arrays(f"learned/{grid}", "t_int", "x", "y", "v", "z", "prev")
    t = times_of(public)
    s = times_of(public - 1 if grid == "full" else np.append(public[1:], -1))
    x0, _ = to_x0_eps("eps", DDPM, t, x, y)
    made, _ = ddpm("learned").step(lambda x, t: (x0, v), DDPM, None, x, t, s, z)
    for i, (ours, theirs) in enumerate(zip(made.x, golden, strict=True)):
        # diffusers adds a little noise to a respaced chain's last step; Algorithm 2 adds none.
        near(ours, theirs, RELATIVE if s[i] > 0.0 else 1e-4)


def toy(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
    """The golden script's denoiser."""
    return 0.8 * jnp.tanh(2.0 * x), None


def chain_of(one: Sampler, p: Process, x: np.ndarray, times: jax.Array, z: np.ndarray) -> jax.Array:
    """x after each step, with this noise."""

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
        made, state = one.step(toy, p, carry[1], carry[0], *inputs)
        return (made.x, state), made.x

    times = jnp.asarray(times)
    start = jnp.asarray(x), one.init(jnp.asarray(x))
    return jax.lax.scan(body, start, (times[:-1], times[1:], z))[1]


@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_chain(variance: str) -> None:
    public, x_init, z, chain = arrays(f"ddpm/chain/{variance}", "t_int", "x_init", "z", "chain")
    times = timesteps(DDPM, 20)
    np.testing.assert_array_equal(times[:-1], times_of(public))
    ours = chain_of(ddpm(VARIANCES[variance]), DDPM, x_init, times, z)
    if variance == "fixed_large":
        # diffusers adds beta's noise to a respaced chain's last step too; Algorithm 2 adds none.
        chain[-1] -= np.asarray(DDPM.sigma(times[-2])) * z[-1]
    for i, golden in enumerate(chain):
        near(np.asarray(ours)[i], golden)


@functools.cache
def ddim_steps(spacing: str) -> dict[tuple[str, float], jax.Array]:
    public, x, y, z = arrays(f"ddim/{spacing}", "t_int", "x", "y", "z")
    t = times_of(public)
    # "leading" was run without set_alpha_to_one: it ends at the paper's index 1 instead of 0.
    s = np.append(t[1:], np.float32(0.0 if spacing == "trailing" else 1e-3))
    if spacing == "trailing":
        np.testing.assert_array_equal(timesteps(DDPM, 10), np.append(t, 0.0))

    @jax.jit
    def run(x: jax.Array, y: jax.Array, z: jax.Array) -> dict:
        made = {}
        for prediction, ours in PREDICTIONS.items():
            x0, _ = to_x0_eps(ours, DDPM, t, x, y)
            for eta in ETAS:
                sampled, _ = ddim(eta).step(lambda x, t, x0=x0: (x0, None), DDPM, None, x, t, s, z)
                made[prediction, eta] = sampled.x
        return made

    return jax.tree.map(np.asarray, run(x, y, z))


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_steps(spacing: str, prediction: str, eta: float) -> None:
    ours, theirs = (
        ddim_steps(spacing)[prediction, eta],
        GOLDEN[f"ddim/{spacing}/{prediction}/{eta}/prev"],
    )
    for i in range(len(theirs)):
        near(ours[i], theirs[i])


def test_stable_diffusion_s_table_and_its_ddim_steps() -> None:
    public, x, y, golden = arrays("scaled_linear", "t_int", "x", "y", "prev")
    table = process("scaled_linear")
    all_times = times_of(np.arange(1000))
    near(table.alpha(all_times) ** 2, GOLDEN["scaled_linear/alphas_cumprod"])
    np.testing.assert_array_equal(table.network_time(all_times), np.arange(1000))
    t = times_of(public)
    np.testing.assert_array_equal(timesteps(table, 10), np.append(t, 0.0))
    x0, _ = to_x0_eps("eps", table, t, x, y)
    s = np.append(t[1:], np.float32(0.0))
    made, _ = ddim(0.0).step(lambda x, t: (x0, None), table, None, x, t, s, jnp.zeros_like(x))
    for ours, theirs in zip(made.x, golden, strict=True):
        near(ours, theirs, 2e-5)  # of a float32 table


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_euler(shift: float) -> None:
    x, y, chain, sigmas, network_time = arrays(
        f"flow/{shift}", "x_init", "y", "chain", "sigmas", "network_time"
    )
    times = timesteps(FLOW, 12, shift)
    near(times, sigmas)
    near(FLOW.network_time(times[:-1]), network_time)

    def denoise(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        answer = jnp.asarray(y)[jnp.argmin(jnp.abs(times - t))]
        return to_x0_eps("flow", FLOW, t, x, answer)[0], None

    keys = jax.random.split(jax.random.key(0), len(x))
    _, made = sample(denoise, jnp.asarray(x), times, FLOW, euler(), keys, every_step=True)
    near(made.x, chain)


@pytest.mark.parametrize("steps", [8, 20])
def test_dpmpp_2m(steps: int) -> None:
    public, x, chain = arrays(f"dpmpp_2m/{steps}", "t_int", "x_init", "chain")
    times = timesteps(DDPM, steps)
    np.testing.assert_array_equal(times[:-1], times_of(public))
    keys = jax.random.split(jax.random.key(0), len(x))
    _, made = sample(toy, jnp.asarray(x), times, DDPM, dpmpp_2m(), keys, every_step=True)
    near(made.x, chain)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m"])
def test_dpmpp_on_the_table(name: str) -> None:
    x, z, golden = arrays("multistep", "x_init", "z", name)
    near(chain_of(sampler(name), DDPM, x, timesteps(DDPM, 8), z), golden)


@functools.cache
def unipc_chains(process_name: str) -> dict[str, jax.Array]:
    x, z = arrays("multistep", "x_init", "z")
    flow = process_name == "flow"
    times = GOLDEN["multistep/flow/sigmas"] if flow else timesteps(DDPM, 8)
    p = process(process_name)

    @jax.jit
    def run(x: jax.Array) -> dict:
        return {
            f"{order}/{bh}": chain_of(sampler("unipc", order=order, bh=bh), p, x, times, z)
            for order in (1, 2, 3)
            for bh in ("bh1", "bh2")
        }

    return run(x)


@pytest.mark.parametrize("bh", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("process_name", ["ddpm", "flow"])
def test_unipc(process_name: str, order: int, bh: str) -> None:
    """All but diffusers' last step, to sigma 0, which is not of an order above 1."""
    golden = GOLDEN[f"multistep/{process_name}/unipc/{order}/{bh}"]
    near(unipc_chains(process_name)[f"{order}/{bh}"][: len(golden)], golden, 2e-5)


def test_heun_and_euler_ancestral() -> None:
    """diffusers' x is x / alpha on the table."""
    x, z = arrays("heun", "x_init", "z")
    times = timesteps(DDPM, 8)
    for name, golden in (("edm", "edm"), ("euler_ancestral", "ancestral")):
        ours = chain_of(sampler(name), DDPM, x, times, z)
        near(ours / np.asarray(DDPM.alpha(times[1:]))[:, None, None], GOLDEN[f"heun/{golden}"])
    flow = GOLDEN["heun/flow/sigmas"]
    near(chain_of(sampler("heun"), FLOW, x, flow, z), GOLDEN["heun/flow"])
