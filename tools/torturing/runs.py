"""Small runs of the program in processes that are watched, and the comparison of their workdirs."""

import contextlib
import importlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib.version
import numpy as np

from vdit import main
from vdit import run as run
from vdit.config.command import leave
from vdit.errors import SIGNALS, UserError, stop
from vdit.runtime import checkpoint, metrics

from ..flags import read_mesh
from . import small as small  # imported before anything is forked

ROOT = Path(__file__).parents[2]
LIMIT = 1800.0  # seconds for one process; generous, because the machine may be busy
STAGES = ("vae", "latents", "dit", "sample", "eval")
CONFIG = "tools/torturing/small.py"
# What the program imports where it is first used: a fork has it.
LAZY = (
    "av", "grain.checkpoint", "jinja2", "matplotlib.figure", "matplotlib.style", "scipy.ndimage",
    "matplotlib.backends.backend_svg", "matplotlib.backends.backend_agg", "vdit.worlds.clips",
    "tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer",
)  # fmt: skip
# Of a row of metrics, what no two runs have alike.
TIMES = ("steps_per_second", "teraflops_per_second", "mfu", "wait", "seconds")
# Of a workdir, what is compared otherwise, or differs by times and the names of processes.
APART = ("checkpoints", "tensorboard", ".processes", "metrics.jsonl", "report.html", ".lock")
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, jaxlib.version.__version__.split(".")[:2])) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # programs compile faster; gone in later ones


class Layout(NamedTuple):
    """How many processes of how many fake devices each, and the mesh that they form."""

    processes: int
    devices: int
    mesh: str

    def __str__(self) -> str:
        return f"{self.processes}x{self.devices}" + (f",{self.mesh}" if self.mesh else "")


def layout_of(text: str) -> Layout:
    """PROCESSESxDEVICES[,AXIS:SIZE,...], as 2x2,fsdp:4. Raises `UserError`."""
    size, _, mesh = text.partition(",")
    if not (match := re.fullmatch(r"([1-9])x([1-9]\d?)", size)):
        raise UserError(f"--layout={text}: PROCESSESxDEVICES[,AXIS:SIZE,...] is allowed")
    if mesh:
        read_mesh(mesh)
    return Layout(int(match[1]), int(match[2]), mesh)


class Life:
    """One start of the command, in all its processes, until it ends or is ended.

    With `program`, what python runs, each process is a new interpreter; without it a fork of this
    one, which has imported all and has no JAX backend: a start costs no imports, and `prepare` is
    called in it first. What the processes print is in files in `logs`, or beside the workdir.
    """

    def __init__(
        self, workdir: Path, layout: Layout, arguments: Sequence[str] = (),
        program: Sequence[str] = (), env: Mapping[str, str] = {},
        prepare: Callable[[], None] = lambda: None, logs: Path | None = None,
    ) -> None:  # fmt: skip
        self.workdir, self.layout, self._logs = workdir, layout, logs or workdir.parent
        self.processes: list[Any] = []
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._held.bind(("", 0))  # gRPC may share it, and no other program is given it
        workdir.parent.mkdir(parents=True, exist_ok=True)
        devices = f"--xla_force_host_platform_device_count={layout.devices}"
        known = {
            "XLA_FLAGS": f"{QUICK} {devices}",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        } | dict(env)
        for index in range(layout.processes):
            mine = list(arguments)
            if layout.processes > 1:
                mine.append(f"--coordinator=127.0.0.1:{self._held.getsockname()[1]}")
                mine += [f"--processes={layout.processes}", f"--process={index}"]
            files = self._file("out", index), self._file("err", index)
            for file in files:
                file.write_bytes(b"")
            if program:
                self.processes.append(_executed([*program, *mine], known, files))
            else:
                self.processes.append(_forked(mine, known, files, prepare))

    def _file(self, kind: str, index: int) -> Path:
        return self._logs / f"{self.workdir.name}.{kind}{index}"

    def out(self, index: int = 0) -> str:
        """What a process has printed."""
        return self._file("out", index).read_text(encoding="utf-8", errors="replace")

    def err(self, index: int = 0) -> str:
        """What a process has printed to standard error."""
        return self._file("err", index).read_text(encoding="utf-8", errors="replace")

    def working(self) -> bool:
        """Whether it has said what it will do: imports are over."""
        return f"{self.workdir}: " in self.out()

    def place(self) -> str:
        """The stage that it is in, "start" before the first and "end" behind the last."""
        if not self.working():
            return "start"
        done = [name for name in STAGES if f"\n{name}: done" in self.out()]
        return (*STAGES, "end")[len(done)]

    def ended(self) -> bool:
        """Whether all processes have."""
        return all(_status(process) is not None for process in self.processes)

    def until(self, reached: Any, seconds: float = LIMIT) -> bool:
        """Waits until `reached()`, or the end of all processes; whether it was reached."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if reached():
                return True
            if self.ended():
                return False
            time.sleep(0.02)
        return False

    def send(self, number: int, index: int | None = None) -> None:
        """Sends a signal to all processes, or to one."""
        for process in self.processes if index is None else [self.processes[index]]:
            if _status(process) is None:
                os.kill(process.pid, number)

    def statuses(self) -> list[int]:
        """Waits for the end; exit statuses, negative for a signal. Raises `TimeoutError`."""
        if not self.until(self.ended):
            raise TimeoutError(f"it does not end: {self.out()[-300:]} {self.err()[-300:]}")
        return [int(_status(process) or 0) for process in self.processes]

    def close(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            if _status(process) is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait() if isinstance(process, subprocess.Popen) else process.join()
        self._held.close()


Files = tuple[Path, Path]  # for standard output and standard error


def _executed(command: list[str], env: Mapping[str, str], files: Files) -> Any:
    paths = [env.get("PYTHONPATH"), str(ROOT), os.environ.get("PYTHONPATH")]
    known = os.environ | dict(env) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with files[0].open("wb") as out, files[1].open("wb") as err:
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=known, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip


def _forked(
    command: list[str], env: Mapping[str, str], files: Files, prepare: Callable[[], None]
) -> Any:
    for name in LAZY:
        importlib.import_module(name)
    process = multiprocessing.get_context("fork").Process(
        target=_born, args=(command, dict(env), files, prepare)
    )
    process.start()
    return process


def _born(
    command: list[str], env: dict[str, str], files: Files, prepare: Callable[[], None]
) -> None:
    """In a fork: the program, as if it had just been started."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, stop)
    os.setsid()
    os.chdir(ROOT)
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    os.environ.update(env)
    for name in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):
        jax.config.update(name.lower(), env[name])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    prepare()
    leave(main.main(["vdit", *command]))


