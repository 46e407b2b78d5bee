"""config.run and config.mesh: how and on which devices a run computes."""

from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config import shared
from vdit.nn.attention import Attend
from vdit.nn.product import Matmul
from vdit.nn.stack import REMAT, Gather
from vdit.runtime import attention, profile
from vdit.runtime.machine import DTYPES, matmul
from vdit.runtime.mesh import gather


def mesh_fields() -> ConfigDict:
    """config.mesh."""
    mesh = ConfigDict()  # devices along each axis; -1: all that remain
    mesh.data = -1  # splits batches
    mesh.fsdp = 1  # splits batches and parameters
    mesh.tensor = 1  # splits attention heads and MLPs
    mesh.sequence = 1  # splits tokens; with fsdp above 1 also parameters
    return mesh


def run_fields() -> ConfigDict:
    """config.run."""
    run = ConfigDict()  # dtype and attention change only rounding, the others nothing
    run.dtype = "auto"  # of matmul operands: float32, bfloat16, or the machine's fastest (auto)
    run.attention = "auto"  # kernel: by machine and length (auto), xla, chunked, splash or cudnn
    # Attention over mesh.sequence: exchange heads (ulysses), pass keys round a ring (ring), both as
    # far as the heads go (auto), or gather all keys (gather)
    run.sequence = "auto"
    run.unroll = 64  # layers unrolled at a time; 1 compiles fastest
    run.remat = "none"  # activation rematerialisation in the denoiser: none, dots or full
    run.log_every = 20  # steps between rows of metrics.jsonl
    run.profile = ""  # FIRST:LAST steps of each stage of which a profiler's trace is written
    run.save_every = 200  # steps between checkpoints
    run.keep = 2  # newest checkpoints kept
    # Seconds without a step after which a process prints its stacks and exits (ten times as many
    # for the first step of a stage, which compiles); 0: never
    run.stuck = 1800.0
    run.lost = 60.0  # several processes: seconds without a heartbeat after which all exit
    return run


def check_run(config: ConfigDict) -> None:
    """Checks names and ranges."""
    tables = {
        "run.dtype": DTYPES, "run.attention": attention.KERNELS, "run.sequence": attention.SEQUENCE,
        "run.remat": REMAT,
    }  # fmt: skip
    shared.check_names(config, tables)
    shared.check_positive(
        config, "run.log_every", "run.save_every", "run.keep", "run.unroll", "run.lost"
    )
    try:
        profile.parse(config.run.profile)
    except ValueError:
        allowed = "FIRST:LAST, steps from 1 on, such as 100:105, is allowed"
        raise shared.refusal(config, "run.profile", allowed) from None
    if config.run.stuck < 0:
        raise shared.refusal(config, "run.stuck", "seconds, or 0 (never), are allowed")


MESH = shared.Section(mesh_fields, lambda config: None)
RUN = shared.Section(run_fields, check_run)


class Machine(NamedTuple):
    """What a network takes from the machine it runs on."""

    attend: Attend
    matmul: Matmul
    gather: Gather
    unroll: int  # layers at a time


def machine(config: ConfigDict, mesh: Mesh | None, platform: str | None) -> Machine:
    """The machine: one device or a mesh, of another `platform` than this one if that is given."""
    shared.choose(attention.KERNELS, "run.attention", config.run.attention)
    return Machine(
        attention.kernel(config.run.attention, mesh, platform, config.run.sequence),
        matmul(config.run.dtype, mesh, platform),
        gather(mesh),
        config.run.unroll,
    )
