"""What is asked for: its fields, and the checks that are made before it is queued."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from vdit.data.sources import most_shots
from vdit.errors import UserError
from vdit.model import settings_of
from vdit.sample import Clip, Given, Model, Shot, whole_spans
from vdit.serve.folder import Folder
from vdit.show import parse_size, placed

MOST_VIDEOS = 16  # of a request
MOST_GIVEN = 16
LARGEST = 32  # times the pixels of a clip of training that a video may have

Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=10_000)]


class Part(BaseModel):
    """Base of what is sent: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class GivenFrames(Part):
    """Frames that the video contains."""

    upload: str = Field("", description="ID of an upload")
    result: str = Field("", description="or ID of a result")
    at: Number = Field(0.0, description="seconds at which they begin")
    last: int = Field(0, ge=0, le=10_000, description="only so many frames of its end; 0: all")


class ShotText(Part):
    """A shot: when it begins, and its caption."""

    start: Number = Field(description="seconds; the first shot starts at 0")
    caption: Text


class Asked(Part):
    """A request for videos. What is left out is as the model was trained."""

    prompt: Text = Field("", description="what to show")
    negative: Text | None = Field(None, description="caption that guidance leads away from")
    shots: list[ShotText] = Field([], description="shots on the timeline, in order")
    given: list[GivenFrames] = Field([], max_length=MOST_GIVEN, description="frames to contain")
    seconds: Number | None = Field(None, description="length, rounded up")
    fps: Number | None = Field(None, description="frames a second")
    size: str | None = Field(None, description="HEIGHTxWIDTH in pixels", examples=["32x32"])
    num: int = Field(1, ge=1, le=MOST_VIDEOS, description="videos, with seeds seed, seed + 1, ...")
    seed: int = Field(0, description="seed of the first video")
    steps: int | None = Field(None, description="denoising steps")
    guidance: Number | None = Field(None, description="classifier-free guidance scale; 1: off")
    lora: list[str] | None = Field(None, description="names of adapters; left out: all")


class Wrong(NamedTuple):
    """What is wrong with a field, in a sentence."""

    field: str
    message: str


class Refused(UserError):
    """A request with wrong fields."""

    def __init__(self, wrong: Sequence[Wrong]) -> None:
        super().__init__("; ".join(f"{field}: {message}" for field, message in wrong))
        self.wrong = list(wrong)


class Request(NamedTuple):
    """A request that is right: the arguments of `Model.generate`."""

    asked: Asked
    clip: Clip
    given: list[Given]
    shots: list[Shot]
    lora: tuple[str, ...]  # names


