"""The choice of operands follows the machine, and a name overrides it."""

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
