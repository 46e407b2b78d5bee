"""What depends on the machine: operand dtypes, how products are computed, host memory."""

import contextlib
import ctypes
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vdit.nn.product import Matmul
from vdit.runtime.mesh import platform_of

DTYPES = ("auto", "float32", "bfloat16")
# FLOP/s of bfloat16 products with float32 sums, by the kind of a device (of some TPUs half a chip)
# as JAX names it; from the vendors' data sheets.
PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 5090": 209e12,
    "NVIDIA RTX PRO 6000 Blackwell": 504e12,
}  # fmt: skip
NARROW = ("avx512_bf16", "amx_bf16")  # flags of x86 CPUs that multiply bfloat16 in hardware


def multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine multiplies bfloat16 faster than float32: accelerators do, and CPUs
    whose flags say so; other CPUs convert the operands to float32 first."""
    if jax.default_backend() != "cpu":
        return True
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return not {flag for line in lines for flag in line.split()}.isdisjoint(NARROW)


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory (the process never shrinks); False if that is not possible.

    XLA's CPU backend allocates a step's temporary memory anew each time, in blocks so large that
    glibc maps and unmaps each, and the system clears all their pages again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    trim, pad, maps = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX of malloc.h
    settings = ((maps, 0), (trim, 2**31 - 1), (pad, 2**26))
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings)


def return_freed_memory() -> None:
    """Gives the system back what has been freed: glibc keeps much of it between large objects."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def operand_dtype(name: str, mesh: Mesh | None = None, platform: str | None = None) -> Any:
    """The dtype of matmul operands by its name in `DTYPES`; "auto" is the machine's fastest.

    The machine is `platform`'s if given, else the mesh's, else this one. Several CPU devices are a
    simulated mesh: float32 there, for the layouts that keep narrow products fast on a CPU cannot be
    partitioned (`vdit.nn.product.row_major`).
    """
    if name == "auto":
        if (platform or platform_of(mesh)) != "cpu":
            return jnp.bfloat16
        mesh_of_cpus = jax.default_backend() == "cpu" and jax.device_count() > 1
        narrow = multiplies_bfloat16() and not mesh_of_cpus
        return jnp.bfloat16 if narrow else jnp.float32
    return jnp.dtype(name)


def matmul(name: str, mesh: Mesh | None = None, platform: str | None = None) -> Matmul:
    """How products are computed with operands of dtype `name`, see `operand_dtype`."""
    one = mesh is None or mesh.size == 1
    on_cpu = one and (platform or platform_of(mesh)) == "cpu"
    return Matmul(operand_dtype(name, mesh, platform), flatten=one, on_cpu=on_cpu)


def peak(mesh: Mesh) -> float | None:
    """FLOP/s of all devices of a mesh together; None for a kind that is not in `PEAKS`."""
    one = PEAKS.get(mesh.devices.flat[0].device_kind)
    return one and one * mesh.size


def device_memory() -> int | None:
    """Bytes of the first device that programs may use; None where it does not say so."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def host_memory() -> AbstractContextManager[Any]:
    """A context that places new arrays in the host's memory (on the first device where JAX has no
    CPU backend)."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()
