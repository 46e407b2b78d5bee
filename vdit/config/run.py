"""config.run and config.mesh: how and on what a run computes, which changes only rounding."""

from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config import shared
from vdit.errors import UserError
from vdit.nn.attention import Attend
from vdit.nn.product import Matmul
from vdit.nn.stack import REMAT, Gather
from vdit.runtime import attention
from vdit.runtime.machine import DTYPES, matmul
from vdit.runtime.mesh import gather


def mesh_fields() -> ConfigDict:
    """config.mesh."""
    mesh = ConfigDict()  # devices along each axis; -1 takes what is left
    mesh.data = -1
    mesh.fsdp = 1
    mesh.tensor = 1
    mesh.sequence = 1
    return mesh


def run_fields() -> ConfigDict:
    """config.run."""
    run = ConfigDict()  # how, not what: dtype and attention change only rounding
    run.dtype = "auto"  # of matmul operands: float32, bfloat16, or what the machine does fastest
    run.attention = "auto"  # by machine and length; or xla, chunked, splash (TPU), cudnn (GPU)
    # tokens split over mesh.sequence exchange heads (ulysses), pass keys round (ring), do both as
    # the heads go (auto), or have all keys everywhere (gather)
    run.sequence = "auto"
    run.unroll = 64  # layers unrolled at a time; 1 compiles fastest
    run.remat = "none"  # rematerialise the DiT's activations: none, dots or full
    run.log_every = 20  # steps between rows of metrics.jsonl
    run.save_every = 200  # steps between checkpoints
    run.keep = 2  # checkpoints that stay
    # Seconds without a step after which a process prints its stacks and ends (ten times as many for
    # a stage's first step, which compiles); 0: for ever
    run.stuck = 1800.0
    run.lost = 60.0  # of several processes: seconds without a sign of one that end all
    return run


def check_run(config: ConfigDict) -> None:
    """Refuses unknown names and numbers out of range."""
    tables = {
        "run.dtype": DTYPES, "run.attention": attention.KERNELS, "run.sequence": attention.SEQUENCE,
        "run.remat": REMAT,
    }  # fmt: skip
    shared.check_names(config, tables)
    shared.check_positive(
        config, "run.log_every", "run.save_every", "run.keep", "run.unroll", "run.lost"
    )
    if config.run.stuck < 0:
        raise UserError(f"run.stuck is {config.run.stuck}: seconds, or 0 for ever, are allowed")


MESH = shared.Section(mesh_fields, lambda config: None)
RUN = shared.Section(run_fields, check_run)


class Machine(NamedTuple):
    """What depends on where a network runs."""

    attend: Attend
    matmul: Matmul
    gather: Gather
    unroll: int  # layers at a time


def machine(config: ConfigDict, mesh: Mesh | None, platform: str | None) -> Machine:
    """For one device, or for steps on a mesh; `platform` is the kind of machine, where that is
    neither the mesh's nor this one."""
    shared.choose(attention.KERNELS, "run.attention", config.run.attention)
    return Machine(
        attention.kernel(config.run.attention, mesh, platform, config.run.sequence),
        matmul(config.run.dtype, mesh, platform),
        gather(mesh),
        config.run.unroll,
    )
