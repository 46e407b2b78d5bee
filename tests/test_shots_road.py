"""Clips of several shots on the road: cached with their captions, learned, sampled, refused."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.shots import get_config
from vdit import stages
from vdit.config import joined
from vdit.config.identity import digest, stage_fields, write_config
from vdit.config.text import build_tokenizer
from vdit.data import sources
from vdit.data.latents import Latents
from vdit.errors import UserError
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics
from vdit.runtime.preemption import Preemption
from vdit.sample import Model, load
from vdit.show import read_shots, sample_request
from vdit.tokens import shot_list
from vdit.train import Runtime


def small() -> ConfigDict:
    config = get_config("smoke")
    config.data.shots, config.data.frames = (1, 2), 17
    config.latents.clips = config.latents.batch = 16
    config.vae.train.steps, config.dit.train.steps = 3, 8
    config.dit.train.batch, config.dit.train.optimizer = 4, "adamw"  # compiles sooner
    config.vae.train.optimizer = "adamw"
    config.sample.steps, config.sample.batch = 2, 4
    config.dit.auxiliary = (("truth", 0.7),)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir after a few steps of each stage."""
    config, workdir = small(), tmp_path_factory.mktemp("shots")
    joined.check(config)
    with contextlib.ExitStack() as stack:
        metrics, preemption = stack.enter_context(Metrics(workdir)), Preemption()
        stack.enter_context(preemption)
        mesh = make_mesh({}, jax.devices()[:1])
        runtime = Runtime(workdir, mesh, metrics, preemption, config.run)
        vae = stages.train_vae(config, runtime)
        stages.train_dit(config, runtime, stages.cache_latents(config, runtime, vae))
    write_config(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def model(trained: Path) -> Model:
    return load(trained)


def test_the_cache_holds_every_caption_and_when_it_begins(trained: Path) -> None:
    config, cache = small(), Latents(trained / "latents")
    clips, tokenizer = sources.source(config, "train", trained), build_tokenizer(config, trained)
    counts = set()
    for i in range(len(cache)):
        element, clip = cache[i], clips[i]
        captions, starts = shot_list(clip, 2)
        ids, mask = tokenizer.encode(captions)
        np.testing.assert_array_equal(element["ids"], ids)
        np.testing.assert_array_equal(element["mask"], mask)
        np.testing.assert_array_equal(element["starts"], starts)
        cuts = np.flatnonzero(clip["truth"]["cuts"]) / config.data.fps
        np.testing.assert_allclose(starts[1 : 1 + len(cuts)], cuts, atol=1e-6)
        counts.add(len(clip["shots"]))
    assert counts == {1, 2}
    words = np.max([cache[i]["mask"].sum(1) for i in range(len(cache))], axis=0)
    longest = cache.longest()
    assert longest is not None and longest[0] % 8 == longest[1] % 8 == 0
    assert 0 <= longest[0] - words[0] < 8 and 0 <= longest[1] - words[1:].max() < 8
    for summary in (trained / "latents").glob("*.array_record.json"):  # of an older cache
        before = json.loads(summary.read_text())
        summary.write_text(json.dumps({k: v for k, v in before.items() if k != "longest"}))
        assert Latents(trained / "latents").longest() is None
        summary.write_text(json.dumps(before))


SHOTS = [(0.0, "a small red ball falls"), (0.9, "at night: a small red ball lies still")]


def test_a_shot_list_is_heard_and_kept(model: Model) -> None:
    prompt = "two shots of a small red ball"
    made, again = (model.generate(prompt, shots=SHOTS)[0] for _ in range(2))
    assert made.settings["shots"] == [list(shot) for shot in SHOTS]
    np.testing.assert_array_equal(made.video, again.video)
    later = [SHOTS[0], (1.3, SHOTS[1][1])]
    other = [SHOTS[0], (0.9, "by day: a large blue box slides to the left")]
    for shots in (later, other, ()):
        assert (model.generate(prompt, shots=shots)[0].video != made.video).any()


def test_a_batch_of_lists_of_several_lengths_is_each_alone(model: Model) -> None:
    prompts = ["two shots of a ball", "a shot of a ball", "a ball"]
    lists: list[Any] = [SHOTS, SHOTS[:1], []]
    together = model.generate(prompts, shots=lists)
    assert ["shots" in result.settings for result in together] == [True, True, True]
    for i, result in enumerate(together):
        alone = model.generate(prompts[i], shots=lists[i] or [(0.0, "")], seed=i)[0]
        off = np.abs(result.video.astype(int) - alone.video)
        assert off.max() <= 1  # other shapes round otherwise


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "is not JSON"),
        ("\xff", "is not JSON in UTF-8"),
        ("[]", "is expected"),
        ('{"start": 0, "caption": "a"}', "is expected"),
        ('[{"start": 0}]', "shot 1 is"),
        ('[{"start": 0, "caption": 3}]', "shot 1 is"),
        ('[{"start": true, "caption": "a"}]', "shot 1 is"),
        ('[{"start": NaN, "caption": "a"}]', "shot 1 is"),
        ('[{"start": 0, "caption": "a", "end": 1}]', "shot 1 is"),
        ('[{"start": 0.4, "caption": "a"}]', "must start at 0"),
        ('[{"start": 0, "caption": "a"}, {"start": 0, "caption": "b"}]', "shot 2 starts at 0"),
        ('[{"start": 0, "caption": "a"}, {"start": 1.7, "caption": "b"}]', "the clip's end"),
        (json.dumps([{"start": i / 1000, "caption": "a"} for i in range(300)]), "at most 256"),
        (json.dumps([{"start": 0, "caption": "so " * 5000}]), "tokens long; allowed: 700"),
    ],
)
def test_wrong_shot_lists_are_one_line(model: Model, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "shots.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        sample_request(
            model, tmp_path / "out", prompts=["a ball"], seconds=None, fps=None, size=None, num=1,
            seed=0, given=[], shots=str(path),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_missing_shot_list_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_shots(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    "text",
    ['["a\\nb"]', f'[{{"start": 1{"0" * 400}, "caption": "a"}}]',
     '[{"start": 0, "caption": "\\ud800"}]', "[" * 100_000],
)  # fmt: skip
def test_what_no_shot_can_be_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "shots.json"
    path.write_text(text)
    with pytest.raises(UserError, match="shot 1 is|not JSON") as raised:
        read_shots(str(path))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("data.shots", (1, 9), "shots"),
        ("data.shots", (2, 1), "shots"),
        ("data.shots", (1, 4), "frames"),  # 17 frames hold two shots
        ("data.shapes", ((17, 32, 32, 10.0),), "one caption a clip"),
        ("data.source", "world", "only shots and playground take it"),
        ("dit.caption_drop", 1.5, "0 to 1"),
    ],
)
def test_wrong_fields_are_refused_before_training(field: str, value: Any, words: str) -> None:
    config = small()
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=words):
        joined.check(config)


def test_older_workdirs_have_the_digests_that_they_had() -> None:
    """Fields for shots that are at their first value are no part of a digest."""
    from experiments.base import get_config as base

    for stage in ("vae", "latents", "dit"):
        fields = stage_fields(base(), stage)
        assert not {"data.shots", "dit.caption_drop"} & set(fields)
        assert digest(fields) != digest(stage_fields(small(), stage))
