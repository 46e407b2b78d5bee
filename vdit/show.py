"""--mode=sample and the stage sample: requests read from flags, videos written with settings."""

import contextlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from vdit.data import sources
from vdit.data.decode import is_text, is_time, one_line, read_clip
from vdit.errors import UserError
from vdit.runtime.files import all_or_nothing, atomic_path, read_text, refusing, write_text
from vdit.runtime.metrics import Metrics
from vdit.runtime.processes import zero_alone, zero_first
from vdit.runtime.progress import Progress, each, say
from vdit.runtime.video import contact_sheet, tile, write_mp4, write_png, write_webp
from vdit.sample import Given, Model, Result, Shot, check_shots

TASKS = ("text", "image", "extend")  # of the stage sample, whose files have these names
PREVIEW = 240  # frames that the animated WebP beside a video has at most
WALL = 2**26  # bytes of videos that are also shown side by side


def read_given(
    text: str, fps: float, size: tuple[int, int] | None, frames: int
) -> tuple[Given, str]:
    """FILE@SECONDS (or FILE, at 0) as frames at `fps` and `size` (height, width), and a message;
    without a size the first frame as it is.

    Refuses a time outside the clip of `frames`; cuts frames behind its end.
    """
    shown = one_line(text)
    name, at, seconds = text.rpartition("@")
    if not at or not _is_number(seconds) or (os.path.exists(text) and not os.path.exists(name)):
        name, seconds = text, "0"
    return placed(
        f"--given={shown}", float(seconds), fps, frames,
        lambda: read_clip(name, fps, size, frames if size else 1),
    )  # fmt: skip


def placed(
    what: str, seconds: float, fps: float, frames: int, read: Callable[[], tuple[np.ndarray, str]]
) -> tuple[Given, str]:
    """What `read` gives (frames, and a message) at a time of a clip of `frames`, cut to its end;
    `what` it is called in errors."""
    try:
        frame = round(seconds * fps)
    except (ValueError, OverflowError):
        raise UserError(f"{what}: FILE@SECONDS is expected") from None
    last = (frames - 1) / fps
    if not 0 <= frame < frames:
        raise UserError(f"{what}: the clip lasts from 0 to {last:g} s")
    video, said = read()
    if len(video) > frames - frame:
        video = video[: frames - frame]
        said += f", cut to {len(video)} frames"
    if len(video) >= frames:
        raise UserError(f"{what} fills the clip of {last:g} s: a longer one is needed")
    return Given(video, frame), said


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_shots(path: str) -> list[Shot]:
    """A shot list from a JSON file: [{"start": seconds, "caption": text}, ...]."""
    try:
        listed = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"--shots={path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--shots={path} is not JSON in UTF-8: {one_line(str(error))}") from error
    want = '[{"start": SECONDS, "caption": TEXT}, ...] is expected'
    if not isinstance(listed, list) or not listed:
        raise UserError(f"--shots={path}: {want}")
    shots = []
    for number, row in enumerate(listed, 1):
        good = isinstance(row, dict) and row.keys() == {"start", "caption"}
        if not good or not is_time(row["start"]) or not is_text(row["caption"]):
            shown = one_line(ascii(row), 60)
            raise UserError(f"--shots={path}: shot {number} is {shown}; {want}")
        shots.append((float(row["start"]), row["caption"]))
    return shots


