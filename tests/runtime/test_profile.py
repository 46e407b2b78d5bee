"""Traces of training steps, and what is counted of them."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import base
from tools.planning.chips import CHIPS, CORES
from tools.planning.gpus import GPUS
from vdit.config import run as section
from vdit.errors import UserError
from vdit.runtime.machine import PEAKS
from vdit.runtime.products import OTHERS, flops
from vdit.runtime.profile import Profile


def test_the_steps_asked_for_are_in_the_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add = jax.jit(lambda x: x + 1)
    with Profile("2:3", "dit", tmp_path / "profile") as profile:
        for step in range(1, 6):
            with profile.step(step):
                x = add(jnp.ones(3))
            profile.after(step, x)
    assert "trace of run.profile" in capsys.readouterr().out
    (path,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if "step_num" in e.get("args", {})}
    assert steps == {"2", "3"}


def test_an_error_ends_the_trace_and_late_steps_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(KeyError),
        Profile("1:9", "vae", tmp_path / "a") as profile,
        profile.step(1),
    ):
        raise KeyError
    with Profile("1:9", "vae", tmp_path / "b"):  # as of a run that goes on from step 20
        pass
    assert "ran none of the steps" in capsys.readouterr().out
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("steps", ["5", "5:4", "0:3", "a:b", "1:2:3", ":", "-1:2"])
def test_other_steps_are_refused(steps: str) -> None:
    config = base.get_config()
    config.run.profile = steps
    with pytest.raises(UserError, match="run.profile.*FIRST:LAST"):
        section.check_run(config)


def test_flops_leave_out_the_optimizer_and_what_is_computed_again() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))

    def step(w: jax.Array, x: jax.Array, remat: bool) -> jax.Array:
        gradient = jax.grad(jax.checkpoint(loss) if remat else loss)(w, x)
        with jax.named_scope("optimizer"):
            return w - gradient @ gradient

    w, x = jnp.ones((8, 8)), jnp.ones((4, 8))
    trees = [jax.make_jaxpr(step, static_argnums=2)(w, x, remat).jaxpr for remat in (False, True)]
    plain, again = (flops(tree, OTHERS) for tree in trees)
    assert plain == again == 5 * 2 * 4 * 8 * 8  # two forward, two for w, one for what is between
    assert flops(trees[0]) == plain + 2 * 8**3
    assert flops(trees[1]) == plain + 2 * 8**3 + 2 * 2 * 4 * 8 * 8


def test_peaks_are_those_of_the_plans() -> None:
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    for name, kind in kinds.items():
        assert PEAKS[kind] == CHIPS[name].flops
    assert PEAKS["TPU7x"] == CHIPS["tpu7x"].flops / CORES["tpu7x"]
    for gpu in GPUS.values():
        assert PEAKS[gpu.name] == gpu.flops
