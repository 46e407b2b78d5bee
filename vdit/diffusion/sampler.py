"""Samplers: `init` and `step` over a state, and the one `lax.scan` that runs them.

A sampler knows only denoise(x_t, t) -> (x0, aux), with x_t (B, ...) and a scalar t, which wraps
guidance, given tokens and the network's prediction type. A sample's noise depends on its own key
and the step's number, not on its neighbours in the batch.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vdit.diffusion.multistep import BH, History, extrapolated
from vdit.diffusion.schedule import Process, build, choose
from vdit.diffusion.step import check_noise, churned, step, trapezoid
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
    evaluations: int = 1  # of the denoiser in a step


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


def euler_ancestral() -> Sampler:
    """DDIM with eta 1, by its name for sigma / alpha as time (k-diffusion)."""
    return _one_step(1.0)


def _multistep(
    order: int, eta: float = 0.0, corrects: bool = False, bh: str = "bh2", second: float = 1.0
) -> Sampler:
    """The step with x0 extrapolated from `order` predictions (`multistep.extrapolated`).

    With `corrects`, x is first corrected by the new prediction: the step before is taken again.
    """

    def init(x: jax.Array) -> tuple[jax.Array | None, History]:
        return (x, History.of(x, order)) if corrects else (None, History.of(x, order - 1))

    def advance(
        denoise: Denoise, process: Process, state: tuple[jax.Array | None, History], x: jax.Array,
        t: jax.Array, s: jax.Array, z: jax.Array,
    ) -> tuple[Made, tuple[jax.Array | None, History]]:  # fmt: skip
        x_last, history = state
        x0, aux = denoise(x, t)
        x0 = x0.astype(x.dtype)
        if x_last is not None:
            x0_last, t_last = history.x0s[0], history.times[0]
            whole = extrapolated(process, t_last, t, x0_last, history.cut(1, order - 1), x0, bh)
            x = jnp.where(t_last > 0.0, step(process, t_last, t, x_last, whole), x)
        whole = extrapolated(process, t, s, x0, history.cut(0, order - 1), bh=bh, second=second)
        made = Made(step(process, t, s, x, whole, z if eta > 0.0 else None, eta), x0, aux)
        return made, (x if corrects else None, history.after(x0, t))

    return Sampler(init, advance)


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): two evaluations extrapolated in log-SNR.

    The deterministic step with D = x0 + h_t / (2 h_last) (x0 - x0_last); first order where a
    neighbour's log-SNR is infinite: at pure noise, after it, and at the end.
    """
    return _multistep(2)


def dpmpp_2m_sde() -> Sampler:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, Eq. 17): `dpmpp_2m` with a step of eta 1."""
    return _multistep(2, eta=1.0)


def dpmpp_3m() -> Sampler:
    """DPM-Solver++(3M) as published (in code alone: LuChengTHU/dpm-solver, diffusers).

    Its second-order term is half of Taylor's, so it is of order 2; UniPC's predictor has all of it.
    """
    return _multistep(3, second=0.5)


def unipc(order: int = 2, bh: str = "bh2") -> Sampler:
    """UniPC (Zhao et al. 2023, Algorithms 1 and 2) of x0: order 1, 2 or 3, B(h) "bh1" or "bh2".

    One evaluation a step: that of the predicted x also corrects it, to `order` + 1.
    """
    if order not in (1, 2, 3) or bh not in BH:
        raise UserError(f"order was {order}, bh {bh!r}: 1, 2, 3 and {' or '.join(BH)} are allowed")
    return _multistep(order, corrects=True, bh=bh)


def _heun(
    straight: bool, churn: float = 0.0, levels: tuple[float, float] = (0.0, 0.0), noise: float = 1.0
) -> Sampler:
    """Two evaluations a step, one of the last, to s = 0."""

    def advance(
        denoise: Denoise, process: Process, state: None, x: jax.Array, t: jax.Array, s: jax.Array,
        z: jax.Array,
    ) -> tuple[Made, None]:  # fmt: skip
        if churn > 0.0:
            t, x = churned(process, t, x, z, churn, levels, noise)
        x0, aux = denoise(x, t)
        x0 = x0.astype(x.dtype)
        euler = step(process, t, s, x, x0)

        def corrected() -> jax.Array:
            x0_s = denoise(euler, s)[0].astype(x.dtype)
            return trapezoid(process, t, s, x, x0, euler, x0_s, straight)

        second = (s > 0.0) & (straight | (process.alpha(t) > 0.0))
        return Made(jax.lax.cond(second, corrected, lambda: euler), x0, aux), None

    return Sampler(lambda x: None, advance, evaluations=2)


def heun() -> Sampler:
    """Heun's method for dx/dt = eps - x0 of the flow process, to which others are rescaled."""
    return _heun(straight=True)


