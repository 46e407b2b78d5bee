"""Test settings: eight fake CPU devices, strict rank promotion, a shared compilation cache."""

import atexit
import contextlib
import ctypes
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from cheap import FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Shared by the workers and by the programs that tests start: resumed runs, and tests of one
    # configuration, compile the same steps.
    CACHE = tempfile.mkdtemp(prefix="vdit-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
# Flags of the environment come last and win.
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count=8 {given}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from vdit.runtime import machine  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def memory(request: Any) -> Iterator[None]:
    """Frees what a file's tests compiled: hundreds of executables, up to a gigabyte.

    The next file compiles little of it again, and reads that from the compilation cache. glibc
    keeps freed memory until it is asked; `vdit.main` has it keep more, as suits a single run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "keep_freed_memory", lambda: True)
        yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


# The longest files run first, so that no worker ends with one of them while the other idles.
LONG = (
    "test_road.py", "test_mesh_models.py", "test_style.py",
    "test_processes_road.py", "test_shots_road.py", "test_paper_road.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """The files of `LONG`, then the others in their order (`--no-loadscope-reorder` keeps it)."""
    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONG)))


# --------------------------------------------------------------------------------------------------
# Comparison with other implementations: `pytest -m reference` ends with a table of differences


@pytest.fixture
def near(record_property: Any) -> Callable[..., None]:
    """near(name, got, want, most=2e-5) bounds the largest difference, relative to the largest
    absolute value of `want`, and records it for the table."""

    def check(name: str, got: Any, want: Any, most: float = 2e-5) -> None:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape
        difference = float(np.abs(got - want).max() / np.abs(want).max())
        record_property("difference", (name, difference, most))
        assert difference < most

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table: largest relative difference, its bound, and the name."""
    rows = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, value in report.user_properties
        if name == "difference" and report.when == "call"
    ]
    if rows:
        terminalreporter.section("largest relative differences")
    for name, difference, most in sorted(rows):
        terminalreporter.write_line(f"{difference:.1e} of {most:.0e} allowed: {name}")
