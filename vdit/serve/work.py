"""Videos of a request: generated one by one, with a preview after a step, and written."""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vdit.data.sources import chosen, source
from vdit.errors import UserError
from vdit.runtime.progress import say
from vdit.runtime.video import webp_bytes, write_gif
from vdit.sample import Model, Result
from vdit.serve.folder import Folder, new_id
from vdit.serve.queue import Job
from vdit.serve.requests import Request
from vdit.show import write_result

# Of the time of denoising that previews may add. On two CPU cores a step of the weights in the
# package takes 60 ms, their whole clip 20 ms to decode and 4 ms to write: every other step has one.
PREVIEW_SHARE = 0.25
PREVIEW_SIDE = 256  # pixels of a preview's longer side, at most
FASTEST_GIF = 50.0  # frames a second
Load = Callable[[Sequence[str]], Model]  # of files of adapters, as --lora takes them


class Studio:
    """The models, and the folder into which their videos go.

    The adapters of `lora`, files by their names, are merged into the weights, so each choice of
    them is a model of its own; the last two that were asked for are kept. `plain` has all of them.
    """

    def __init__(
        self, plain: Model, load: Load, folder: Folder, lora: Mapping[str, str] | None = None,
        name: str = "",
    ) -> None:  # fmt: skip
        self.plain, self._load, self.folder, self.name = plain, load, folder, name
        self.lora = dict(lora or {})
        self._models = {tuple(self.lora): plain}
        self.reading = chosen(self.plain.config).part("reading")

    def model(self, names: Sequence[str]) -> Model:
        """The model with these adapters."""
        key = tuple(name for name in self.lora if name in names)
        if key not in self._models:
            for old in list(self._models)[:-1]:
                del self._models[old]
            self._models[key] = self._load([self.lora[name] for name in key])
        self._models[key] = self._models.pop(key)  # the newest
        return self._models[key]

    def warm(self) -> None:
        """Compiles what a first request would wait for."""
        began = time.monotonic()
        needs = self.plain.dit.beside or self.plain.classes
        if not needs:
            (result,) = self.plain.generate("", steps=1, watch=lambda done, x0: None)
            next(result.parts())
            say(f"ready after {time.monotonic() - began:.0f} s of compilation")

    def work(self, job: Job) -> None:
        """Generates and writes the videos of a job, one by one: a program is compiled once for any
        number of them, and each is shown when it is done."""
        request: Request = job.request
        model = self.model(request.lora)
        asked, clip, before = request.asked, request.clip, 0
        for number in range(asked.num):
            watch = Preview(job, model, clip.height, clip.width, clip.fps, before)
            (result,) = model.generate(
                [asked.prompt], clip.frames / clip.fps, fps=clip.fps, size=clip[2:],
                seed=asked.seed + number, given=request.given, shots=request.shots,
                steps=asked.steps, guidance=asked.guidance, negative=asked.negative or None,
                watch=watch,
            )  # fmt: skip
            before = job.step
            job.results.append(self._write(result, request))

    def _write(self, result: Result, request: Request) -> str:
        """Writes a video with its settings; its ID."""
        name, settings = new_id(), result.settings
        settings.pop("lora", None)  # paths of this machine
        if request.lora:
            settings["lora"] = list(request.lora)
        if request.asked.given:
            settings["given"] = [part.model_dump() for part in request.asked.given]
        settings["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if self.reading is not None:
            settings["reading"] = self._read(result)
        path = self.folder.root / f"{name}.mp4"
        size = settings["size"]
        zoom = max(1, min(8, PREVIEW_SIDE // max(size)))
        shown = write_result(path, result, zoom)
        if settings["fps"] <= FASTEST_GIF:
            write_gif(path.with_suffix(".gif"), shown, settings["fps"], scale=zoom)
        return name

    def _read(self, result: Result) -> list[str]:
        """What the oracle reads; nothing of what it was not written for."""
        try:
            lines: list[str] = self.reading(result.video, result.settings["fps"])
        except Exception as error:  # e.g. of sizes and lengths that the world never has
            return [f"the oracle cannot read this clip ({type(error).__name__})"]
        return lines


class Preview:
    """Tells a job of each step, and shows x0, decoded, after the first one and then as often as
    PREVIEW_SHARE allows. The decoder's program is that of the finished video."""

    def __init__(
        self, job: Job, model: Model, height: int, width: int, fps: float, before: int
    ) -> None:
        self.job, self.model, self.before = job, model, before
        self.size, self.fps = (height, width), fps
        self.spent, self.began = 0.0, time.monotonic()

    def __call__(self, done: int, x0_BnhwZ: np.ndarray) -> None:
        self.job.at(self.before + done)
        began = time.monotonic()
        if self.spent > PREVIEW_SHARE * (began - self.began):
            return
        video = self.model.decode(jnp.asarray(x0_BnhwZ[:1]), *self.size)[0]
        every = max(1, -(-max(self.size) // PREVIEW_SIDE))
        self.job.preview = webp_bytes(video[:, ::every, ::every], self.fps, fast=True)
        self.job.previews += 1
        if self.spent or done > 1:  # the first one may have been compiled
            self.spent += time.monotonic() - began
        self.job.at(self.before + done)  # it may have been cancelled in the meantime


def named(lora: Sequence[str]) -> dict[str, str]:
    """Files of adapters by the names that are shown: those of the files, without their folders."""
    names: dict[str, str] = {}
    for text in lora:
        name = Path(text).name or text
        if name in names:
            raise UserError(f"--lora={text}: two files of the name {name}; rename one of them")
        names[name] = text
    return names


def about(studio: Studio) -> dict[str, Any]:
    """What the page needs to know beside what the model takes."""
    config = studio.plain.config
    example = ""
    if chosen(config).endless and not studio.plain.classes:
        example = source(config, "heldout", studio.folder.root)[0]["caption"]
    return {
        "name": studio.name, "lora": list(studio.lora), "oracle": studio.reading is not None,
        "example": example,
    }  # fmt: skip
