"""Several processes that run as one program: how they connect, wait, and end together.

`jax.distributed` connects them, and aborts all of them, from C++, when one is lost. So the program
runs in a child of a process that only waits (`supervised`), and the parent prints which process it
was. It reads that from a folder in the shared workdir (`Board`), where the child's `Watch` records
its progress and where each process records why it ended.

`supervised` forks before JAX has a backend.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from vdit.errors import SIGNALS, UserError, stop
from vdit.runtime.files import appears, write_text

GRACE = 3.0  # seconds for a process to print its own error after another one has failed
FAREWELL = 30.0  # seconds for the others to end before process 0, which coordinates, does
STUCK = "made no step for"  # marks the verdict on a stuck process
REFUSED = "refused what it was given: "  # marks the verdict on bad input


class Member(NamedTuple):
    """Which of how many processes this is; None where JAX detects it."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def member(
    coordinator: str | None, count: int | None, index: int | None, env: Mapping[str, str]
) -> Member | None:
    """From the flags, or the environment; None for a single process. Raises `UserError` for flags
    that are incomplete or wrong."""
    if coordinator is None and count is None and index is None:
        return Member() if several(env) else None
    if count == 1 and coordinator is None and index in (None, 0):
        return None
    if coordinator is None or count is None or index is None:
        raise UserError(
            f"--coordinator={coordinator} --processes={count} --process={index}: give all three,"
            " the same coordinator (HOST:PORT, where process 0 runs) to each process, or none"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: HOST:PORT is expected, as 10.0.0.2:8476")
    if count < 1 or not 0 <= index < count:
        raise UserError(f"--process={index} --processes={count}: 0 to --processes - 1 is allowed")
    return Member(coordinator, count, index)


def several(env: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether this is one of several processes that `jax.distributed` detects by itself.

    By the task counts of Slurm and Open MPI; on TPUs by a pod's environment (GKE), or by a TPU
    device, whose machine's metadata JAX reads (TPU VMs).
    """
    if int(env.get("SLURM_NTASKS", 1)) > 1 and {"SLURM_STEP_NODELIST", "SLURM_PROCID"} <= set(env):
        return True
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    if "tpu" not in (env.get("JAX_PLATFORMS") or "tpu"):
        return False
    workers = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", ""))
    if "," in workers or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return True
    alone = workers != "" or "TPU_SKIP_MDS_QUERY" in env
    return not alone and ((devices / "accel0").exists() or (devices / "vfio" / "0").exists())


def connect(who: Member, lost: float) -> None:
    """Connects this process with the others, before anything touches a device.

    From then on JAX aborts all of them when one has been silent for `lost` seconds.
    """
    options: dict[str, Any] = {"heartbeat_timeout_seconds": max(1, round(lost))}
    if who.processes is not None:
        options |= {
            "coordinator_address": who.coordinator, "num_processes": who.processes,
            "process_id": who.process, "cluster_detection_method": "deactivate",
        }  # fmt: skip
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        if who.processes is None and "coordinator_address" in str(error):
            return  # a single machine after all
        raise
    except (RuntimeError, OSError, ImportError) as error:
        if who.processes is None:
            where = "the other processes cannot be found (--processes=1: there are none)"
        else:
            where = f"process {who.process} of {who.processes}, coordinator {who.coordinator}"
        raise UserError(f"{where}: {error}") from error
    print(f"{_name()}: {jax.local_device_count()} of {jax.device_count()} devices", flush=True)
    if jax.process_index() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  process 0 prints the rest


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()} ({socket.gethostname()})"


def disconnect() -> None:
    """Ends what `connect` began, in all processes together."""
    jax.distributed.shutdown()
    while _BOARD:
        _BOARD.pop().remove()


def check() -> None:
    """Refuses devices of several processes that are not connected (--processes=1 on a pod)."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"the devices are those of {jax.process_count()} processes, which are not connected:"
            " leave --processes out, or give --coordinator, --processes and --process"
        )


def together(what: str) -> None:
    """A barrier; every process passes the same names in the same order."""
    multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def zero_first(what: str) -> Iterator[None]:
    """Process 0 goes through the body alone, then all others do: they find its files."""
    if jax.process_index() != 0:
        together(what)
    yield
    if jax.process_index() == 0:
        together(what)


@contextlib.contextmanager
def zero_alone(what: str) -> Iterator[bool]:
    """Whether this is process 0, for what it does alone; the others wait for it at the end."""
    yield jax.process_index() == 0
    together(what)


def agreed(value: int) -> int:
    """Process 0's value, in all of them: they may see a shared folder at different times."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def refuse_unshared(file: Path) -> None:
    """In all processes, refuses a workdir in which one of them does not see process 0's `file`."""
    seen = multihost_utils.process_allgather(np.int32(appears(file)))
    if not seen.all():
        raise UserError(
            f"{file.parent} of process {seen.argmin()} is not that of process 0: the workdir must"
            " be a folder that all processes share"
        )


def newest_checkpoint(workdir: Path) -> str:
    """What to say of the checkpoint that was finished last, of any stage."""
    there = list((workdir / "checkpoints").glob("*/*/digests.json"))
    if not there:
        return f"no checkpoint is saved in {workdir}"
    return f"the newest checkpoint is {max(there, key=lambda path: path.stat().st_mtime).parent}"


# --------------------------------------------------------------------------------------------------
# Progress, and why a run ended


class Board(NamedTuple):
    """Files by which the processes of one run, and their parents, know of each other.

    `sign-I` holds the name and the progress of process I, rewritten every `period` seconds, and
    `verdict-I` why it ended. In a workdir that cannot be written there are none, and JAX alone ends
    the others.
    """

    folder: str
    process: int
    processes: int
    name: str
    lost: float

    @property
    def period(self) -> float:
        return _period(self.lost)

    def write(self, kind: str, text: str) -> None:
        with contextlib.suppress(UserError):
            write_text(Path(self.folder) / f"{kind}-{self.process}", text)

    def read(self, kind: str) -> dict[int, tuple[float, str]]:
        """Process -> when it wrote, by the file system's clock, and what."""
        found: dict[int, tuple[float, str]] = {}
        for path in Path(self.folder).glob(f"{kind}-*"):
            with contextlib.suppress(OSError), path.open() as file:
                # Of an opened file NFS does not give an old time.
                written = os.fstat(file.fileno()).st_mtime
                found[int(path.name.rpartition("-")[2])] = written, file.read()
        return found

    def verdict(self) -> str | None:
        """The first one, if there is any."""
        return min(self.read("verdict").values(), default=(0.0, None))[1]

    def wait(self, kind: str, count: int) -> bool:
        """Waits for `count` files of a kind, not for ever; whether they are there."""
        until = time.monotonic() + FAREWELL
        while not (there := len(self.read(kind)) == count) and time.monotonic() < until:
            time.sleep(0.1)
        return there

    def part(self, verdict: str) -> None:
        """This process is at its end."""
        if self.process not in self.read("verdict"):
            self.write("verdict", verdict)
        with contextlib.suppress(OSError):
            Path(self.folder, f"sign-{self.process}").unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the files, and a workdir that holds nothing else."""
        if self.process == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in list(Path(self.folder).parents)[:2]:
                    folder.rmdir()


def _period(limit: float) -> float:
    """Seconds between two looks at what has to happen within `limit` seconds."""
    return max(0.05, min(5.0, limit / 12))


def _say(verdict: str, workdir: Path) -> int:
    """Prints a verdict and returns the exit status."""
    refused = REFUSED in verdict
    more = "" if refused else f"; {newest_checkpoint(workdir)}; run again"
    print(f"vdit: {verdict}{more}", file=sys.stderr, flush=True)
    return 2 if refused else 1


class Watch:
    """Ends this process when another one has failed, and when it makes no step itself.

    After `stuck` seconds (0: never) without a step it prints the stacks of all threads. The verdict
    on the run, its own or another's, is printed with the newest checkpoint of `workdir`, and the
    exit status is 1; for refused input the line stands alone, and the status is 2.
    """

    def __init__(self, workdir: Path = Path(), lost: float = 60.0, stuck: float = 0.0) -> None:
        self._workdir, self._lost, self._stuck = workdir, lost, stuck
        self._name = "this process"
        self._place, self._patience = "", 0.0  # current step, and seconds allowed; 0: no limit
        self._at, self._still = "", 0.0  # step at the last look, and seconds since it changed
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._board: Board | None = None

    def __enter__(self) -> "Watch":
        if jax.process_count() > 1:
            self._name, folder = _name(), self._workdir.absolute() / ".processes"
            index, count = jax.process_index(), jax.process_count()
            for old in folder.glob("*") if index == 0 else ():  # of runs that were killed
                if time.time() - old.stat().st_mtime > 3600:
                    shutil.rmtree(old, ignore_errors=True)
            run = agreed(int.from_bytes(os.urandom(3), "big"))
            self._board = Board(str(folder / f"{run}"), index, count, self._name, self._lost)
            _BOARD.append(self._board)
            _tell_parent(board=self._board)
        if self._board is not None or self._stuck:
            self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def step(self, stage: str, step: int, first: bool = False) -> None:
        """A step begins. The next one, or `rest`, is due within `stuck` seconds; within ten times
        as many after the first step, which compiles."""
        self._place, self._patience = f"stage {stage}, step {step}", self._stuck * (1 + 9 * first)

    def rest(self) -> None:
        """No step is due for now."""
        self._patience = 0.0

    def failed(self, error: Exception) -> None:
        """This process is about to end by an error; its verdict is one line."""
        self._end.set()
        if self._board is not None:
            how = REFUSED if isinstance(error, UserError) else f"ended by {type(error).__name__}: "
            line = f"{self._name} {how}{' '.join(str(error).split())[:500]}"
            self._board.write("verdict", line)

    def wait(self) -> None:
        """After an error that another process may have caused: time for its verdict."""
        if self._board is not None:
            self.rest()
            time.sleep(2 * self._lost + self._board.period + GRACE)

    def _loop(self) -> None:
        # Time is counted in rounds of this loop: a machine that slept, or a process that was
        # stopped and goes on, has not been stuck.
        period = min(_period(limit) for limit in (self._lost, self._stuck) if limit)
        while not self._end.is_set():
            if self._stuck and self._board is not None:
                # Also ends a process that never releases the interpreter's lock.
                faulthandler.dump_traceback_later(10 * self._stuck + 60, exit=True)
            patience = self._patience
            same = patience > 0 and self._place == self._at
            self._at, self._still = self._place, self._still + period if same else 0.0
            if self._still > patience > 0:
                line = f"{self._name} {STUCK} {patience:g} s: {self._place}{self._behind()}"
                self._give_up(line, mine=True)
            if self._board is not None:
                self._board.write("sign", f"{self._name};{self._place}")
                verdict = self._board.verdict()
                if verdict is not None:
                    self._give_up(verdict)
            self._end.wait(period)

    def _behind(self) -> str:
        """Names the processes that have begun fewer steps than this one."""
        signs = self._board.read("sign").values() if self._board is not None else ()
        mine, _, step = self._place.rpartition(" ")
        others = []
        for name, _, place in (text.partition(";") for _, text in signs):
            stage, _, other = place.rpartition(" ")
            if stage == mine and int(other) < int(step):
                others.append(f"; {name} is behind: {place}")
        return "".join(others[:3])

    def _give_up(self, verdict: str, mine: bool = False) -> None:
        if STUCK in verdict:
            print(f"vdit: {self._name}, {self._place}; its threads:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self._board is not None:
            self._board.write("verdict", verdict)
            if mine:
                self._board.wait("verdict", self._board.processes)  # all have shown their stacks
            elif self._end.wait(GRACE):
                return  # this process has an error of its own to print
        leave(_say(verdict, self._workdir))


# --------------------------------------------------------------------------------------------------
# Parent and child

_PARENT: list[int] = []  # the pipe to the process that waits for this one, if one does
_BOARD: list[Board] = []  # of this process, if it is one of several


def _tell_parent(**what: Any) -> None:
    if _PARENT:
        os.write(_PARENT[0], json.dumps(what).encode() + b"\n")


def leave(status: int) -> None:
    """Ends this process, after what it has printed; its parent, if any, adds nothing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    _tell_parent(status=status)
    for board in _BOARD:
        board.part(f"{board.name} ended with status {status}")
        if board.process == 0 and board.wait("sign", 0):  # with its end JAX aborts the others
            board.remove()
    os._exit(status)


def supervised(work: Callable[[], int], workdir: Path) -> int:
    """Runs `work` in a child process, hands signals on, and returns its exit status.

    Of a child that was killed, or that JAX aborted, it says so in one line, with the newest
    checkpoint. The child hears of each signal by SIGINT, and is killed after the second. It dies
    with its parent.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.setpgid(0, 0)  # Ctrl-C comes by the parent, once
        with contextlib.suppress(OSError, AttributeError):  # Linux's PR_SET_PDEATHSIG
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        _PARENT.append(write)
        for number in SIGNALS:
            signal.signal(number, stop)
        try:
            leave(work())
        except BaseException:  # never on into what is the parent's
            traceback.print_exc()
            leave(1)
    os.close(write)
    heard: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGINT if len(heard) < 3 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    _, code = os.waitpid(child, 0)
    os.set_blocking(read, False)  # whoever the child started may hold the other end
    known: dict[str, Any] = {}
    with contextlib.suppress(BlockingIOError):
        for line in os.read(read, 2**16).splitlines():
            known |= json.loads(line)
    status = known.get("status", os.waitstatus_to_exitcode(code))
    if heard and status == 128 + signal.SIGINT:  # as the child hears of each
        return 128 + heard[0]
    if "status" in known:
        return status
    how = f"ended with status {status}"
    if status < 0:
        how = f"was ended by {signal.Signals(-status).name}"
    status = 128 - status if status < 0 else status or 1
    if "board" not in known:
        print(f"vdit: this process {how}; {newest_checkpoint(workdir)}", file=sys.stderr)
        return status
    board = Board(*known["board"])
    verdict = _why(board, f"{board.name} {how}", status in (1, 128 + signal.SIGABRT))
    said = _say(verdict, workdir)
    board.part(verdict)
    return status if how in verdict else said


def _why(board: Board, ended: str, by_jax: bool) -> str:
    """The verdict on a child that gave none; JAX may have aborted it because of another."""
    until = time.monotonic() + (3 * board.period + GRACE if by_jax else 0)
    while (verdict := board.verdict()) is None and time.monotonic() < until:
        time.sleep(0.1)
    if verdict is not None or not by_jax:
        return verdict or ended
    signs = board.read("sign")
    newest = max((written for written, _ in signs.values()), default=0.0)
    silent = [i for i, (written, _) in signs.items() if newest - written > 2.5 * board.period]
    if silent and board.process not in silent:
        name, _, place = signs[silent[0]][1].partition(";")
        last = f" (last known: {place})" if place else ""
        return f"{name} gave no sign of life for {board.lost:g} s{last}"
    if not silent and board.process != 0:  # all stopped at one time
        name = signs[0][1].partition(";")[0] if 0 in signs else f"process 0 of {board.processes}"
        return f"{name}, which coordinates, is gone; {ended}"
    return ended
