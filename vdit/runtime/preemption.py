"""Graceful stops: a signal sets a flag, and the training loop saves before it returns.

Where nothing is to be saved a command ends at once (`vdit.errors.stop`).
"""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from vdit import errors
from vdit.errors import SIGNALS, Interrupted
from vdit.runtime import processes

ACTIVE: list["Preemption"] = []  # the one that a command is in


class Preemption:
    """A context in which SIGTERM and SIGINT (Ctrl-C) only set `requested`, from the first step on.

    A second signal, or one where there is nothing to be saved, ends a command at once; elsewhere
    it raises `KeyboardInterrupt`. With several processes JAX's preemption service stops all of them
    at the same step: each must call `reached` after every step, equally often.
    """

    def __init__(self) -> None:
        self.requested = False
        self._asked = False  # by a signal
        self._armed = False  # since `reached`, until `rest`
        self._calls = 0  # of `reached`; a stage's own steps begin at 0 again
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        ACTIVE.append(self)
        main = threading.current_thread() is threading.main_thread()
        if jax.process_count() == 1 and main and signal.getsignal(SIGNALS[0]) is not _heard:
            for number in SIGNALS:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        ACTIVE.remove(self)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; the same answer in every process."""
        del step
        self._armed = True
        if jax.process_count() > 1 and not self.requested:
            self._calls += 1
            self.requested = multihost_utils.reached_preemption_sync_point(self._calls)
        return self.requested

    def rest(self) -> None:
        """Until the next call of `reached` there is nothing to be saved."""
        self._armed = False

    def ask(self, number: int) -> bool:
        """A signal asks to save and stop; whether that will be done."""
        if not self._armed or self._asked:
            return False
        self._asked = True
        Interrupted.status = 128 + number
        name = signal.Signals(number).name
        os.write(2, f"{name}: saving, then stopping; again to stop at once\n".encode())
        if jax.process_count() == 1:
            self.requested = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # to JAX's preemption service
        return True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.ask(number):
            raise KeyboardInterrupt


def listen() -> None:
    """In a command: a thread hears signals, for the main one may compute for long."""
    if signal.getsignal(SIGNALS[0]) is not errors.stop or os.name == "nt":
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in SIGNALS:
        signal.signal(number, _heard)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(read,), name="signals", daemon=True).start()


def _heard(number: int, frame: FrameType | None) -> None:
    """Nothing more: Python has told the thread."""


def _hear(pipe: int) -> None:
    while byte := os.read(pipe, 1):
        if byte[0] in SIGNALS and not any(each.ask(byte[0]) for each in ACTIVE):
            errors.say_stopped()
            processes.leave(128 + byte[0])
