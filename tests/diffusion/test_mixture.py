"""Samplers on a mixture of three Gaussians in the plane, whose denoiser is known exactly.

Every prediction type runs through its own algebra: the network's answer is made from the exact x0,
then turned back. Dimension key: R samplers, P predictions, B samples of N independent points each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.diffusion.prediction import PREDICTIONS, target, to_x0_eps
from vdit.diffusion.sampler import Made, Sampler, sample, sampler
from vdit.diffusion.schedule import Process, add_noise, process, time_at, timesteps

SHARES = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[1.5, 0.5], [-1.5, 1.0], [0.0, -1.75]])
COVARIANCES = np.array(
    [[[0.16, 0.06], [0.06, 0.09]], [[0.06, -0.02], [-0.02, 0.12]], [[0.25, 0.0], [0.0, 0.04]]]
)
MEAN = SHARES @ MEANS
CENTRED = MEANS - MEAN
COVARIANCE = np.einsum("m,mij->ij", SHARES, COVARIANCES + np.einsum("mi,mj->mij", CENTRED, CENTRED))
CLOUDS, POINTS = 16, 256  # B, N
FAST = {"xla_backend_optimization_level": 3}  # millions of points: here the code's speed counts
ERRORS = 4.5  # standard errors that are allowed: 1 in 150,000 a comparison

SAMPLERS = {
    "ddpm posterior": sampler("ddpm"),
    "ddpm beta": sampler("ddpm", variance="beta"),
    "ddim eta .5": sampler("ddim", eta=0.5),
    "euler": sampler("euler"),  # is "ddim" with eta 0 (test_sampler.py)
    "dpmpp_2m": sampler("dpmpp_2m"),
    "dpmpp_2m_sde": sampler("dpmpp_2m_sde"),
    "dpmpp_3m": sampler("dpmpp_3m"),
    "unipc 2": sampler("unipc"),
    "unipc 3 bh1": sampler("unipc", order=3, bh="bh1"),
    "heun": sampler("heun"),
    "edm churn": sampler("edm", churn=0.1, churn_levels=(0.05, 50.0), churn_noise=1.0),
}
# (process, samplers, predictions, steps): each is one compiled scan
RUNS = {
    "flow": ("flow", tuple(SAMPLERS), tuple(PREDICTIONS), 100),
    "cosine": ("cosine", tuple(SAMPLERS), tuple(PREDICTIONS), 100),
    "ddpm respaced": ("ddpm", tuple(SAMPLERS), tuple(PREDICTIONS), 100),
    "ddpm 1000": ("ddpm", ("ddpm posterior", "ddpm beta"), ("eps",), 1000),
}
# What the finite number of steps may add, as a share of the deviations.
BIAS = {"flow": 0.02, "cosine": 0.02, "ddpm respaced": 0.02, "ddpm 1000": 0.0}
CASES = [
    (run, name, prediction)
    for run, (_, samplers, predictions, _) in RUNS.items()
    for name in samplers
    for prediction in predictions
]


def exact_x0(process: Process, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """E[x0 | x_t] at points x_t (B, 2, N) and the scalar time t, of x_t's shape.

    By coordinate, for elementwise code is one fused loop and small matrices are not.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    total, sum_x, sum_y = 0.0, 0.0, 0.0
    for share, (mean_x, mean_y), ((xx, xy), (_, yy)) in zip(
        SHARES.tolist(), MEANS.tolist(), COVARIANCES.tolist(), strict=True
    ):
        # x_t's marginal in a component: mean alpha m, covariance alpha^2 S + sigma^2 I
        m_xx, m_xy, m_yy = alpha**2 * xx + sigma**2, alpha**2 * xy, alpha**2 * yy + sigma**2
        det = m_xx * m_yy - m_xy**2
        dx, dy = x_t[:, 0] - alpha * mean_x, x_t[:, 1] - alpha * mean_y
        # e = marginal^-1 d; E[x0 | x_t, component] = m + alpha S e
        ex, ey = (m_yy / det) * dx - (m_xy / det) * dy, (m_xx / det) * dy - (m_xy / det) * dx
        density = share / jnp.sqrt(det) * jnp.exp(-0.5 * (dx * ex + dy * ey)) + 1e-30
        total += density
        sum_x += density * (mean_x + alpha * (xx * ex + xy * ey))
        sum_y += density * (mean_y + alpha * (xy * ex + yy * ey))
    return jnp.stack([sum_x / total, sum_y / total], 1)


def check_moments(x: np.ndarray, bias: float) -> None:
    """Mean, covariance and shares of points (B, 2, N) within Monte Carlo error plus `bias`."""
    x = np.moveaxis(x, 1, 2).reshape(-1, 2)
    count = len(x)
    assert np.isfinite(x).all()
    deviation = np.sqrt(np.diag(COVARIANCE))
    centred = x - MEAN
    products = np.einsum("ni,nj->nij", centred, centred)
    away = x[:, None] - MEANS
    distance = np.einsum("nmi,mij,nmj->nm", away, np.linalg.inv(COVARIANCES), away)
    log_density = np.log(SHARES) - 0.5 * (np.log(np.linalg.det(COVARIANCES)) + distance)
    shares = np.bincount(log_density.argmax(1), minlength=3) / count
    quotients = [  # error / allowed error
        np.abs(x.mean(0) - MEAN) / (ERRORS * deviation / count**0.5 + bias * deviation),
        np.abs(products.mean(0) - COVARIANCE)
        / (ERRORS * products.std(0) / count**0.5 + bias * np.outer(deviation, deviation)),
        np.abs(shares - SHARES) / (ERRORS * np.sqrt(SHARES * (1 - SHARES) / count) + bias),
    ]
    assert max(quotient.max() for quotient in quotients) < 1.0, quotients