def parse_size(text: str | None) -> tuple[int, int] | None:
    """HEIGHTxWIDTH."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise UserError(f"--size={one_line(text)}: HEIGHTxWIDTH is expected, e.g. 32x48")
    return int(match[1]), int(match[2])


def sample_request(
    model: Model, folder: Path, *, prompts: Sequence[str], seconds: float | None,
    fps: float | None, size: str | None, num: int, seed: int, given: Sequence[str],
    shots: str | None = None, negative: str | None = None,
) -> list[Path]:  # fmt: skip
    """--mode=sample: generates videos, writes them and returns their paths; several small ones are
    also shown side by side, in NAME-wall.webp. Of several processes all generate and process 0
    writes."""
    model.check_parts(bool(given), bool(shots))
    frames, fps, height, width = model.clip(seconds, fps, parse_size(size))
    if seconds is not None and abs(frames / fps - seconds) > 1e-6:
        say(f"{seconds:g} s is rounded up to {frames} frames, {frames / fps:g} s")
    listed = read_shots(shots) if shots else []
    check_shots(listed, frames / fps)
    parts = []
    for text in given:
        part, said = read_given(text, fps, None if model.dit.beside else (height, width), frames)
        parts.append(part)
        say(f"given {said}")
    results = model.generate(
        prompts, frames / fps, fps=fps, size=(height, width), num=num, seed=seed, given=parts,
        shots=listed, negative=negative,
    )  # fmt: skip
    paths: list[Path] = []
    wall: list[np.ndarray] = []
    small = len(results) * frames * height * width * 3 <= WALL
    with zero_alone("samples") as zero:
        for result in each("writing", results, "videos"):
            if given:
                result.settings["given"] = list(given)
            if not zero:
                continue
            name = f"{slug(result.settings['prompt'])}-{result.settings['seed']}"
            with reserved(folder, name) as path:
                shown = write_result(path, result, model.config.sample.zoom)
            wall += [shown] * small
            say(str(path))
            paths.append(path)
        if len(wall) > 1:
            with reserved(folder, f"{paths[0].stem}-wall", ".webp") as place:
                write_wall(place, np.stack(wall), fps, model.config.sample.zoom)
            say(str(place))
    return paths


def write_wall(path: Path, videos: np.ndarray, fps: float, zoom: int, columns: int = 0) -> None:
    """Writes an animated WebP of videos side by side."""
    tiled = tile(videos, columns, gap=2, edge=1, colour=255)
    write_webp(path, tiled, fps, scale=max(zoom // 2, 1))


def slug(text: str, most: int = 60) -> str:
    """A prompt as a file name: its letters, marks and digits, of any script. At most 120 bytes, for
    file systems take 255, and temporary names are longer."""
    text = unicodedata.normalize("NFC", text.lower())
    name = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # a file system of another encoding
        name = re.sub(r"[^a-z0-9]", " ", name)
    name = "-".join(name.split())[:most].encode()[:120].decode(errors="ignore")
    name = name.strip("-") or "video"
    return f"video-{name}" if name in TASKS else name


def unused(folder: Path, name: str) -> Path:
    """FOLDER/NAME.mp4, or NAME-2 and so on: nothing there is written over."""

    def plain(name: str) -> str:  # some file systems take other forms and cases for the same
        return unicodedata.normalize("NFC", name).casefold()

    there = {plain(path.stem) for path in folder.glob("*.*")}
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return folder / f"{next(name for name in names if plain(name) not in there)}.mp4"


@contextlib.contextmanager
def reserved(folder: Path, name: str, suffix: str = ".mp4") -> Iterator[Path]:
    """An `unused` path, where an empty file keeps other processes from taking it until it is
    written; after an error there is none."""
    with refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = unused(folder, name).with_suffix(suffix)
            with contextlib.suppress(FileExistsError):
                path.open("x").close()
                break
    with all_or_nothing(path):
        yield path


def write_result(path: Path, result: Result, zoom: int) -> np.ndarray:
    """Writes the video, an animated WebP of its first frames, its settings as JSON and, if it is
    one frame, a PNG; returns the first frames. It is decoded as it is written: memory does not grow
    with its length."""
    fps = result.settings["fps"]
    preview: list[np.ndarray] = []

    def parts(bar: Progress) -> Iterator[np.ndarray]:
        for part in result.parts():
            bar.update(bar.step + len(part))
            if (room := PREVIEW - sum(map(len, preview))) > 0:
                preview.append(part[:room].copy())
            yield part

    with contextlib.ExitStack() as stack:  # all of its files or none, and older ones stay

        def place(suffix: str) -> Path:
            return stack.enter_context(atomic_path(path.with_suffix(suffix)))

        frames = result.settings.get("frames", 0)
        with Progress(path.stem, frames, unit="frames", passing=True) as bar:
            write_mp4(place(".mp4"), parts(bar), fps, scale=zoom)
        shown = np.concatenate(preview)
        write_webp(place(".webp"), shown, fps, scale=max(zoom // 2, 1))
        if len(shown) == 1:
            write_png(place(".png"), shown[0], zoom)
        write_text(place(".json"), json.dumps(result.settings, indent=1) + "\n")
    return shown


def sample_stage(model: Model, workdir: Path, metrics: Metrics) -> None:
    """The stage sample: text to video, image to video and extension on held-out captions, as far as
    the model knows them; a contact sheet of each task, and one picture of all tasks (wall.webp)."""
    config = model.config
    with zero_first("clips"):
        clips = sources.source(config, "heldout", workdir)
    rows = [clips[i] for i in range(min(config.sample.clips, len(clips)))]
    prompts, shots = [row["caption"] for row in rows], [row.get("shots", ()) for row in rows]
    p, folder = config.vae.patch[0], workdir / "samples"
    tasks = [("image", 1) if model.dit.beside else ("text", 0)]
    if config.data.frames > 1 + p and not model.dit.one_time:
        tasks += [("image", 1), ("extend", 1 + p)]
    wall = []
    for task, known in tasks:
        say(f"sample: {len(prompts)} videos, {known} frames given")
        given = [[Given(row["video"][:known])] for row in rows] if known else []
        results = model.generate(prompts, seed=config.seed, given=given, shots=shots)
        with zero_alone("samples") as zero:
            if not zero:
                continue
            for number, result in enumerate(results):
                if known:
                    frames = f"{known} frame{'s' * (known > 1)}"
                    result.settings["given"] = f"{frames} of a held-out clip"
                write_result(folder / f"{task}-{number:02d}.mp4", result, config.sample.zoom)
            videos = np.stack([result.video for result in results])
            sheet, scale = folder / f"sheet-{task}.png", max(config.sample.zoom // 3, 1)
            contact_sheet(sheet, videos[:8], prompts[:8], every=2, scale=scale)
            metrics.video("sample", config.dit.train.steps, task, videos, config.data.fps)
            wall.append(videos[:8])
    if wall:
        shown, columns = np.concatenate(wall), len(wall[0])
        write_wall(folder / "wall.webp", shown, config.data.fps, config.sample.zoom, columns)
