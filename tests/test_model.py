"""Settings of sampling: a sampler's options are its function's parameters."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contributing import run

import vdit.model
from experiments import base
from tools.planning.step import sampling, text_encoder
from vdit.config import default, joined
from vdit.diffusion.sampler import SAMPLERS, sample
from vdit.diffusion.schedule import process, timesteps
from vdit.errors import UserError
from vdit.model import Scan, settings_of
from vdit.sample import Model


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


def test_a_negative_caption_takes_the_null_rows_place() -> None:
    """As good as none without words; the prompt itself leaves nothing to guide."""
    config = base.get_config("smoke")
    config.run.dtype, config.sample.batch, config.sample.steps = "float32", 1, 2
    config.sample.guidance, config.sample.push = 3.0, 0.0
    params, inputs = sampling(config).arguments
    rng = np.random.default_rng(0)
    params, inputs = jax.tree.map(
        lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype), (params, inputs)
    )
    words = np.ones(inputs.mask_BJS.shape, bool)
    inputs = inputs._replace(mask_BJS=words, given_Bn=np.zeros(inputs.given_Bn.shape, bool))
    scan = Scan(config, text_encoder(config, None, None), params)

    def video(guidance: float, negative: tuple | None) -> np.ndarray:
        settings = settings_of(config, guidance=guidance)
        return np.asarray(scan(inputs._replace(negative=negative), settings))

    none, features = video(3.0, None), inputs.features_BJSE
    np.testing.assert_allclose(video(3.0, (~words, features)), none, atol=1e-5)
    itself = video(3.0, (words, features))
    np.testing.assert_allclose(itself, video(1.0, None), atol=1e-5)
    assert np.abs(itself - none).max() > 1e-3


def test_steps_are_told_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = base.get_config("smoke")
    config.run.dtype, config.sample.batch, config.sample.steps = "float32", 2, 4
    config.sample.guidance, config.sample.sampler = 2.0, "heun"  # of several evaluations a step
    params, inputs = sampling(config).arguments
    rng = np.random.default_rng(0)
    params, inputs = jax.tree.map(
        lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype), (params, inputs)
    )
    monkeypatch.setattr(vdit.model, "sampling_mesh", lambda rows: None)
    kept = jax.config.jax_compilation_cache_dir
    videos, told, more = [], list[int](), list[int]()
    try:
        cases = (None, kept, 1e8), (told.append, None, 1e8), (more.append, kept, 1)
        for done, folder, large in cases:
            jax.config.update("jax_compilation_cache_dir", folder)
            monkeypatch.setattr(vdit.model, "LARGE", large)
            scan = Scan(config, text_encoder(config, None, None), dict(params))
            scan.done = done
            videos.append(np.asarray(scan(inputs, settings_of(config))))
        jax.effects_barrier()
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
    for video in videos[1:]:
        np.testing.assert_array_equal(videos[0], video)
    for numbers in (told, more):
        assert set(numbers) == {0, 1, 2, 3} and numbers[0] == 0


@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
def test_steps_can_be_watched_and_are_those_of_the_scan(
    sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fresh noise, and with a sampler that has a state; one program for all of them."""
    config = base.get_config("smoke")
    config.run.dtype, config.sample.batch, config.sample.steps = "float32", 2, 3
    config.sample.sampler, config.sample.eta = sampler, 1.0
    params, inputs = sampling(config).arguments
    rng = np.random.default_rng(0)
    params, inputs = jax.tree.map(
        lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype), (params, inputs)
    )
    monkeypatch.setattr(vdit.model, "sampling_mesh", lambda rows: None)
    scan = Scan(config, text_encoder(config, None, None), dict(params))
    seen: list[tuple[int, np.ndarray]] = []

    def watch(done: int, x0: Any) -> None:
        seen.append((done, np.asarray(x0)))

    whole = np.asarray(scan(inputs, settings_of(config)))
    steps = np.asarray(scan(inputs, settings_of(config), watch))
    np.testing.assert_allclose(steps, whole, atol=1e-5)
    assert [done for done, _ in seen] == [1, 2, 3]
    np.testing.assert_array_equal(seen[-1][1], steps)  # the last x0 is the result
    scan(inputs, settings_of(config, steps=2, guidance=4.0), watch)
    assert scan._stepwise[None][1]._cache_size() == 1

    def cancel(done: int, x0: Any) -> None:
        raise KeyError(done)

    with pytest.raises(KeyError, match="1"):
        scan(inputs, settings_of(config), cancel)


def test_what_guidance_refuses() -> None:
    for changes, words in (
        ({"guidance_levels": (0.5, 0.2)}, "guidance_levels was (0.5, 0.2)"),
        ({"guidance_parallel": 2.0}, "guidance_parallel was 2.0"),
        ({"guidance_radius": -1.0}, "guidance_radius -1.0"),
        ({"order": 0, "sampler": "unipc"}, "order was 0"),
        ({"steps": 0}, "sample.steps is 0"),
    ):
        with pytest.raises(UserError) as error:
            settings_of(default(), **changes)
        assert words in str(error.value) and "\n" not in str(error.value)
    config = default()
    config.sample.update({"sampler": "unipc", "order": 4})
    with pytest.raises(UserError, match="order was 4"):
        joined.check(config)


def test_negative_prompts_are_checked() -> None:
    def lists(negative: Any, guidance: float = 2.0, classes: tuple = ()) -> list:
        tokenizer = SimpleNamespace(encode=lambda texts, where: None)
        model: Any = SimpleNamespace(classes=classes, tokenizer=tokenizer)
        settings = settings_of(default(), guidance=guidance)
        return Model.negatives(model, negative, ["a", "b"], settings)

    assert lists(None) == [None, None] and lists("c") == ["c", "c"]
    assert lists(["c", ""]) == ["c", ""]
    for arguments, words in (
        (("c", 1.0), "negative with guidance 1"),
        (("c", 2.0, ("cat",)), "negative with classes"),
        ((["c"],), "1 negative for 2 prompts"),
    ):
        with pytest.raises(UserError, match=words):
            lists(*arguments)
