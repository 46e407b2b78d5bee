"""The program `python -m vdit.main` with one small stage, for tests that start several processes.

TOY=stuck:PROCESS:SAMPLE hangs in that process at that sample, TOY=broken:PROCESS:SAMPLE raises a
KeyError there, and TOY=refused:PROCESS:SAMPLE a UserError. TOY=slow:SECONDS delays every sample.
TOY=latents:FOLDER, with --mode=sample, writes each process's sampled latents to a file.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vdit import main, model
from vdit import run as runs
from vdit.config import default
from vdit.data.loader import batches
from vdit.errors import UserError
from vdit.objectives.objective import Objective, sample_keys
from vdit.runtime.mesh import data_process, make_mesh
from vdit.runtime.metrics import Metrics
from vdit.runtime.preemption import Preemption
from vdit.runtime.processes import Watch
from vdit.train import Runtime, fit

WIDTH = 64  # a kernel is large enough to be split


class Points:
    """A regression task as a source."""

    def __init__(self) -> None:
        self.task, *self.given = os.environ.get("TOY", "").split(":")

    def __len__(self) -> int:
        return 128

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        if self.task == "slow":
            time.sleep(float(self.given[0]))
        if self.given == [str(jax.process_index()), str(int(index))]:
            if self.task == "broken":
                raise KeyError("a mistake")
            if self.task == "refused":
                raise UserError("that is wrong")
            time.sleep(3600)
        x = np.random.default_rng(int(index)).normal(size=WIDTH).astype(np.float32)
        return {"x": x}


def objective() -> Objective:
    def init(key: jax.Array, batch: Any) -> dict[str, Any]:
        return {"net": {"q": {"kernel": jax.random.normal(key, (WIDTH, WIDTH)) * 0.1}}}

    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        noise = jax.vmap(lambda k: jax.random.normal(k, (WIDTH,)))
        x = batch["x"] + 0.1 * noise(sample_keys(key, batch["ordinal"]))
        error = jnp.square(x @ params["net"]["q"]["kernel"] - x[:, ::-1] * frozen["scale"])
        return error.sum(), jnp.float32(error.size), {}

    return Objective(init, loss)


def train(runtime: Runtime, steps: int) -> Any:
    """The stage, on the mesh of `runtime`; the EMA."""
    options = default().vae.train.copy_and_resolve_references()
    options.unlock()
    options.update({"steps": steps, "batch": 8, "warmup": 2, "optimizer": "adamw"})
    options.schedule = "constant"  # more steps change none of those before
    stream = batches(Points(), 8, 3, ("x",), shuffle=False, process=data_process(runtime.mesh))
    frozen = {"scale": np.float32(0.5)}
    return fit("toy", objective(), stream, options, runtime, seed=1, frozen=frozen, meta={})


def run(config: ConfigDict, workdir: Path, watch: Watch | None = None) -> None:
    """Replaces --mode=run by the toy stage."""
    mesh = make_mesh(dict(config.mesh))
    with Preemption() as preemption, Metrics(workdir, jax.process_index() == 0) as metrics:
        runtime = Runtime(workdir, mesh, metrics, preemption, config.run, watch or Watch())
        train(runtime, config.vae.train.steps)


def keep_latents(folder: Path) -> None:
    """Patches sampling: each process also writes its latents to FOLDER/PROCESS.npy."""
    made = model.Scan.__call__

    def kept(self: Any, *arguments: Any, **settings: Any) -> jax.Array:
        latent = made(self, *arguments, **settings)
        np.save(folder / f"{jax.process_index()}.npy", latent)
        return latent

    model.Scan.__call__ = kept  # type: ignore[method-assign]


if __name__ == "__main__":
    runs.run = run
    if os.environ.get("TOY", "").startswith("latents:"):
        keep_latents(Path(os.environ["TOY"].partition(":")[2]))
    sys.exit(main.main())
