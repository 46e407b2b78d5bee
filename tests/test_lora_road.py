"""Adapters from a base's workdir to files and back, by the programs that users run."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from stopping import StopAt
from test_export_weights import same, trained

from experiments import base
from experiments import lora as experiment
from tools import export_weights, import_weights
from vdit import run as runs
from vdit.config.identity import digest, read_config, stage_fields
from vdit.errors import Interrupted, UserError
from vdit.loading import read_stage
from vdit.nn.lora import flat
from vdit.published.lora import WEIGHTS
from vdit.runtime.checkpoint import restore_ema, saved_shapes
from vdit.sample import load

WORDS = {"prompt": "a red ball falls", "seconds": 0.5, "num": 1}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of random weights."""
    config = base.get_config("smoke")
    config.run.dtype = "float32"
    workdir = tmp_path_factory.mktemp("base") / "base"
    trained(config, workdir, "vae", "dit")
    return workdir


def config_of(origin: Path) -> Any:
    config = experiment.get_config(str(origin))
    config.data.source, config.data.stride, config.data.heldout = "world", 1.0, 0.1
    config.stages = ("vae", "latents", "dit")
    config.dit.lora.rank, config.dit.lora.alpha = 2, 4.0
    config.dit.lora.base_dtype = "bfloat16"
    config.dit.lora.dropout = 0.1
    config.dit.train.steps, config.dit.train.warmup, config.run.save_every = 4, 1, 2
    return config


@pytest.fixture(scope="module")
def learned(origin: Path) -> Path:
    """Adapters of that base, of a training that was stopped and resumed."""
    workdir = origin.parent / "learned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "Preemption", lambda: StopAt(3))
        with pytest.raises(Interrupted, match="step 3"):
            runs.run(config_of(origin), workdir)
    runs.run(config_of(origin), workdir)
    return workdir


def test_only_adapters_are_learned_and_kept_and_a_resume_has_the_same_bits(
    origin: Path, learned: Path
) -> None:
    assert [path.name for path in (learned / "checkpoints").iterdir()] == ["dit"]
    for item in ("state", "ema"):
        names = saved_shapes(learned / "checkpoints" / "dit", 4, item)
        kernels = [name.partition("dit/")[2] for name in names if "dit/" in name]
        assert kernels and all(name.endswith(("/lora_down", "/lora_up")) for name in kernels)
        assert all(name.startswith("blocks/joint/") for name in kernels)
        assert not any("text/" in name or name.endswith("kernel") for name in names)
    other = learned.with_name("at once")
    runs.run(config_of(origin), other)
    first, second = (restore_ema(w / "checkpoints" / "dit", 4) for w in (learned, other))
    same(first, second)
    assert any(np.abs(x).max() > 0 for path, x in flat(first).items() if path.endswith("up"))
    assert (learned / "tokenizer.json").read_bytes() == (origin / "tokenizer.json").read_bytes()


def test_a_workdir_and_its_file_sample_alike(origin: Path, learned: Path, tmp_path: Path) -> None:
    """And so does what is exported whole; a file at weight 0 is the base."""
    out, whole, again = tmp_path / "out", tmp_path / "whole", tmp_path / "again"
    assert export_weights.main([f"--workdir={learned}", f"--out={out}", "--lora"]) == 0
    keys = load_file(out / WEIGHTS).keys()
    assert "transformer.blocks.0.joint.attention.q.lora_A.weight" in keys
    options: dict[str, Any] = {"seconds": 0.5, "seed": 3}

    def video(workdir: Path, *lora: str) -> np.ndarray:
        (result,) = load(workdir, lora=lora).generate("a red ball falls", **options)
        assert result.settings.get("lora", []) == list(lora)
        return result.video.astype(int)

    def close(a: np.ndarray, b: np.ndarray) -> None:
        assert np.abs(a - b).max() <= 1

    made, plain = video(learned), video(origin)
    assert np.abs(made - plain).max() > 1
    close(video(origin, str(out)), made)
    close(video(origin, f"{out}:0.5", f"{out / WEIGHTS}:0.5"), made)
    np.testing.assert_array_equal(video(origin, f"{out}:0"), plain)
    assert export_weights.main([f"--workdir={learned}", f"--out={whole}", "--own"]) == 0
    assert import_weights.main([f"--source={whole}", f"--workdir={again}"]) == 0
    np.testing.assert_array_equal(video(again), made)
    assert read_config(again).dit.lora.rank == 0


