"""Loader throughput by source, size and threads, against PyTorch's DataLoader.

Part of `tools/bench.py` (`--only=loader`). The folder source reads H.264 files written here.
PyTorch's DataLoader decodes the same files with PyAV for every clip, in a separate process
(tools/benching/loader_torch.py); vdit decodes each file once, which is timed separately.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vdit.data.folder import Folder
from vdit.data.latents import Latents, write_cache
from vdit.data.loader import batches
from vdit.runtime.video import write_mp4
from vdit.worlds.bodies.source import World
from vdit.worlds.clips import MAX_SHOTS
from vdit.worlds.playground.shots import PlaygroundShots
from vdit.worlds.playground.source import Playground
from vdit.worlds.shots.source import Shots

from ..table import markdown

BATCH = 16
FRAMES, FPS = 17, 10.0  # of a clip of films
FILMS, SECONDS, FILM_FPS, FILM_SIZE = 8, 12, 24, 128  # of the files
WORKERS = (1, 2, 4)
MEASURED = 3.0  # seconds
FLAT = 10_000  # clips over which memory must not grow
GROWTH = 32.0  # MiB, at most, after the first tenth of the clips

Say = Callable[[str], None]
Measured = dict[str, Any]  # a row: source, size, workers, clips_per_second


def write_films(folder: Path) -> None:
    """Writes `FILMS` captioned videos of `SECONDS` seconds of the world."""
    world = World(0, frames=FILM_FPS * SECONDS, size=(FILM_SIZE, FILM_SIZE), fps=float(FILM_FPS))
    for number in range(FILMS):
        clip = world[number]
        write_mp4(folder / f"{number}.mp4", clip["video"], float(FILM_FPS))
        (folder / f"{number}.txt").write_text(clip["caption"], encoding="utf-8")


def write_latents(folder: Path) -> None:
    """A cache of latents of the default shape."""

    def encode(indices: range) -> Iterator[Mapping[str, np.ndarray]]:
        for index in indices:
            latent = np.random.default_rng(index).standard_normal((8, 4, 4, 24))
            words = np.arange(48)
            yield {"latent": latent.astype(np.float16), "ids": words, "mask": words < 20}

    write_cache(folder, "0" * 64, 512, 256, encode)


def rate(stream: Iterator[Any], batch: int, seconds: float) -> float:
    """Clips per second after the first two batches."""
    next(stream), next(stream)
    count, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        next(stream)
        count += batch
    return count / took


def loader_rate(
    source: Any, field: str, workers: int, batch: int = BATCH, seconds: float | None = None
) -> float:
    """Clips per second of vdit's loader."""
    stream = batches(source, batch, 0, (field,), workers)
    try:
        return rate(stream, batch, MEASURED if seconds is None else seconds)
    finally:
        stream.close()


def resident() -> float:
    """Resident memory of this process in MiB; 0 if unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(source: Any, clips: int) -> tuple[float, float]:
    """Resident MiB after a tenth of `count` clips, and its growth after all of them."""
    stream = batches(source, BATCH, 0, ("video",), 1)
    try:
        first = 0.0
        for step in range(-(-clips // BATCH)):
            next(stream)
            if step == clips // BATCH // 10:
                first = resident()
        return first, resident() - first
    finally:
        stream.close()


def torch_rates(python: str, films: Path, sizes: Sequence[int], say: Say) -> list[Measured]:
    """Rows of PyTorch's DataLoader; none if that Python cannot run it (for lack of torch or PyAV),
    and then prints the reason."""
    asked = {
        "films": str(films), "frames": FRAMES, "fps": FPS, "sizes": list(sizes), "batch": BATCH,
        "workers": [0, *WORKERS], "seconds": MEASURED,
    }  # fmt: skip
    script = Path(__file__).with_name("loader_torch.py")
    made = subprocess.run(
        [python, str(script), json.dumps(asked)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        say(f"loader: no PyTorch: {(made.stderr.strip().splitlines() or ['no answer'])[-1]}")
        return []
    return [json.loads(line) for line in made.stdout.splitlines()]


def measure(python: str, say: Say) -> list[Measured]:
    """Measures all rows of the table."""
    rows: list[Measured] = []

    def add(name: str, size: str, source: Any, field: str = "video") -> None:
        for workers in WORKERS:
            say(f"loader: {name} {size}, {workers} threads")
            value = loader_rate(source, field, workers)
            rows.append({"source": name, "size": size, "workers": workers, "rate": value})

    for side in (32, 64):
        size = f"17x{side}x{side}"
        add("vdit world", size, World(0, size=(side, side)))
        add("vdit shots", size, Shots(0, size=(side, side)))
        add("vdit playground", size, Playground(0, frames=17, size=(side, side)))
    several = PlaygroundShots(0, size=(64, 64), shots=(1, MAX_SHOTS))
    add("vdit playground shots", "49x64x64", several)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        films = root / "films"
        films.mkdir()
        write_films(films)
        write_latents(root / "latents")
        add("vdit latents", "8x4x4x24", Latents(root / "latents"), "latent")
        for side in (32, 64):
            began, size = time.perf_counter(), f"17x{side}x{side}"
            options: Any = {"frames": FRAMES, "size": (side, side), "fps": FPS, "stride": 0.1}
            folder = Folder(films, cache=root / f"cache{side}", **options)
            took = time.perf_counter() - began
            seconds = FILMS * SECONDS / took
            print(f"folder {size}: {seconds:.0f} seconds of film decoded a second, once")
            rows.append({"source": "decoding once", "size": size, "film_seconds": seconds})
            add("vdit folder", size, folder)
        say("loader: PyTorch's DataLoader with PyAV")
        rows += torch_rates(python, films, (32, 64), say)
    return rows


def table(rows: Sequence[Measured]) -> str:
    """Clips per second as Markdown: a row per source and size, a column per thread count."""
    counts = sorted({row["workers"] for row in rows if "workers" in row})
    by: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if "workers" in row:
            by.setdefault((row["source"], row["size"]), {})[row["workers"]] = row["rate"]
    lines = [
        [source, size, *(f"{found[n]:,.0f}" if n in found else "–" for n in counts)]
        for (source, size), found in by.items()
    ]
    return markdown(["clips/s", "clip", *(f"{n} workers" for n in counts)], lines)