def side_by_side(samplers: list[Sampler]) -> Sampler:
    """A sampler that gives each of several an equal part of the batch."""

    def parts(x: jax.Array) -> list[jax.Array]:
        return jnp.split(x, len(samplers))

    def init(x: jax.Array) -> list:
        return [one.init(part) for one, part in zip(samplers, parts(x), strict=True)]

    def advance(denoise, process, state, x, t, s, z) -> tuple[Made, list]:  # noqa: ANN001
        x0 = denoise(x, t)[0]
        made = [
            one.step(
                # Methods of one evaluation share it.
                lambda at, t, x=x, x0=x0: (x0, None) if at is x else denoise(at, t),
                process,
                old,
                x,
                t,
                s,
                z,
            )
            for one, old, x, x0, z in zip(
                samplers, state, parts(x), parts(x0), parts(z), strict=True
            )
        ]
        return Made(jnp.concatenate([m.x for m, _ in made]), x0, None), [new for _, new in made]

    return Sampler(init, advance)


@functools.cache
def drawn(run: str) -> dict[tuple[str, str], np.ndarray]:
    """Points (B, 2, N) of every sampler and prediction of a run."""
    process_name, names, predictions, steps = RUNS[run]
    p = process(process_name)

    def denoise(x: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        x0, eps = to_x0_eps("x0", p, t, x, exact_x0(p, x, t))
        groups = [array.reshape(-1, len(predictions), CLOUDS * 2, POINTS) for array in (x, x0, eps)]
        made = []
        for i, prediction in enumerate(predictions):
            x_t, x0, eps = (array[:, i] for array in groups)
            made.append(to_x0_eps(prediction, p, t, x_t, target(prediction, p, t, x0, eps))[0])
        return jnp.stack(made, 1).reshape(x.shape), None

    @functools.partial(jax.jit, compiler_options=FAST)
    def draw(x_init: jax.Array, times: jax.Array, keys: jax.Array) -> jax.Array:
        return sample(denoise, x_init, times, p, side_by_side(samplers), keys)[0]

    samplers = [SAMPLERS[name] for name in names]
    batch = len(names) * len(predictions) * CLOUDS
    x_init = np.random.default_rng(0).normal(size=(batch, 2, POINTS)).astype(np.float32)
    x = draw(x_init, timesteps(p, steps), jax.random.split(jax.random.key(0), batch))
    x = np.asarray(x).reshape(len(names), len(predictions), CLOUDS, 2, POINTS)
    return {
        (name, prediction): x[r, i]
        for r, name in enumerate(names)
        for i, prediction in enumerate(predictions)
    }


def test_the_denoiser_is_the_posterior_mean() -> None:
    """The residual of a posterior mean is uncorrelated with any function of x_t."""
    p, rng = process("cosine"), np.random.default_rng(0)
    component = rng.choice(3, CLOUDS * POINTS, p=SHARES)
    roots, normal = np.linalg.cholesky(COVARIANCES), rng.normal(size=(len(component), 2))
    x0 = MEANS[component] + np.einsum("nij,nj->ni", roots[component], normal)
    x0 = np.moveaxis(x0.reshape(CLOUDS, POINTS, 2), 1, 2).astype(np.float32)
    check_moments(x0, bias=0.0)
    t = np.float32(0.45)
    x_t = add_noise(p, x0, rng.normal(size=x0.shape).astype(np.float32), t)
    residual = np.asarray(x0 - jax.jit(exact_x0, static_argnums=0)(p, x_t, t))
    x_t = np.asarray(x_t)
    for probe in (np.ones_like(x_t), x_t, x_t[:, ::-1], np.sin(3 * x_t), x_t**2):
        product = residual * probe
        error = np.abs(product.mean((0, 2))) / (product.std((0, 2)) / len(component) ** 0.5)
        assert error.max() < ERRORS


@pytest.mark.parametrize(("run", "name", "prediction"), CASES)
def test_samples_have_the_mixtures_moments(run: str, name: str, prediction: str) -> None:
    check_moments(drawn(run)[name, prediction], BIAS[run])


# Name, options, order: UniPC's corrector adds one to that of its predictor.
ORDERS = [
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("edm", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_3m", {}, 2),  # as published
    ("unipc", {"order": 1, "bh": "bh1"}, 2),
    ("unipc", {"order": 1}, 2),
    ("unipc", {"order": 2}, 3),
    ("unipc", {"order": 3}, 4),
]


@functools.cache
def to_one_end() -> tuple[jax.Array, jax.Array]:
    """Where points go by the probability flow, and where from."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 32)), jnp.float32)
    return x, walked("unipc", {"order": 3}, 240, x)


def walked(name: str, options: dict, steps: int, x: jax.Array) -> jax.Array:
    """From log-SNR -3 to 2 in even steps on the flow process."""
    p = process("flow")

    @jax.jit
    def walk(x: jax.Array, times: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), len(x))
        one = sampler(name, **options)
        return sample(lambda x, t: (exact_x0(p, x, t), None), x, times, p, one, keys)[0]

    times = time_at(p, jnp.asarray(np.exp(np.linspace(1.5, -1.0, steps + 1)), jnp.float32))
    return walk(x, times)


@pytest.mark.parametrize(("name", "options", "order"), ORDERS)
def test_the_error_falls_by_the_order(name: str, options: dict, order: int) -> None:
    x, end = to_one_end()
    few, many = (
        float(jnp.sqrt(jnp.square(walked(name, options, steps, x) - end).mean()))
        for steps in (20, 60)
    )
    measured = np.log(few / many) / np.log(3)
    assert abs(measured - order) < 0.4, measured
