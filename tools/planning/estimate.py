"""What a train step needs, without compiling it: bytes on a chip, FLOPs, and the time they take.

Parameters, optimizer and EMA are counted exactly. Activations are the residuals of the gradient,
traced; what a layer's backward pass works with is `WORKING` times its own residuals, as measured
against XLA's TPU compiler (docs/scale.md).
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from tools.planning import step
from tools.planning.chips import Chip
from tools.planning.products import flops
from vdit.runtime.mesh import AXES, param_sharding
from vdit.train import init_state

WORKING = 2.1  # residuals of a layer that its backward pass holds at a time


class Model(NamedTuple):
    """What does not depend on the mesh. Bytes and FLOPs are of one sample, over all devices."""

    state: Any  # shapes of state and EMA
    params: int
    model_flops: float  # forward and backward, nothing twice
    again_flops: float  # rematerialisation
    saved: float  # bytes that the forward pass leaves to the backward pass
    working: float  # bytes of one layer's backward pass
    layers: int


class Estimate(NamedTuple):
    """A train step on one device: bytes by part, and seconds by what they wait for."""

    params: float
    optimizer: float
    ema: float
    temporaries: float
    compute: float
    hbm: float
    ici: float

    @property
    def total(self) -> float:
        """Bytes."""
        return self.params + self.optimizer + self.ema + self.temporaries

    @property
    def seconds(self) -> float:
        """At least this long: everything at full rate, and all at once."""
        return max(self.compute, self.hbm, self.ici)


def with_(config: ConfigDict, **changes: Any) -> ConfigDict:
    """A copy with changes, {"dit_train_batch": 1} style: section.field names by "__"."""
    made = config.copy_and_resolve_references()
    for name, value in changes.items():
        *path, last = name.split("__")
        functools.reduce(lambda node, part: node[part], path, made)[last] = value
    return made


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree of shapes (random keys left out)."""
    return sum(
        math.prod(x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    )


def device_bytes(mesh: AbstractMesh, tree: Any) -> int:
    """Bytes of one device's share of parameters, moments or EMA."""
    shares = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(where.shard_shape(x.shape), x.dtype),
        tree,
        param_sharding(mesh, tree),  # type: ignore[arg-type]
    )
    return nbytes(shares)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)


def residuals(config: ConfigDict, stage: str, batch: int, platform: str) -> int:
    """Bytes that the gradient of a batch keeps."""
    made = step.training(with_(config, **{f"{stage}__train__batch": batch}), stage, None, platform)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(made.objective.init, key, made.batch)

    def back(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return jax.vjp(lambda p: made.objective.loss(p, frozen, batch, key)[0], params)[1]

    return nbytes(jax.eval_shape(back, params, made.frozen, made.batch, key))


def gradient_flops(config: ConfigDict, stage: str, platform: str) -> int:
    """FLOPs of the matrix products of one sample's loss and gradient."""
    made = step.training(with_(config, **{f"{stage}__train__batch": 1}), stage, None, platform)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(made.objective.init, key, made.batch)

    def loss(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return made.objective.loss(params, frozen, batch, key)[0]

    return flops(jax.make_jaxpr(jax.grad(loss))(params, made.frozen, made.batch, key).jaxpr)


def model_of(config: ConfigDict, stage: str, platform: str = "tpu") -> Model:
    """Traces the step of a stage; a few seconds, no device."""
    made = step.training(config, stage, None, platform)
    begin = functools.partial(init_state, made.objective, made.options, seed=made.seed)
    state, ema = jax.eval_shape(begin, made.batch)
    per_sample = {
        remat: residuals(c, stage, 2, platform) - residuals(c, stage, 1, platform)
        for remat in {"none", config.run.remat}
        for c in [with_(config, run__remat=remat)]
    }
    # A Pallas kernel's products are inside of it, a block at a time: count those of plain XLA.
    plain = with_(config, run__attention="xla")
    once = gradient_flops(with_(plain, run__remat="none"), stage, platform)
    remat = config.run.remat
    again = 0 if remat == "none" else gradient_flops(plain, stage, platform) - once
    group = {"vae": "vae", "dit": "dit", "classify": "vivit"}[stage]
    stacked = [
        leaf.shape[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"][group])
        if "blocks" in jax.tree_util.keystr(path)
    ]
    layers = max(stacked, default=1)
    return Model(
        state=(state, ema),
        params=sum(math.prod(x.shape) for x in jax.tree.leaves(state["params"])),
        model_flops=once,
        again_flops=again,
        saved=per_sample[remat],
        working=WORKING * per_sample["none"] / layers if remat != "none" else 0.0,
        layers=layers,
    )


def estimate(
    model: Model, options: ConfigDict, sizes: Mapping[str, int], chip: Chip
) -> Estimate:
    """The step of `options.batch` samples on a mesh of such devices.

    Tokens are split over data, fsdp and sequence; what tensor saves of activations is not counted.
    """
    mesh = abstract_mesh(sizes)
    state, ema = model.state
    params, optimizer = device_bytes(mesh, state["params"]), device_bytes(mesh, state["opt"])
    devices = math.prod(sizes.values())
    shards = sizes["data"] * sizes["fsdp"]
    share = options.batch / (shards * options.accumulate * sizes["sequence"])  # samples at a time
    gradients = params * (2 if options.accumulate > 1 else 1)
    temporaries = gradients + share * (model.saved + model.working)
    total = options.batch * (model.model_flops + model.again_flops)
    whole = nbytes(state["params"]) / sizes["tensor"]  # of one tensor shard, float32
    parts = options.accumulate
    passes = 3 if model.again_flops else 2
    # State is read and written once; weights by every pass as bfloat16; what is saved, twice.
    traffic = 2 * (2 * params + optimizer) + parts * passes * whole / 2
    traffic += 2 * parts * share * (model.saved + model.working * model.layers)
    around = {axis: (size - 1) / size for axis, size in sizes.items()}
    sent = parts * (passes * whole / 2 + whole) * around["fsdp"]
    sent += 2 * params * around["data"]
    return Estimate(
        params, optimizer, device_bytes(mesh, ema), temporaries,
        total / devices / chip.flops, traffic / chip.hbm_rate, sent / chip.ici,
    )  # fmt: skip
