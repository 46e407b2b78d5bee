"""tools/restore_checkpoint.py: what it prints, what it refuses, and its exit status."""

import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from tools.restore_checkpoint import main
from vdit.runtime.checkpoint import Checkpoints, damage


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir: stage vae with steps 1 and 2, stage dit with step 5; tests change only copies."""
    workdir = tmp_path_factory.mktemp("work")
    for stage, steps in (("vae", (1, 2)), ("dit", (5,))):
        checkpoints = Checkpoints(workdir / "checkpoints" / stage)
        for step in steps:
            state = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}, "step": jnp.int32(step)}
            checkpoints.save(step, state, state["params"], None, {"stage": stage})
        checkpoints.close()
    return workdir


@pytest.fixture
def workdir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "work"))


def test_list_inspect_verify_copy(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", str(workdir)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    steps = [(line[0], line[1], line[-1]) for line in lines]
    assert steps == [(s, n, "finished") for s, n in (("dit", "5"), ("vae", "1"), ("vae", "2"))]

    assert main(["inspect", str(workdir), "--stage", "vae"]) == 0
    text = capsys.readouterr().out
    assert "vae/2" in text and '"stage": "vae"' in text and "vae/1" not in text
    assert "state/params/w  (2, 3)  float32  24 B" in text and "ema/w" in text

    assert main(["verify", str(workdir)]) == 0
    assert capsys.readouterr().out == "dit/5: good\nvae/1: good\nvae/2: good\n"

    copied = tmp_path / "copied"
    assert main(["copy", str(workdir), "--stage", "vae", "--step", "1", "--to", str(copied)]) == 0
    assert damage(copied / "checkpoints" / "vae", 1) is None
    assert [path.name for path in (copied / "checkpoints" / "vae").iterdir()] == ["1"]


def test_damage_is_named(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = workdir / "checkpoints" / "vae" / "2" / "state" / "manifest.ocdbt"
    os.truncate(bad, 3)
    (workdir / "checkpoints" / "vae" / "3").mkdir()
    assert main(["verify", str(workdir), "--stage", "vae"]) == 1
    good, truncated, empty = capsys.readouterr().out.splitlines()
    assert good == "vae/1: good" and empty == "vae/3: 3: the folder is empty"
    assert truncated.startswith("vae/2: state/manifest.ocdbt: 3 bytes")
    # Copying takes the newest good step, and never a bad one.
    to = ["--to", str(tmp_path / "copied")]
    assert main(["copy", str(workdir), "--stage", "vae", "--step", "2", *to]) == 1
    assert not (tmp_path / "copied").exists()
    assert main(["copy", str(workdir), "--stage", "vae", *to]) == 0
    assert "vae/1: good, copied to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "required"),
        (["burn", "WORK"], "invalid choice: 'burn'"),
        (["list", "/nowhere"], "/nowhere holds no checkpoints"),
        (["list", "WORK", "--stage", "vqgan"], "there are dit, vae"),
        (["verify", "WORK", "--step", "7"], "no step 7 in"),
        (["verify", "WORK", "--step", "x"], "invalid int value"),
        (["verify", "WORK", "--to", "there"], "the other commands do not take it"),
        (["copy", "WORK"], "copy needs --to"),
        (["copy", "WORK", "--to", "there"], "choose one of dit, vae with --stage"),
        (["copy", "WORK", "--stage", "dit", "--to", "WORK"], "is there already"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(
    arguments: list[str], line: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(made) if part == "WORK" else part for part in arguments]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
