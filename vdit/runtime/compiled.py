"""Compiled programs kept between processes: JAX's compilation cache, in a folder of the user's."""

import contextlib
import functools
import hashlib
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib

NAME = "JAX_COMPILATION_CACHE_DIR"
SHORTEST = 0.1  # seconds that a program took to compile, to be kept
MOST = 4 * 2**30  # bytes; of more, what was not used for longest goes


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Model and flags of this CPU: programs for one with other instructions may not run here."""
    with contextlib.suppress(OSError):
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
        kinds = ("model name", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in text.splitlines() if line.startswith(kinds)}))
    return ""


def folder() -> Path:
    """Where this user's programs for this processor are kept: below $XDG_CACHE_HOME, or ~/.cache.

    Raises `RuntimeError` where there is no home.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    machine = f"{processor()} {os.environ.get('XLA_FLAGS', '')}"
    key = f"{jaxlib.__version__}-{hashlib.sha256(machine.encode()).hexdigest()[:12]}"
    return base / "vdit" / "compiled" / key


def keep() -> Path | None:
    """Keeps what this process compiles, and takes what others have; returns where.

    None where the user has chosen (JAX_COMPILATION_CACHE_DIR, also empty), or nothing can be
    written.
    """
    if NAME in os.environ or getattr(jax.config, "jax_compilation_cache_dir", None):
        return None
    with contextlib.suppress(OSError, RuntimeError):
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        prune(place.parent)
        if not os.access(place, os.W_OK):
            return None
        jax.config.update("jax_compilation_cache_dir", str(place))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
        warnings.showwarning = functools.partial(mend, place, warnings.showwarning)
        return place
    return None


# JAX's warning of a program that was cut short: its process was killed, or the disk was full.
DAMAGED = re.compile(r"Error \w+ persistent compilation cache entry for '([\w.-]+)'")


def mend(place: Path, shown: Callable[..., None], message: Warning | str, *others: Any) -> None:
    """Deletes a damaged program in place of warning of it. JAX would neither take nor replace it;
    now it compiles it and writes it anew."""
    if found := DAMAGED.search(str(message)):
        for path in place.glob(f"{found[1]}-*"):
            path.unlink(missing_ok=True)
    else:
        shown(message, *others)


def prune(place: Path, most: int = MOST) -> None:
    """Deletes what was not used for longest, beyond `most` bytes, and empty files: JAX, which was
    killed before it wrote them, would never replace them."""
    files = [(path, path.stat()) for path in place.rglob("*") if path.is_file()]
    room = most
    for path, status in sorted(files, key=lambda f: max(f[1].st_atime, f[1].st_mtime))[::-1]:
        room -= status.st_size
        if room < 0 or not status.st_size:
            path.unlink(missing_ok=True)
