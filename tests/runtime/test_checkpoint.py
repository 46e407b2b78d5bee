"""What is saved comes back to the bit, on any topology; what is damaged is found and named."""

import functools
import gc
import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.config import default
from vdit.errors import UserError
from vdit.run import run
from vdit.runtime import checkpoint
from vdit.runtime.checkpoint import (
    FORMAT,
    Checkpoints,
    all_steps,
    damage,
    load_meta,
    newest_good_step,
    read_newest,
    restore_ema,
    saved_shapes,
)
from vdit.runtime.mesh import make_mesh, param_sharding
from vdit.runtime.optimizer import make_optimizer

META = {"stage": "dit", "digest": "abc", "latents": {"mean": [0.5]}}
DEVICES = 8


def make_state(value: float, devices: int = DEVICES) -> tuple[Any, Any]:
    """A state as the trainer has it (moments of both optimizers, step, key) and an EMA."""
    kernel = jnp.linspace(-1, value, 2 * 64 * 64).reshape(2, 64, 64)
    params = {"model": {"blocks": {"q": {"kernel": kernel}}, "bias": jnp.full(3, value)}}
    optimizer = make_optimizer("muon", learning_rate=0.1, steps=10)
    state = {
        "params": params,
        "opt": {"model": optimizer.init(params["model"])},
        "step": jnp.int32(value),
        "key": jax.random.key_data(jax.random.key(int(value))),
    }
    mesh = make_mesh({"fsdp": -1}, jax.devices()[:devices])
    ema = jax.tree.map(lambda x: x + 1, params)
    return jax.device_put((state, ema), param_sharding(mesh, (state, ema)))


def abstract(devices: int) -> tuple[Any, Any]:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        make_state(0, devices),
    )


def clips() -> Any:
    return iter(grain.MapDataset.range(100).shuffle(seed=0).repeat().to_iter_dataset().batch(4))


