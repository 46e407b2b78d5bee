"""The one training loop: any objective, any mesh, resumable to the bit.

It knows an objective's two functions and nothing of models, videos or text.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.errors import Diverged, Interrupted, UserError
from vdit.nn.product import Matmul
from vdit.objectives.objective import Objective, Params
from vdit.runtime import averages
from vdit.runtime.checkpoint import Checkpoints
from vdit.runtime.machine import matmul, peak
from vdit.runtime.mesh import (
    batch_sharding,
    gather,
    param_sharding,
    replicate,
    replicated,
    spread,
)
from vdit.runtime.metrics import Metrics
from vdit.runtime.optimizer import ema_update, make_optimizer
from vdit.runtime.preemption import Preemption
from vdit.runtime.processes import Watch
from vdit.runtime.products import OTHERS, flops
from vdit.runtime.profile import Profile
from vdit.runtime.progress import Progress, say

# "params" and "opt" by group, "step", "key", and with train.averages "averages"
State = dict[str, Any]
SPARE = ("params", "opt", "key", "averages")  # of a state, what a checkpoint may lack
# From the placement of a tree of shapes to a step and groups of trained parameters.
Begin = Callable[[Callable[[Any], Any]], tuple[int, Params]]


@dataclass(frozen=True)
class Runtime:
    """The machine and the place that a stage runs in."""

    workdir: Path
    mesh: Mesh
    metrics: Metrics
    preemption: Preemption
    run: ConfigDict
    watch: Watch = field(default_factory=Watch)
    content: Mapping[str, str] = field(default_factory=dict)  # of the data set, `sources.identity`

    def checkpoints(self, stage: str) -> Checkpoints:
        """The checkpoints of a stage."""
        return Checkpoints(self.workdir / "checkpoints" / stage, keep=self.run.keep)


def optimizers(
    options: ConfigDict, groups: Params, how: Matmul = Matmul()
) -> dict[str, optax.GradientTransformation]:
    """One optimizer for each group of parameters; `how` is for Muon's own products.

    What differs for a group is under its name in `options`.
    """
    muon: dict[str, Any] = {"matmul": how} if options.optimizer == "muon" else {}

    def make(own: Mapping[str, Any]) -> optax.GradientTransformation:
        names = (
            "learning_rate", "adam_learning_rate", "steps", "warmup", "schedule", "clip",
            "weight_decay",
        )  # fmt: skip
        chosen = {name: own.get(name, options[name]) for name in names}
        chosen["adam_learning_rate"] = chosen["adam_learning_rate"] or None
        return make_optimizer(options.optimizer, **chosen, **muon)

    return {group: make(options.get(group, {})) for group in groups}


def init_state(
    objective: Objective, options: ConfigDict, batch: Mapping[str, Any], seed: int,
    params: Params | None = None,
) -> tuple[State, Params]:  # fmt: skip
    """State and EMA at step 0, of random parameters or of `params`; pure, so that it can be traced
    for shapes or placed on a mesh."""
    key = jax.random.key(seed)
    if params is None:
        params = objective.init(jax.random.fold_in(key, 0), batch)
    made = optimizers(options, params)
    state = {
        "params": params,
        "opt": {group: made[group].init(tree) for group, tree in params.items()},
        "step": jnp.zeros((), jnp.int32),
        "key": jax.random.key_data(jax.random.fold_in(key, 1)),
    }
    if options.averages:
        state["averages"] = averages.begun(params)
    return state, jax.tree.map(lambda x: x + 0, params)


def make_step(
    objective: Objective, options: ConfigDict, how: Matmul = Matmul(), gather: Any = None
) -> Any:
    """step(state, ema, frozen, batch) -> (state, ema, metrics): gradients, optimizers, EMA.

    The batch is computed in `accumulate` parts; sums of the loss, its gradient and its weight are
    added over parts and devices and divided once, so the parts do not change the result. `how` is
    for the optimizer's own products (the objective's model has its own); `gather` as in
    `vdit.runtime.mesh`.
    """

    def step(
        state: State, ema: Params, frozen: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[State, Params, dict[str, jax.Array]]:
        key = jax.random.wrap_key_data(state["key"])
        params = state["params"]
        if "base" in frozen:  # of adapters
            base = frozen["base"] if gather is None else gather(frozen["base"])
            frozen = frozen | {"base": base, "step": state["step"]}

        def total(params: Params, part: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
            whole = params if gather is None else gather(params)
            loss, weight, metrics = objective.loss(whole, frozen, part, key)
            return loss, {"weight": weight, "loss": loss, **metrics}

        gradient = jax.named_scope("gradient")(jax.grad(total, has_aux=True))
        if options.accumulate == 1:
            grads, sums = gradient(params, batch)
        else:

            def part_of(x: jax.Array) -> jax.Array:
                # Every device keeps its own samples: parts are strided, not blocks.
                return x.reshape(-1, options.accumulate, *x.shape[1:]).swapaxes(0, 1)

            def add(carry: Any, part: Mapping[str, jax.Array]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, gradient(params, part)), None

            parts = jax.tree.map(part_of, batch)
            shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(add, zero, parts)
        weight = sums.pop("weight")
        grads = jax.tree.map(lambda g: g / weight, grads)
        new_params, new_opt = {}, {}
        with jax.named_scope("optimizer"):
            for group, made in optimizers(options, params, how).items():
                old = state["opt"][group], params[group]
                updates, new_opt[group] = made.update(grads[group], *old)
                new_params[group] = optax.apply_updates(params[group], updates)
        metrics = {name: value / weight for name, value in sums.items()}
        metrics["grad_norm"] = optax.tree.norm(grads)
        new = {"params": new_params, "opt": new_opt, "key": state["key"]}
        new["step"] = state["step"] + 1
        if "averages" in state:
            new["averages"] = averages.follow(state["averages"], new_params, state["step"])
        return new, ema_update(ema, new_params, options.ema, state["step"]), metrics

    return step


def abstract_state(
    objective: Objective, options: ConfigDict, batch: Mapping[str, Any], mesh: Mesh, seed: int
) -> tuple[Any, Any]:
    """Shapes and placements of state and EMA, for a batch of arrays or of shapes."""
    begin = functools.partial(init_state, objective, options, seed=seed)
    shapes = jax.eval_shape(begin, batch)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        param_sharding(mesh, shapes),
    )


def compiled_step(
    objective: Objective, options: ConfigDict, run: ConfigDict, mesh: Mesh, abstract: Any
) -> Any:
    """`make_step`, jitted for a mesh; `abstract` is what `abstract_state` gave. The old state is
    used up. `lower` compiles it for shapes alone, and for a mesh of a machine that is not here."""
    return jax.jit(
        make_step(objective, options, matmul(run.dtype, mesh), gather(mesh)),
        donate_argnums=(0, 1),
        out_shardings=(*jax.tree.map(lambda x: x.sharding, abstract), replicated(mesh)),
    )


def products_of(step: Any, *arguments: Any) -> int:
    """FLOPs of the products of a compiled step's gradient (but for what Pallas kernels loop over,
    and what is computed again for want of memory)."""
    return flops(step.trace(*arguments).jaxpr.jaxpr, OTHERS)


def check_batch(stage: str, options: ConfigDict, sizes: Mapping[str, int]) -> None:
    """Refuses a batch that the devices along the data axes cannot share, part by part."""
    shards = sizes["data"] * sizes["fsdp"]
    if options.batch % (shards * options.accumulate):
        raise UserError(
            f"{stage}.train.batch {options.batch} must be a multiple of the {shards} data shards"
            f" times accumulate {options.accumulate}"
        )


def place(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's share of a batch (`data_process`), on the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def _begin(
    stage: str, objective: Objective, options: ConfigDict, checkpoints: Checkpoints,
    batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, seed: int, weights: Begin | None,
) -> tuple[Any, State, Params, int, dict[str, jax.Array] | None]:  # fmt: skip
    """(abstract state, state, EMA, step, first batch), from the newest good checkpoint if any; else
    from `weights`, where they have a group.

    A restored stream gives its own next batch: then there is no first one.
    """
    first = place(mesh, next(batches))
    abstract = abstract_state(objective, options, first, mesh, seed)
    restored = checkpoints.restore(*abstract, batches, spare=SPARE)
    if restored is not None and "opt" in restored.state:
        return abstract, restored.state, restored.ema, restored.step, None
    begin = functools.partial(init_state, objective, options, seed=seed)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if restored is None:
        state, ema = jax.jit(begin, out_shardings=shardings)(first)
        step = 0
        if weights is not None:
            step, groups = weights(functools.partial(param_sharding, mesh))
            ema |= groups
            state["params"] |= jax.tree.map(lambda x: x + 0, groups)  # both are donated
            state["step"] += step
            if "averages" in state:
                state["averages"] = averages.begun(state["params"])
        return abstract, state, ema, step, first
    # An imported checkpoint, or a copy without optimizer state.
    say(f"{stage}: step {restored.step} has weights alone: its optimizer begins anew")
    params = restored.state.get("params", restored.ema)
    state, ema = jax.jit(begin, out_shardings=shardings)(first, params=params)
    ema = restored.ema if "params" in restored.state else ema  # never the state's own arrays
    return abstract, state | restored.state, ema, restored.step, None


class _Log:
    """Reports a step's numbers while the device is busy with the next step."""

    def __init__(
        self, stage: str, steps: int, runtime: Runtime, checkpoints: Checkpoints,
        progress: Progress, start: int,
    ) -> None:  # fmt: skip
        self._stage, self._steps, self._runtime = stage, steps, runtime
        self._checkpoints, self._progress = checkpoints, progress
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._began = self._last = time.monotonic()
        self._last_step, self._waited = start, 0.0
        self.flops, self._peak = 0, peak(runtime.mesh)  # of a step's products

    def next(self, batches: Iterator[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """The next batch; counts the time in which no step was running while it was read."""
        began = time.monotonic()
        batch = next(batches)
        running: Any = self._pending[1]["loss"] if self._pending else None
        if running is None or running.is_ready():
            self._waited += time.monotonic() - began
        return batch

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """A dispatched step; the one before is reported."""
        self.settle()
        self._pending = step, values

    def settle(self) -> None:
        """Waits for the pending step and reports it. Raises `Diverged`."""
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        loss = float(values["loss"])
        if not np.isfinite(loss):
            kept = self._checkpoints.kept()
            raise Diverged(f"stage {self._stage}: the loss is {loss} at step {step}; {kept}")
        self._progress.update(step, loss=loss)
        if step % self._runtime.run.log_every == 0 or step == self._steps:
            now = time.monotonic()
            row = {name: float(value) for name, value in values.items()}
            row["steps_per_second"] = (step - self._last_step) / (now - self._last)
            rate = self.flops * row["steps_per_second"]
            row["teraflops_per_second"] = rate / 1e12
            if self._peak:
                row["mfu"] = rate / self._peak
            row["wait"] = self._waited / (now - self._last)  # no step was running
            row["seconds"] = now - self._began
            self._runtime.metrics.write(self._stage, step, row)
            self._last, self._last_step, self._waited = now, step, 0.0


def fit(
    stage: str, objective: Objective, batches: Iterator[Mapping[str, np.ndarray]],
    options: ConfigDict, runtime: Runtime, *, seed: int, frozen: Any, meta: dict[str, Any],
    preview: Any = None, begin: Begin | None = None,
) -> Params:  # fmt: skip
    """Trains a stage to its last step, from its newest good checkpoint or from the weights that
    `begin` reads, and returns the EMA.

    Raises `Interrupted` after a signal (saved), `Diverged` at a loss or a state that is not
    finite: neither is saved. `frozen` is replicated, but for the "base" of adapters, which is split
    as parameters are.
    `preview(ema, step)`, if given, is called at every checkpoint.
    """
    mesh, run = runtime.mesh, runtime.run
    check_batch(stage, options, mesh.shape)
    checkpoints = runtime.checkpoints(stage)
    abstract, state, ema, start, batch = _begin(
        stage, objective, options, checkpoints, batches, mesh, seed, begin
    )
    runtime.metrics.truncate(stage, start)
    kept = averages.Kept(runtime.workdir, stage) if options.averages else None
    if kept is not None and start:  # stopped after the checkpoint and before this
        kept.save(start, state["averages"])
    frozen = {n: (spread if n == "base" else replicate)(mesh, x) for n, x in frozen.items()}
    step_fn = compiled_step(objective, options, run, mesh, abstract)
    active = jax.process_index() == 0
    traced = run.profile if active else "", stage, runtime.workdir / "profile" / stage
    bar = Progress(stage, options.steps, start, active=active)
    with checkpoints.closing(), bar as progress, Profile(*traced) as profile:
        log = _Log(stage, options.steps, runtime, checkpoints, progress, start)
        if start >= options.steps and checkpoints.latest() is None:  # taken over
            checkpoints.save(start, state, ema, batches, meta)
        for step in range(start + 1, options.steps + 1):
            runtime.watch.step(stage, step, first=step == start + 1)
            batch = batch or place(mesh, log.next(batches))
            with jax.set_mesh(mesh), profile.step(step):
                log.flops = log.flops or products_of(step_fn, state, ema, frozen, batch)
                state, ema, values = step_fn(state, ema, frozen, batch)
            batch = None
            log.add(step, values)
            profile.after(step, values)
            stop = runtime.preemption.reached(step)
            if stop or step % run.save_every == 0 or step == options.steps:
                log.settle()
                if preview is not None:  # before the save: a run that ends here does it again
                    preview(ema, step)
                if kept:
                    kept.wait()
                checkpoints.save(step, state, ema, batches, meta)
                if kept is not None:
                    kept.save(step, state["averages"])
            if stop:
                checkpoints.close()
                if kept is not None:
                    kept.close()
                raise Interrupted(f"stage {stage}: stopped and saved at step {step}; run again")
    if kept is not None:
        kept.close()
    runtime.watch.rest()
    return ema
