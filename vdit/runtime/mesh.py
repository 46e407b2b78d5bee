"""The device mesh, and the sharding of arrays on it: rules from a parameter's path to mesh axes.

Four axes. `data` shards the batch; `fsdp` shards the batch and, between uses, the parameters;
`tensor` shards heads and MLP columns; `sequence` shards tokens and, with `fsdp` above 1, also
parameters. XLA inserts the communication (axes of type Auto), so models know nothing of it: one
device and 512 are the same program.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vdit.errors import UserError
from vdit.nn.stack import STACKED

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = ("data", "fsdp")  # axes that shard a batch's leading dimension

# (regex on the path, axes of the LAST dimensions). The first match counts; no match, no axes.
# A column-parallel kernel before a row-parallel one needs one all-reduce a pair (Megatron-LM,
# arXiv:1909.08053). Paths of moments and EMA end in the same names, so they are sharded alike.
Rules = Sequence[tuple[str, tuple[str | None, ...]]]
RULES: Rules = (
    (r"(^|/)(q|k|v|k_image|v_image|up|told|half0/conv)/(kernel|lora_up)$", (None, "tensor")),
    (r"(^|/)(o|down|half1/conv)/(kernel|lora_down)$", ("tensor", None)),
)
SMALL = 2**12  # a leaf of fewer elements is replicated: gathering costs more than sharding saves


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or `devices`) with the axes of `AXES`, as `mesh_sizes` has them."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(axes, len(devices))
    kinds, shape = (AxisType.Auto,) * len(AXES), tuple(sizes.values())
    try:
        return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # a TPU's physical axis must be split: 2 x 8 of 4 x 4
        grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=kinds)


def mesh_sizes(axes: Mapping[str, int], count: int) -> dict[str, int]:
    """The size of each of `AXES` over `count` devices; a missing axis has size 1.

    At most one axis may be -1: it takes the devices that the others leave. Raises `UserError` for
    an unknown axis, a size that is no positive integer, or sizes that do not multiply to the number
    of devices.
    """
    given = ", ".join(f"{name}={size}" for name, size in axes.items())
    for name, size in axes.items():
        if name not in AXES:
            raise UserError(f"mesh axis {name!r} is unknown: the axes are {', '.join(AXES)}")
        if size != -1 and size < 1:
            raise UserError(f"mesh {given}: {name} must be a positive number, or -1 for the rest")
    sizes = {name: int(axes.get(name, 1)) for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh {given}: only one axis may be -1, here {' and '.join(free)} are")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    works = fixed == count or (bool(free) and count % fixed == 0)
    if not works:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        allowed = f"one of {divisors}" if free else f"{count} (or set one axis to -1)"
        raise UserError(
            f"mesh {given}: the fixed axes multiply to {fixed}, but there are {count}"
            f" device(s): the product must be {allowed}"
        )
    if free:
        sizes[free[0]] = count // fixed
    return sizes


def sampling_mesh(rows: int) -> Mesh | None:
    """A mesh for sampling `rows` rows (two a guided video): rows over data as far as they divide
    the devices, tokens over the rest. None for one device, and for a CPU's, which share its
    cores."""
    devices = jax.local_devices()
    if len(devices) == 1 or devices[0].platform == "cpu":
        return None
    data = math.gcd(rows, len(devices))
    return make_mesh({"data": data, "sequence": len(devices) // data}, devices)


def platform_of(mesh: Mesh | None) -> str:
    """The platform, "cpu", "gpu" or "tpu", of a mesh; without one that of this machine.

    A mesh may be of a machine that is not present (`jax.experimental.topologies`).
    """
    if mesh is None:
        return jax.default_backend()
    platform = mesh.devices.flat[0].platform
    return "gpu" if platform == "cuda" else platform


def map_paths(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`jax.tree.map` of a function that is also given a leaf's path, "a/b/c"."""

    def call(path: Any, leaf: Any) -> Any:
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(call, tree)


def param_sharding(mesh: Mesh, tree: Any, rules: Rules = RULES) -> Any:
    """The tree of `NamedSharding`s for parameters, moments or EMA (arrays or abstract values).

    A leaf is sharded by its path: first over the tensor axes of `rules`, then, with `fsdp` above 1,
    over (fsdp, sequence) along the largest remaining dimension that they divide, or else over fsdp
    alone. A dimension that an axis does not divide is replicated, and so is a leaf of fewer than
    `SMALL` elements.
    """

    def place(name: str, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(mesh, name, tuple(leaf.shape), rules))

    return map_paths(place, tree)


def spread(mesh: Mesh, tree: Any) -> Any:
    """Shards a tree of parameters that every process has, by `param_sharding`; leaves that have
    that sharding already stay."""

    def put(x: Any, where: NamedSharding) -> jax.Array:
        if jax.process_count() == 1 or getattr(x, "sharding", None) == where:
            return jax.device_put(x, where)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, where, lambda part: whole[part])

    return jax.tree.map(put, tree, param_sharding(mesh, tree))


