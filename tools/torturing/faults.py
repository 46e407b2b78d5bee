"""Faults below the program: a disk that is full, read-only, slow or failing, a clock that jumps.

A run meets the faults of a chain one after another. After each it must end with status 2 and one
line, and go on by the same command where the fault is gone; at the end it must be equal to the bit
to a run that met none.
"""

import contextlib
import ctypes
import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .runs import Layout, Life, apart, arguments, differences, finish

ALONE = Layout(1, 1, "")
SIZE = 64  # MB of the disk that is filled


class Fault(NamedTuple):
    """`prepare(workdir)` is called in the process, `meet(life)` beside it."""

    name: str
    prepare: Callable[[Path], None] = lambda workdir: None
    meet: Callable[[Life], None] = lambda life: None
    said: str = "cannot (write|save checkpoint|read or write) "  # in its line; "": it goes on


def _failing(pattern: str, number: int = errno.EIO) -> Fault:
    """Opening for writing, or renaming to, a path that matches fails."""

    def prepare(workdir: Path) -> None:
        def hook(event: str, given: tuple[Any, ...]) -> None:
            if event not in ("open", "os.rename", "os.mkdir"):
                return
            if event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR):
                return
            path = str(given[1 if event == "os.rename" else 0])
            if path.startswith(str(workdir)) and re.search(pattern, path):
                raise OSError(number, os.strerror(number), path)

        sys.addaudithook(hook)

    return Fault(f"{errno.errorcode[number]} at {pattern}", prepare)


def _read_only(name: str) -> Fault:
    """A folder of the workdir lies on a disk that is mounted read-only, for this process alone."""

    def prepare(workdir: Path) -> None:
        folder = workdir / name
        folder.mkdir(parents=True, exist_ok=True)
        if ctypes.CDLL(None, use_errno=True).unshare(0x20000):  # CLONE_NEWNS
            raise OSError(ctypes.get_errno(), "unshare")
        for options in (("--make-rprivate", "/"), ("--bind", folder, folder)):
            subprocess.run(["mount", *options], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)

    return Fault(f"read-only {name or 'workdir'}", prepare)


def _small(limit: int) -> Fault:
    """No file may grow over `limit` bytes (EFBIG)."""
    limits = limit, resource.RLIM_INFINITY
    return Fault(
        f"files of at most {limit} bytes",
        lambda workdir: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )


def _full(place: str) -> Fault:
    """The disk is filled when the run has come to a stage."""

    def meet(life: Life) -> None:
        life.until(lambda: life.place() == place)
        with contextlib.suppress(OSError), _filler(life).open("wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"\0" * size):
                        pass

    return Fault(f"full disk at {place}", meet=meet)


def _filler(life: Life) -> Path:
    return life.workdir.parent / "filler"


def _slow(workdir: Path) -> None:
    """Each file takes its time."""

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove") and str(given[0]).startswith(str(workdir)):
            time.sleep(0.05)

    sys.addaudithook(hook)


def _jumping(workdir: Path) -> None:
    """time.time() goes forth and back by hours."""
    true, calls = time.time, iter(range(10**12))
    time.time = lambda: true() + 7200.0 * ((next(calls) * 7919) % 5 - 2)


CHAINS: dict[str, list[Fault]] = {
    "full": [_full(place) for place in ("vae", "latents", "dit", "sample", "eval")],
    "read-only": [
        _read_only(name)
        for name in ("", "checkpoints/vae", "tensorboard", "latents", "checkpoints/dit", "samples")
    ],
    "failing": [
        _failing(name)  # in the order of a run: each life comes to the next one
        for name in (
            r"/\.lock$", "tokenizer", r"captions\.json$", r"config\.json$", r"metrics\.jsonl$",
            "tfevents", r"vae/\d+$", "digests", r"latents/.*array_record$", r"array_record\.json$",
            "manifest", r"dit/\d+$", r"samples/.*mp4$", r"samples/.*webp$", r"samples/.*json$",
            "sheet", "wall", "reconstructions", r"loss\.png$", r"report\.html$",
        )
    ],
    "small": [_small(512), _small(4096)],
    "slow": [Fault("slow disk", _slow, said="")],
    "clock": [Fault("clock that jumps", _jumping, said="")],
}  # fmt: skip
MOUNTS = ("full", "read-only")  # need root


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def meet(fault: Fault, workdir: Path, logs: Path) -> str:
    """Starts the command, which meets the fault: what is wrong with how it ends, or ""."""
    flags = arguments(workdir, ALONE)
    life = Life(workdir, ALONE, flags, prepare=lambda: fault.prepare(workdir), logs=logs)
    try:
        fault.meet(life)
        (status,) = life.statuses()
        err = life.err()
    finally:
        _filler(life).unlink(missing_ok=True)
        life.close()
    lines = [line for line in err.splitlines() if not line.startswith("WARNING:vdit:")]
    if not fault.said:
        return "" if status == 0 and not lines else f"status {status}: {err[-1000:]}"
    good = status == 2 and len(lines) == 1 and re.match(f"vdit: {fault.said}", lines[0])
    return "" if good else f"status {status}: {err[-1000:]}"


def chain(name: str, whole: Path, folder: Path, say: Callable[[str], None]) -> list[str]:
    """A run through a chain of faults; a line for each that it does not end as it should."""
    wrong = []
    with disk(folder / name) if name in MOUNTS else contextlib.nullcontext(folder / name) as place:
        workdir = Path(place) / "run"
        for fault in CHAINS[name]:
            how = meet(fault, workdir, folder)  # whose disk is not full
            wrong += [f"{fault.name}: {how}"] if how else []
            good = "one line, status 2" if fault.said else "goes on"
            say(f"{fault.name}: {how or good}")
        finish(Life(workdir, ALONE, arguments(workdir, ALONE), logs=folder))
        wrong += [f"{name}: {line}" for line in apart(differences, whole, workdir)]
        say(f"{name}: {'equal to the bit' if not wrong else '; '.join(wrong)}")
    if not wrong:
        shutil.rmtree(folder / name, ignore_errors=True)
    return wrong
