"""The attention kernel of a run, by name or by machine, and its sharding over a mesh.

Every kernel is one function, `attend(q_BLNK, k_BSNK, v_BSNK, q_id_BL, k_id_BS)`; they compute the
same up to rounding.

Dimension key: B batch, L query tokens, S key tokens, N heads, K head dim.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from vdit.errors import UserError
from vdit.kernels import chunked, cudnn, ring, splash
from vdit.nn import dot_product
from vdit.nn.attention import Attend
from vdit.nn.dot_product import Ids
from vdit.runtime.mesh import BATCH, platform_of

# Logits of one head (L·S) from which `auto` leaves xla for chunked. Measured on two cores at 512,
# 1,024 and 2,048 tokens, in both dtypes: at 512 chunked takes up to 1.5 times as long; from 1,024
# on its gradient is as fast and its forward pass faster, and memory no longer grows by the square.
LONG = 1024 * 1024

# Logits of one head from which `auto` leaves splash: its tables, an entry for each pair of blocks,
# must fit into a TPU's scalar memory. Those of 166,912 x 166,912 do (compiled for v5p).
TABLES = 2**35


def has_cudnn() -> bool:
    """Whether this machine's first device runs cuDNN's attention: NVIDIA's from compute capability
    8 on (AMD's say "gfx90a"). So do the GPUs that are planned for without one (tools/plan.py)."""
    if jax.default_backend() != "gpu":
        return True
    major, _, minor = getattr(jax.devices()[0], "compute_capability", "").partition(".")
    return major.isdigit() and minor.isdigit() and int(major) >= 8


def auto(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, *ids: Ids,
    platform: str | None = None, sharded: bool = False,
) -> jax.Array:  # fmt: skip
    """The kernel that is `chosen` for these lengths while tracing. `sharded`: for one of several
    devices."""
    attend = chosen(q_BLNK, k_BSNK, platform)
    if (platform or jax.default_backend()) == "cpu" and not sharded:
        attend = functools.partial(attend, on_cpu=True)
    return attend(q_BLNK, k_BSNK, v_BSNK, *ids)


def chosen(q_BLNK: Any, k_BSNK: Any, platform: str | None = None) -> Any:
    """The kernel of a platform (None: this machine) for arrays, or shapes, of these lengths.

    On a TPU splash; xla where a row would not fill one of its blocks (text, few frames); chunked
    from `TABLES` logits a head on. Elsewhere xla below `LONG` logits a head; above, on a CPU
    chunked, on a GPU cuDNN for the inputs that it supports, if present, and otherwise xla while the
    logits fit (`cudnn.ROOM`), then chunked.
    """
    length, keys = q_BLNK.shape[1], k_BSNK.shape[1]
    platform = platform or jax.default_backend()
    if platform == "tpu":
        attend = chunked.attend if length * keys >= TABLES else splash.attend
        return attend if min(length, keys) >= splash.LANES else dot_product.attend
    if length * keys < LONG:
        return dot_product.attend
    if platform == "gpu":
        return cudnn.attend if has_cudnn() else cudnn.fallback(q_BLNK, k_BSNK)
    return chunked.attend


KERNELS: dict[str, Attend] = {
    "auto": auto,
    "xla": dot_product.attend,
    "chunked": chunked.attend,
    "splash": splash.attend,
    "cudnn": cudnn.attend,
}
NEEDS = {"splash": "tpu", "cudnn": "gpu"}  # the platform of kernels that run on one alone
# Kernels that differ on one device of XLA's CPU backend.
ON_CPU: dict[str, Attend] = {
    name: functools.partial(KERNELS[name], on_cpu=True) for name in ("xla", "chunked")
}


def runs_here(name: str, platform: str | None = None) -> bool:
    """Whether a platform (None: this machine) runs the kernel of that name in `KERNELS`."""
    return NEEDS.get(name) in (None, platform or jax.default_backend())


def check(name: str, platform: str | None = None) -> None:
    """Validates run.attention: a `UserError` for a kernel of another machine lists this one's."""
    if not runs_here(name, platform):
        here = ", ".join(other for other in sorted(KERNELS) if runs_here(other, platform))
        raise UserError(
            f"run.attention={name!r} needs a {NEEDS[name]}, this machine has"
            f" {platform or jax.default_backend()}: allowed here are {here}"
        )


# Sequence parallelism, how tokens attend to those of other shards of `sequence`: ulysses exchanges
# heads for tokens (an all-to-all before the kernel and after it, Jacobs et al., arXiv:2309.14509),
# ring passes keys round, gather all-gathers keys. auto: ulysses while the heads suffice, then ring.
SEQUENCE = ("auto", "ulysses", "ring", "gather")


def exchange(how: str, heads: int, shards: int) -> tuple[int, int]:
    """(u, r): all-to-alls in groups of u shards, and rings of r groups, for a device's `heads`."""
    wanted = {"auto": math.gcd(heads, shards), "ulysses": shards, "ring": 1}[how]
    return wanted, shards // wanted


def check_mesh(name: str, how: str, heads: int, sizes: Mapping[str, int]) -> None:
    """Validates tensor and sequence shards against a model's heads and the kernel of that name."""
    tensor, shards = sizes["tensor"], sizes["sequence"]
    if heads % tensor:
        raise UserError(f"mesh tensor={tensor}: there are {heads} heads, which tensor must divide")
    if shards == 1 or how == "gather":
        return
    local = heads // tensor
    if how == "ulysses" and local % shards:
        raise UserError(
            f"run.sequence=ulysses with mesh sequence={shards}: it must divide the {local} heads of"
            " a tensor shard; auto and ring are allowed"
        )
    if exchange(how, local, shards)[1] > 1 and name not in ("auto", "chunked"):
        raise UserError(
            f"run.attention={name} with mesh sequence={shards} and {local} heads of a tensor shard:"
            " keys go round a ring, which takes auto or chunked; or run.sequence=gather"
        )


def across(attend: Attend, how: str, shards: int) -> Attend:
    """`attend` over tokens that are sharded along sequence, for use inside `jax.shard_map`: every
    query sees the keys of all `shards` devices."""

    def over(q_BLNK: jax.Array, k_BLNK: jax.Array, v_BLNK: jax.Array, *ids: Ids) -> jax.Array:
        u, r = exchange(how, q_BLNK.shape[2], shards)
        local: Any = attend
        if r > 1:
            pairs = tuple((i, (i + u) % shards) for i in range(shards))
            local = functools.partial(ring.attend, ring=ring.Ring("sequence", r, pairs))
        if u == 1:
            return local(q_BLNK, k_BLNK, v_BLNK, *ids)
        groups = [[a * u + b for b in range(u)] for a in range(r)] if r > 1 else None
        options: Any = {"axis_index_groups": groups, "tiled": True}

        def exchanged(x: jax.Array, away: int, here: int) -> jax.Array:
            return jax.lax.all_to_all(x, "sequence", away, here, **options)

        arrays = (exchanged(x, 2, 1) for x in (q_BLNK, k_BLNK, v_BLNK))
        everywhere = (
            None if x is None else jax.lax.all_gather(x, "sequence", axis=1, **options) for x in ids
        )
        # The result is rounded to the operands' dtype by its reader, so that is what is sent.
        out = local(*arrays, *everywhere).astype(q_BLNK.dtype)
        return exchanged(out, 1, 2).astype(jnp.float32)

    return over


def split(attend: Attend, mesh: Mesh, how: str = "auto") -> Attend:
    """`attend` sharded over a mesh by `jax.shard_map`, for use inside jit.

    XLA cannot partition a custom kernel, and partitions a scan over chunks badly. Rows are sharded
    over (data, fsdp), heads over tensor, queries over sequence. As many keys as queries are
    taken for self-attention, whose keys are sharded too: `how` of `SEQUENCE` is the parallelism.
    With auto, rows enough for all axes (of a frame, a place, a window) are sharded over sequence as
    well, and need none. Fewer keys (a text's) are replicated. So is a dimension that its axes do
    not divide.
    """
    shards = mesh.shape["sequence"]

    def divides(axes: tuple[str, ...], size: int) -> bool:
        return size % math.prod(mesh.shape[axis] for axis in axes) == 0

    def over(q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, *ids: Ids) -> jax.Array:
        rows, length, heads, _ = q_BLNK.shape
        others = k_BSNK.shape[1]
        batch: Any = BATCH if divides(BATCH, rows) else None
        queries: Any = ("sequence",) if divides(("sequence",), length) else None
        keys: Any = None
        at: Any = ("tensor",) if divides(("tensor",), heads) else None
        local = attend
        by_rows = others > length or (others == length and how == "auto")
        if shards > 1 and by_rows and divides((*BATCH, "sequence"), rows):
            batch, queries = (*BATCH, "sequence"), None
        elif how != "gather" and shards > 1 and others == length and queries:
            keys, local = queries, across(attend, how, shards)
        of_q, of_k = PartitionSpec(batch, queries, at), PartitionSpec(batch, keys, at)
        specs = of_q, of_k, of_k, PartitionSpec(batch, queries), PartitionSpec(batch, keys)
        given = [x for x in ids if x is not None]
        # Custom kernels do not declare over which axes their results vary: no check.
        place: Any = {"in_specs": specs[: 3 + len(given)], "out_specs": of_q, "check_vma": False}
        return jax.shard_map(local, mesh=mesh, **place)(q_BLNK, k_BSNK, v_BSNK, *given)

    return over


def kernel(
    name: str, mesh: Mesh | None = None, platform: str | None = None, how: str = "auto"
) -> Attend:
    """The kernel of that name in `KERNELS` for `platform` (by default the mesh's), sharded over the
    mesh if there is one (`how`: see `split`)."""
    attend, platform = KERNELS[name], platform or platform_of(mesh)
    sharded = mesh is not None and mesh.size > 1
    if name == "auto" and (sharded or platform != jax.default_backend()):
        attend = functools.partial(auto, platform=platform, sharded=sharded)
    elif platform == "cpu" and not sharded:
        attend = ON_CPU.get(name, attend)
    return split(attend, mesh, how) if mesh is not None and sharded else attend
