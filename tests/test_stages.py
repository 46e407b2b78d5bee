"""What a workdir goes on with, and what it refuses."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import base
from vdit.errors import UserError
from vdit.run import run
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics, read
from vdit.runtime.preemption import Preemption
from vdit.stages import refuse_other, stage_meta
from vdit.train import Runtime


def test_a_rate_may_change_before_the_last_step_and_is_recorded(tmp_path: Path) -> None:
    """The cure of a training that diverged; nothing else of it may, and then no more."""
    config = base.get_config("smoke")
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    place = Runtime(tmp_path, mesh, Metrics(tmp_path), Preemption(), config.run)
    checkpoints, one = place.checkpoints("vae"), {"vae": jnp.ones(1)}
    checkpoints.save(6, {"params": one}, one, None, stage_meta(config, "vae"))
    checkpoints.wait()
    config.vae.train.learning_rate = 1e-3
    config.vae.train.discriminator.adam_learning_rate = 1e-5
    refuse_other(config, "vae", place, begins=True)
    (row,) = read(tmp_path)
    assert (row["stage"], row["step"]) == ("vae", 6)
    assert "vae.train.learning_rate was 0.03, now 0.001" in row["changed"]
    config.dit.train.learning_rate = 1e-3  # of another stage, which has not begun
    refuse_other(config, "dit", place)
    config.vae.train.optimizer = "adamw"
    with pytest.raises(UserError, match="of another run: .*vae.train.optimizer was 'muon'"):
        refuse_other(config, "vae", place)
    config.vae.train.optimizer, config.vae.train.steps = "muon", 6
    with pytest.raises(UserError, match=r"vae.train.learning_rate was 0.03, now 0.001"):
        refuse_other(config, "vae", place)
    checkpoints.close()


@pytest.mark.parametrize("name, value", [
    ("vae.train.adam_learning_rate", float("inf")), ("dit.train.learning_rate", 11.0),
    ("classify.train.learning_rate", -1.0), ("vae.train.discriminator.adam_learning_rate", 1e9),
    ("vae.train.ema", 1.5), ("sample.guidance", float("nan")), ("seed", -1), ("seed", 2**32),
    ("dit.logit_normal", (float("nan"), 1.0)),
])  # fmt: skip
def test_numbers_out_of_range_are_refused_before_anything_is_written(
    name: str, value: float, tmp_path: Path
) -> None:
    config = base.get_config("smoke")
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=rf"{name} is .* allowed"):
        run(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())
