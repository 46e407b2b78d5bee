"""Graceful stops: a signal sets a flag, and the training loop saves before it returns."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Preemption:
    """A context in which SIGTERM and SIGINT (Ctrl-C) only set `requested`.

    A second signal raises `KeyboardInterrupt`; the old handlers are restored at the end. With
    several processes JAX's preemption service handles SIGTERM and stops all of them at the same
    step: each must call `reached` after every step, equally often.
    """

    def __init__(self) -> None:
        self.requested = False
        self._calls = 0  # of `reached`; a stage's own steps begin at 0 again
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; the same answer in every process."""
        del step
        if jax.process_count() > 1 and not self.requested:
            self._calls += 1
            self.requested = multihost_utils.reached_preemption_sync_point(self._calls)
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        os.write(2, f"{name}: saving, then stopping; again to stop at once\n".encode())
