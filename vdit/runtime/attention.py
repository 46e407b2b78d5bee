"""Which attention kernel a run uses: by name, or by the machine; and how a mesh splits its rows.

Every kernel is one function, `attend(q_BLNK, k_BSNK, v_BSNK, q_id_BL, k_id_BS)`, and they compute
the same up to rounding.

Dimension key: B batch, L query tokens, S key tokens, N heads, K head dim.
"""

import functools
import math

import jax
from jax.sharding import Mesh, PartitionSpec

from vdit.errors import UserError
from vdit.kernels import chunked, cudnn, splash, xla
from vdit.nn.attention import Attend
from vdit.runtime.mesh import BATCH, platform_of

# Logits of one head (L·S) from which `auto` leaves xla for chunked. Measured on two cores at 512,
# 1,024 and 2,048 tokens, in both dtypes: at 512 chunked takes up to 1.5 times as long; from 1,024
# on its gradient is as fast and its forward pass faster, and memory no longer grows by the square.
LONG = 1024 * 1024


def auto(
    q_BLNK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    q_id_BL: jax.Array | None = None,
    k_id_BS: jax.Array | None = None,
    *,
    platform: str | None = None,
) -> jax.Array:
    """The kernel of a platform (None: this machine) for rows of this length, chosen while tracing.

    On a TPU splash, and xla for rows that would not fill one of its blocks (text, few frames).
    Elsewhere xla below `LONG` logits a head, and chunked from there on.
    """
    length, keys = q_BLNK.shape[1], k_BSNK.shape[1]
    if (platform or jax.default_backend()) == "tpu":
        attend = splash.attend if min(length, keys) >= splash.LANES else xla.attend
    else:
        attend = chunked.attend if length * keys >= LONG else xla.attend
    return attend(q_BLNK, k_BSNK, v_BSNK, q_id_BL, k_id_BS)


KERNELS: dict[str, Attend] = {
    "auto": auto,
    "xla": xla.attend,
    "chunked": chunked.attend,
    "splash": splash.attend,
    "cudnn": cudnn.attend,
}
NEEDS = {"splash": "tpu", "cudnn": "gpu"}  # kernels that only one kind of machine runs


def runs_here(name: str, platform: str | None = None) -> bool:
    """Whether a platform (None: this machine) runs the kernel of that name in `KERNELS`."""
    return NEEDS.get(name) in (None, platform or jax.default_backend())


def check(name: str, platform: str | None = None) -> None:
    """Refuses a kernel of another machine, with a `UserError` that lists those of this one."""
    if not runs_here(name, platform):
        here = ", ".join(other for other in sorted(KERNELS) if runs_here(other, platform))
        raise UserError(
            f"run.attention={name!r} needs a {NEEDS[name]}, this machine has"
            f" {platform or jax.default_backend()}: allowed here are {here}"
        )


def split(attend: Attend, mesh: Mesh) -> Attend:
    """`attend` on every device's own rows, queries and heads, for use inside jit.

    XLA cannot split a kernel that it did not write, and would split a scan over chunks badly. Rows
    go over (data, fsdp), heads over tensor, queries over sequence; each device has all keys of its
    queries. A dimension that its axes do not divide stays whole.
    """

    def over(
        q_BLNK: jax.Array,
        k_BSNK: jax.Array,
        v_BSNK: jax.Array,
        q_id_BL: jax.Array | None = None,
        k_id_BS: jax.Array | None = None,
    ) -> jax.Array:
        wanted = zip(q_BLNK.shape, (BATCH, ("sequence",), ("tensor",)), strict=False)
        batch, queries, heads = (
            axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
            for size, axes in wanted
        )
        of_q, of_k = PartitionSpec(batch, queries, heads), PartitionSpec(batch, None, heads)
        arrays, specs = [q_BLNK, k_BSNK, v_BSNK], [of_q, of_k, of_k]
        if q_id_BL is not None:
            assert k_id_BS is not None
            arrays += [q_id_BL, k_id_BS]
            specs += [PartitionSpec(batch, queries), PartitionSpec(batch, None)]
        # Kernels do not say over which axes their results vary, so that cannot be checked.
        local = jax.shard_map(
            attend, mesh=mesh, in_specs=tuple(specs), out_specs=of_q, check_vma=False
        )
        return local(*arrays)

    return over


def kernel(name: str, mesh: Mesh | None = None, platform: str | None = None) -> Attend:
    """The kernel of that name in `KERNELS`, split over the mesh where there is one.

    `auto` chooses for `platform`, by default that of the mesh.
    """
    attend, platform = KERNELS[name], platform or platform_of(mesh)
    if name == "auto" and platform != jax.default_backend():  # steps for another machine
        attend = functools.partial(auto, platform=platform)
    return attend if mesh is None or mesh.size == 1 else split(attend, mesh)