class Checks:
    """Collects what is wrong, each with its field."""

    def __init__(self) -> None:
        self.wrong: list[Wrong] = []

    @contextlib.contextmanager
    def of(self, field: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.wrong.append(Wrong(field, " ".join(str(error).split())))

    def end(self) -> None:
        """Raises `Refused` if anything is wrong."""
        if self.wrong:
            raise Refused(self.wrong)


def checked(model: Model, folder: Folder, asked: Asked, lora: Sequence[str]) -> Request:
    """The request, if all of it is right; `lora`: the names that are known. Raises `Refused`."""
    checks = Checks()
    names = tuple(lora if asked.lora is None else dict.fromkeys(asked.lora))
    with checks.of("lora"):
        if unknown := [name for name in names if name not in lora]:
            known = ", ".join(lora) or "none"
            raise UserError(f"there are no adapters {unknown[0][:60]!r}: known are {known}")
    for field in ("steps", "guidance"):
        with checks.of(field):
            settings_of(model.config, **{field: getattr(asked, field)})
    clip = _clip(model, asked, checks)
    given = _given(model, folder, asked, clip, checks)
    _texts(model, asked, clip, given, checks)
    checks.end()
    shots = [(shot.start, shot.caption) for shot in asked.shots]
    return Request(asked, clip, given, shots, names)


def _clip(model: Model, asked: Asked, checks: Checks) -> Clip:
    """Length, rate and size; those of training where they are wrong."""
    size = seconds = fps = None
    with checks.of("size"):
        size = parse_size(asked.size)
        model.clip(None, None, size)
    with checks.of("fps"):
        model.clip(None, asked.fps, None)
        fps = asked.fps
    with checks.of("seconds"):
        model.clip(asked.seconds, None, None)
        seconds = asked.seconds
    if checks.wrong:
        return model.clip(None, None, None)
    clip, plain = model.clip(seconds, fps, size), model.clip(None, None, None)
    volume, most = (c.frames * c.height * c.width for c in (clip, plain))
    with checks.of("seconds" if size is None else "size"):
        if volume > LARGEST * most:
            raise UserError(
                f"{clip.frames} frames of {clip.height}x{clip.width} are {volume / most:.0f} times"
                f" the {plain.frames} of {plain.height}x{plain.width} that the model was trained"
                f" on: at most {LARGEST} times as many pixels are allowed here"
            )
    return clip


def _given(model: Model, folder: Folder, asked: Asked, clip: Clip, checks: Checks) -> list[Given]:
    """The given frames, decoded, as the model takes them."""
    size = None if model.dit.beside else (clip.height, clip.width)
    parts: list[Given] = []
    with checks.of("given"):
        model.check_parts(bool(asked.given), any(part.at > 0 for part in asked.given))
        for part in asked.given:
            if bool(part.result) == bool(part.upload):
                raise UserError("given frames are those of an upload or of a result")
            kind, name = ("result", part.result) if part.result else ("upload", part.upload)
            known = folder.upload(name) or {}
            shown = str(known.get("name") or f"{kind} {name[:40]!r}")
            read = functools.partial(
                folder.clip, kind, name, shown, clip.fps, size, clip.frames, part.last
            )
            parts.append(placed(shown, part.at, clip.fps, clip.frames, read)[0])
        p = 0 if model.dit.beside else model.config.vae.patch[0]
        parts, _ = whole_spans(parts, clip.frames, p)
        model.asks([""], clip, 1, 0, parts, ())
    return parts


def _texts(model: Model, asked: Asked, clip: Clip, given: Sequence[Given], checks: Checks) -> None:
    """Checks seeds, prompt, negative prompt and shots, if the rest is right so far."""
    if any(field == "given" for field, _ in checks.wrong):
        return
    with checks.of("seed"):
        model.asks([""], clip, asked.num, asked.seed, given, ())
    with checks.of("prompt"):
        if not asked.prompt.strip() and not asked.shots:
            raise UserError("a prompt is needed: what to show")
        model.asks([asked.prompt], clip, 1, 0, given, ())
    with checks.of("shots"):
        if asked.shots:
            shots = [(shot.start, shot.caption) for shot in asked.shots]
            model.asks([""], clip, 1, 0, given, shots)
    if not {"guidance", "steps"} & {field for field, _ in checks.wrong}:
        with checks.of("negative"):
            settings = settings_of(model.config, guidance=asked.guidance)
            model.negatives(asked.negative or None, [asked.prompt], settings)


def takes(model: Model) -> dict[str, Any]:
    """What a model takes, for the page and for programs."""

    def allowed(given: bool, later: bool) -> bool:
        try:
            model.check_parts(given, later)
        except UserError:
            return False
        return True

    config, clip = model.config, model.clip(None, None, None)
    given: Literal["none", "image", "start", "any"] = "none"
    if model.dit.beside:
        given = "image"
    elif allowed(True, False):
        given = "any" if allowed(True, True) else "start"
    return {
        "frames": clip.frames, "fps": clip.fps, "size": f"{clip.height}x{clip.width}",
        "seconds": clip.frames / clip.fps, "steps": config.sample.steps,
        "guidance": config.sample.guidance, "sampler": config.sample.sampler,
        "given": given, "shots": most_shots(config) > 0 and allowed(False, True),
        "negative": not model.classes, "classes": list(model.classes[:1000]),
        "patch": config.vae.patch[0], "most_videos": MOST_VIDEOS,
    }  # fmt: skip
