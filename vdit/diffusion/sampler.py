"""Samplers: `init` and `step` over a state, and the one `lax.scan` that runs them.

A sampler knows only denoise(x_t, t) -> (x0, aux), with x_t (B, ...) and a scalar t, which wraps
guidance, given tokens and the network's prediction type. A sample's noise depends on its own key
and the step's number, not on its neighbours in the batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vdit.diffusion.schedule import Process, build
from vdit.diffusion.step import check_noise, step
from vdit.errors import UserError

Denoise = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]
INITIAL = 0  # folded into a sample's key for x_init; step i folds in i = 1 .. N


class Made(NamedTuple):
    """The result of one step: x_s, the denoiser's x0 at t and its aux."""

    x: jax.Array
    x0: jax.Array
    aux: Any


class Sampler(NamedTuple):
    """init(x) -> state; step(denoise, process, state, x_t, t, s, z) -> (Made, state).

    z is standard normal noise of x's shape, which costs nothing where it is not used.
    """

    init: Callable[[jax.Array], Any]
    step: Callable[..., tuple[Made, Any]]


def _one_step(eta: float, variance: str = "posterior") -> Sampler:
    check_noise(eta, variance)

    def init(x: jax.Array) -> None:
        return None

    def advance(
        denoise: Denoise, process: Process, state: None, x: jax.Array, t: jax.Array, s: jax.Array,
        z: jax.Array,
    ) -> tuple[Made, None]:  # fmt: skip
        x0, aux = denoise(x, t)
        noise = z if eta > 0.0 else None
        share = aux if variance == "learned" else None
        return Made(step(process, t, s, x, x0, noise, eta, variance, share), x0, aux), None

    return Sampler(init, advance)


def ddpm(variance: str = "posterior") -> Sampler:
    """Ancestral sampling (DDPM, Algorithm 2); variance "posterior" (beta-tilde), "beta", "learned".

    With "learned" the denoiser's aux is its share of x's shape (`step.between`).
    """
    return _one_step(1.0, variance)


def ddim(eta: float = 0.0) -> Sampler:
    """DDIM with eta in [0, 1] (Song et al. 2021, Eq. 12 and 16)."""
    return _one_step(eta)


def euler() -> Sampler:
    """The deterministic step; on the flow process Euler's method for dx/dt = eps - x0."""
    return _one_step(0.0)


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): two evaluations extrapolated in log-SNR.

    The deterministic step with D = x0 + h_t / (2 h_last) (x0 - x0_last); first order where a
    neighbour's log-SNR is infinite: at pure noise, after it, and at the end.
    """

    def init(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros_like(x), jnp.zeros((), jnp.float32)  # a last time of 0: no step yet

    def half_log_snr(process: Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(lambda, whether it is finite)."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        finite = (alpha > 0.0) & (sigma > 0.0)
        ratio = jnp.where(finite, alpha, 1.0) / jnp.where(finite, sigma, 1.0)
        return jnp.log(ratio), finite

    def advance(
        denoise: Denoise, process: Process, state: tuple[jax.Array, jax.Array], x: jax.Array,
        t: jax.Array, s: jax.Array, z: jax.Array,
    ) -> tuple[Made, tuple[jax.Array, jax.Array]]:  # fmt: skip
        x0_last, t_last = state
        x0, aux = denoise(x, t)
        x0 = x0.astype(x.dtype)
        (at_last, has_last), (at_t, has_t), (at_s, has_s) = (
            half_log_snr(process, time) for time in (t_last, t, s)
        )
        second = has_last & has_t & has_s & (at_t > at_last)
        weight = jnp.where(
            second, (at_s - at_t) / (2.0 * jnp.where(second, at_t - at_last, 1.0)), 0.0
        )
        extrapolated = x0 + weight * (x0 - x0_last)
        return Made(step(process, t, s, x, extrapolated), x0, aux), (x0, t)

    return Sampler(init, advance)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
}


@functools.cache
def sampler(name: str, **options: Any) -> Sampler:
    """The sampler of `SAMPLERS` by name; the same arguments give the same object."""
    return build(SAMPLERS, "sampler", name, options)


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x_init (B, *shape) of standard normal noise from one key a sample (B,)."""
    return step_noise(keys, jnp.asarray(INITIAL), shape)


def step_noise(keys: jax.Array, number: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise (B, *shape) of step `number` (1 .. N) from one key a sample (B,)."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys)


def sample(
    denoise: Denoise, x_init: jax.Array, times: jax.Array, process: Process, sampler: Sampler,
    keys: jax.Array, every_step: bool = False,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Runs a sampler down `times` (N + 1,) from x_init (B, ...) with one key a sample, keys (B,).

    Returns (x at the last time, float32; aux of the last step), or with `every_step` (x, Made)
    whose leaves are stacked over the N steps. x is exactly the denoiser's last x0 where the last
    time is 0. One scan: the denoiser is compiled once, whatever N is.
    """
    if keys.shape[0] != x_init.shape[0]:
        raise UserError(f"{keys.shape[0]} keys for {x_init.shape[0]} samples: one each is allowed")
    times = jnp.asarray(times, jnp.float32)
    x_init = x_init.astype(jnp.float32)

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, Made | None]:
        x, state, _ = carry
        t, s, number = inputs
        z = step_noise(keys, number, x.shape[1:])
        made, state = sampler.step(denoise, process, state, x, t, s, z)
        return (made.x, state, made.aux), made if every_step else None

    # aux is carried, not stacked, where only the last step's is wanted: it may be large.
    aux = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(denoise, x_init, times[0])[1]
    )
    numbers = jnp.arange(1, times.shape[0])
    (x, _, aux), made = jax.lax.scan(
        body, (x_init, sampler.init(x_init), aux), (times[:-1], times[1:], numbers)
    )
    return x, made if every_step else aux