def _status(process: Any) -> int | None:
    """Of a process that has ended."""
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def apart(function: Any, *arguments: Any) -> Any:
    """function(*arguments), JSON, by a fork: JAX starts its threads there."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(function(*arguments)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise AssertionError(f"{function.__name__} failed") from None
    finally:
        process.join()


def arguments(workdir: Path, layout: Layout, changes: Mapping[str, Any] = {}) -> list[str]:
    """The flags of a small run of all stages."""
    mesh = read_mesh(layout.mesh) if layout.mesh else {}
    fields = {f"mesh.{axis}": size for axis, size in mesh.items()} | dict(changes)
    made = [f"--config.{name}={value}" for name, value in fields.items()]
    return [f"--config={CONFIG}", f"--workdir={workdir}", *made]


def finish(life: Life) -> None:
    """Waits for a life that nothing disturbs. Raises AssertionError where it fails."""
    statuses = life.statuses()
    if any(statuses):
        said = " | ".join(life.err(i) for i in range(len(statuses)))
        raise AssertionError(f"statuses {statuses}: {said[-2000:]}")


def unfinished(workdir: Path) -> set[Path]:
    """Files and folders that are being written, or were when their process ended."""
    found = set()
    for path in workdir.rglob("*"):
        step = path.name.isdecimal() and path.parent.parent.name == "checkpoints"
        if ".tmp" in path.name or ".orbax-checkpoint-tmp" in path.name:
            found.add(path)
        elif step and not (path / checkpoint.DIGESTS).exists():
            found.add(path)
    return found


# --------------------------------------------------------------------------------------------------
# Comparison


def differences(whole: Path, other: Path) -> list[str]:
    """What differs between two workdirs beside times, a line each."""
    found = _files(whole, other) + _metrics(whole, other)
    for stage in ("vae", "dit"):
        steps = [checkpoint.all_steps(path / "checkpoints" / stage) for path in (whole, other)]
        if steps[0] != steps[1]:
            found.append(f"checkpoints/{stage}: steps {steps[0]} and {steps[1]}")
        for step in set(steps[0]) & set(steps[1]):
            found += _arrays(whole / "checkpoints" / stage, other / "checkpoints" / stage, step)
    left = unfinished(other)
    return found + [f"{path.relative_to(other)} is left" for path in sorted(left)]


def _files(whole: Path, other: Path) -> list[str]:
    def listed(workdir: Path) -> dict[str, bytes]:
        files = [p for p in workdir.rglob("*") if p.is_file()]
        names = {path.relative_to(workdir): path for path in files}
        return {
            name.as_posix(): path.read_bytes()
            for name, path in names.items()
            if name.parts[0] not in APART and ".tmp" not in path.name
        }

    a, b = listed(whole), listed(other)
    missing = [f"{name} is in one alone" for name in sorted(a.keys() ^ b.keys())]
    return missing + [f"{n} differs" for n in sorted(a.keys() & b.keys()) if a[n] != b[n]]


def _metrics(whole: Path, other: Path) -> list[str]:
    def rows(workdir: Path) -> list[dict[str, Any]]:
        kept = [row for row in metrics.read(workdir) if row["stage"] != "run"]
        return [{k: v for k, v in row.items() if k not in TIMES} for row in kept]

    a, b = rows(whole), rows(other)
    same = len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))
    return [] if same else [f"metrics.jsonl: {len(a)} and {len(b)} rows, which differ"]


def _arrays(whole: Path, other: Path, step: int) -> list[str]:
    if wrong := checkpoint.damage(other, step):
        return [f"{other.name}/{step}: {wrong}"]
    if checkpoint.load_meta(whole, step) != checkpoint.load_meta(other, step):
        return [f"{other.name}/{step}: other metadata"]
    found = []
    for read in (checkpoint.restore_state, checkpoint.restore_ema):
        trees = [jax.tree.leaves_with_path(read(folder, step)) for folder in (whole, other)]
        for (path, a), (_, b) in zip(*trees, strict=True):
            if np.asarray(a).tobytes() != np.asarray(b).tobytes():
                found.append(f"{other.name}/{step}{jax.tree_util.keystr(path)} differs")
    positions = {
        next((folder / str(step) / "iterator").glob("process_*.json")).read_bytes()
        for folder in (whole, other)
    }
    return found + [f"{other.name}/{step}: another position in the data"] * (len(positions) - 1)
