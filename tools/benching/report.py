"""Interleaved timing, and tables of the results."""

import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .cases import Run

SLOW = 3.0  # times the fastest: not repeated


def say(text: str) -> None:
    """Prints progress to stderr, away from the tables."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def take_turns(runs: Mapping[str, Run], turns: int, what: str) -> dict[str, list[float]]:
    """Seconds of every run, interleaved; slow runs are timed once."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        say(f"{what}: turn {turn + 1} of {turns}")
        best = min((values[0] for values in seconds.values() if values), default=math.inf)
        for name, run in runs.items():
            if turn == 0 or seconds[name][0] <= SLOW * best:
                seconds[name].append(run())
    return seconds


@dataclass
class Report:
    """Prints results and keeps them as rows."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def table(
        self, part: str, task: str, seconds: Mapping[str, list[float]], gflop: float | None
    ) -> None:
        """A row per run: median, range, rate, and the two best of PyTorch relative to it."""
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        best32, best = best_torch(medians, "PyTorch float32"), best_torch(medians)
        print(f"\n{part} {task}" + (f", {gflop:.3g} GFLOP of matmuls" if gflop else ""))
        head = f"{'':44} {'median s':>9} {'least':>8} {'most':>8} {'n':>3}"
        print(f"{head} {'GFLOP/s':>8} {'PT fp32/it':>11} {'PT best/it':>11}")
        for name, values in seconds.items():
            median = medians[name]
            rate = "" if gflop is None else f"{gflop / median:.0f}"
            over = ["" if b is None else f"{b / median:.2f}" for b in (best32, best)]
            spread = f"{median:9.4f} {min(values):8.4f} {max(values):8.4f} {len(values):3}"
            print(f"{name:44} {spread} {rate:>8} {over[0]:>11} {over[1]:>11}".rstrip())
            row = {"part": part, "task": task, "name": name, "median": median, "seconds": values}
            self.rows.append(row | ({} if gflop is None else {"gflop": gflop}))
        sys.stdout.flush()

    def target(self, part: str, what: str, value: float | None, limit: float, most: bool) -> None:
        """Compares a ratio with its target; None if not measured."""
        if value is None:
            return
        reached = value <= limit if most else value >= limit
        print(
            f"{'reached ' if reached else 'MISSED  '} {what}: {value:.2f},"
            f" wanted at {'most' if most else 'least'} {limit:.2f}",
            flush=True,
        )
        row = {"part": part, "target": what, "value": value, "limit": limit, "reached": reached}
        self.rows.append(row)


def best_torch(medians: Mapping[str, float], prefix: str = "PyTorch") -> float | None:
    return min((s for name, s in medians.items() if name.startswith(prefix)), default=None)


def over_torch(seconds: Mapping[str, list[float]], prefix: str = "PyTorch") -> float | None:
    """The best time of PyTorch over the best of JAX."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = best_torch(medians, prefix)
    return None if best is None else best / best_torch(medians, "JAX")  # type: ignore[operator]
