"""Traces of a few training steps by JAX's profiler, for XProf, TensorBoard and Perfetto."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from vdit.runtime.files import refusing
from vdit.runtime.progress import say


def parse(text: str) -> tuple[int, int] | None:
    """(first, last) of "FIRST:LAST", from 1 on; None of "". Raises `ValueError`."""
    if not text:
        return None
    first, last = (int(part) if part.isdecimal() else 0 for part in text.split(":"))
    if not 1 <= first <= last:
        raise ValueError(text)
    return first, last


class Profile:
    """The steps `run.profile` of a stage, traced into `folder`; a context that ends the trace."""

    def __init__(self, steps: str, stage: str, folder: Path) -> None:
        self._steps, self._stage, self._folder = parse(steps), stage, folder
        self._runs = self._done = False

    def __enter__(self) -> "Profile":
        return self

    def step(self, step: int) -> AbstractContextManager[Any]:
        """A context for the dispatch of a step."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            return nullcontext()
        if not self._runs:
            with refusing(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._runs = True
        return jax.profiler.StepTraceAnnotation(self._stage, step_num=step)

    def after(self, step: int, values: Any) -> None:
        """Ends the trace behind its last step, whose results it waits for."""
        if self._runs and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(values)
            self._end()

    def _end(self) -> None:
        self._runs, self._done = False, True
        jax.profiler.stop_trace()
        say(f"{self._stage}: trace of run.profile in {self._folder}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._runs:
            self._end()
        elif self._steps is not None and not self._done and kind is None:
            first, last = self._steps
            say(f"{self._stage}: ran none of the steps of run.profile={first}:{last}")
