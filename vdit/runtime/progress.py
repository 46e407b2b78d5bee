"""Progress of a stage on the terminal: step, rate, loss, time left."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

REDRAW = 0.1  # seconds between updates of the bar
WINDOW = 30.0  # seconds over which the rate is averaged
SHORT = 2.0  # seconds that something may take without a bar
T = TypeVar("T")


class Progress:
    """A progress bar on a terminal; elsewhere a line at most every `every` seconds.

        with Progress("dit", total=2000, start=step) as progress:
            progress.update(step, loss=0.12)

    The rate excludes everything before the first update, such as compilation. `update` costs
    microseconds between redraws. Only one process is `active`; the others print nothing.

    A `passing` one is for what may be over soon: its bar appears after `SHORT` seconds, goes at the
    end, and elsewhere than on a terminal nothing is printed.
    """

    def __init__(
        self, stage: str, total: int, start: int = 0, every: float = 10.0, active: bool = True,
        unit: str = "steps", passing: bool = False,
    ) -> None:  # fmt: skip
        self._unit, self._passing = unit, passing
        self.stage, self.total, self.step, self.active = stage, total, start, active
        self.values: dict[str, float | int | str] = {}
        self._wait = every
        self._next = 0.0
        self._began = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._marks: deque[tuple[float, int]] = deque()
        self._printed = -1
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        tolerant()
        if self._passing:
            self._wait = REDRAW
        else:
            self._start()
        return self

    def _start(self) -> None:
        """Shows the bar, if this is a terminal."""
        if self.active and sys.stdout.isatty():
            from rich import get_console, progress

            if not get_console().is_dumb_terminal:
                self._wait = REDRAW
                self._bar = progress.Progress(
                    progress.SpinnerColumn(finished_text="✓"),
                    progress.TextColumn("[bold]{task.description}"),
                    progress.BarColumn(bar_width=24),
                    progress.TextColumn("{task.fields[line]}", markup=False),
                    refresh_per_second=4,
                    transient=self._passing,
                )
                self._task = self._bar.add_task(self.stage, total=self.total, line="")
                self._show()
                self._bar.start()

    def update(self, step: int, **values: float | int | str) -> None:
        """Reports that `step` is done. Values (on the host) are shown until they are replaced."""
        self.step = step
        self.values.update(values)
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._wait
            self._mark(now)
            if self._passing and self._bar is None and now - self._began > SHORT:
                self._start()
            self._show()

    def beyond(self, start: int) -> Callable[[int], None] | None:
        """Reports steps that are counted from `start`; None where no bar can be shown."""
        if not (self.active and sys.stdout.isatty()):
            return None
        return lambda done: self.update(start + done)

    def __exit__(self, *error: object) -> None:
        now = time.monotonic()
        self._mark(now)
        self._show(f"took {clock(now - self._began)}")
        if self._bar is not None:
            self._bar.stop()

    def _mark(self, now: float) -> None:
        self._first = self._first or (now, self.step)
        self._marks.append((now, self.step))
        while len(self._marks) > 2 and self._marks[0][0] < now - WINDOW:
            self._marks.popleft()

    def _show(self, end: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.step, line=self._line(end))
        elif self.active and not self._passing and (end or self.step != self._printed):
            self._printed = self.step
            _print(f"{self.stage}  {self._line(end)}")

    def _line(self, end: str = "") -> str:
        """step/total, rate, values, and the time left or `end`."""
        parts = [f"{self.step}/{self.total}"]
        rate = self._rate(whole=bool(end))
        if rate:
            speed = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
            one = self._unit.removesuffix("s")
            parts.append(f"{speed} {self._unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{one}")
        for name, value in self.values.items():
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        if end:
            parts.append(end)
        elif rate:
            parts.append(f"{clock((self.total - self.step) / rate)} left")
        return "  ".join(parts)

    def _rate(self, whole: bool) -> float:
        """Steps per second, of the whole stage or of the last WINDOW seconds; 0 if unknown."""
        if self._first is None:
            return 0.0
        (begin, first), (end, last) = self._first if whole else self._marks[0], self._marks[-1]
        return (last - first) / (end - begin) if end > begin else 0.0


def each(what: str, items: Sequence[T], unit: str) -> Iterator[T]:
    """The items in turn, with a passing bar."""
    with Progress(what, len(items), unit=unit, passing=True) as progress:
        for number, item in enumerate(items):
            yield item
            progress.update(number + 1)


def say(text: str) -> None:
    """Prints a line, bold on a terminal, above the bar if there is one."""
    _print(text, style="bold")


def clock(seconds: float) -> str:
    """0:07, 12:05, 1:02:03."""
    minutes, second = divmod(math.ceil(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def tolerant() -> None:
    """Has stdout escape what its encoding lacks (cron, Windows, a pipe), instead of failing."""
    if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _print(text: str, style: str | None = None) -> None:
    tolerant()
    if sys.stdout.isatty():
        from rich import get_console

        get_console().print(text, style=style, markup=False, highlight=False)
    else:
        print(text, flush=True)
