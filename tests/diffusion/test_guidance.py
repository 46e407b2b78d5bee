"""Guidance: one call on [conditional, null], mixed in x0."""

import jax
import jax.numpy as jnp
import numpy as np

from vdit.diffusion.guidance import guided, pushed
from vdit.diffusion.prediction import to_x0_eps
from vdit.diffusion.sampler import sample, sampler
from vdit.diffusion.schedule import process, timesteps

CONDITION = jnp.array([[1.0], [-2.0], [0.0], [0.0]])  # of two samples, then their nulls


def conditioned(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A denoiser of two samples and their nulls; its aux is the batch that it was given."""
    assert x.shape[0] == 4
    return 0.3 * x + CONDITION * (1.0 - t), x


def test_mixes_conditional_and_null_in_one_call() -> None:
    x, t = jnp.array([[0.5, 1.0], [2.0, -1.0]]), jnp.float32(0.25)
    cond, null = 0.3 * x + CONDITION[:2] * 0.75, 0.3 * x
    for scale in (0.0, 1.0, 2.5):
        x0, aux = guided(conditioned, scale)(x, t)
        np.testing.assert_allclose(x0, null + scale * (cond - null), atol=1e-6)
        np.testing.assert_array_equal(aux, x)
    np.testing.assert_array_equal(guided(conditioned, 1.0)(x, t)[0], cond)


def test_one_scale_a_sample() -> None:
    x, t = jnp.array([[0.5, 1.0], [2.0, -1.0]]), jnp.float32(0.25)
    x0, _ = guided(conditioned, jnp.array([1.0, 3.0]))(x, t)
    alone = [guided(conditioned, scale)(x, t)[0][i] for i, scale in enumerate((1.0, 3.0))]
    np.testing.assert_array_equal(x0, jnp.stack(alone))


def test_mixing_x0_is_mixing_eps() -> None:
    p, x, t = process("cosine"), jnp.array([[0.5, 1.0], [2.0, -1.0]]), jnp.float32(0.4)
    x0, _ = guided(conditioned, 4.0)(x, t)
    both, _ = conditioned(jnp.concatenate([x, x]), t)
    cond, null = (to_x0_eps("x0", p, t, x, half)[1] for half in jnp.split(both, 2))
    np.testing.assert_allclose(
        to_x0_eps("x0", p, t, x, x0)[1], null + 4.0 * (cond - null), atol=1e-5
    )


def test_runs_in_the_scan() -> None:
    p, keys = process("flow"), jax.random.split(jax.random.key(0), 2)
    x_init, grid = jnp.zeros((2, 3)), timesteps(p, 8)
    x, aux = sample(guided(conditioned, 2.0), x_init, grid, p, sampler("euler"), keys)
    assert x.shape == (2, 3) and aux.shape == (2, 3)
    assert x[0].mean() > x[1].mean()


def test_pushes_away_from_a_weaker_answer() -> None:
    """A denoiser whose error is twice the other's, in the same direction: push 1 is the truth."""
    x, t, truth = jnp.array([[0.5, 1.0], [2.0, -1.0]]), jnp.float32(0.25), jnp.full((2, 2), 0.7)
    error = jnp.array([[0.1, -0.2], [0.3, 0.05]])

    def strong(x: jax.Array, t: jax.Array) -> tuple[jax.Array, str]:
        return truth + error, "aux"

    def weak(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        assert x.shape == truth.shape
        return truth + 2 * error, None

    x0, aux = pushed(strong, weak, jnp.ones_like)(x, t)
    np.testing.assert_allclose(x0, truth, atol=1e-6)
    assert aux == "aux"
    # Beside guidance it is the conditional answer that is pushed.
    mixed, _ = guided(conditioned, 2.5)(x, t)
    cond = conditioned(jnp.concatenate([x, x]), t)[0][:2]
    both, _ = guided(conditioned, 2.5, weak, lambda t: 2 * t)(x, t)
    np.testing.assert_allclose(both, mixed + 0.5 * (cond - truth - 2 * error), atol=1e-6)
