"""The queue: one request is worked on at a time, in the order in which they came."""

import collections
import contextlib
import enum
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from vdit.errors import UserError

MOST = 32  # requests that wait
KEPT = 256  # finished ones of which the state is still known


class State(enum.StrEnum):
    """Of a request."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNFINISHED = (State.WAITING, State.RUNNING)


class Cancelled(Exception):
    """Raised in the place of the next step."""


class Job:
    """A request, and how far it is. Its ID is known to those alone who asked."""

    def __init__(self, request: Any, total: int = 0) -> None:
        self.id, self.request = secrets.token_hex(12), request
        self.state, self.error = State.WAITING, ""
        self.step, self.total = 0, total
        self.preview, self.previews = b"", 0  # WebP of x0, and how many there have been
        self.results: list[str] = []  # IDs
        self._first: tuple[float, int] | None = None  # before it programs are compiled

    def at(self, step: int) -> None:
        """A step is done. Raises `Cancelled` once the request has been."""
        if self.state is State.CANCELLED:
            raise Cancelled
        self.step = step
        self._first = self._first or (time.monotonic(), step)

    def left(self) -> float | None:
        """Seconds that it still needs, if that is known."""
        if self.state is not State.RUNNING or self._first is None or self.step <= self._first[1]:
            return None
        began, first = self._first
        return (time.monotonic() - began) / (self.step - first) * (self.total - self.step)


class Full(UserError):
    """Too many requests wait."""


class Queue(contextlib.AbstractContextManager):
    """Calls work(job) for each job in turn, in a thread of its own, and `warm` before the first."""

    def __init__(self, work: Callable[[Job], None], warm: Callable[[], None] | None = None) -> None:
        self._work, self._warm = work, warm
        self._jobs: dict[str, Job] = {}
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        self.ready = warm is None
        self._thread = threading.Thread(target=self._loop, name="queue", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Queues a job; raises `Full`."""
        with self._changed:
            if len(self._waiting) >= MOST:
                raise Full(f"{MOST} requests wait already: try again later")
            self._jobs[job.id] = job
            self._waiting.append(job)
            over = [old.id for old in self._jobs.values() if old.state not in UNFINISHED][:-KEPT]
            for name in over:
                del self._jobs[name]
            self._changed.notify_all()

    def get(self, name: str) -> Job | None:
        return self._jobs.get(name)

    def place(self, job: Job) -> int:
        """How many requests are before this one, that which runs among them."""
        with self._changed:
            if job not in self._waiting:
                return 0
            return self._waiting.index(job) + (self._running is not None)

    def load(self) -> int:
        """How many requests wait or run."""
        with self._changed:
            return len(self._waiting) + (self._running is not None)

    def cancel(self, job: Job) -> None:
        """Ends a job: at once where it waits, after the current step where it runs."""
        with self._changed:
            if job.state in UNFINISHED:
                job.state = State.CANCELLED
            if job in self._waiting:
                self._waiting.remove(job)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels all jobs, and waits for the end of the step."""
        with self._changed:
            self._closed = True
            for job in self._jobs.values():
                if job.state in UNFINISHED:
                    job.state = State.CANCELLED
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()

    def _loop(self) -> None:
        if self._warm is not None:
            try:
                self._warm()
            except Exception:  # the first request says what is wrong
                traceback.print_exc(file=sys.stderr)
            self.ready = True
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
                job.state = State.RUNNING
            self._do(job)
            with self._changed:
                self._running = None
                if job.state is State.RUNNING:
                    job.state = State.FAILED if job.error else State.DONE

    def _do(self, job: Job) -> None:
        try:
            self._work(job)
        except Cancelled:
            pass
        except UserError as error:
            job.error = " ".join(str(error).split())
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            why = "a shorter or smaller video may fit" if full else "see the server's terminal"
            what = "the memory is full" if full else f"it ended by {type(error).__name__}"
            job.error = f"{what}: {why}"
