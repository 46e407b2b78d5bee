"""One sampling step of a process from time t to time s, with any amount and variance of noise.

With r = alpha_t sigma_s / (alpha_s sigma_t): x_s = alpha_s x0 + k eps + c z, where (k, c) comes
from eta (0 is DDIM, and Euler on the linear path; 1 is DDPM's ancestral step with the posterior
variance), from DDPM's other fixed variance, beta, or from a learned variance between the two.
Singular points (t or s at 0 or 1) are kept out of the divisions and roots.
"""

import jax
import jax.numpy as jnp

from vdit.diffusion.prediction import to_x0_eps
from vdit.diffusion.schedule import Process, like, time_at
from vdit.errors import UserError

VARIANCES = ("posterior", "beta", "learned")


def check_noise(eta: float, variance: str) -> None:
    """Validates `variance`, and `eta`: in [0, 1], and 1 with any but the posterior variance."""
    if variance not in VARIANCES:
        raise UserError(f"unknown variance {variance!r}: known are {', '.join(VARIANCES)}")
    if not 0.0 <= eta <= 1.0 or (variance != "posterior" and eta != 1.0):
        allowed = "0 to 1" if variance == "posterior" else "1"
        raise UserError(f"eta was {eta}: {allowed} is allowed with variance {variance!r}")


