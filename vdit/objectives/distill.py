"""Learning a teacher's guided trajectory in few steps (progressive distillation).

Each of the student's steps is taught as the several steps that its teacher takes from the same
point, guidance included (Salimans and Ho 2022, arXiv:2202.00512, Algorithm 2, with any number of
the teacher's steps at once; guidance as in Meng et al. 2023, arXiv:2210.03142, at one scale).

Dimension key: B batch rows, L tokens, C token channels, N steps of the student, P of the teacher in
each of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdit.denoiser import Denoiser
from vdit.diffusion.sampler import Denoise
from vdit.diffusion.schedule import Process, like
from vdit.diffusion.step import step
from vdit.objectives.diffusion import Dense
from vdit.objectives.objective import Batch, Objective, Params, Sums, low_discrepancy
from vdit.tokens import Condition, Layout

# From denoise(params, x_t, t), of both halves or of the conditional one, and the parameters.
Steer = Callable[[Callable[..., tuple[jax.Array, Any]], Any], Denoise]


def lands_at(
    process: Process, t: jax.Array, s: jax.Array, x_t: jax.Array, x_s: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The x0 and eps of one deterministic step that leads from x_t to x_s, t above s."""
    t, s = like(t, x_t), like(s, x_t)
    ratio = process.sigma(s) / process.sigma(t)
    x0 = (x_s - ratio * x_t) / (process.alpha(s) - ratio * process.alpha(t))
    return x0, (x_t - process.alpha(t) * x0) / process.sigma(t)


def distilled(
    base: Objective, denoiser: Denoiser, rows: Dense, steer: Steer, times: np.ndarray, parts: int
) -> Objective:
    """`base`'s networks learn, from dense batches, N steps whose ends `times[::parts]` are.

    frozen["base"] holds the teacher's groups "dit" and "text"; it goes through all of `times`
    (N·P + 1,), falling, with the guidance of `steer`. A text is never dropped: what the student
    learns has the guidance in it.
    """
    steps = (len(times) - 1) // parts
    told, untold = (dataclasses.replace(rows, text_drop=share) for share in (0.0, 1.0))
    process, grid = denoiser.process, jnp.asarray(times, jnp.float32)

    def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array) -> Sums:
        teacher = frozen["base"]
        drawn = told.draw(denoiser, params, frozen, batch, key)
        x0, eps, layout = jax.tree.map(denoiser.constrain, (drawn.x0, drawn.eps, drawn.layout))
        both = [
            rows.draw(denoiser, teacher, frozen, batch, key).condition for rows in (told, untold)
        ]
        number = (low_discrepancy(batch["ordinal"]) * steps).astype(jnp.int32)
        known, length = layout.given()[:, : x0.shape[1], None], len(x0)

        def denoise(params: Any, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            times = len(x_t) // length  # with the null half, or without
            condition: Condition = jax.tree.map(lambda *x: jnp.concatenate(x), *both[:times])
            all_layout: Layout = jax.tree.map(lambda x: jnp.concatenate([x] * times), layout)
            out = denoiser(params, x_t, jnp.tile(t, times), all_layout, condition).x0
            return jnp.where(jnp.tile(known, (times, 1, 1)), jnp.tile(x0, (times, 1, 1)), out), None

        guided = steer(denoise, teacher["dit"])

        def part(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            t, s = grid[number * parts + index], grid[number * parts + index + 1]
            x_s = step(process, t, s, x, guided(x, t)[0])
            return jnp.where(known, x0, x_s), None

        t, s = grid[number * parts], grid[(number + 1) * parts]
        x_t = denoiser.add_noise(x0, eps, t, layout)
        x_s = jax.lax.stop_gradient(jax.lax.scan(part, x_t, jnp.arange(parts))[0])
        wanted = layout.wanted()[..., None]
        denoised = denoiser(params["dit"], x_t, t, layout, drawn.condition)
        error = denoised.error(*lands_at(process, t, s, x_t, x_s), "uniform")
        total = jnp.where(wanted, error, 0.0).sum()
        return total, (wanted.sum() * x0.shape[-1]).astype(jnp.float32), {}

    return Objective(base.init, loss)
