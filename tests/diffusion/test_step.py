"""The one step against the closed forms that it unites, and at its singular points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.diffusion.schedule import PROCESSES, process, timesteps
from vdit.diffusion.step import step
from vdit.errors import UserError

BETAS = np.concatenate([[0.0], np.linspace(1e-4, 0.02, 1000)])  # by the paper's index
ALPHA_BAR = np.cumprod(1.0 - BETAS)
VARIANTS = [
    {"eta": 0.0},
    {"eta": 0.4},
    {"eta": 1.0},
    {"eta": 1.0, "variance": "beta"},
]
jitted = jax.jit(step, static_argnums=0, static_argnames=("eta", "variance"))


def triple(shape: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(3)]


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpms_closed_form_at_every_t(variance: str) -> None:
    """q(x_{t-1} | x_t, x0), Eq. 6 and 7, from the betas themselves in float64."""
    index = np.arange(1000, 0, -1)
    x_t, x0, z = triple((1000, 3))
    times = timesteps(process("ddpm"), 1000)
    times, ones, zeros = np.asarray(times), np.ones_like(z), np.zeros_like(z)

    def made(z: jax.Array) -> np.ndarray:
        x_s = jitted(process("ddpm"), times[:-1], times[1:], x_t, x0, z, eta=1.0, variance=variance)
        return np.asarray(x_s, np.float64)

    beta, ab, ab_last = (a[:, None] for a in (BETAS[index], ALPHA_BAR[index], ALPHA_BAR[index - 1]))
    mean = (
        np.sqrt(ab_last) * beta / (1 - ab) * x0 + np.sqrt(1 - beta) * (1 - ab_last) / (1 - ab) * x_t
    )
    posterior = (1 - ab_last) / (1 - ab) * beta
    deviation = np.sqrt(posterior if variance == "posterior" else beta)
    deviation[-1] = 0.0  # Algorithm 2, line 3: z = 0 at the last step
    # Rounding: 6e-8 in r is 6e-8 / beta in 1 - r^2, and half of that in the deviation.
    np.testing.assert_allclose(made(zeros), mean, atol=5e-6)
    np.testing.assert_allclose((made(ones) - made(zeros)), deviation * np.ones((1, 3)), atol=5e-6)
    np.testing.assert_array_equal(made(z)[-1], x0[-1])


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_steps_keep_the_marginal(name: str, eta: float) -> None:
    """If x_t = alpha_t x0 + sigma_t eps, the noise of x_s has variance sigma_s^2, for any eta."""
    p = process(name)
    grid = np.array([1.0, 0.9, 0.7, 0.3, 0.05, 0.0], np.float32)
    t, s = grid[:-1], grid[1:]
    alpha, sigma = (np.asarray(curve(grid))[:, None] for curve in (p.alpha, p.sigma))
    zero, one = np.zeros((5, 1), np.float32), np.ones((5, 1), np.float32)

    def made(x_t: np.ndarray, x0: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.asarray(jitted(p, t, s, x_t, x0, z, eta=eta))

    from_eps = made(sigma[:-1], zero, zero)
    from_z = made(sigma[:-1], zero, one) - from_eps
    np.testing.assert_allclose(from_eps**2 + from_z**2, sigma[1:] ** 2, atol=1e-6)
    np.testing.assert_allclose(made(alpha[:-1], one, zero), alpha[1:], atol=1e-6)


def test_ddim_is_song_et_als_equation_12() -> None:
    p = process("ddpm")
    x_t, x0, z = (np.asarray(x, np.float64) for x in triple((3, 4)))
    at, to = np.array([1000, 400, 30]), np.array([900, 350, 10])
    ab, ab_s = ALPHA_BAR[at][:, None], ALPHA_BAR[to][:, None]
    eps = (x_t - np.sqrt(ab) * x0) / np.sqrt(1 - ab)
    for eta in (0.0, 0.4, 1.0):
        sigma = eta * np.sqrt((1 - ab_s) / (1 - ab) * (1 - ab / ab_s))  # Eq. 16
        expected = np.sqrt(ab_s) * x0 + np.sqrt(1 - ab_s - sigma**2) * eps + sigma * z
        arrays = (jnp.asarray(a, jnp.float32) for a in (at / 1000, to / 1000, x_t, x0, z))
        np.testing.assert_allclose(jitted(p, *arrays, eta=eta), expected, rtol=1e-5, atol=1e-5)


def test_without_noise_it_is_euler_on_the_straight_path() -> None:
    x_t, x0, _ = triple((4, 3))
    t, s = jnp.array([1.0, 0.8, 0.5, 0.1]), jnp.array([0.7, 0.4, 0.45, 0.0])
    velocity = (x_t - x0) / t[:, None]  # eps - x0
    np.testing.assert_allclose(
        jitted(process("flow"), t, s, x_t, x0), x_t + (s - t)[:, None] * velocity, atol=1e-6
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_singular_points(name: str) -> None:
    """Values and gradients are finite; s = 0 is x0 to the bit; a step to its own time stays."""
    p = process(name)
    x_t, x0, z = triple((6, 3))
    t = jnp.array([1.0, 1.0, 0.5, 0.0, 1.0, 0.3])
    s = jnp.array([0.5, 0.0, 0.0, 0.0, 1.0, 0.3])

    def total(x_t, x0, t, s, options):  # noqa: ANN001, ANN202
        x_s = step(p, t, s, x_t, x0, z if options["eta"] else None, **options)
        return (x_s**2).sum(), x_s

    @jax.jit
    def run(*arguments: jax.Array) -> list:
        with_gradients = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)
        return [with_gradients(*arguments, options) for options in VARIANTS]

    for (_, x_s), gradients in run(x_t, x0, t, s):
        for array in (x_s, *gradients):
            assert np.isfinite(array).all()
        np.testing.assert_array_equal(x_s[1:3], x0[1:3])
        np.testing.assert_array_equal(x_s[3], x_t[3])  # given tokens keep their value
        np.testing.assert_allclose(x_s[4:], x_t[4:], atol=1e-5)


def test_levels_by_token() -> None:
    """One step of (B, L, C) with times (B, L) is the steps of the tokens alone."""
    p = process("cosine")
    x_t, x0, z = triple((2, 3, 4))
    t = jnp.array([[1.0, 0.5, 0.0], [0.7, 0.7, 0.7]])
    s = t * 0.5
    whole = jitted(p, t, s, x_t, x0, z, eta=0.6)
    flat = jitted(p, t.ravel(), s.ravel(), *(a.reshape(6, 4) for a in (x_t, x0, z)), eta=0.6)
    np.testing.assert_allclose(whole.reshape(6, 4), flat, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variance": "fixed"}, "'fixed': known are posterior, beta, learned"),
        ({"eta": 1.0, "variance": "learned"}, "'learned' needs a denoiser that gives it"),
        ({"eta": 1.5}, "eta was 1.5: 0 to 1"),
        ({"eta": 0.5, "variance": "beta"}, "eta was 0.5: 1 is allowed with variance 'beta'"),
    ],
)
def test_what_is_refused(options: dict, words: str) -> None:
    x = jnp.zeros((1, 1))
    with pytest.raises(UserError, match=words):
        step(process("flow"), jnp.ones(1), jnp.zeros(1), x, x, x, **options)


def test_a_learned_variance_lies_between_the_two() -> None:
    """Shares of -1 and 1 are the two fixed variances; 0 is their geometric mean."""
    p = process("ddpm")
    index = np.array([1000, 700, 300, 40, 3, 2])
    t, s = index / 1000, (index - 1) / 1000
    x_t, x0, z = triple((len(index), 5))
    fixed = [jitted(p, t, s, x_t, x0, z, eta=1.0, variance=name) for name in ("posterior", "beta")]
    made = [
        jitted(p, t, s, x_t, x0, z, eta=1.0, variance="learned", share=jnp.full_like(x0, v))
        for v in (-1.0, 1.0, 0.0)
    ]
    np.testing.assert_allclose(made[0], fixed[0], atol=2e-6)
    np.testing.assert_allclose(made[1], fixed[1], atol=2e-6)
    mean = jitted(p, t, s, x_t, x0, jnp.zeros_like(z), eta=1.0, variance="beta")
    noise = [np.abs(np.asarray(x - mean)) for x in (*fixed, made[2])]
    np.testing.assert_allclose(noise[2], np.sqrt(noise[0] * noise[1]), rtol=2e-3, atol=1e-6)


def test_the_last_step_of_a_learned_variance_adds_no_noise() -> None:
    x_t, x0, z = triple((1, 5))
    made = step(process("ddpm"), jnp.array([1e-3]), jnp.zeros(1), x_t, x0, z, 1.0, "learned", x0)
    np.testing.assert_array_equal(made, x0)