def equal(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished steps 10 and 20; tests change only copies of it."""
    directory = tmp_path_factory.mktemp("stage")
    checkpoints, iterator = Checkpoints(directory), clips()
    for step in (10, 20):
        next(iterator)
        checkpoints.save(step, *make_state(step), iterator, META)
    checkpoints.close()
    return directory


@pytest.fixture
def copy(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "stage"))


def biggest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_round_trip_on_another_topology(two_steps: Path, devices: int) -> None:
    iterator = clips()
    restored = Checkpoints(two_steps).restore(*abstract(devices), iterator)
    assert restored is not None and restored.step == 20
    state, ema = make_state(20)
    equal(restored.state, state)
    equal(restored.ema, ema)
    assert restored.meta == META | {"format": FORMAT}
    kernel = restored.state["params"]["model"]["blocks"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 64 // devices, 64)
    fresh = clips()
    expected = [next(fresh) for _ in range(3)][2]
    np.testing.assert_array_equal(next(iterator), expected)


def test_a_save_is_a_snapshot(tmp_path: Path) -> None:
    """Donating the state right after `save` does not reach what is written."""
    state = {"w": jnp.zeros((256, 1024))}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    state = step(state)
    checkpoints.save(1, state, {"e": jnp.zeros(())}, None, {})
    for _ in range(20):
        state = step(state)
    jax.block_until_ready(state)
    shape = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    restored = checkpoints.restore({"w": shape}, {"e": jax.ShapeDtypeStruct((), jnp.float32)})
    checkpoints.close()
    assert restored is not None and np.all(np.asarray(restored.state["w"]) == 1)


def test_sampling_needs_only_ema_and_meta(copy: Path) -> None:
    biggest(copy / "20" / "state").write_bytes(b"")
    assert newest_good_step(copy) == 20
    assert load_meta(copy, 20)["digest"] == "abc"
    equal(restore_ema(copy, 20), make_state(20)[1])
    two = make_mesh({"fsdp": 2}, jax.devices()[:2])
    ema = restore_ema(copy, 20, functools.partial(param_sharding, two))
    assert ema["model"]["blocks"]["q"]["kernel"].addressable_shards[0].data.shape == (2, 32, 64)
    shapes = saved_shapes(copy, 20, "state")
    assert shapes["params/model/blocks/q/kernel"].shape == (2, 64, 64)
    assert any(name.endswith("momentum/blocks/q/kernel") for name in shapes)


def test_old_steps_are_deleted_and_a_finished_one_is_kept(copy: Path) -> None:
    checkpoints = Checkpoints(copy, keep=2)
    checkpoints.save(20, *make_state(99), None, META)  # is there: nothing happens
    (copy / "5.bad").mkdir()
    checkpoints.save(30, *make_state(30), None, META)
    checkpoints.wait()
    assert checkpoints.steps() == [20, 30] and checkpoints.latest() == 30
    assert sorted(path.name for path in copy.iterdir()) == ["20", "30"]
    equal(restore_ema(copy, 20), make_state(20)[1])
    checkpoints.close()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (lambda step: flip(biggest(step / "state")), "state/.*SHA-256"),
    "flipped bit in ema": (lambda step: flip(biggest(step / "ema")), "ema/.*SHA-256"),
    "truncated": (lambda step: os.truncate(biggest(step), 7), ": 7 bytes, .* were saved"),
    "missing file": (lambda step: (step / "state" / "manifest.ocdbt").unlink(), "ocdbt: missing"),
    "missing item": (lambda step: shutil.rmtree(step / "iterator"), "iterator/.*: missing"),
    "empty folder": (empty, "the folder is empty"),
    "unfinished": (lambda step: (step / "digests.json").unlink(), "the save was not finished"),
    "bad digests": (lambda step: os.truncate(step / "digests.json", 9), "digests.json: unreadable"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_step_before_is_taken(
    kind: str, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm, reason = DAMAGE[kind]
    harm(copy / "20")
    restored = Checkpoints(copy).restore(*abstract(1), clips())
    assert restored is not None and restored.step == 10
    equal(restored.state, make_state(10)[0])
    lines = [record.getMessage() for record in caplog.records if record.name == "vdit"]
    assert len(lines) == 1 and "\n" not in lines[0]
    assert re.search(f"{copy}/20 is damaged: .*{reason}.*; taking step 10", lines[0]), lines[0]


def test_a_first_save_that_was_interrupted_is_none(copy: Path) -> None:
    """Training begins anew, and the folder makes way; of several steps none is thrown away."""
    (copy / "10" / "digests.json").unlink()
    (copy / "20" / "digests.json").unlink()
    with pytest.raises(UserError, match="no good step is left"):
        newest_good_step(copy)
    shutil.rmtree(copy / "20")
    checkpoints = Checkpoints(copy)
    assert checkpoints.restore(*abstract(1), clips()) is None
    checkpoints.save(5, *make_state(5), None, {})
    checkpoints.close()
    assert newest_good_step(copy) == 5 and (copy / "10.bad").is_dir()


def test_what_a_killed_process_had_begun_to_delete_goes_with_the_next_start(copy: Path) -> None:
    shutil.copytree(copy / "10", copy / "5")
    (copy / "5" / "digests.json").unlink()
    shutil.rmtree(copy / "5" / "state")
    restored = Checkpoints(copy).restore(*abstract(1), clips())
    assert restored is not None and restored.step == 20
    assert sorted(path.name for path in copy.iterdir()) == ["10", "20"]


def test_every_file_is_guarded(copy: Path) -> None:
    for path in sorted(path for path in (copy / "20").rglob("*") if path.is_file()):
        good = path.read_bytes()
        if path.name != "digests.json" and good:
            flip(path)
            assert str(path.relative_to(copy / "20")) in (damage(copy, 20) or "")
            path.write_bytes(good)
    assert damage(copy, 20) is None


def test_the_bad_step_is_saved_again(copy: Path) -> None:
    flip(biggest(copy / "20"))
    checkpoints = Checkpoints(copy)
    restored = checkpoints.restore(*abstract(DEVICES))
    assert restored is not None and restored.step == 10
    checkpoints.save(15, *make_state(15), None, META)
    checkpoints.save(20, *make_state(21), None, META)
    checkpoints.close()
    assert all_steps(copy) == [15, 20] and (copy / "20.bad").is_dir()
    equal(restore_ema(copy, newest_good_step(copy) or 0), make_state(21)[1])


def test_no_step_is_none_and_no_good_step_is_refused(copy: Path, tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nothing").restore(*abstract(1)) is None
    assert not (tmp_path / "nothing").exists()
    for step in (10, 20):
        flip(biggest(copy / str(step)))
    with pytest.raises(UserError, match="/20 is damaged.*/10 is damaged.*no good step is left"):
        Checkpoints(copy).restore(*abstract(1))


def test_refusals(copy: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(copy)
    state, ema = abstract(1)
    state["params"]["model"]["bias"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    with pytest.raises(UserError, match=r"params/model/bias has shape \(3,\), .* has \(4,\)"):
        checkpoints.restore(state, ema)
    with pytest.raises(UserError, match="more is only in this model"):
        checkpoints.restore(abstract(1)[0], {**ema, "more": ema["model"]["bias"]})
    with pytest.raises(UserError, match="no finished step 7; steps there: 10, 20"):
        load_meta(copy, 7)

    def check(meta: dict[str, Any]) -> None:
        raise UserError(f"another {meta['stage']}")

    with pytest.raises(UserError, match="another dit"):
        checkpoints.restore(*abstract(1), check=check)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save checkpoint .*/file/1: File exists"):
        Checkpoints(tmp_path / "file").save(1, *make_state(1), None, {})
    huge = {"x": jax.ShapeDtypeStruct((2**50,), jnp.float32)}
    with pytest.raises(UserError, match="MB are free"):
        checkpoints.save(30, huge, ema, None, {})


def test_a_newer_format_is_refused(copy: Path) -> None:
    path = copy / "20" / "meta" / "metadata"
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(UserError, match="format 99; this vdit reads"):
        load_meta(copy, 20)


def test_an_error_in_the_background_is_raised_and_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vdit.runtime.checkpoint.write_digests", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, *make_state(1), None, {})
    with pytest.raises(UserError, match="cannot save checkpoint .*/1: No space left"):
        checkpoints.wait()
    assert checkpoints.steps() == []
    checkpoints.close()


@pytest.mark.parametrize("in_flight", [None, 2**20])
def test_a_clock_that_jumps_is_no_timeout(
    in_flight: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hours, as after a laptop's sleep."""
    true, hours = time.time, itertools.cycle((0, 4, -4, 2, -2))
    monkeypatch.setattr(time, "time", lambda: true() + 3600.0 * next(hours))
    checkpoints, iterator = Checkpoints(tmp_path, in_flight=in_flight), clips()
    for step in (1, 2):
        checkpoints.save(step, *make_state(step), iterator, META)
    checkpoints.close()
    equal(restore_ema(tmp_path, 2), make_state(2)[1])


@pytest.mark.parametrize("name", ["run [1]", "a\\b", "what?", "all*", "gs:/b", "\udcff"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused_at_once(
    name: str, tmp_path: Path
) -> None:
    """It would end "done", with digests, and every array would be lost."""
    with pytest.raises(UserError, match="cannot be kept under a path with"):
        Checkpoints(tmp_path / name / "checkpoints" / "vae")
    with pytest.raises(UserError, match="cannot be kept under a path with"):
        run(default(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\\b", "gs:"])
def test_checkpoints_that_were_moved_where_orbax_finds_nothing_are_refused(
    name: str, two_steps: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_steps, tmp_path / name / "stage")
    with pytest.raises(UserError, match="cannot be kept under a path with"):
        newest_good_step(tmp_path / name / "stage")


@pytest.mark.parametrize(
    "name", ["a b", "ünï 🎬", "50%20 #1", "{a,b}", "it's;\n", "gs:x", "x" * 255]
)
def test_any_other_path_holds_checkpoints(name: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / name)
    checkpoints.save(3, {"w": jnp.ones(2)}, {"e": jnp.arange(2)}, None, {})
    checkpoints.close()
    equal(restore_ema(tmp_path / name, newest_good_step(tmp_path / name) or 0), {"e": [0, 1]})


def test_what_cannot_be_read_back_is_no_finished_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here orbax loses the arrays, as it would in a folder whose name is a pattern."""
    monkeypatch.setattr("vdit.runtime.checkpoint.refuse_pattern", lambda path: None)
    checkpoints = Checkpoints(tmp_path / "run [1]")
    checkpoints.save(1, {"w": jnp.ones(2)}, {"w": jnp.ones(2)}, None, {})
    with pytest.raises(UserError, match=r"cannot save checkpoint .*1: it cannot be read back"):
        checkpoints.close()
    assert checkpoints.steps() == []


def test_reading_a_save_back_leaves_nothing_in_memory(two_steps: Path) -> None:
    """Each save is read back: what stayed of one would stay of thousands."""

    def blocks() -> int:
        checkpoint.refuse_unreadable(two_steps / "20")
        gc.collect()
        return sys.getallocatedblocks()

    first, *_, last = [blocks() for _ in range(5)][1:]
    assert last - first < 100


def test_a_reader_beside_a_writer_takes_the_step_that_has_replaced_its_own(copy: Path) -> None:
    """The run keeps one step, and saves the next while the reader has just chosen one."""
    checkpoints = Checkpoints(copy, keep=1)

    def read(step: int) -> Any:
        if step == 20:
            checkpoints.save(30, *make_state(30), None, META)
            checkpoints.wait()
        return restore_ema(copy, step)

    step, ema = read_newest(copy, read)
    checkpoints.close()
    assert step == 30
    equal(ema, make_state(30)[1])
    with pytest.raises(ZeroDivisionError):  # a fault of its own is not tried again
        read_newest(copy, lambda step: 1 // 0)
    with pytest.raises(UserError, match="holds no checkpoint"):
        read_newest(copy / "none", lambda step: step)


def test_a_step_that_is_finished_while_others_are_looked_through_is_found(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = (copy / "20" / "digests.json").read_text()
    (copy / "20" / "digests.json").unlink()

    def finishing(directory: Path, step: int, items: Any) -> str | None:
        said = damage(directory, step, items)
        if step == 20:
            (copy / "20" / "digests.json").write_text(digests)
            shutil.rmtree(copy / "10", ignore_errors=True)
        return said

    monkeypatch.setattr("vdit.runtime.checkpoint.damage", finishing)
    assert newest_good_step(copy) == 20


def test_a_failed_save_prints_no_traceback_beside_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of tensorstore's futures, dozens on a full disk; any other is shown."""
    shown: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: shown.append(str(raised.exc_value)))
    checkpoint._quieten.__wrapped__()
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert shown == ["another"]
