"""The registry of sources: CONTRIBUTING's example as written, installed sources, unknown names."""

import importlib.util
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import base
from vdit.config import joined
from vdit.data import sources
from vdit.data.latents import Latents
from vdit.data.sources import DataSource, register
from vdit.errors import UserError
from vdit.run import run

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
SHAPE = (5, 16, 16)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))


@pytest.fixture
def example(tmp_path: Path, registry: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The first Python block of CONTRIBUTING's section, as a module."""
    section = PAGE.read_text(encoding="utf-8").split("\n### A data source\n")[1]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    (tmp_path / "arrays.py").write_text(block[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("arrays", tmp_path / "arrays.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "arrays", module)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, clips: int = 20) -> np.ndarray:
    videos = np.random.default_rng(0).integers(0, 256, (clips, *SHAPE, 3), dtype=np.uint8)
    np.save(folder / "clips.npy", videos)
    (folder / "captions.txt").write_text("".join(f"clip {i}\n" for i in range(clips)))
    return videos


def small(example: Any, folder: Path) -> Any:
    config = example.get_config("smoke")
    config.data.path, config.data.frames, config.data.size = str(folder), SHAPE[0], SHAPE[1:]
    config.stages = ("vae", "latents")
    config.vae.train.steps, config.vae.train.batch = 3, 8
    config.vae.train.optimizer = "adamw"  # compiles faster than Muon
    config.latents.clips = config.latents.batch = 4
    return config


def test_the_example_trains(example: Any, tmp_path: Path) -> None:
    videos, config = write(tmp_path), small(example, tmp_path)
    heldout = sources.source(config, "heldout", tmp_path)
    assert len(heldout) == 2 and len(sources.source(config, "train", tmp_path)) == 18
    np.testing.assert_array_equal(heldout[1]["video"], videos[10])
    assert heldout[1]["caption"] == "clip 10" and sources.most_shots(config) == 0
    run(config, tmp_path / "run")
    assert len(Latents(tmp_path / "run" / "latents")) == 4
    (tmp_path / "captions.txt").write_text("one\n")
    with pytest.raises(UserError, match="for each of 1 captions"):
        sources.source(config, "train", tmp_path)


def test_an_installed_package_adds_a_source(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    example.SOURCE = DataSource(example.make)
    points = [EntryPoint("installed", "arrays:SOURCE", sources.GROUP),
              EntryPoint("wrong", "arrays:make", sources.GROUP)]  # fmt: skip
    monkeypatch.setattr(sources, "entry_points", lambda group: points)
    config = small(example, tmp_path)
    config.data.source = "installed"
    joined.check(config)
    assert len(sources.source(config, "train", tmp_path)) == 18
    config.data.source = "wrong"
    with pytest.raises(UserError, match="arrays:make is no vdit DataSource"):
        joined.check(config)
    config.data.source = "films"
    known = (
        "known are arrays, datasets, folder, installed, mixture, parquet, playground, shots, tfds,"
        " webdataset, world, wrong"
    )
    with pytest.raises(UserError, match=f"data.source='films': {known}"):
        joined.check(config)


def test_a_built_in_name_is_taken(registry: None) -> None:
    with pytest.raises(UserError, match="'world'"):
        register("world", DataSource("nowhere:make"))


@pytest.mark.parametrize(
    "source, field, value, words",
    [
        ("world", "detail", 1, "data.detail is given with data.source=world: only playground"),
        ("folder", "shots", (1, 2), "only shots and playground take it"),
        (
            "mine",
            "name",
            "set",
            "data.name is given with data.source=mine: only datasets and tfds take",
        ),
        ("mine", "label", "caption", "data.source=mine: allowed are none"),
    ],
)
def test_fields_of_other_sources_are_refused(
    registry: None, source: str, field: str, value: Any, words: str
) -> None:
    register("mine", DataSource(lambda config, split, workdir: []))
    config = base.get_config("smoke")
    config.data.source, config.data[field] = source, value
    config.stages = ("vae",)
    with pytest.raises(UserError, match=words):
        joined.check(config)


def test_a_source_checks_its_own_fields_and_takes_its_own(registry: None) -> None:
    def check(config: Any) -> None:
        if config.data.detail > 1:
            raise UserError("at most 1")

    register("mine", DataSource(lambda *given: [], takes=("detail",), check=check))
    config = base.get_config("smoke")
    config.data.source, config.data.detail = "mine", 1
    joined.check(config)
    config.data.detail = 2
    with pytest.raises(UserError, match="at most 1"):
        joined.check(config)