def gather(mesh: Mesh | None) -> Callable[[Any], Any] | None:
    """A function that all-gathers a tree of parameters over the axes that split them, for use
    inside jit; None where fsdp is 1.

    Gradients are scattered at once. A product is then sharded as its activations are; if batch and
    kernel are sharded over the same axis, XLA moves whichever it takes for the smaller, also
    activations. Stacked leaves stay: a scan gathers a layer at a time (`vdit.nn.stack`).
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return None

    def one(name: str, leaf: jax.Array) -> jax.Array:
        split = _spec(mesh, name, leaf.shape, RULES)
        kept = PartitionSpec(*(axis if axis == "tensor" else None for axis in split))
        if STACKED.search(name) or kept == split:
            return leaf
        fsdp = PartitionSpec(*("fsdp" if type(axis) is tuple else axis for axis in split))
        return _gathered(leaf, *(NamedSharding(mesh, spec) for spec in (kept, fsdp, split)))

    return functools.partial(map_paths, one)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(
    x: jax.Array, kept: NamedSharding, fsdp: NamedSharding, split: NamedSharding
) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, kept)


def _scattered(
    kept: Any, fsdp: NamedSharding, split: NamedSharding, _: Any, gradient: jax.Array
) -> Any:
    """The gradient over fsdp, then over sequence: for both at once XLA would move a product's
    operand instead."""
    gradient = jax.lax.with_sharding_constraint(gradient, fsdp)
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gathered.defvjp(lambda x, *shardings: (_gathered(x, *shardings), None), _scattered)


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...], rules: Rules) -> PartitionSpec:
    if math.prod(shape) < SMALL:
        return PartitionSpec()
    axes: list[Any] = [None] * len(shape)
    named = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
    for dim, axis in enumerate(named, start=len(shape) - len(named)):
        if axis is not None and dim >= 0 and mesh.shape[axis] > 1:
            axes[dim] = axis if shape[dim] % mesh.shape[axis] == 0 else None
    first = 1 if STACKED.search(name) else 0
    free = [d for d in range(first, len(shape)) if axes[d] is None]
    fsdp, sequence = mesh.shape["fsdp"], mesh.shape["sequence"]
    both = (("fsdp", "sequence"), fsdp * sequence)
    for split, size in (both, ("fsdp", fsdp)) if sequence > 1 else (("fsdp", fsdp),):
        fits = [d for d in free if shape[d] % size == 0]
        if fits and fsdp > 1:
            axes[max(fits, key=lambda d: shape[d])] = split
            break
    return PartitionSpec(*axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its leading dimension over (data, fsdp)."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Replicates a tree of arrays that every process has over the mesh."""
    sharding = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    make = jax.make_array_from_process_local_data
    return jax.tree.map(lambda x: make(sharding, np.asarray(x), x.shape), tree)


def local_mesh(mesh: Mesh, batch: int) -> Mesh:
    """This process's devices of a mesh, along `data`: as many as divide the batch."""
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return make_mesh({"data": -1}, mine[: math.gcd(batch, len(mine))])


def to_local(mesh: Mesh, tree: Any, here: Mesh) -> Any:
    """Gathers a tree of arrays from all processes and replicates it over the mesh `here`."""
    if jax.process_count() > 1:
        whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
        tree = jax.tree.map(lambda x: x.addressable_data(0), whole)
    return jax.device_put(tree, replicated(here))


def data_process(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process loads part `index` of the `count` parts of a batch.

    Processes with the same rows (which differ along `tensor` or `sequence`) load the same part.
    Raises `UserError` where processes share some rows and not others.
    """
    rows: dict[int, set[int]] = {}
    shards = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    for row, devices in enumerate(shards):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(held)) for held in rows.values()})
    if len({row for share in shares for row in share}) < sum(map(len, shares)):
        raise UserError(
            f"mesh {dict(mesh.shape)}: the rows of a batch that two processes hold must be the same"
            " or none; choose tensor and sequence so that they divide, or are divided by, the"
            f" {jax.local_device_count()} devices of a process"
        )
    if len({len(share) for share in shares}) > 1:
        raise UserError(f"mesh {dict(mesh.shape)}: processes hold unequal shares of a batch")
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def sequence_constraint(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """A function that shards activations (B, L, ...) over ((data, fsdp), sequence), inside jit.

    A dimension that its axes do not divide is replicated (a single sample on eight devices).
    """

    def constrain(x: jax.Array) -> jax.Array:
        sizes = (math.prod(mesh.shape[a] for a in BATCH), mesh.shape["sequence"])
        axes = [
            axis if x.shape[dim] % size == 0 else None
            for dim, (axis, size) in enumerate(zip((BATCH, "sequence"), sizes, strict=True))
        ]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return constrain