def step(
    process: Process, t: jax.Array, s: jax.Array, x_t: jax.Array, x0: jax.Array,
    z: jax.Array | None = None, eta: float = 0.0, variance: str = "posterior",
    share: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """x_s from x_t, the denoiser's x0 and standard normal z, all of one shape (z only if eta > 0).

    t, s: times with the leading axes of x_t, s <= t for eta > 0. Exactly x0 where s = 0; x_t where
    t = 0. share: for "learned", the network's v of x_t's shape, -1 for the posterior variance to 1
    for beta, in log. Sources: DDIM Eq. 12 and 16 (eta); DDPM Eq. 6, 7 ("posterior") and section 3.2
    ("beta"); Nichol and Dhariwal 2021, Eq. 15 ("learned").
    """
    check_noise(eta, variance)
    t, s = like(t, x_t), like(s, x_t)
    x0, eps = to_x0_eps("x0", process, t, x_t, x0)
    if variance == "learned":
        if share is None:
            raise UserError("variance 'learned' needs a denoiser that gives it (learned_variance)")
        k = mean_coefficient(process, t, s)
        c = jnp.where(process.sigma(s) == 0.0, 0.0, jnp.exp(0.5 * between(process, t, s, share)))
        x_s = process.alpha(s) * x0 + k * eps
        return x_s if z is None else x_s + c * z
    k, c = _coefficients(process, t, s, eta, variance)
    x_s = process.alpha(s) * x0 + k * eps
    return x_s if z is None else x_s + c * z


def trapezoid(
    process: Process, t: jax.Array, s: jax.Array, x_t: jax.Array, x0: jax.Array, x_s: jax.Array,
    x0_s: jax.Array, straight: bool,
) -> jax.Array:  # fmt: skip
    """Heun's method: x_s from x_t by the mean of the slopes at (x_t, x0) and (x_s, x0_s).

    x / alpha as a function of sigma / alpha (Karras et al. 2022, Algorithm 1, lines 6 to 8), which
    needs alpha_t > 0; or `straight`, x / (alpha + sigma) of sigma / (alpha + sigma), which is x of
    t on the flow process and finite for all t.
    """
    t, s = like(t, x_t), like(s, x_t)
    slopes, scales, places = [], [], []
    for time, x, clean in ((t, x_t, x0), (s, x_s, x0_s)):
        alpha, sigma = process.alpha(time), process.sigma(time)
        eps = to_x0_eps("x0", process, time, x, clean)[1]
        slopes.append(eps - clean if straight else eps)
        scales.append(alpha + sigma if straight else alpha)
        places.append(sigma / scales[-1])
    slope = 0.5 * (slopes[0] + slopes[1])
    return scales[1] * (x_t / scales[0] + (places[1] - places[0]) * slope)


def churned(
    process: Process, t: jax.Array, x: jax.Array, z: jax.Array, churn: float,
    levels: tuple[float, float], noise: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """A later time and x there, with fresh noise (Karras et al. 2022, Algorithm 2, lines 4 to 6).

    sigma / alpha grows by `churn` (their gamma) where it lies in `levels`, on a table to its next
    point; the noise z is scaled by `noise` (their S_noise). t is ().
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    positive = alpha > 0.0
    ratio = sigma / jnp.where(positive, alpha, 1.0)
    within = positive & (ratio >= levels[0]) & (ratio <= levels[1])
    later = jnp.where(within, jnp.maximum(time_at(process, (1.0 + churn) * ratio), t), t)
    scale = jnp.where(within, process.alpha(later) / jnp.where(positive, alpha, 1.0), 1.0)
    added = _sqrt(process.sigma(later) ** 2 - (scale * sigma) ** 2)
    return later, scale * x + jnp.where(within, noise * added, 0.0) * z


def between(process: Process, t: jax.Array, s: jax.Array, share: jax.Array) -> jax.Array:
    """Log-variances of the step from t to s, of share's shape: Nichol and Dhariwal 2021, Eq. 15.

    share is -1 for the posterior variance, 1 for beta; t and s have as many axes. The last step of
    a table, whose posterior variance is 0, takes that of the step before (as in their code).
    """

    def both(t: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(posterior, beta)."""
        ratio, r = _ratios(process, t, s)
        beta = process.sigma(t) ** 2 - (ratio * process.sigma(s)) ** 2
        return process.sigma(s) ** 2 * (1.0 - r**2), beta

    posterior, beta = both(t, s)
    if process.points is not None:
        first, second = (jnp.full_like(s, point / process.points) for point in (1, 2))
        posterior = jnp.where(process.sigma(s) == 0.0, both(second, first)[0], posterior)
    low, high = (jnp.log(jnp.maximum(variance, 1e-20)) for variance in (posterior, beta))
    return low + 0.5 * (share + 1.0) * (high - low)


def mean_coefficient(process: Process, t: jax.Array, s: jax.Array) -> jax.Array:
    """k of the posterior's mean alpha_s x0 + k eps (DDPM, Eq. 7), of t's shape."""
    return process.sigma(s) * _ratios(process, t, s)[1]


def _ratios(process: Process, t: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha_t / alpha_s, and r = alpha_t sigma_s / (alpha_s sigma_t)."""
    alpha_s, sigma_t, sigma_s = process.alpha(s), process.sigma(t), process.sigma(s)
    # alpha_s = 0 (then t = s = 1) and sigma_t = 0 (then t = s = 0) are steps that stay: both 1.
    stay = (alpha_s == 0.0) | (sigma_t == 0.0)
    ratio = jnp.where(stay, 1.0, process.alpha(t) / jnp.where(stay, 1.0, alpha_s))
    return ratio, jnp.where(stay, 1.0, ratio * sigma_s / jnp.where(stay, 1.0, sigma_t))


def _coefficients(
    process: Process, t: jax.Array, s: jax.Array, eta: float, variance: str
) -> tuple[jax.Array, jax.Array]:
    """(k, c): the factor of eps, and the standard deviation of the added noise."""
    sigma_t, sigma_s = process.sigma(t), process.sigma(s)
    if eta == 0.0:
        return sigma_s, jnp.zeros_like(sigma_s)
    ratio, r = _ratios(process, t, s)
    if variance == "beta":
        c2 = sigma_t**2 - (ratio * sigma_s) ** 2
        # Algorithm 2, line 3: the last step adds no noise, though beta_1 is not 0.
        return sigma_s * r, jnp.where(sigma_s == 0.0, 0.0, _sqrt(c2))
    c2 = eta**2 * (1.0 - r**2)
    return sigma_s * _sqrt(1.0 - c2), sigma_s * _sqrt(c2)


def _sqrt(x: jax.Array) -> jax.Array:
    """sqrt(max(x, 0)) whose gradient at 0 is 0."""
    return jnp.where(x > 0.0, jnp.sqrt(jnp.where(x > 0.0, x, 1.0)), 0.0)
