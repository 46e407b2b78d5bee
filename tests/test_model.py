"""Settings of sampling: a sampler's options are its function's parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contributing import run

from vdit.config import default
from vdit.diffusion.sampler import SAMPLERS, sample
from vdit.diffusion.schedule import process, timesteps
from vdit.errors import UserError
from vdit.model import settings_of


def test_the_sampler_of_contributing_has_its_options() -> None:
    run("A sampler")
    try:
        config = default()
        settings = settings_of(config, sampler="ahead", reach=0.3)
        assert settings.shown()["reach"] == 0.3 and "reach" not in settings_of(config).shown()
        keys, times = jax.random.split(jax.random.key(0), 2), timesteps(process("flow"), 4)
        x, _ = sample(
            lambda x, t: (jnp.tanh(x) * t, None), jnp.ones((2, 3)), times, process("flow"),
            settings.make(), keys,
        )  # fmt: skip
        assert jnp.isfinite(x).all()
        with pytest.raises(UserError, match="unknown setting 'reech'"):
            settings_of(config, sampler="ahead", reech=0.3)
    finally:
        del SAMPLERS["ahead"]


def test_options_come_from_the_fields_of_the_same_names() -> None:
    config = default()
    config.sample.update({"sampler": "ddim", "eta": 0.25, "variance": "beta"})
    settings = settings_of(config, steps=7, guidance=None)
    assert (settings.steps, settings.guidance) == (7, config.sample.guidance)
    options = ["bh", "churn", "churn_levels", "churn_noise", "eta", "order", "variance"]
    want = ["sampler", "steps", "guidance", *options, "spacing", "shift"]
    assert list(settings.shown())[: len(want)] == want and settings.shown()["eta"] == 0.25
    assert settings.make() is settings_of(config, variance="learned").make()  # ddim has none
    assert settings.make() is not settings_of(config, eta=0.5).make()
    with pytest.raises(UserError, match="dpmpp_2m"):
        settings_of(config, sampler="rk4")
    np.testing.assert_equal(hash(settings), hash(settings_of(config, steps=7)))
