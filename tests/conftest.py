"""Test settings: eight fake CPU devices, strict rank promotion, one compilation cache."""

import atexit
import os
import shutil
import tempfile
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers and the programs that tests start inherit it: runs that stop and go on, and tests of
    # one road, compile the same steps again and again.
    CACHE = tempfile.mkdtemp(prefix="vdit-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# What takes longest begins first, so that no worker is left alone with it at the end.
LONG = (
    "test_road.py", "test_notebook.py", "test_shots_road.py", "test_paper_road.py",
    "test_processes_road.py", "test_mesh_models.py", "test_style.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """The files of `LONG`, then the others in their order (`--no-loadscope-reorder` keeps it)."""
    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONG)))
