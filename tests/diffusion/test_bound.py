"""The variational bound against numerical integration, in float64, and what it teaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from vdit.diffusion.bound import bound, discretized_nll
from vdit.diffusion.schedule import process
from vdit.errors import UserError

BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.cumprod(1.0 - BETAS)
POSTERIOR = BETAS[1:] * (1.0 - ALPHA_BAR[:-1]) / (1.0 - ALPHA_BAR[1:])  # from index 2 on
DDPM = process("ddpm")


def parts(index: int, share: float) -> tuple[float, float, float]:
    """(the mean's factor of x0, posterior, learned variance) of the paper's index 2 .. 1000."""
    i = index - 1
    factor = np.sqrt(ALPHA_BAR[i - 1]) * BETAS[i] / (1.0 - ALPHA_BAR[i])  # DDPM, Eq. 7
    mixed = 0.5 * (share + 1.0)
    learned = np.exp(mixed * np.log(BETAS[i]) + (1.0 - mixed) * np.log(POSTERIOR[i - 1]))
    return factor, POSTERIOR[i - 1], learned


@pytest.mark.parametrize("index", [1000, 600, 100, 10, 2])
@pytest.mark.parametrize("share", [-1.0, -0.3, 1.0])
def test_the_divergence_is_the_integral(index: int, share: float) -> None:
    x0, guess = 0.4, 0.1
    factor, posterior, learned = parts(index, share)
    p, q = stats.norm(0.0, posterior**0.5), stats.norm(factor * (guess - x0), learned**0.5)
    reach = 12.0 * posterior**0.5
    nats, _ = integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -reach, reach, epsabs=1e-12, limit=200
    )
    ours = bound(
        DDPM, jnp.array([index / 1000]), *(jnp.full((1, 1), v) for v in (x0, guess, share))
    )
    np.testing.assert_allclose(ours[0, 0] * np.log(2.0), nats, rtol=2e-3, atol=2e-6)


def test_a_perfect_step_costs_nothing() -> None:
    t, x = jnp.arange(2, 1001) / 1000, jnp.linspace(-1.0, 1.0, 999)[:, None]
    np.testing.assert_allclose(bound(DDPM, t, x, x, jnp.full_like(x, -1.0)), 0.0, atol=1e-6)


def test_the_likelihood_is_that_of_bins_and_they_fill_the_line() -> None:
    x = np.linspace(-1.0, 1.0, 256)
    log_variance = np.log(0.05**2)
    edges = np.concatenate([[-np.inf], (x[1:] + x[:-1]) / 2, [np.inf]])
    mass = np.diff(stats.norm(0.13, 0.05).cdf(edges))
    ours = np.exp(-np.asarray(discretized_nll(jnp.asarray(x), jnp.full(256, 0.13), log_variance)))
    np.testing.assert_allclose(ours, np.maximum(mass, 1e-12), rtol=2e-3, atol=2e-7)
    assert abs(ours.sum() - 1.0) < 1e-4


def test_the_first_point_is_the_discretized_nll() -> None:
    share = jnp.full((1, 1), 0.5)
    mixed = 0.25 * np.log(POSTERIOR[0]) + 0.75 * np.log(BETAS[0])  # the clipped posterior
    x, guess = jnp.full((1, 1), 0.3), jnp.full((1, 1), 0.31)
    ours = bound(DDPM, jnp.array([1e-3]), x, guess, share)
    np.testing.assert_allclose(ours * np.log(2.0), discretized_nll(x, guess, mixed), rtol=1e-4)


def test_it_teaches_the_variance_and_not_the_mean() -> None:
    """No gradient for the prediction; the best share is where the variance is what it should be."""
    t, rng = jnp.full((1,), 0.3), np.random.default_rng(0)
    factor, posterior, _ = parts(300, -1.0)
    # Errors of x0 that double the variance of the step: the optimum is in between.
    x0 = jnp.zeros((1, 20_000))
    guess = jnp.asarray(
        rng.standard_normal(x0.shape) * 0.2 * (BETAS[299] - posterior) ** 0.5 / factor
    )

    def total(guess: jax.Array, share: jax.Array) -> jax.Array:
        return bound(DDPM, t, x0, guess, jnp.full_like(x0, share)).mean()

    assert not np.any(jax.grad(total)(guess, jnp.float32(0.2)))
    best = np.log((posterior + float(jnp.mean((factor * guess) ** 2))) / posterior)
    best = 2.0 * best / np.log(BETAS[299] / posterior) - 1.0
    assert abs(jax.grad(total, argnums=1)(guess, jnp.float32(best))) < 1e-5
    below, above = (jax.grad(total, argnums=1)(guess, jnp.float32(best + d)) for d in (-0.3, 0.3))
    assert below < 0.0 < above


def test_only_tables_have_it() -> None:
    x = jnp.zeros((1, 1))
    with pytest.raises(UserError, match="needs a table as ddpm, not process 'flow'"):
        bound(process("flow"), jnp.ones(1), x, x, x)


def test_a_clean_token_gives_no_nan() -> None:
    x = jnp.ones((2, 3))
    gradient = jax.grad(lambda v: bound(DDPM, jnp.array([0.0, 0.5]), x, x, v).sum())(x)
    assert np.isfinite(gradient).all()
