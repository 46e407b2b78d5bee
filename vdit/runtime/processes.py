"""Several processes that are one program: how they find each other, wait, and end together.

`jax.distributed` connects them by a coordination service that lives in process 0. `Watch` keeps
signs of life there, so that a process that is gone, or makes no step any more, ends all of them
with a line that names it. Where process 0 itself is gone, JAX aborts the others from C++; so the
program runs in a child of a process that only waits (`supervised`), and that one has the last word.

JAX is imported late: `supervised` forks before it is.
"""

import contextlib
import ctypes
import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from vdit.errors import UserError

FOREVER = 7 * 24 * 3600  # seconds; who waits at a barrier is ended by the watch, not by this
GRACE = 3.0  # seconds that a process has to say its own word when another one has failed
KEYS = "vdit/processes"  # folder of the keys in the coordination service
STUCK = "made no step for"  # in verdicts of that kind
REFUSED = "refused what it was given: "


class Told(NamedTuple):
    """Which of how many processes this is; None where JAX finds it out."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def told(
    coordinator: str | None, count: int | None, index: int | None, env: Mapping[str, str]
) -> Told | None:
    """What flags and environment say; None is one process. Raises `UserError` for half of it."""
    if coordinator is None and count is None and index is None:
        return Told() if several(env) else None
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
    return Told(coordinator, count, index)


def several(env: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether this looks like one of several processes that `jax.distributed` finds by itself.

    Slurm's and Open MPI's task counts, and a TPU: a pod's workers know each other by environment
    (GKE) or by the machine's metadata (TPU VMs), which JAX asks.
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


def connect(who: Told, lost: float) -> None:
    """Connects this process with the others; before anything touches a device.

    JAX's own limit for a silent process is far above `lost`, so that the watch speaks first.
    """
    import jax

    options: dict[str, Any] = {"heartbeat_timeout_seconds": int(20 * lost) + 60}
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
    index, count = jax.process_index(), jax.process_count()
    _tell_parent(index=index, count=count, at=_state().coordinator_address)
    devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
    print(f"process {index} of {count} ({socket.gethostname()}): {devices}", flush=True)
    if index != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what follows is said by process 0


def disconnect() -> None:
    """The end of what `connect` began, of all processes together."""
    import jax

    if _client() is not None:
        jax.distributed.shutdown()


def check() -> None:
    """Refuses devices of several processes that no `connect` connected (a pod told to be one)."""
    import jax

    if jax.process_count() > 1 and _client() is None:
        raise UserError(
            f"the devices are those of {jax.process_count()} processes, which are not connected:"
            " leave --processes out, or give --coordinator, --processes and --process"
        )


def _state() -> Any:
    from jax._src import distributed  # its key-value store has no public name yet

    return distributed.global_state


def _client() -> Any:
    return _state().client


_NUMBERS = itertools.count()  # of barriers; every process passes the same ones in the same order


def together(what: str) -> None:
    """Waits until every process is here. `what` is for the logs of JAX."""
    import jax

    if jax.process_count() > 1:
        name = f"{KEYS}/{next(_NUMBERS)}/{what}"
        _client().wait_at_barrier(name, timeout_in_ms=FOREVER * 1000)


@contextlib.contextmanager
def zero_first(what: str) -> Iterator[None]:
    """Process 0 goes through the body alone, then all others do: they find its files."""
    import jax

    if jax.process_index() != 0:
        together(what)
    yield
    if jax.process_index() == 0:
        together(what)


@contextlib.contextmanager
def zero_alone(what: str) -> Iterator[bool]:
    """Whether this is process 0, for what it does alone; the others wait for it at the end."""
    import jax

    yield jax.process_index() == 0
    together(what)


def agreed(value: bool) -> bool:
    """What process 0 says, on all of them: they may see a shared folder at different times."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def newest_checkpoint(workdir: Path) -> str:
    """What to say of the checkpoint that was finished last, of any stage."""
    there = list((workdir / "checkpoints").glob("*/*/digests.json"))
    if not there:
        return f"no checkpoint is saved in {workdir}"
    return f"the newest checkpoint is {max(there, key=lambda path: path.stat().st_mtime).parent}"


# --------------------------------------------------------------------------------------------------
# Who is alive, and who gets on


