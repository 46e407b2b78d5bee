"""Distillation: the student's target is where its teacher's steps lead."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base, distill
from vdit.config import joined
from vdit.denoiser import Denoiser
from vdit.diffusion.schedule import add_noise, process, timesteps
from vdit.diffusion.step import step
from vdit.errors import UserError
from vdit.model import Settings, settings_of, steered
from vdit.models.dit import DiT
from vdit.models.text import learned
from vdit.objectives.diffusion import Dense, denoising_objective
from vdit.objectives.distill import distilled, lands_at
from vdit.tokens import pattern_shares, patterns


@pytest.mark.parametrize("name", ["flow", "cosine"])
def test_a_step_s_end_is_taken_back_to_its_x0_and_eps(name: str) -> None:
    made = process(name)
    x0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    t, s = jnp.array([0.9, 0.5, 0.2]), jnp.array([0.4, 0.45, 0.0])
    x_t = add_noise(made, x0, eps, t)
    found = lands_at(made, t, s, x_t, step(made, t, s, x_t, x0))
    for one, other in zip(found, (x0, eps), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def parts(settings: Settings, steps: int, count: int) -> tuple[Any, ...]:
    """The objective of a small denoiser, its batch, and parameters with an output."""
    network = DiT(width=16, depth=2, heads=2)
    denoiser = Denoiser(network, process("flow"), "flow", learned(40, width=16, depth=1, heads=2))
    table = patterns(3, 4, 12.0)
    shares = pattern_shares(table, {"text": 0.5, "prefix": 0.5})
    rows = Dense(table, shares, lambda u: u, 0.1)
    plain = denoising_objective(denoiser, rows)
    steer = functools.partial(steered, settings=settings, process=denoiser.process)
    times = np.asarray(timesteps(denoiser.process, steps * count, 3.0, "trailing"))
    random = np.random.default_rng(0)
    batch = {
        "latent": random.normal(size=(4, int(table.source.max()) + 1, 2, 2, 3)).astype(np.float32),
        "ids": random.integers(1, 40, (4, 6)).astype(np.int32),
        "mask": np.ones((4, 6), bool),
        "ordinal": np.arange(4, dtype=np.uint32),
    }
    params = jax.jit(plain.init)(jax.random.key(0), batch)
    # Gates and the output begin at zero: random ones, so that all of the network counts.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    frozen = {"mean": jnp.zeros(3), "std": jnp.ones(3)}
    objective = distilled(plain, denoiser, rows, steer, times, count)
    return objective, batch, jax.tree.unflatten(tree, moved), frozen


def loss(made: tuple[Any, ...], student: Any, teacher: Any) -> float:
    objective, batch, _, frozen = made
    total, weight, _ = jax.jit(objective.loss)(
        student, frozen | {"base": teacher}, batch, jax.random.key(2)
    )
    return float(total / weight)


def test_one_step_of_a_teacher_without_guidance_is_its_own() -> None:
    """Its student's loss is zero with its parameters, and with no others."""
    settings = settings_of(base.get_config("smoke"), guidance=1.0, push=0.0)
    made = parts(settings, 3, 1)
    params = made[2]
    assert loss(made, params, params) < 1e-9
    assert loss(made, jax.tree.map(lambda x: 1.1 * x, params), params) > 1e-4


def test_guidance_and_steps_of_the_teacher_are_what_is_learned() -> None:
    settings = settings_of(base.get_config("smoke"), guidance=2.5, push=0.0)
    made, params = parts(settings, 3, 1), None
    params = made[2]
    assert loss(made, params, params) > 1e-4
    plain = settings_of(base.get_config("smoke"), guidance=1.0, push=0.0)
    several = parts(plain, 3, 4)
    assert loss(several, params, params) > 1e-6


def test_what_cannot_be_distilled_is_refused() -> None:
    config = distill.get_config("base")
    joined.check(config)
    assert config.dit.distill.steps * config.dit.distill.parts == 20
    for changes, words in (({"init": ""}, "trained workdir"), ({"dit.distill.parts": 0}, "1 or")):
        config = distill.get_config("base,2")
        config.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=words):
            joined.check(config)
    with pytest.raises(UserError, match="WORKDIR,STEPS"):
        distill.get_config("base,nine")