def test_a_base_that_has_changed_is_refused(origin: Path, learned: Path, tmp_path: Path) -> None:
    """By its values, wherever it lies: a copy elsewhere is the same."""
    moved, mine = tmp_path / "moved", tmp_path / "mine"
    shutil.copytree(origin, moved)
    shutil.copytree(learned, mine)
    fields = json.loads((mine / "config.json").read_text())
    fields["dit"]["lora"]["base"] = str(moved)
    (mine / "config.json").write_text(json.dumps(fields))
    same(read_stage(mine, "dit").params, read_stage(learned, "dit").params)
    shutil.rmtree(moved)
    changed = base.get_config("smoke")
    changed.run.dtype = "float32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "test_export_weights.random",
            lambda shapes, seed: jax.tree.map(
                lambda x: np.random.default_rng(7).standard_normal(x.shape, np.float32), shapes
            ),
        )
        trained(changed, moved, "vae", "dit")
    words = f"mine: its base has changed: .* and dit.lora.base={moved} now has"
    with pytest.raises(UserError, match=words):
        load(mine)
    config = config_of(moved)
    with pytest.raises(UserError, match="another data set, VAE"):
        runs.run(config, mine)
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="mine: its base is not there: dit.lora.base is .*moved"):
        load(mine)


@pytest.mark.parametrize("changes, words", [
    ({"rank": 0}, r"dit.lora.alpha is 4.0 with dit.lora.rank=0: a rank above 0 is needed"),
    ({"base": ""}, "dit.lora.rank is 2 with dit.lora.base='': a trained workdir is needed"),
    ({"base": "/nowhere"}, "/nowhere/config.json: No such file"),
    ({"rank": -1}, "dit.lora.rank is -1 with"),
    ({"dropout": 1.0}, "0 to less than 1 is allowed"),
    ({"paths": "("}, r"dit.lora.paths is '\(': no regex"),
    ({"paths": "nowhere"}, "no kernel matches 'nowhere'; there are "),
    ({"base_dtype": "int3"}, "dit.lora.base_dtype='int3': known are bfloat16, int8, stored"),
    ({"dit.preset": "micro"}, "has other networks: dit.preset was 'smoke', now 'micro'"),
    ({"vae.channels": 4}, "has other networks: vae.channels was 8, now 4"),
    ({"dit.auxiliary": (("truth", 1.0),)}, "none is allowed with adapters"),
], ids=str)  # fmt: skip
def test_refusals(changes: dict[str, Any], words: str, origin: Path, tmp_path: Path) -> None:
    config = config_of(origin)
    for name, value in changes.items():
        key = name if "." in name else f"dit.lora.{name}"
        config.update_from_flattened_dict({key: value})
    if "paths" in changes and changes["paths"] == "nowhere":
        config.latents.clips = 8
    with pytest.raises(UserError, match=words):
        runs.run(config, tmp_path / "new")


def test_without_adapters_nothing_changes(origin: Path) -> None:
    """The identity of every stage is that of a configuration without the fields."""
    config = base.get_config("smoke")
    for stage in ("vae", "latents", "dit"):
        fields = stage_fields(config, stage)
        assert not any("lora" in name for name in fields)
        moved = config_of(origin)
        where = digest(stage_fields(moved, stage))
        moved.dit.lora.base = "elsewhere"
        assert digest(stage_fields(moved, stage)) == where
