"""Averages of any length from snapshots of two: weights and sums against averages followed."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import Points, objective

from vdit.config import default
from vdit.data.loader import batches
from vdit.errors import UserError
from vdit.runtime import averages
from vdit.runtime.checkpoint import restore_ema
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics
from vdit.runtime.preemption import Preemption
from vdit.train import Runtime, fit

STEPS, EVERY = 400, 25
LENGTHS = (0.02, 0.05, 0.08, 0.10, 0.15, 0.25)


def fitted(workdir: Path, steps: int, **changes: Any) -> None:
    """Trains the toy stage to step `steps`, with a checkpoint every two."""
    config = default()
    config.run.save_every = 2
    options = config.vae.train.copy_and_resolve_references()
    options.update({"batch": 8, "warmup": 2, "schedule": "constant", "steps": steps, **changes})
    stream = batches(Points(), 8, 3, ("x",), shuffle=False)
    mesh, frozen = make_mesh({"data": 1}, jax.devices()[:1]), {"scale": np.float32(0.5)}
    with Preemption() as preemption, Metrics(workdir, True) as metrics:
        runtime = Runtime(workdir, mesh, metrics, preemption, config.run)
        fit("toy", objective(), stream, options, runtime, seed=1, frozen=frozen, meta={})


def profile(length: float, steps: int) -> np.ndarray:
    """The weight of each of the parameters after updates 1 .. steps, by its definition: t^gamma."""
    edges = np.arange(steps + 1) ** (averages.exponent(length) + 1.0)
    return np.diff(edges) / edges[-1]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_exponent_gives_the_profile_its_length(length: float) -> None:
    t = (np.arange(20_000) + 0.5) / 20_000
    density = t ** averages.exponent(length)
    density /= density.sum()
    middle = (density * t).sum()
    assert np.sqrt((density * (t - middle) ** 2).sum()) == pytest.approx(length, rel=1e-3)


def test_an_average_that_is_followed_has_its_profile() -> None:
    values = np.random.default_rng(0).normal(size=(STEPS, 3)).astype(np.float32)

    def one(carry: Any, inputs: Any) -> tuple[Any, None]:
        return averages.follow(carry, inputs[0], inputs[1]), None

    made, _ = jax.lax.scan(one, averages.begun(jnp.zeros(3)), (values, jnp.arange(STEPS)))
    for name, length in averages.KEPT.items():
        np.testing.assert_allclose(made[name], profile(length, STEPS) @ values, atol=2e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_snapshots_add_up_to_an_average_of_another_length(length: float) -> None:
    steps = [step for step in range(EVERY, STEPS + 1, EVERY) for _ in averages.KEPT]
    lengths = list(averages.KEPT.values()) * (STEPS // EVERY)
    solved = averages.weights(steps, lengths, length)
    found = sum(
        weight * np.pad(profile(kept, step), (0, STEPS - step))
        for weight, kept, step in zip(solved, lengths, steps, strict=True)
    )
    want = profile(length, STEPS)
    tolerance = 0.01 if 0.05 <= length <= 0.15 else 0.15  # far from both it is less exact
    assert np.linalg.norm(found - want) < tolerance * np.linalg.norm(want)
    assert found.sum() == pytest.approx(1.0, abs=0.02)


def test_a_training_keeps_snapshots_and_resumes_with_them(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fitted(whole, steps=8, averages=True)
    fitted(parts, steps=4, averages=True)
    fitted(parts, steps=8, averages=True)
    made = []
    for workdir in (whole, parts):
        folder = averages.folder(workdir, "toy")
        made.append([averages.chosen(folder, 8, length) for length in (0.05, 0.2)])
    jax.tree.map(np.testing.assert_array_equal, *made)
    short, long = made[0]
    kept = restore_ema(averages.folder(whole, "toy"), 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), short, kept["short"])
    leaves = zip(jax.tree.leaves(short), jax.tree.leaves(long), strict=True)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in leaves)


def test_what_was_not_kept_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path, steps=4)
    assert not (tmp_path / averages.FOLDER).exists()
    with pytest.raises(UserError, match=r"sample.ema=0.1 .* dit.train.averages=True"):
        averages.chosen(averages.folder(tmp_path, "toy"), 4, 0.1)
