"""tools/restore_checkpoint.py: what it prints, what it refuses, and its exit status."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy
from tools.restore_checkpoint import main
from vdit.config import default
from vdit.runtime import checkpoint
from vdit.runtime.checkpoint import Checkpoints, damage
from vdit.runtime.mesh import make_mesh, param_sharding
from vdit.runtime.metrics import Metrics
from vdit.runtime.preemption import Preemption
from vdit.train import Runtime


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
        (["verify", "WORK", "--mesh", "fsdp:8"], "allowed with copy alone"),
        (["list", "WORK", "--drop", "optimizer"], "allowed with copy alone"),
        (["copy", "WORK", "--stage", "dit", "--to", "there", "--drop", "ema"], "invalid choice"),
        (["copy", "WORK", "--stage", "dit", "--to", "there", "--mesh", "fsdp"], "AXIS:SIZE,..."),
        (["copy", "WORK", "--stage", "dit", "--to", "there", "--mesh", "fsdp:3"], "8 device(s)"),
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


# --------------------------------------------------------------------------------------------------
# Copies that are split for another mesh, or go without the optimizer's state

SPLIT = {"fsdp": 4, "tensor": 2}


def toy_runtime(workdir: Path, axes: dict[str, int]) -> Runtime:
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    return Runtime(workdir, mesh, Metrics(workdir), Preemption(), default().run)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir whose stage toy one device trained for three steps."""
    workdir = tmp_path_factory.mktemp("toy")
    toy.train(toy_runtime(workdir, {"data": 1}), 3)
    return workdir


def chunks(folder: Path, item: str) -> dict[str, tuple[int, ...]]:
    """How the arrays of an item are cut on the disk."""
    tree = checkpoint._saved_tree(folder, 3, item)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {checkpoint._name(path): leaf.storage.chunk_shape for path, leaf in leaves}


def arrays(folder: Path) -> dict[str, Any]:
    return {item: checkpoint._restore(folder, 3, item) for item in ("state", "ema")}


def same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_copy_is_split_for_a_mesh_and_training_goes_on_as_before(
    trained: Path, tmp_path: Path
) -> None:
    to = tmp_path / "copy"
    assert main(["copy", str(trained), "--to", str(to), "--mesh", "fsdp:4,tensor:2"]) == 0
    old, new = (path / "checkpoints" / "toy" for path in (trained, to))
    assert damage(new, 3) is None and [path.name for path in new.iterdir()] == ["3"]
    same(arrays(old), arrays(new))
    # Kernel, both moments and EMA are cut as the mesh would have them; the rest is whole.
    place = param_sharding(make_mesh(SPLIT), arrays(new))
    for item, tree in arrays(new).items():
        found, wanted = chunks(new, item), flat_names(place[item])
        for name, leaf in flat_names(tree).items():
            if not wanted[name].is_fully_replicated:  # else devices may share the writing
                assert found[name] == wanted[name].shard_shape(leaf.shape)
        kernels = {shape for name, shape in found.items() if name.endswith("q/kernel")}
        assert kernels == {(16, 32)} and chunks(old, item) != found
    again = shutil.copytree(trained, tmp_path / "again")
    on = [toy.train(toy_runtime(path, SPLIT), 5) for path in (Path(again), to)]
    same(*on)


def test_a_copy_without_the_optimizer_is_trained_by_a_new_one(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "copy"
    assert main(["copy", str(trained), "--to", str(to), "--drop", "optimizer"]) == 0
    old, new = (path / "checkpoints" / "toy" for path in (trained, to))
    assert damage(new, 3) is None
    kept = arrays(old)
    kept["state"].pop("opt")
    same(kept, arrays(new))
    same(toy.train(toy_runtime(to, {"data": 1}), 3), kept["ema"])  # it is finished: no step
    # Its next step is the first of an optimizer that knows no gradient: a warm-up's, by Adam.
    toy.train(toy_runtime(to, {"data": 1}), 4)
    assert "toy: step 3 has weights alone: its optimizer begins anew" in capsys.readouterr().out
    made = checkpoint._restore(new, 4, "state")
    assert int(made["step"]) == 4
    moved = made["params"]["net"]["q"]["kernel"] - kept["state"]["params"]["net"]["q"]["kernel"]
    counts = [v for k, v in flat_names(made["opt"]).items() if k.endswith("count")]
    assert counts and all(int(count) == 1 for count in counts)
    assert float(jnp.abs(moved).max()) > 0


def flat_names(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {checkpoint._name(path): leaf for path, leaf in leaves}
