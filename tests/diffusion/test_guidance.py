"""Guidance: one call on [conditional, null], mixed in x0."""

import jax
import jax.numpy as jnp
import numpy as np

from vdit.diffusion.guidance import guided, projected, pushed, within
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


def test_projected_is_apgs_direction() -> None:
    """In NumPy: limited first, then split along the conditional x0 of each sample."""
    rng = np.random.default_rng(0)
    difference, cond = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    difference[1] *= 0.1
    made = projected(jnp.asarray(difference), jnp.asarray(cond), parallel=0.25, radius=0.5)
    for ours, d, c in zip(made, difference.reshape(3, -1), cond.reshape(3, -1), strict=True):
        d = d * min(1.0, 0.5 / np.sqrt(np.mean(d**2)))
        unit = c / np.linalg.norm(c)
        along = (d @ unit) * unit
        np.testing.assert_allclose(ours.ravel(), d - along + 0.25 * along, atol=1e-6)
    same = projected(jnp.asarray(difference), jnp.zeros_like(cond), parallel=0.0, radius=0.0)
    np.testing.assert_array_equal(same, difference)


def test_guided_by_a_projected_difference() -> None:
    x, t = jnp.array([[0.5, 1.0], [2.0, -1.0]]), jnp.float32(0.25)
    half, _ = guided(conditioned, 3.0, project=lambda difference, cond: 0.5 * difference)(x, t)
    np.testing.assert_allclose(half, guided(conditioned, 2.0)(x, t)[0], atol=1e-6)


def test_guidance_applies_within_its_levels() -> None:
    """And the other denoiser alone elsewhere: in all, the calls that are needed."""
    p, keys = process("flow"), jax.random.split(jax.random.key(0), 2)
    calls = []

    def counted(name: str, value: float):  # noqa: ANN202
        def denoise(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            jax.debug.callback(lambda t: calls.append((name, round(float(t), 3))), t)
            return jnp.full_like(x, value), x

        return denoise

    denoise = within(p, (0.25, 0.75), counted("inside", 1.0), counted("outside", 0.0))
    _, made = jax.jit(
        lambda x: sample(denoise, x, timesteps(p, 4), p, sampler("euler"), keys, every_step=True)
    )(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(made.x0[:, 0, 0], [0.0, 1.0, 1.0, 0.0])
    jax.effects_barrier()
    assert sorted(calls) == [("inside", 0.5), ("inside", 0.75), ("outside", 0.25), ("outside", 1.0)]