def edm(
    churn: float = 0.0, churn_levels: tuple[float, float] = (0.05, 50.0), churn_noise: float = 1.003
) -> Sampler:
    """EDM's sampler (Karras et al. 2022, Algorithm 2; without churn Algorithm 1).

    churn: gamma, their S_churn / N, the share by which sigma / alpha grows before a step where it
    lies in `churn_levels` (S_tmin, S_tmax); churn_noise: S_noise. One evaluation from pure noise,
    where sigma / alpha is infinite.
    """
    most = math.sqrt(2.0) - 1.0
    if not 0.0 <= churn <= most or len(churn_levels) != 2 or churn_noise <= 0.0:
        raise UserError(
            f"churn was {churn}, churn_levels {churn_levels}, churn_noise {churn_noise}: 0 to"
            f" {most:.4f}, two levels and a factor above 0 are allowed"
        )
    return _heun(False, churn, churn_levels, churn_noise)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddpm": ddpm, "ddim": ddim, "euler": euler, "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m, "dpmpp_2m_sde": dpmpp_2m_sde, "dpmpp_3m": dpmpp_3m,
    "unipc": unipc, "heun": heun, "edm": edm,
}  # fmt: skip


@functools.cache
def sampler(name: str, **options: Any) -> Sampler:
    """The sampler of `SAMPLERS` by name; the same arguments give the same object."""
    return build(SAMPLERS, "sampler", name, options)


def configured(name: str, values: Mapping[str, Any]) -> Sampler:
    """The sampler by name, with those of `values` that are its options."""
    known = inspect.signature(choose(SAMPLERS, "sampler", name)).parameters
    return sampler(name, **{option: values[option] for option in known if option in values})


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
    start = begin(sampler, x_init, keys)
    (x, _), aux = advance(denoise, start, times, process, sampler, keys, every_step=every_step)
    return x, aux


def begin(sampler: Sampler, x_init: jax.Array, keys: jax.Array) -> tuple[jax.Array, Any]:
    """x in float32 and the sampler's state before the first step."""
    if keys.shape[0] != x_init.shape[0]:
        raise UserError(f"{keys.shape[0]} keys for {x_init.shape[0]} samples: one each is allowed")
    x = x_init.astype(jnp.float32)
    return x, sampler.init(x)


def advance(
    denoise: Denoise, start: tuple[jax.Array, Any], times: jax.Array, process: Process,
    sampler: Sampler, keys: jax.Array, first: int | jax.Array = 1, every_step: bool = False,
) -> tuple[tuple[jax.Array, Any], Any]:  # fmt: skip
    """`sample` from x and a state, of which `times[0]` begins step number `first`: ((x, state),
    aux), from which another call goes on."""
    times = jnp.asarray(times, jnp.float32)
    x_init, state = start

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
    numbers = first + jnp.arange(times.shape[0] - 1)
    (x, state, aux), made = jax.lax.scan(
        body, (x_init, state, aux), (times[:-1], times[1:], numbers)
    )
    return (x, state), made if every_step else aux
