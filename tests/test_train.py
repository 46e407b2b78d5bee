"""The trainer: resume to the bit, accumulation, meshes, and a loss that is not finite."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from stopping import StopAt

from vdit.config import default
from vdit.data.loader import batches
from vdit.errors import UserError
from vdit.objectives.objective import Objective, sample_keys
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics, read
from vdit.runtime.preemption import Preemption
from vdit.train import Diverged, Interrupted, Runtime, fit, init_state, make_step


class Points:
    """A regression task as a source."""

    def __init__(self, poison: int | None = None) -> None:
        self.poison = poison

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        x = np.random.default_rng(int(index)).normal(size=8).astype(np.float32)
        if self.poison is not None and int(index) == self.poison:
            x = x * np.nan
        return {"x": x}


def objective() -> Objective:
    def init(key: jax.Array, batch: Any) -> dict[str, Any]:
        kernel = jax.random.normal(key, (2, 8, 8)) * 0.3
        return {"net": {"blocks": {"q": {"kernel": kernel}}, "out": {"kernel": kernel[0]}}}

    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        net = params["net"]
        x = batch["x"]
        noise = jax.vmap(lambda k: jax.random.normal(k, (8,)))(sample_keys(key, batch["ordinal"]))
        y = x + 0.1 * noise
        for layer in range(2):
            y = jnp.tanh(y @ net["blocks"]["q"]["kernel"][layer])
        error = jnp.square(y @ net["out"]["kernel"] - x[:, ::-1] * frozen["scale"])
        return error.sum(), jnp.float32(error.size), {"size": error.sum()}

    return Objective(init, loss)


def options(**changes: Any) -> ConfigDict:
    config = default().vae.train.copy_and_resolve_references()
    config.unlock()
    config.update({"steps": 10, "batch": 8, "warmup": 2, **changes})
    return config


def runtime(folder: Path, preemption: Any = None, **mesh: int) -> Runtime:
    run = default().run
    run.log_every, run.save_every = 2, 4
    run.dtype = "float32"  # so that a mesh changes the order of sums only
    devices = jax.devices()[: int(np.prod(list(mesh.values()))) if mesh else 1]
    made = make_mesh(mesh or {"data": 1}, devices)
    return Runtime(folder, made, Metrics(folder), preemption or Preemption(), run)


FROZEN = {"scale": np.float32(0.5)}


def train(place: Runtime, opts: ConfigDict, source: Any = None) -> Any:
    stream = batches(source or Points(), opts.batch, 3, ("x",))
    return fit("toy", objective(), stream, opts, place, seed=1, frozen=FROZEN, meta={"digest": "x"})


@pytest.mark.parametrize("stop", [3, 4, 9])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path, stop: int) -> None:
    whole = train(runtime(tmp_path / "whole"), options())
    with pytest.raises(Interrupted, match=f"step {stop}"):
        train(runtime(tmp_path / "cut", StopAt(stop)), options())
    again = train(runtime(tmp_path / "cut"), options())
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    rows = [[r["step"] for r in read(tmp_path / name)] for name in ("whole", "cut")]
    assert rows[0] == [2, 4, 6, 8, 10] == rows[1]


class Slow(Points):
    """A source that is what training waits for."""

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        time.sleep(0.05)
        return super().__getitem__(index)


def test_metrics_say_how_much_of_the_time_data_was_waited_for(tmp_path: Path) -> None:
    train(runtime(tmp_path / "slow"), options(), Slow())
    train(runtime(tmp_path / "quick"), options())
    slow, quick = ([r["wait"] for r in read(tmp_path / n)][1:] for n in ("slow", "quick"))
    assert all(0 <= share <= 1 for share in (*slow, *quick))
    assert np.median(slow) > 0.5 > np.median(quick)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first = train(runtime(tmp_path), options())
    jax.tree.map(np.testing.assert_array_equal, first, train(runtime(tmp_path), options()))


def test_a_damaged_newest_step_costs_only_the_steps_since_the_one_before(tmp_path: Path) -> None:
    whole = train(runtime(tmp_path), options())
    step = tmp_path / "checkpoints" / "toy" / "10"
    file = max((f for f in step.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    jax.tree.map(np.testing.assert_array_equal, whole, train(runtime(tmp_path), options()))


def test_a_loss_that_is_not_finite_stops_and_names_the_good_checkpoint(tmp_path: Path) -> None:
    stream = batches(Points(), 8, 3, ("x",))
    order = [int(next(stream)["x"].sum() * 1e6) for _ in range(7)]
    assert len(set(order)) == 7
    with pytest.raises(Diverged, match=r"loss is nan at step \d+.*(checkpoint|none saved)"):
        train(runtime(tmp_path), options(), Points(poison=5))
    steps = [p.name for p in (tmp_path / "checkpoints" / "toy").glob("[0-9]*")]
    assert "10" not in steps


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_of_a_batch_add_up_to_the_batch(accumulate: int) -> None:
    batch = {
        "x": np.stack([Points()[i]["x"] for i in range(8)]),
        "ordinal": np.arange(8, dtype=np.uint32),
    }
    made = []
    for count in (1, accumulate):
        opts = options(accumulate=count)
        state, ema = init_state(objective(), opts, batch, 0)
        step = jax.jit(make_step(objective(), opts))
        made.append(step(state, ema, FROZEN, batch))
    np.testing.assert_allclose(made[0][2]["loss"], made[1][2]["loss"], rtol=1e-5)
    np.testing.assert_allclose(made[0][2]["grad_norm"], made[1][2]["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize(
    "mesh", [{"data": 8}, {"fsdp": 4, "data": 2}, {"tensor": 2, "data": 2, "sequence": 2}]
)
def test_any_mesh_trains_the_same(tmp_path: Path, mesh: dict[str, int]) -> None:
    rows = []
    for name, axes in (("one", {}), ("many", mesh)):
        train(runtime(tmp_path / name, **axes), options(steps=4))
        rows.append([r["loss"] for r in read(tmp_path / name)])
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """The loss of a step is of the parameters before it; what is saved is what comes after."""
    with pytest.raises(Diverged, match=r"not finite after step 1: \d+ arrays .*no checkpoint is"):
        train(runtime(tmp_path), options(steps=1, warmup=0, learning_rate=np.inf))
    assert not list((tmp_path / "checkpoints").rglob("digests.json"))
    train(runtime(tmp_path), options(schedule="constant"))
    with pytest.raises(
        Diverged, match=r"step \d+.*; checkpoint 10 is good .before it 8.*a smaller config.toy"
    ):
        train(runtime(tmp_path), options(steps=20, schedule="constant", learning_rate=np.inf))
    again = train(runtime(tmp_path), options(steps=12, schedule="constant"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(again))


def test_a_step_that_is_not_finite_is_not_gone_on_from(tmp_path: Path, monkeypatch: Any) -> None:
    """As versions before this one saved it."""
    with monkeypatch.context() as before:
        before.setattr("vdit.runtime.checkpoint.not_finite", lambda tree: [])
        train(runtime(tmp_path), options(steps=1, warmup=0, learning_rate=np.inf))
    step = tmp_path / "checkpoints" / "toy" / "1"
    with pytest.raises(UserError, match=f"{step} holds numbers that are not finite.*delete its"):
        train(runtime(tmp_path), options())
