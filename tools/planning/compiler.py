"""XLA's compilers for TPUs and GPUs on a machine without them, and their devices."""

import importlib.util
import os
from typing import Any

from vdit.errors import UserError

from .chips import Topology
from .gpus import GPUS, target

NEEDS = {
    "tpu": ("libtpu", "libtpu is missing: pip install libtpu beside jax (pip install -e '.[tpu]')"),
    "gpu": (
        "jax_plugins.xla_cuda12",
        "JAX's CUDA plugin is missing: pip install -e '.[plan-gpu]' (3 GB; no GPU is needed)",
    ),
}
# Without a GPU no kernel can be timed: the compiler takes its default choices.
OPTIONS: dict[str, Any] = {
    "tpu": {},
    "gpu": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
}


def installed(module: str) -> bool:
    """Whether a module, possibly of a package that is not there, can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def devices_of(name: str, where: Topology) -> Any:
    """The devices of a topology."""
    module, missing = NEEDS[where.platform]
    if not installed(module):
        raise UserError(f"{missing}, or give --fast")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        if where.platform == "tpu":
            return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        shape = f"1x{where.devices // where.host}x{where.host}"
        told = {"target_config": target(GPUS[where.kind]), "topology": shape}
        return topologies.get_topology_desc("", "cuda", **told).devices
    except Exception as error:  # the plugins raise untyped errors
        raise UserError(f"--topology={name}: XLA says: {str(error).splitlines()[0]}") from error


def compiled_of(lowered: Any, what: str, platform: str = "tpu") -> Any:
    """Compiles; running out of memory is a `UserError`."""
    try:
        return lowered.compile(compiler_options=OPTIONS[platform])
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{what} does not fit, the compiler says: {line}") from error