class Watch:
    """Ends this process when another one is gone or has failed, and when no step is made.

    Every process counts up a key of its own; process 0 notes whose stands still for `lost` seconds
    and leaves a verdict, which all read. A process without a step for `stuck` seconds (0: for ever)
    prints the stacks of its threads and leaves a verdict itself. Whoever finds a verdict prints it,
    names the newest checkpoint of `workdir` and ends with status 1; or with 2 and the line alone,
    if it is a refusal.
    """

    def __init__(self, workdir: Path = Path(), lost: float = 60.0, stuck: float = 0.0) -> None:
        self._workdir, self._lost, self._stuck = workdir, lost, stuck
        self._index, self._count, self._name = 0, 1, "this process"
        self._place, self._patience = "", 0.0  # what is done, and how long it may take; 0: for ever
        self._at, self._still = "", 0.0  # the place looked at last, and how long it has been so
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._calls: ThreadPoolExecutor | None = None
        self._seen: dict[str, tuple[str, float]] = {}  # process 0: signs, and how long they are so
        self._number = 0

    def __enter__(self) -> "Watch":
        import jax

        if _client() is not None:
            self._index, self._count = jax.process_index(), jax.process_count()
            self._name = f"process {self._index} of {self._count} ({socket.gethostname()})"
        if self._count > 1:
            self._calls = ThreadPoolExecutor(1, "signs of life")
        if self._count > 1 or self._stuck:
            self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
        if self._calls is not None:
            self._calls.shutdown()

    def step(self, stage: str, step: int, first: bool = False) -> None:
        """A step begins; the next, or `rest`, is expected within `stuck` seconds, ten times as many
        after the first, which compiles."""
        self._place, self._patience = f"stage {stage}, step {step}", self._stuck * (1 + 9 * first)

    def rest(self) -> None:
        """No steps are expected for now."""
        self._patience = 0.0

    def failed(self, error: Exception) -> None:
        """This process ends by an error, of which the others are told in one line."""
        if self._calls is not None:
            how = REFUSED if isinstance(error, UserError) else f"ended by {type(error).__name__}: "
            line = f"{self._name} {how}{' '.join(str(error).split())[:500]}"
            with contextlib.suppress(Exception):
                self._calls.submit(self._verdict, line).result(GRACE)
            if self._index == 0:
                time.sleep(self._period() + 1)  # with it goes where the others read

    def wait(self) -> None:
        """After an error that another process's end may be the cause of: time to learn of it."""
        if self._count > 1:
            self.rest()
            time.sleep(2 * self._lost + 3 * self._period() + GRACE)

    def _period(self) -> float:
        limits = [self._lost] * (self._count > 1) + [self._stuck] * (self._stuck > 0)
        return max(0.05, min(10.0, min(limits) / 6))

    def _loop(self) -> None:
        # Time is counted in rounds of this loop: a machine that slept, or a process that was
        # stopped and goes on, has not been stuck.
        period = self._period()
        while not self._end.is_set():
            if self._stuck and self._count > 1:
                # Also ends a process whose interpreter's lock is never let go.
                faulthandler.dump_traceback_later(10 * self._stuck + 60, exit=True)
            patience = self._patience
            same = patience > 0 and self._place == self._at
            self._at, self._still = self._place, self._still + period if same else 0.0
            if same and self._still > patience:
                self._no_step(patience)
            if self._calls is not None:
                self._ask_others(self._calls)
            self._end.wait(period)

    def _no_step(self, patience: float) -> None:
        line = f"{self._name} {STUCK} {patience:g} s: {self._place}"
        self._show_stacks()
        if self._calls is not None:
            with contextlib.suppress(Exception):
                line += self._calls.submit(self._behind).result(GRACE)
                self._calls.submit(self._verdict, line).result(GRACE)
            time.sleep(GRACE + 2 * self._period())  # the others have theirs to print
        self._give_up(line)

    def _behind(self) -> str:
        """Who has begun fewer steps than this process, as words to add."""
        step = int(self._place.rsplit(" ", 1)[1])
        others = []
        for _, sign in _client().key_value_dir_get(f"{KEYS}/alive/"):
            _, name, place = sign.split(";", 2)
            stage, _, other = place.rpartition(" ")
            if self._place.startswith(stage) and other.isdecimal() and int(other) < step:
                others.append(f"; {name} is behind: {place}")
        return "".join(others[:3])

    def _show_stacks(self) -> None:
        print(f"vdit: {self._name}, {self._place}; its threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _ask_others(self, calls: ThreadPoolExecutor) -> None:
        try:
            verdict = calls.submit(self._exchange).result(self._lost)
        except (RuntimeError, TimeoutError) as error:
            if self._end.is_set():
                return
            if self._index == 0:
                return  # its own service: said elsewhere
            first = str(error).splitlines()[0] if str(error) else "no answer"
            self._give_up(f"process 0 of {self._count}, which coordinates, is gone ({first})")
        else:
            if verdict is not None:
                if STUCK in verdict:
                    self._show_stacks()
                self._end.wait(GRACE)  # its own word, if it has one, comes first
                if not self._end.is_set():
                    self._give_up(verdict)

    def _exchange(self) -> str | None:
        """A sign of life; the verdict on this run, if there is one."""
        client = _client()
        self._number += 1
        sign = f"{self._number};{self._name};{self._place}"
        client.key_value_set(f"{KEYS}/alive/{self._index}", sign, allow_overwrite=True)
        if self._index == 0:
            self._judge(client)
        return next((text for _, text in client.key_value_dir_get(f"{KEYS}/verdict/")), None)

    def _judge(self, client: Any) -> None:
        for key, sign in client.key_value_dir_get(f"{KEYS}/alive/"):
            before, silent = self._seen.get(key, ("", 0.0))
            silent = silent + self._period() if sign == before else 0.0
            self._seen[key] = sign, silent
            _, name, place = sign.split(";", 2)
            if silent > self._lost:
                last = f" (last known: {place})" if place else ""
                self._verdict(f"{name} gave no sign of life for {self._lost:g} s{last}")

    def _verdict(self, line: str) -> None:
        with contextlib.suppress(RuntimeError):  # another one's is there already
            _client().key_value_set(f"{KEYS}/verdict/{self._index}", line)

    def _give_up(self, line: str) -> None:
        if REFUSED in line:
            print(f"vdit: {line}", file=sys.stderr, flush=True)
            leave(2)
        checkpoint = newest_checkpoint(self._workdir)
        print(f"vdit: {line}; {checkpoint}; run again", file=sys.stderr, flush=True)
        leave(1)


# --------------------------------------------------------------------------------------------------
# Parent and child


_PARENT: list[int] = []  # the pipe to the process that waits for this one, if one does


def _tell_parent(**what: Any) -> None:
    if _PARENT:
        os.write(_PARENT[0], json.dumps(what).encode() + b"\n")


def leave(status: int) -> None:
    """Ends this process at once with what it has said; its parent, if any, has no more to say."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    _tell_parent(status=status)
    os._exit(status)


def supervised(work: Callable[[], int], workdir: Path) -> int:
    """Runs `work` in a child process, hands signals on, and returns its exit status.

    Of a child that was killed, or that JAX aborted, it says so in one line, with the newest
    checkpoint. SIGTERM and SIGINT ask to save and stop, a second SIGINT ends at once. The child
    dies with its parent.
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
        try:
            leave(work())
        except BaseException:  # never on into what is the parent's
            traceback.print_exc()
            leave(1)
    os.close(write)
    interrupted = 0

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted += number == signal.SIGINT
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL if interrupted > 1 else signal.SIGTERM)
        if interrupted < 2:
            name = signal.Signals(number).name
            os.write(2, f"{name}: saving, then stopping\n".encode())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    _, code = os.waitpid(child, 0)
    os.set_blocking(read, False)  # whoever the child started may hold the other end
    known: dict[str, Any] = {}
    with contextlib.suppress(BlockingIOError):
        for line in os.read(read, 2**16).splitlines():
            known |= json.loads(line)
    if "status" in known:
        return known["status"]
    status = os.waitstatus_to_exitcode(code)
    print(f"vdit: {_last_word(known, status)}; {newest_checkpoint(workdir)}", file=sys.stderr)
    return 128 - status if status < 0 else status or 1


def _last_word(known: Mapping[str, Any], status: int) -> str:
    """What became of a child that could not say it."""
    name = "this process"
    if "count" in known:
        name = f"process {known['index']} of {known['count']} ({socket.gethostname()})"
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    ended = f"{name} was ended {how}"
    if known.get("index", 0) and not _answers(known["at"]):
        return f"process 0 of {known['count']}, which coordinates, is gone ({known['at']}); {ended}"
    return ended


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True
