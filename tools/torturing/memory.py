"""Resident memory over many steps, and over many requests of one model."""

import re
import time
from pathlib import Path

import numpy as np

from vdit.runtime import metrics

from ..table import markdown
from .runs import Layout, Life, apart, arguments, finish

ALONE = Layout(1, 1, "")
PARTS = 8  # of a run, of each of which the largest value is shown
FLAT = 0.02  # growth from the middle of a run to its end, as a share


def resident(process: int) -> float:
    """MB of a process."""
    text = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s*(\d+) kB", text)
    return int(found[1]) / 1024 if found else 0.0


def steps(folder: Path, count: int) -> list[float]:
    """MB at each look, over stage dit of `count` steps with fifty saves."""
    workdir = folder / "steps"
    changes = {
        "dit.train.steps": count, "run.save_every": max(1, count // 50),
        "run.log_every": max(1, count // 100), "stages": ("vae", "latents", "dit"),
    }  # fmt: skip
    life = Life(workdir, ALONE, arguments(workdir, ALONE, changes))
    seen: list[float] = []
    while not life.ended():
        rows = metrics.read(workdir)
        if rows and rows[-1]["stage"] == "dit" and rows[-1]["step"] < count:
            seen.append(resident(life.processes[0].pid))
        time.sleep(0.1)
    finish(life)
    life.close()
    return seen


def requests(workdir: Path, count: int) -> list[float]:
    """MB after each of `count` requests of one model, of changing prompts, numbers and seeds."""
    return apart(_requests, str(workdir), count)


def _requests(workdir: str, count: int) -> list[float]:
    import os

    from vdit.sample import load

    from . import small

    model, seen = load(workdir, small.get_config()), []
    for number in range(count):
        prompt = ("a red ball falls", "two blue boxes", "a small ring rolls")[number % 3]
        for result in model.generate(prompt, num=1 + number % 2, seed=number):
            assert result.video.dtype == np.uint8
        seen.append(resident(os.getpid()))
    return seen


def parts(seen: list[float]) -> list[float]:
    """The largest value of each of `PARTS` parts."""
    return [float(max(part)) for part in np.array_split(np.array(seen), PARTS)]


def growth(shown: list[float]) -> float:
    """From the middle to the end, as a share."""
    return shown[-1] / shown[PARTS // 2] - 1.0


def table(found: dict[str, list[float]]) -> str:
    """MB by part, as Markdown."""
    heads = ["", *(f"{i}/{PARTS}" for i in range(1, PARTS + 1)), "growth of the second half"]
    rows = [
        [name, *(f"{mb:.0f}" for mb in shown), f"{100 * growth(shown):.1f}%"]
        for name, shown in found.items()
    ]
    return markdown(heads, rows)


def measure(folder: Path, count: int, asked: int) -> tuple[str, bool]:
    """The table of a run of `count` steps and of `asked` requests, and whether both are flat."""
    found = {f"{count} steps, 50 saves": parts(steps(folder, count))}
    found[f"{asked} requests"] = parts(requests(folder / "steps", asked))
    return table(found), all(growth(shown) < FLAT for shown in found.values())
