"""The U-Net walks the road: videos from text by guidance, one time for all tokens, refusals."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdit
from experiments.unet import get_config
from vdit.config import joined
from vdit.errors import UserError
from vdit.run import run
from vdit.runtime.metrics import read
from vdit.sample import Given, Model


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = get_config("smoke")
    config.data.frames = 5
    config.vae.train.steps = config.dit.train.steps = 2
    config.vae.train.warmup = config.dit.train.warmup = 1
    config.latents.clips = config.latents.batch = config.latents.shard = 16
    config.sample.steps = 2
    config.sample.clips = config.eval.captions = config.sample.batch = 2
    config.run.log_every = config.run.save_every = 2
    workdir = tmp_path_factory.mktemp("unet")
    run(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def model(road: Path) -> Model:
    return vdit.load(road)


@pytest.mark.slow
def test_the_road_ends_with_samples_and_scores(road: Path) -> None:
    told = json.loads((road / "samples" / "text-00.json").read_text())
    assert told["sampler"] == "ddim" and told["frames"] == 5
    assert not list((road / "samples").glob("extend*"))
    rows = read(road)
    assert [row["step"] for row in rows if row["stage"] == "dit" and "loss" in row] == [2]
    scores = [row for row in rows if row["stage"] == "eval"]
    assert {row["split"] for row in scores} == {"real", "reconstructed", "generated"}


@pytest.mark.slow
def test_prompt_seed_and_guidance_are_what_a_video_depends_on(model: Model) -> None:
    """Far from its start, where it says 0."""
    params = jax.tree.map(
        lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), model.params["dit"]
    )
    statistics = {name: np.asarray(value) for name, value in model.codec.statistics.items()}
    parts = model.config, model.tokenizer, model.encoder, model.params | {"dit": params}
    made = Model(*parts, statistics)

    def video(prompt: str = "a small red ball falls", **asked: Any) -> np.ndarray:
        return made.generate(prompt, **{"seed": 3, **asked})[0].video

    first = video()
    np.testing.assert_array_equal(video(), first)
    for other in (video("a large blue box rolls"), video(seed=4), video(guidance=1.0)):
        assert other.shape == first.shape == (5, 32, 32, 3) and (other != first).any()
    assert video(seconds=0.8, size=(40, 24)).shape == (9, 40, 24, 3)


@pytest.mark.slow
def test_given_frames_are_refused_in_one_line(model: Model) -> None:
    with pytest.raises(UserError, match="one time for all tokens") as caught:
        model.generate("a ball", given=[Given(np.zeros((1, 32, 32, 3), np.uint8))])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("dit.given.prefix", 0.1, "dit.given.prefix is 0.1 with dit.model='unet'"),
        ("dit.axes", "factorised", "nano and joint"),
        ("dit.preset", "S", "dit.preset is 'S'"),
        ("dit.unet.groups", 7, "must divide it"),
        ("dit.unet.heads", (2, 16), "even width"),
        ("dit.unet.depths", (1,), "one number of each"),
        ("data.shapes", ((1, 32, 32, 10.0),), "clips of one shape"),
        ("text.encoder", "none", "none"),
        ("sample.push", 1.0, "sample.push is 1.0 with dit.model=unet: 0 is allowed"),
    ],
)
def test_what_it_cannot_be_trained_for_is_one_line(field: str, value: Any, words: str) -> None:
    config = get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=words) as caught:
        joined.check(config)
    assert "\n" not in str(caught.value)


def test_the_variants_are_allowed_and_others_are_named() -> None:
    for variant in ("", "flow", "smoke", "flow+smoke"):
        joined.check(get_config(variant))
    assert get_config("flow").dit.process == "flow"
    assert (get_config().dit.process, get_config().dit.prediction) == ("scaled_linear", "eps")
    with pytest.raises(UserError, match="tiny: known variants are"):
        get_config("tiny")
