"""Diffusion processes x_t = alpha(t) x0 + sigma(t) eps, and the times they are trained and run at.

A time is a float in [0, 1]: 0 is clean, 1 is the noisiest. Every function here takes times of any
shape and answers with the same shape; `like` appends the axes that an array behind it still needs.
A discrete process is a table of T + 1 points that is read at round(t T).
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vdit.errors import UserError

Curve = Callable[[jax.Array], jax.Array]
Entry = TypeVar("Entry")


@dataclasses.dataclass(frozen=True)
class Process:
    """A noise process; its curves take times of any shape and return float arrays of that shape.

    alpha, sigma: scale of the clean value and of the noise; (1, 0) at t = 0.
    d_alpha, d_sigma: their derivatives by t (finite differences on a table).
    network_time: the time as the network's input.
    points: T where the process is a table of T + 1 points, None where time is continuous.
    """

    name: str
    alpha: Curve
    sigma: Curve
    d_alpha: Curve
    d_sigma: Curve
    network_time: Curve
    points: int | None = None


def flow() -> Process:
    """The linear path of flow matching: x_t = (1 - t) x0 + t eps; networks see 1000 t."""
    return Process(
        name="flow",
        alpha=lambda t: 1.0 - t,
        sigma=lambda t: 1.0 * t,
        d_alpha=lambda t: jnp.full_like(t, -1.0),
        d_sigma=lambda t: jnp.full_like(t, 1.0),
        network_time=lambda t: 1000.0 * t,
    )


def cosine() -> Process:
    """The arc alpha = cos(pi t / 2), sigma = sin(pi t / 2); networks see 1000 t."""
    half = math.pi / 2
    # cos(x) is written sin(pi/2 - x): float32's cos(pi/2) is -4e-8, but alpha(1) has to be 0.
    return Process(
        name="cosine",
        alpha=lambda t: jnp.sin(half * (1.0 - t)),
        sigma=lambda t: jnp.sin(half * t),
        d_alpha=lambda t: -half * jnp.sin(half * t),
        d_sigma=lambda t: half * jnp.sin(half * (1.0 - t)),
        network_time=lambda t: 1000.0 * t,
    )


def ddpm(points: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Process:
    """DDPM's table (Ho et al. 2020, section 4): T = `points` betas, linear from start to end.

    alpha^2 is the cumulative product of 1 - beta (the paper's alpha-bar, Eq. 4) at the paper's
    index t T = 1 .. T, with index 0 clean. Networks see the index of public weights, 0 .. T - 1,
    which is the paper's less one; a clean token has -1.
    """
    _check_betas("ddpm", points, beta_start, beta_end)
    return _table("ddpm", np.linspace(beta_start, beta_end, points))


def scaled_linear(
    points: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Process:
    """Stable Diffusion's table (Rombach et al. 2022): betas whose square roots are linear.

    Otherwise as `ddpm`. At its noisy end alpha is still 0.068.
    """
    _check_betas("scaled_linear", points, beta_start, beta_end)
    return _table("scaled_linear", np.linspace(beta_start**0.5, beta_end**0.5, points) ** 2)


def _check_betas(name: str, points: int, beta_start: float, beta_end: float) -> None:
    if points < 1 or not 0.0 < beta_start <= beta_end < 1.0:
        raise UserError(
            f"process {name!r} was given points={points}, beta_start={beta_start}, "
            f"beta_end={beta_end}: points >= 1 and 0 < beta_start <= beta_end < 1 are allowed"
        )


def _table(name: str, betas: np.ndarray) -> Process:
    """The discrete process of betas; see `ddpm`."""
    points = len(betas)
    # float64: float32 loses four digits of 1 - alpha-bar near the clean end.
    alpha_bar = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)

    def index(t: jax.Array) -> jax.Array:
        return jnp.round(t * points).astype(jnp.int32)

    def curve(table: np.ndarray) -> Curve:
        def read(t: jax.Array) -> jax.Array:
            return jnp.take(jnp.asarray(table, jnp.result_type(t)), index(t), mode="clip")

        return read

    return Process(
        name=name,
        alpha=curve(alpha),
        sigma=curve(sigma),
        d_alpha=curve(np.gradient(alpha) * points),
        d_sigma=curve(np.gradient(sigma) * points),
        network_time=lambda t: jnp.round(t * points) - 1.0,
        points=points,
    )


PROCESSES: dict[str, Callable[..., Process]] = {
    "flow": flow, "cosine": cosine, "ddpm": ddpm, "scaled_linear": scaled_linear,
}  # fmt: skip


@functools.cache
def process(name: str, **options: Any) -> Process:
    """The process of `PROCESSES` by name; the same arguments give the same object."""
    return build(PROCESSES, "process", name, options)


def like(t: ArrayLike, x: jax.Array) -> jax.Array:
    """t of shape (), (B,), (B, L) ... with axes of 1 appended, to broadcast with x (B, L, ...)."""
    t = jnp.asarray(t, jnp.result_type(t, float))
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def add_noise(process: Process, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = alpha x0 + sigma eps (DDPM Eq. 4); t has the leading axes of x0; x0 where t = 0."""
    t = like(t, x0)
    return process.alpha(t) * x0 + process.sigma(t) * eps


def shifted(t: Any, shift: float) -> Any:
    """t' = shift t / (1 + (shift - 1) t): more noise for shift > 1 (SD3, Eq. 23); keeps 0 and 1."""
    if not shift > 0.0:
        raise UserError(f"shift was {shift}: a number above 0 is allowed")
    return t / (t + (1.0 - t) / shift)


def sample_times(
    process: Process, u: jax.Array, logit_normal: tuple[float, float] | None = None,
    shift: float = 1.0, between: tuple[float, float] = (0.0, 1.0),
) -> jax.Array:  # fmt: skip
    """Training times in (0, 1] from uniform u in [0, 1), of u's shape.

    Continuous: uniform, or with `logit_normal` = (mean, deviation) the sigmoid of such a normal
    (SD3, Eq. 19); then shifted; and of these only times `between` two. Discrete: i / T with i
    uniform over 1 .. T (DDPM, Algorithm 1).
    """
    if process.points is not None:
        if logit_normal is not None or shift != 1.0 or between != (0.0, 1.0):
            raise UserError(
                f"process {process.name!r} is a table and trains at uniform indices: "
                f"logit_normal={logit_normal}, shift={shift} and times between {between} are for"
                " continuous processes"
            )
        return (jnp.floor(u * process.points) + 1.0) / process.points
    mean, deviation = logit_normal or (0.0, 1.0)
    if not deviation > 0.0:
        raise UserError(f"logit_normal's deviation was {deviation}: above 0 is allowed")

    def below(end: float) -> float:
        """The share of all times below one: the inverse of what is done to t."""
        share = end / (end + (1.0 - end) * shift)
        if logit_normal is None or share in (0.0, 1.0):
            return share
        return NormalDist(mean, deviation).cdf(math.log(share / (1.0 - share)))

    low, high = map(below, between)
    t = high - u * (high - low)  # 0 is clean, without a loss; 1 is where sampling starts
    if logit_normal is not None:
        t = jax.nn.sigmoid(mean + deviation * jax.scipy.special.ndtri(t))
    t = shifted(t, shift)
    return t if between == (0.0, 1.0) else jnp.clip(t, *between)


# Ends of grids, before their shift, that published flow models were sampled on: diffusers'
# use_flow_sigmas, and Wan's release. The last one is left out, for 0. Networks see floor(1000 t).
WHOLE = {"flow_sigmas": (1.0, 0.001), "wan": (float(np.float32(0.999)), 0.0)}
SPACINGS = ("trailing", "leading", "karras", "exponential", *WHOLE)
SHIFTED = ("trailing", "leading", *WHOLE)
RATIOS = (0.002, 80.0)  # least and most sigma / alpha of a continuous process's grid (EDM, Table 1)


def timesteps(
    process: Process, steps: int, shift: float = 1.0, spacing: str = "trailing"
) -> jax.Array:
    """The grid of a sampler: (steps + 1,) float32 times, the last exactly 0.

    Continuous, "trailing": even from exactly 1, then shifted. On a table, where a shift is refused:
    even and rounded to its indices from T down, so all of T .. 0 where steps = T ("trailing", Lin
    et al. 2023, Table 2); or each T // steps of them down to 1 ("leading", ibid., as many published
    pipelines have it). "karras" (Karras et al. 2022, Eq. 5, rho 7) and "exponential" (even in
    log-SNR) space sigma / alpha from 1 down, between `RATIOS` or over the table. Or `steps` falling
    times, as "1,0.75,0.5". "flow_sigmas" and "wan" (continuous alone): see `WHOLE`. Only these and
    trailing take a shift.
    """
    if steps < 1 or (process.points is not None and steps > process.points):
        allowed = "at least 1" if process.points is None else f"1 to {process.points}"
        raise UserError(f"steps was {steps}: {allowed} is allowed on process {process.name!r}")
    if shift != 1.0 and process.points is not None:
        raise UserError(f"shift was {shift}: process {process.name!r} is a table and allows 1")
    if spacing == "leading" and process.points is None:
        raise UserError(f"spacing was {spacing!r}: leading on a table alone is allowed")
    if spacing in WHOLE:
        return _whole(process, steps, shift, spacing)
    if shift != 1.0 and spacing != "trailing":
        raise UserError(f"shift was {shift}: spacing {spacing!r} allows 1")
    if spacing in ("karras", "exponential"):
        return _even_in_ratio(process, steps, spacing)
    grid = np.arange(steps, -1, -1) / steps
    if spacing not in SPACINGS:
        grid = np.append(_listed(process, steps, spacing), 0.0)
    elif process.points is not None:
        index = np.round(grid * process.points)
        if spacing == "leading":
            index = np.append(1 + np.arange(steps)[::-1] * (process.points // steps), 0)
        grid = index / process.points
    return jnp.asarray(shifted(grid, shift), jnp.float32)


def _whole(process: Process, steps: int, shift: float, spacing: str) -> jax.Array:
    """A grid of `WHOLE`; a first time of 1 is moved to where log-SNR is finite."""
    if process.name != "flow":
        raise UserError(f"spacing was {spacing!r} on process {process.name!r}: flow is allowed")
    even = np.linspace(*WHOLE[spacing], steps + 1)[:-1]
    shifted(even, shift)  # refuses a shift that is none
    times = shift * even / (1.0 + (shift - 1.0) * even)  # in the order that published grids round
    times[0] -= 1e-6 * (abs(times[0] - 1.0) < 1e-6)
    seen, found = np.floor(1000.0 * times), times.astype(np.float32)
    # Where float32 rounds to another whole number, the time is moved by its last bit.
    while (wrong := np.floor(np.float32(1000.0) * found) - seen).any():
        found = np.where(wrong == 0.0, found, np.nextafter(found, np.float32(wrong < 0.0)))
    return jnp.append(found, jnp.float32(0.0))


def seen(process: Process, spacing: str) -> Process:
    """The process on a grid of this spacing: networks see whole numbers on those of `WHOLE`."""
    if spacing not in WHOLE:
        return process
    return dataclasses.replace(process, network_time=lambda t: jnp.floor(1000.0 * t))


def _listed(process: Process, steps: int, spacing: str) -> np.ndarray:
    """The times (steps,) that `spacing` lists, on a table at its points."""
    try:
        times = np.array([float(time) for time in spacing.split(",")])
    except ValueError:
        known = ", ".join(SPACINGS)
        raise UserError(f"spacing was {spacing!r}: {known} or times as 1,0.75,0.5") from None
    if process.points is not None:
        times = np.round(times * process.points) / process.points
    if not (times[0] <= 1.0 and times[-1] > 0.0 and (np.diff(times) < 0.0).all()):
        on = "" if process.points is None else f", on {process.points} points,"
        raise UserError(f"spacing was {spacing!r}: falling times from at most 1{on} to above 0")
    if len(times) != steps:
        raise UserError(f"spacing lists {len(times)} times for {steps} steps: as many are needed")
    return times


def _even_in_ratio(process: Process, steps: int, spacing: str) -> jax.Array:
    """A grid even in (sigma / alpha)^(1/7), or in its logarithm; on a table at distinct points."""
    least, most = map(jnp.asarray, RATIOS)
    if process.points is not None:
        ends = jnp.array([1.0 / process.points, 1.0])
        # A little less, so that rounding does not miss the points themselves.
        least, most = 0.9999 * process.sigma(ends) / process.alpha(ends)
    there, back = (lambda x: x ** (1 / 7), lambda x: x**7)
    if spacing == "exponential":
        there, back = jnp.log, jnp.exp
    times = time_at(process, back(jnp.linspace(there(most), there(least), steps)))
    if process.points is not None:
        number = jnp.arange(steps)
        index = jnp.round(times * process.points) + number
        index = jax.lax.cummax(index, reverse=True) - number  # at least one apart
        times = jnp.minimum(index, process.points - number) / process.points
    return jnp.append(times.at[0].set(1.0), 0.0)


def time_at(process: Process, ratio: jax.Array) -> jax.Array:
    """The first time at which sigma / alpha is `ratio` or more, by bisection; 1 if it never is."""

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        reached = process.sigma(middle) >= ratio * process.alpha(middle)
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    return jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(ratio), jnp.ones_like(ratio)))[1]


def half_log_snr(process: Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """lambda = log(alpha / sigma), and whether it is finite; 0 where it is not."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    finite = (alpha > 0.0) & (sigma > 0.0)
    return jnp.log(jnp.where(finite, alpha, 1.0) / jnp.where(finite, sigma, 1.0)), finite


def choose(table: Mapping[str, Entry], what: str, name: str) -> Entry:
    """table[name]; an unknown name is a UserError that lists the known ones."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}: known are {', '.join(table)}")
    return table[name]


def build(
    table: Mapping[str, Callable[..., Entry]], what: str, name: str, options: Mapping[str, Any]
) -> Entry:
    """table[name](**options); an unknown name or option is a UserError that lists the known."""
    make = choose(table, what, name)
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            raise UserError(
                f"unknown option {option!r} of {what} {name!r}: known are "
                f"{', '.join(known) or 'none'}"
            )
    return make(**options)
