"""The choice of operands follows the machine, and a name overrides it; freed memory stays."""

import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vdit.runtime.machine import multiplies_bfloat16, operand_dtype


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads a CPU's flags")
@pytest.mark.parametrize(
    ("flags", "narrow"),
    [("fpu avx2", False), ("fpu avx512f avx512_bf16 avx512_vnni", True), ("amx_bf16", True)],
)
def test_flags_of_the_cpu_decide(flags: str, narrow: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert multiplies_bfloat16(tmp_path / "cpuinfo") is narrow
    assert multiplies_bfloat16(tmp_path / "nowhere") is False


def test_a_name_overrides_the_machine() -> None:
    assert operand_dtype("float32") == jnp.float32 and operand_dtype("bfloat16") == jnp.bfloat16


def test_several_cpu_devices_multiply_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdit.runtime.machine.multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    for devices, dtype in ((1, jnp.bfloat16), (8, jnp.float32)):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        assert operand_dtype("auto") == dtype


FAULTS = """
import resource, sys
import numpy as np
from vdit.runtime.machine import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**25)  # 256 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc")
def test_freed_memory_is_not_mapped_anew() -> None:
    """The system clears no page of an array that takes the place of one before it."""
    told = [sys.executable, "-c", FAULTS]
    kept, given_back = (
        int(subprocess.run([*told, how], capture_output=True, check=True, text=True).stdout)
        for how in ("kept", "given back")
    )
    assert kept < 50 and given_back > 100  # of 65,536 pages, or 128 huge ones
