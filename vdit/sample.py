"""Requests for videos and the model that serves them: `load(workdir).generate(prompts, ...)`.

Dimension key: B videos, T frames, H height, W width; n latent frames, h w places, Z latent
channels, J captions of a video (the whole video's, then one a shot), S text tokens of a caption, E
text width, K shots.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config.denoiser import build_dit, build_image_encoder, latent_shape, token_pixels
from vdit.errors import UserError
from vdit.loading import read_parts
from vdit.model import Codec, Inputs, Scan, Settings, Watcher, everywhere, settings_of
from vdit.models import wan
from vdit.models.text import TextEncoder, Tokenizer
from vdit.published.image_folder import resized
from vdit.runtime.mesh import replicate, spread
from vdit.runtime.processes import Watch
from vdit.runtime.progress import Progress, say
from vdit.shipped import find
from vdit.tokens import clip_frames, latent_times, shot_list

Shot = tuple[float, str]  # when a shot begins, in seconds, and its caption
MOST_SHOTS, MOST_VIDEOS = 256, 2**16


@dataclass(frozen=True)
class Given:
    """Frames that the video must contain: uint8 (T, H, W, 3) starting at `frame` of the clip.

    The first 1 + k·p of them are used (`whole_spans`). For a network with latents beside the noisy
    ones it is one image of any size, which the video begins with (`images`).
    """

    video: np.ndarray
    frame: int = 0


class Clip(NamedTuple):
    """Length, rate and size of all videos of a request."""

    frames: int
    fps: float
    height: int
    width: int


class Ask(NamedTuple):
    """One video of a batch."""

    captions: list[str]  # the whole video's, then its shots' (J,)
    starts: np.ndarray  # (K,) seconds at which its shots begin; see tokens.shot_list
    seed: int
    given: list[Given]  # of 1 + k·p frames, inside the clip
    label: int  # number of its class, -1 for none
    negative: str | None  # the caption that guidance leads away from


@dataclass
class Result:
    """One generated video and its settings, from which it can be generated again."""

    settings: dict[str, Any]
    parts: Callable[[], Iterator[np.ndarray]]  # decodes it chunk by chunk: uint8 (t, H, W, 3)

    @functools.cached_property
    def video(self) -> np.ndarray:
        """The decoded video, uint8 (T, H, W, 3)."""
        return np.concatenate(list(self.parts()))


class Model:
    """A trained workdir, ready to generate: `vdit.load(workdir)`.

    The denoising scan and the text encoder run on `mesh`; without one, the scan runs on that of
    `sampling_mesh`. Several processes make the same calls, and each of them encodes and decodes
    with the autoencoder by itself. `watch` treats a batch of videos as a step of training.
    """

    def __init__(
        self, config: ConfigDict, tokenizer: Tokenizer, encoder: TextEncoder,
        params: dict[str, Any], statistics: dict[str, np.ndarray], classes: Sequence[str] = (),
        mesh: Mesh | None = None, watch: Watch | None = None, lora: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.config, self.tokenizer, self.encoder = config, tokenizer, encoder
        self.classes, self.mesh, self.lora = classes, mesh, lora
        self.params = dict(params)  # see `loading.Parts`; the scan narrows the group dit
        self.codec = Codec(config, self.params, statistics)
        self.scan = Scan(config, encoder, self.params, mesh, watch)
        self.encode, self.decode, self.stream = (
            self.codec.encode, self.codec.decode, self.codec.stream,
        )  # fmt: skip
        self.dit = build_dit(config)
        self.images = build_image_encoder(config)
        self._text = jax.jit(
            lambda params, ids, mask: self.encoder.apply(params["text"], ids, mask),
            out_shardings=everywhere(mesh),
        )

    def text(self, captions: Sequence[Sequence[str]]) -> tuple[np.ndarray, jax.Array]:
        """Mask (B, J, S) and features (B, J, S, E) of as many captions for each video."""
        ids, mask = self.tokenizer.encode([text for texts in captions for text in texts])
        params, inputs = {"text": self.params["text"]}, (ids, mask)
        if self.mesh is not None:
            params, inputs = spread(self.mesh, params), replicate(self.mesh, inputs)
        features = jnp.asarray(jax.device_get(self._text(params, *inputs)))
        shape = (len(captions), len(captions[0]))
        return mask.reshape(*shape, -1), features.reshape(*shape, *features.shape[1:])

    def check_parts(self, given: bool, later: bool) -> None:
        """Refuses (UserError) frames that are `given` and shots for a model with one noise level a
        row, and shots and frames given `later` for one whose clips can only be continued."""
        name = self.config.dit.model
        if self.dit.beside:
            if later or not given:
                raise UserError(
                    f"dit.model={name} of image to video needs one image, given at 0"
                    " (--given=IMAGE@0), and takes neither other frames nor shots"
                )
        elif not given and not later:
            return
        elif self.dit.one_time:
            raise UserError(
                f"dit.model={name} knows one time for all tokens and one prompt:"
                " neither given frames nor shots are allowed"
            )
        elif self.dit.from_start and later:
            raise UserError(
                f"dit.model={name} continues a clip's beginning, by one prompt: neither frames"
                " given later nor shots are allowed"
            )

    def label(self, prompt: str) -> int:
        """The number of the class of that name or number; -1 for an empty prompt.

        A name may be one of several, separated by commas. `UserError` for what names no class.
        """
        asked, names = " ".join(prompt.split()).lower(), [name.lower() for name in self.classes]
        if not asked:
            return -1
        if asked.isdecimal() and int(asked) < len(names):
            return int(asked)
        exact = [i for i, name in enumerate(names) if name == asked]
        found = exact or [
            i for i, name in enumerate(names) if asked in [part.strip() for part in name.split(",")]
        ]
        if len(found) != 1:
            some = f"{', '.join(self.classes[:8])}{', ...' if len(names) > 8 else ''}"
            what = f"is {len(found)} classes, numbers {found}" if found else "names no class"
            raise UserError(
                f"prompt {prompt[:60]!r} {what}: a number from 0 to {len(names) - 1} or the name"
                f" of one ({some}) is allowed"
            )
        return found[0]

    def generate(
        self,
        prompts: str | Sequence[str],
        seconds: float | None = None,
        *,
        fps: float | None = None,
        size: tuple[int, int] | None = None,
        num: int = 1,
        seed: int = 0,
        given: Sequence[Given] | Sequence[Sequence[Given]] = (),
        shots: Sequence[Shot] | Sequence[Sequence[Shot]] = (),
        steps: int | None = None,
        guidance: float | None = None,
        push: float | None = None,
        negative: str | Sequence[str] | None = None,
        sampler: str | None = None,
        watch: Watcher | None = None,
        **options: Any,
    ) -> list[Result]:
        """`num` videos for each prompt, with seeds `seed`, `seed` + 1, ... in order.

        prompts: captions; for a class-conditional model, the name or number of a class (see
        `label`). seconds: length, rounded up to the next clip length (default: that of training).
        fps: frames a second. size: (height, width) in pixels. given: frames that every video must
        contain, or one list for each prompt (all of the same shapes and times). shots: start in
        seconds and caption of each shot, beside the prompt, which is the whole video's caption; or
        one list for each prompt. negative: the caption that guidance leads away from, or one for
        each prompt. watch: called after each step of denoising, with their number and x0's latents,
        which `decode` shows; what it raises ends the request. The others, and `options` of samplers
        (`eta`, `variance`, ...), are as in the config's `sample`. Raises UserError.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        settings = settings_of(
            self.config, sampler=sampler, steps=steps, guidance=guidance, push=push, **options
        )
        clip = self.clip(seconds, fps, size)
        negatives = self.negatives(negative, prompts, settings)
        rows = self.asks(prompts, clip, num, seed, given, shots, negatives)
        results: list[Result] = []
        batch = min(self.config.sample.batch, len(rows))
        total = -(-len(rows) // batch) * settings.steps
        zero = jax.process_index() == 0
        with Progress("denoising", total, active=zero, passing=True) as bar:
            for number, start in enumerate(range(0, len(rows), batch)):
                part = rows[start : start + batch]
                full = [part[i % len(part)] for i in range(batch)]
                inputs, count = self._inputs(full, clip)
                self.scan.done = bar.beyond(number * settings.steps)
                watched = _numbered(watch, number * settings.steps, count)
                # Rows are cut on the host: on the device each would be a program.
                latents = np.asarray(self.scan(inputs, settings, watched)[:, :count])
                bar.update((number + 1) * settings.steps)
                results += [
                    self._result(ask, latent, clip, settings.shown())
                    for ask, latent in zip(part, latents, strict=False)
                ]
        return results

    def clip(self, seconds: float | None, fps: float | None, size: tuple[int, int] | None) -> Clip:
        """The clip of this length, rate and size; None means that of training."""
        fps = self.config.data.fps if fps is None else fps
        height, width = size or tuple(self.config.data.size)
        if not (0.001 <= fps <= 240) or (seconds is not None and not 0 < seconds <= 3600):
            raise UserError(
                f"seconds {seconds}, fps {fps}: more than 0, up to 3600 s, and 0.001 to 240 fps are"
                " allowed"
            )
        if not (0 < height <= 8192 and 0 < width <= 8192):
            raise UserError(f"size {height}x{width}: 1x1 to 8192x8192 pixels are allowed")
        if self.config.dit.model == "wan":
            height, width = rounded((height, width), token_pixels(self.config))
        frames = self.config.data.frames
        if seconds is not None:
            frames = clip_frames(seconds, fps, self.config.vae.patch[0])
        return Clip(frames, fps, height, width)

    def asks(
        self, prompts: Sequence[str], clip: Clip, num: int, seed: int, given: Any, shots: Any,
        negatives: Sequence[str | None] = (),
    ) -> list[Ask]:  # fmt: skip
        """The videos of a request, `num` of each prompt, validated (UserError)."""
        if num < 1 or not prompts:
            raise UserError(f"{len(prompts)} prompts, num {num}: at least one of each is needed")
        last, most = seed + num * len(prompts) - 1, 2**32 - 1
        if seed < 0 or last > most or num * len(prompts) > MOST_VIDEOS:
            raise UserError(
                f"seed {seed}, {num * len(prompts)} videos: seeds of 0 to {most} and at most"
                f" {MOST_VIDEOS} videos are allowed"
            )
        negatives = negatives or [None] * len(prompts)
        lists = _per_prompt(given, prompts, lambda value: isinstance(value, Given), "lists given")
        p = 0 if self.dit.beside else self.config.vae.patch[0]
        spans = [whole_spans(parts, clip.frames, p) for parts in lists]
        frames = [parts for parts, _ in spans]
        shot_lists = _per_prompt(shots, prompts, _is_shot, "shot lists")
        several = self.dit.beside and any(len(parts) > 1 for parts in frames)
        later = any(part.frame > 0 for parts in frames for part in parts)
        some = (all if self.dit.beside else any)(frames)
        self.check_parts(some, bool(later or several or any(shot_lists)))
        for text in dict.fromkeys(text for _, said in spans for text in said):
            say(text)
        labels = [self.label(prompt) if self.classes else -1 for prompt in prompts]
        for listed in shot_lists:
            check_shots(listed, clip.frames / clip.fps)
        most = max(len(listed) for listed in shot_lists)
        texts = [
            shot_list({"caption": prompt, "shots": listed}, most)
            for prompt, listed in zip(prompts, shot_lists, strict=True)
        ]
        self.tokenizer.encode(prompts)  # refuses a prompt that is too long before any work
        for listed in shot_lists:
            self.tokenizer.encode([caption for _, caption in listed], "shot")
        return [
            Ask(*texts[i], seed + i * num + k, frames[i], labels[i], negatives[i])
            for i in range(len(prompts))
            for k in range(num)
        ]

    def negatives(
        self, negative: str | Sequence[str] | None, prompts: Sequence[str], settings: Settings
    ) -> list[str | None]:
        """One negative caption, or none, for each prompt, validated (UserError)."""
        if negative is None:
            return [None] * len(prompts)
        if settings.guidance == 1.0 or self.classes:
            what = "classes" if self.classes else "guidance 1"
            raise UserError(f"negative with {what}: text and another scale of guidance are needed")
        texts = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(texts) != len(prompts):
            raise UserError(f"{len(texts)} negative for {len(prompts)} prompts: one each is needed")
        self.tokenizer.encode(texts, "negative")
        return [*texts]

    def _inputs(self, rows: Sequence[Ask], clip: Clip) -> tuple[Inputs, int]:
        """The scan's inputs for these videos, and how many of the latent frames are the clip's:
        given spans inside of it are appended."""
        mask, features = self.text([row.captions for row in rows])
        starts = np.stack([row.starts for row in rows])
        p = self.config.vae.patch[0]
        count, h, w, channels = latent_shape(self.config, clip.frames, *clip[2:])
        clean = np.zeros((len(rows), count, h, w, channels), np.float32)
        times, is_given = [latent_times(count, p, clip.fps)], [np.zeros(count, bool)]
        spans = [row.given for row in rows]
        beside, image = None, None
        if self.dit.beside:
            beside, image = self._image_inputs([parts[0].video[0] for parts in spans], clip)
        for position, span in enumerate(() if self.dit.beside else spans[0]):
            video = np.stack([parts[position].video for parts in spans])
            latent = np.asarray(self.encode(video))
            length = latent.shape[1]
            if span.frame == 0:
                clean[:, :length] = latent
                is_given[0][:length] = True
            else:
                clean = np.concatenate([clean, latent], axis=1)
                times.append(latent_times(length, p, clip.fps, span.frame / clip.fps))
                is_given.append(np.ones(length, bool))
        all_times = np.broadcast_to(np.concatenate(times), (len(rows), clean.shape[1]))
        all_given = np.broadcast_to(np.concatenate(is_given), all_times.shape)
        seeds = jnp.asarray([row.seed for row in rows], jnp.uint32)
        labels = jnp.asarray([row.label for row in rows], jnp.int32) if self.classes else None
        # By way of the host: the encoder's output is committed to its device, zeros are not, and
        # the scan would be compiled for each.
        frames = jnp.asarray(clean), jnp.asarray(all_given), jnp.asarray(all_times, jnp.float32)
        shots = starts if starts.size else None
        negative = None
        if rows[0].negative is not None:  # shots have no negative captions of their own
            rest = [""] * (len(rows[0].captions) - 1)
            negative = self.text([[row.negative or "", *rest] for row in rows])
        inputs = Inputs(mask, features, shots, *frames, seeds, labels, negative, beside, image)
        return inputs, count

    def _image_inputs(
        self, images: Sequence[np.ndarray], clip: Clip
    ) -> tuple[jax.Array, jax.Array | None]:
        """Of image to video, for an image (H, W, 3) each: mask and latents (B, n, h, w, p + Z) of
        the video that is the image and then grey, and the image encoder's features (B, S, E)."""
        size = clip.height, clip.width
        if other := [x.shape[:2] for x in images if x.shape[0] * size[1] != x.shape[1] * size[0]]:
            (height, width), to = other[0], f"{size[0]}x{size[1]}"
            say(f"given image of {height}x{width}: resized to {to}, which changes its aspect")
        first = np.stack([resized(image, size, "LANCZOS") for image in images])
        latent = np.asarray(self.encode(wan.begun_with(first, clip.frames)))
        beside = wan.with_mask(jnp.asarray(latent), self.dit.beside)
        if self.images is None:
            return beside, None
        # By way of the host, as the frames.
        found = self.images.features(self.params["image"], images)
        return beside, jnp.asarray(jax.device_get(found))

    def _result(
        self, ask: Ask, latent_nhwZ: np.ndarray, clip: Clip, settings: dict[str, Any]
    ) -> Result:
        settings = {
            "prompt": ask.captions[0], "seed": ask.seed, "frames": clip.frames, "fps": clip.fps,
            "size": [clip.height, clip.width], **settings,
        }  # fmt: skip
        if ask.negative is not None:
            settings["negative"] = ask.negative
        if ask.label >= 0:
            settings["class"] = ask.label
        if self.lora:
            settings["lora"] = list(self.lora)
        if begun := int(np.isfinite(ask.starts).sum()):
            pairs = zip(ask.starts[:begun].tolist(), ask.captions[1:], strict=False)
            settings["shots"] = [[round(start, 6), caption] for start, caption in pairs]
        shown = [] if self.dit.beside else ask.given  # an image's video is decoded from the start
        parts = functools.partial(self._parts, latent_nhwZ[None], shown, *clip[2:])
        return Result(settings, parts)

    def _parts(
        self, latent_1nhwZ: np.ndarray, given: Sequence[Given], height: int, width: int
    ) -> Iterator[np.ndarray]:
        """One video's frames (t, height, width, 3) in parts, given ones as they were given."""
        first = 0
        for videos in self.stream(latent_1nhwZ, height, width):
            video = np.array(videos[0])
            for part in given:
                begin = max(part.frame, first)
                end = max(begin, first + len(video))
                cut = part.video[begin - part.frame : end - part.frame]
                video[begin - first : begin - first + len(cut)] = cut
            yield video
            first += len(video)


def whole_spans(given: Sequence[Given], frames: int, p: int) -> tuple[list[Given], list[str]]:
    """Given frames cut to spans of 1 + k·p inside a clip of `frames` (p = 0: to one frame), and
    what to say about it.

    The model is conditioned on these, and these are put into its video: both are the same frames.
    Raises UserError for a span outside of the clip, and for two of the same frames.
    """
    spans, said = [], []
    for part in given:
        if not 0 <= part.frame < frames or not len(part.video):
            raise UserError(
                f"{len(part.video)} frames given at frame {part.frame}: at least one, from 0 to"
                f" {frames - 1}, is allowed"
            )
        most = min(len(part.video), frames - part.frame)
        count = 1 + (most - 1) // p * p if p else 1
        spans.append(Given(part.video[:count], part.frame))
        if count < len(part.video):
            takes = f"1, {1 + p}, {1 + 2 * p}, ..." if p else "one image"
            said.append(
                f"given at frame {part.frame}: the first {count} of {len(part.video)} frames are"
                f" used, for this model takes {takes}"
            )
    for one, other in itertools.pairwise(sorted(spans, key=lambda span: span.frame)):
        if other.frame < one.frame + len(one.video):
            raise UserError(
                f"{len(one.video)} frames given at frame {one.frame}, and others at frame"
                f" {other.frame}: given frames may not overlap"
            )
    return spans, said


def rounded(size: tuple[int, int], multiple: tuple[int, int]) -> tuple[int, int]:
    """Height and width, each down to a multiple, as published pipelines do; says so."""
    height, width = (max(x // m, 1) * m for x, m in zip(size, multiple, strict=True))
    if (height, width) != size:
        m = "x".join(map(str, multiple))
        say(f"size {size[0]}x{size[1]} is rounded to {height}x{width}, a multiple of {m}")
    return height, width


def _per_prompt(
    values: Sequence[Any], prompts: Sequence[str], is_one: Callable[[Any], bool], what: str
) -> list[list[Any]]:
    """One list for each prompt, from one list for all prompts or one for each."""
    if not values or is_one(values[0]):
        return [list(values)] * len(prompts)
    if len(values) != len(prompts):
        raise UserError(f"{len(values)} {what} for {len(prompts)} prompts: one each is needed")
    return [list(value) for value in values]


def _numbered(watch: Watcher | None, before: int, count: int) -> Watcher | None:
    """The watcher of a batch after `before` steps, told of the clip's `count` latent frames."""
    if watch is None:
        return None
    return lambda done, x0: watch(before + done, np.asarray(x0)[:, :count])


def _is_shot(value: Any) -> bool:
    return len(value) > 0 and isinstance(value[0], int | float)


def check_shots(shots: Sequence[Shot], seconds: float) -> None:
    """Refuses (UserError) a shot list whose times do not fit a clip of that length."""
    if len(shots) > MOST_SHOTS:
        raise UserError(f"{len(shots)} shots: at most {MOST_SHOTS} are allowed")
    before = None
    for number, (start, caption) in enumerate(shots, 1):
        if not isinstance(caption, str):
            raise UserError(f"shot {number}: its caption is {caption!r}, not text")
        if before is None and start != 0:
            raise UserError(f"shot 1 starts at {start:g} s: the first one must start at 0")
        if before is not None and not before < start < seconds:
            raise UserError(
                f"shot {number} starts at {start:g} s: after {before:g} (the shot before it) and"
                f" before {seconds:g} (the clip's end) is allowed"
            )
        before = start


def load(
    workdir: str | Path, overrides: ConfigDict | None = None, mesh: Mesh | None = None,
    watch: Watch | None = None, lora: Sequence[str] = (),
) -> Model:  # fmt: skip
    """A trained workdir as a `Model`: config.json, tokenizer.json and the newest good checkpoints;
    or the weights of that name in the package, or an exported folder.

    `overrides` is used in place of config.json; it may differ in `sample` and `run`. With a `mesh`
    no device holds all parameters of the denoiser or the text encoder. `lora`: files of adapters
    that are merged, as FILE or FILE:WEIGHT. Raises UserError where a part is missing or damaged.
    """
    parts = read_parts(find(workdir), overrides, mesh, lora)
    return Model(*parts, mesh=mesh, watch=watch, lora=lora)
