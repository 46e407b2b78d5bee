"""Runs that are killed at random times, started again until they are done, and compared to the bit
with a run that nothing disturbed."""

import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vdit.runtime import metrics

from ..table import markdown
from .runs import (
    STAGES,
    Layout,
    Life,
    apart,
    arguments,
    differences,
    finish,
    unfinished,
)

SPAN = 0.4  # of an undisturbed run's time, within which a process is killed
MOST = 10  # in one run, which then ends undisturbed
EARLY = 0.08  # share of signals before anything is printed
SIGNALS = {"KILL": signal.SIGKILL, "INT": signal.SIGINT, "TERM": signal.SIGTERM}
ASKED = re.compile(r"SIG\w+: saving, then stopping; again to stop at once$")


class Kill(NamedTuple):
    """Where one fell, and whether something was being written."""

    layout: Layout
    place: str
    saving: bool
    victims: str


class Undisturbed(NamedTuple):
    """A workdir, and the seconds of its run from the first line on."""

    workdir: Path
    seconds: float


def undisturbed(folder: Path, layout: Layout) -> Undisturbed:
    """A run that nothing disturbs; an earlier one of `folder` is used again."""
    workdir = folder / f"{layout.processes}x{layout.devices}"
    if not (workdir / "report.html").is_file():
        life = Life(workdir, layout, arguments(workdir, layout))
        finish(life)
        life.close()
    rows = [row for row in metrics.read(workdir) if row["stage"] == "run"]
    seconds = max(row.get("seconds", 0.0) for row in rows)
    return Undisturbed(workdir, seconds)


def one_kill(
    workdir: Path, layout: Layout, span: float, rng: np.random.Generator,
    number: signal.Signals = signal.SIGKILL,
) -> Kill | None:  # fmt: skip
    """Starts the command and ends it; None if it was done before. Raises AssertionError where it
    fails by itself, or does not end as it should."""
    before = unfinished(workdir)
    life = Life(workdir, layout, arguments(workdir, layout))
    try:
        early, delay = rng.random() < EARLY, rng.random()
        one = int(rng.integers(0, layout.processes)) if rng.random() < 0.25 else None
        if not early:
            life.until(life.working)
        life.until(lambda: False, delay * (2.0 if early else span))
        if life.ended():
            finish(life)
            return None
        life.send(number, one if layout.processes > 1 else None)
        statuses = life.statuses()
        place = life.place()
        everyone = layout.processes == 1 or one is None
        if not any(statuses):
            return None  # it was faster than the signal
        left = unfinished(workdir) - before
        for index in range(layout.processes):
            check(life, index, statuses, number, left)
        saving = bool(left)
        return Kill(layout, place, saving, "all" if everyone else f"process {one}")
    finally:
        life.close()


def check(
    life: Life, index: int, statuses: list[int], number: signal.Signals, left: set[Path]
) -> None:
    """Raises AssertionError where a process did not end as it should: without a traceback; after a
    signal that it can hear with one line and that signal's status, and nothing half written."""
    said = life.err(index)
    wrong = "Traceback" in said
    if number != signal.SIGKILL:
        lines = [x for x in said.splitlines() if not (ASKED.match(x) or x.startswith("WARNING:"))]
        good = (0, 128 + number) if len(statuses) == 1 else (0, 1, 130, 143)
        wrong |= statuses[index] not in good or len(lines) != bool(statuses[index])
        wrong |= any(".tmp" in path.name and path.is_file() for path in left)
    if wrong:
        raise AssertionError(f"process {index} of {statuses}, {left}: {said[-2000:]}")


def kills(
    layouts: Sequence[Layout], count: int, seed: int, folder: Path, say: Callable[[str], None],
    number: signal.Signals = signal.SIGKILL,
) -> tuple[list[Kill], list[str]]:  # fmt: skip
    """`count` kills over runs of the layouts in turn, and a line for each run that did not end
    equal to the bit."""
    wholes: dict[Layout, Undisturbed] = {}
    made: list[Kill] = []
    failures: list[str] = []
    rounds = 0
    while len(made) < count:
        layout = layouts[rounds % len(layouts)]
        workdir = folder / f"run{rounds}"
        if layout not in wholes:
            wholes[layout] = undisturbed(folder, layout)
            say(f"{layout}: undisturbed in {wholes[layout].seconds:.0f} s")
        whole, first = wholes[layout], len(made)
        rng = np.random.default_rng((seed, rounds))
        try:
            while len(made) < min(count, first + MOST):
                kill = one_kill(workdir, layout, SPAN * whole.seconds, rng, number)
                if kill is None:
                    break
                made.append(kill)
                where = f"{kill.place}, {'while it wrote' if kill.saving else 'between writes'}"
                say(f"kill {len(made)} of {count}: run {rounds}, {layout}, {where}, {kill.victims}")
            else:
                finish(Life(workdir, layout, arguments(workdir, layout)))
            wrong = apart(differences, whole.workdir, workdir)
        except (AssertionError, TimeoutError) as error:
            wrong = [" ".join(str(error).split())]
            made += [] if len(made) > first else [Kill(layout, "start", False, "failed")]
        if wrong:
            failures.append(f"run {rounds}, {layout}, {workdir}: {'; '.join(wrong)[:1500]}")
        else:
            shutil.rmtree(workdir)
        equal = "NOT EQUAL: " + failures[-1] if wrong else "equal to the bit"
        say(f"run {rounds}, {layout}: {len(made) - first} kills, {equal}")
        rounds += 1
    return made, failures


def table(made: Sequence[Kill]) -> str:
    """Kills by layout and place, as Markdown."""
    places = ("start", *STAGES, "end")
    lines = []
    layouts = list(dict.fromkeys(kill.layout for kill in made))
    for name, rows in [
        *((str(layout), [k for k in made if k.layout == layout]) for layout in layouts),
        ("all", list(made)),
    ]:
        counts = Counter(kill.place for kill in rows)
        saving, part = sum(k.saving for k in rows), sum(k.victims != "all" for k in rows)
        shown = [str(counts[place]) for place in places]
        lines.append([name, str(len(rows)), *shown, str(saving), str(part)])
    return markdown(["layout", "kills", *places, "while writing", "one of two"], lines)
