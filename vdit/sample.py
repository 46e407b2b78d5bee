"""From a request to videos: text, given frames, the denoising scan, the decoder.

Dimension key: B videos, T frames, H height, W width; n latent frames, h w places, Z latent
channels, L tokens, C token channels, J captions of a video (its own, and its shots'), S text
tokens of a caption, E text width, K shots.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config import joined
from vdit.config.autoencoder import build_vae
from vdit.config.classes import read_classes
from vdit.config.denoiser import (
    build_dit,
    build_process,
    latent_shape,
    token_pixels,
    token_shards,
    wordless,
)
from vdit.config.identity import read_config
from vdit.config.text import build_text_encoder, build_tokenizer, text_content
from vdit.diffusion.guidance import guided, pushed
from vdit.diffusion.prediction import to_x0_eps
from vdit.diffusion.sampler import Denoise, initial_noise, sample, sampler
from vdit.diffusion.schedule import timesteps
from vdit.errors import UserError
from vdit.models.autoencoder import decode_in_chunks, encode_in_chunks
from vdit.models.dit import without_attention
from vdit.models.text import TextEncoder, Tokenizer
from vdit.nn.narrow import operand_dtypes
from vdit.nn.patch import pad_to_multiple, unpatchify
from vdit.objectives.diffusion import (
    conditioned,
    dense_tokens,
    fill,
    filled,
    levels,
    split_variance,
)
from vdit.objectives.vae import to_float, to_uint8
from vdit.runtime.checkpoint import load_meta, newest_everywhere, restore_ema
from vdit.runtime.machine import host_memory
from vdit.runtime.mesh import (
    gather,
    param_sharding,
    replicate,
    replicated,
    sampling_mesh,
    sequence_constraint,
    spread,
)
from vdit.runtime.processes import Watch
from vdit.tokens import clip_frames, latent_times, shot_list

Shot = tuple[float, str]  # when a shot begins, in seconds, and its caption
MOST_SHOTS = 256


@dataclass(frozen=True)
class Given:
    """Frames that the video must contain: uint8 (T, H, W, 3) starting at `frame` of the clip."""

    video: np.ndarray
    frame: int = 0


class Ask(NamedTuple):
    """One video of a batch."""

    captions: list[str]  # its own, and its shots'; a class instead is `label`
    starts: np.ndarray  # (K,) seconds at which its shots begin; see tokens.shot_list
    seed: int
    given: list[Given]
    label: int  # of the class that is asked for, -1 for none


@dataclass
class Result:
    """One generated video and everything that it was made from."""

    settings: dict[str, Any]
    parts: Callable[[], Iterator[np.ndarray]]  # decodes it: uint8 (t, H, W, 3), one after another

    @functools.cached_property
    def video(self) -> np.ndarray:
        """All of it, uint8 (T, H, W, 3)."""
        return np.concatenate(list(self.parts()))


@dataclass(frozen=True)
class Settings:
    """How to sample; defaults come from the config."""

    sampler: str
    steps: int
    guidance: float
    eta: float
    variance: str
    spacing: str
    shift: float
    push: float
    push_above: float
    skip: tuple[float, float]

    def make(self) -> Any:
        """The sampler; only the options that it has."""
        options: dict[str, Any] = {}
        if self.sampler == "ddim":
            options["eta"] = self.eta
        if self.sampler == "ddpm":
            options["variance"] = self.variance
        return sampler(self.sampler, **options)


class Model:
    """A trained workdir, ready to generate. Made by `vdit.load(workdir)`.

    The denoising scan runs on `mesh`, or, where that is not given, on one of `sampling_mesh`. A
    mesh of several processes has the text encoder, too, and each of them makes the same calls; what
    is encoded and decoded by the autoencoder is so by each of them, for itself. `watch` expects a
    batch of videos as it does a step of training.
    """

    def __init__(
        self,
        config: ConfigDict,
        tokenizer: Tokenizer,
        encoder: TextEncoder,
        params: dict[str, Any],
        statistics: dict[str, np.ndarray],
        mesh: Mesh | None = None,
        classes: Sequence[str] = (),
        watch: Watch | None = None,
    ) -> None:
        self.config, self.tokenizer, self.encoder = config, tokenizer, encoder
        # Groups vae, dit and text; "empty", if a text without words stands in. See `narrow`.
        self.params = dict(params)
        self.classes = classes  # names of the classes, if it is told of classes instead of text
        self.statistics = {name: jnp.asarray(value) for name, value in statistics.items()}
        self.vae, self.dit, self.mesh = build_vae(config), build_dit(config), mesh
        self.process = build_process(config)
        self._encode = jax.jit(
            lambda params, video, state: self.vae.apply(
                {"params": params["vae"]},
                to_float(pad_to_multiple(video, token_pixels(config))),
                state,
                method=self.vae.encode,
            )[::2]
        )
        self._decode = jax.jit(
            lambda params, latent, state: self.vae.apply(
                {"params": params["vae"]}, latent, state, method=self.vae.decode
            )
        )
        self._pixels = jax.jit(to_uint8)
        self._text = jax.jit(
            lambda params, ids, mask: self.encoder.apply(params["text"], ids, mask),
            out_shardings=self._whole(mesh),
        )
        self._denoisers: dict[Mesh | None, tuple[Any, Any]] = {}
        self._watch, self._begun = watch or Watch(), list[Any]()

    def settings(self, **changes: Any) -> Settings:
        """The config's sampling settings with changes; None means the config's."""
        base = {f: self.config.sample[f] for f in Settings.__dataclass_fields__}
        base |= {name: value for name, value in changes.items() if value is not None}
        made = Settings(**base)
        made.make()  # refuses unknown names and options at once
        joined.check_push(self.config, made.push, made.skip)
        self.times(made)
        return made

    def times(self, settings: Settings) -> jax.Array:
        """The times t_0 > .. > t_n between which it samples."""
        shift = settings.shift or self.config.dit.shift
        return timesteps(self.process, settings.steps, shift, settings.spacing)

    def denoiser(self, mesh: Mesh | None, platform: str | None = None) -> Any:
        """`_sample` compiled for a mesh, or for one device of `platform` (by default this one)."""
        run = functools.partial(self._sample, mesh, build_dit(self.config, mesh, platform))
        return jax.jit(run, static_argnames=("settings",), out_shardings=self._whole(mesh))

    def _whole(self, mesh: Mesh | None) -> Any:
        """For results that every process has."""
        return None if mesh is None else replicated(mesh)

    def denoise(self, *arguments: Any, settings: Settings) -> jax.Array:
        """`_sample` of these arguments but the parameters, where it is fastest."""
        rows = arguments[0].shape[0] * (2 if settings.guidance != 1.0 else 1)
        mesh = self.mesh or sampling_mesh(rows)
        if mesh is None:
            run, params = self._placed(mesh, arguments, settings)
            return run(params, *arguments, settings=settings)
        asked = settings, [x.shape for x in jax.tree.leaves(arguments)]
        self._watch.step("sample", len(self._begun) + 1, first=asked not in self._begun)
        self._begun.append(asked)
        with jax.set_mesh(mesh):
            run, params = self._placed(mesh, arguments, settings)
            placed = replicate(mesh, arguments)
            latent = jax.device_get(run(params, *placed, settings=settings))
        self._watch.rest()
        return jnp.asarray(latent)

    def _placed(
        self, mesh: Mesh | None, arguments: tuple[Any, ...], settings: Settings
    ) -> tuple[Any, dict[str, Any]]:
        """The denoiser for a mesh, and its parameters there."""
        if mesh not in self._denoisers:
            run = self.denoiser(mesh)
            if not self._denoisers:
                plain = dataclasses.replace(settings, push=0.0)  # the weaker answer's are the same
                narrow(self.params, operand_dtypes(run, self.params, *arguments, settings=plain))
            params = {name: self.params[name] for name in ("dit", "empty") if name in self.params}
            if mesh is not None:
                params = spread(mesh, params)
            self._denoisers[mesh] = run, params
        return self._denoisers[mesh]

    def encode(self, video_BTHWC: np.ndarray) -> jax.Array:
        """Normalised latents (B, n, h, w, Z) of uint8 videos of 1 + k·p frames."""
        encode = functools.partial(self._encode, self.params)
        p, chunk = self.config.vae.patch[0], self.config.vae.chunk
        latent = encode_in_chunks(encode, video_BTHWC, p, chunk)
        return (latent - self._shape("mean")) / self._shape("std")

    def stream(
        self, latent_BnhwZ: jax.Array | np.ndarray, height: int, width: int
    ) -> Iterator[np.ndarray]:
        """uint8 videos of normalised latents, in parts (B, t, height, width, 3)."""
        latent = latent_BnhwZ * self._shape("std") + self._shape("mean")
        decode, vae = functools.partial(self._decode, self.params), self.config.vae
        for part in decode_in_chunks(decode, latent, tuple(vae.patch), vae.chunk, vae.tile):
            yield np.asarray(self._pixels(part))[:, :, :height, :width]

    def decode(self, latent_BnhwZ: jax.Array, height: int, width: int) -> np.ndarray:
        """uint8 videos (B, T, height, width, 3) of normalised latents."""
        return np.concatenate(list(self.stream(latent_BnhwZ, height, width)), axis=1)

    def _shape(self, name: str) -> jax.Array:
        return self.statistics[name].reshape(1, 1, 1, 1, -1)

    def _sample(
        self,
        mesh: Mesh | None,
        dit: Any,
        params: dict[str, Any],
        mask_BJS: jax.Array,
        features_BJSE: jax.Array,
        starts_BK: jax.Array | None,
        clean_BnhwZ: jax.Array,
        given_Bn: jax.Array,
        times_Bn: jax.Array,
        seeds_B: jax.Array,
        label_B: jax.Array | None,
        settings: Settings,
    ) -> jax.Array:
        """The denoising scan: latents (B, n, h, w, Z), given ones as they were."""
        if whole := gather(mesh):
            params = whole(params)
        constrain = (lambda x: x) if mesh is None else sequence_constraint(mesh)
        patch = tuple(self.config.dit.patch)
        clean, layout = dense_tokens(clean_BnhwZ, patch, times_Bn, given_Bn, starts_BK)
        (batch, length, _), grid = clean.shape, layout.grid
        assert grid is not None
        multiple = token_shards(self.config, mesh)
        layout = filled(layout, multiple)
        known = layout.given()[:, :length, None]
        told = features_BJSE, mask_BJS, label_B
        use_guidance = settings.guidance != 1.0
        if use_guidance:
            double = functools.partial(jax.tree.map, lambda x: jnp.concatenate([x, x]))
            clean2, known2, layout2, told = double((clean, known, layout, told))
        else:
            clean2, known2, layout2 = clean, known, layout
        layout2 = jax.tree.map(constrain, layout2)
        rows = len(clean2)
        features, mask, label = told
        condition = conditioned(
            self.encoder, features, mask, levels(dit, self.process, jnp.zeros(rows)),
            jnp.arange(rows) >= batch, label, params.get("empty"),
        )  # fmt: skip
        shots = max(mask_BJS.shape[1] - 1, 1)

        def denoise(
            params: Any, x_t: jax.Array, t: jax.Array
        ) -> tuple[jax.Array, jax.Array | None]:
            # As many of the rows as x_t has: all of them, or the conditional half.
            rows = len(x_t)
            known, clean, layout, told = jax.tree.map(
                lambda x: x[:rows], (known2, clean2, layout2, condition)
            )
            # A video's two rows may lie on two devices.
            x_t = jnp.where(known, clean, x_t)
            level = jnp.tile(levels(dit, self.process, t[None]), (rows, shots))
            tokens = constrain(fill(x_t, multiple))
            out: Any = dit.apply(
                {"params": params}, tokens, layout, dataclasses.replace(told, level=level)
            )
            out, share = split_variance(dit, out[:, :length])
            x0, _ = to_x0_eps(self.config.dit.prediction, self.process, t, x_t, out)
            return jnp.where(known, clean, x0), share

        def push(t: jax.Array) -> jax.Array:
            return jnp.where(self.process.sigma(t) > settings.push_above, settings.push, 0.0)

        asked: Denoise = functools.partial(denoise, params["dit"])
        if settings.push:
            weak = functools.partial(denoise, without_attention(params["dit"], settings.skip))
            if use_guidance:
                asked = guided(asked, settings.guidance, weak, push)
            else:
                asked = pushed(asked, weak, push)
        elif use_guidance:
            asked = guided(asked, settings.guidance)
        keys_B = jax.vmap(jax.random.key)(seeds_B)
        x, _ = sample(
            asked,
            initial_noise(keys_B, clean.shape[1:]),
            self.times(settings),
            self.process,
            settings.make(),
            keys_B,
        )
        return unpatchify(x.reshape(batch, *grid, -1), (1, *patch))

    def text(self, captions: Sequence[Sequence[str]]) -> tuple[np.ndarray, jax.Array]:
        """Mask (B, J, S) and features (B, J, S, E) of as many captions for each video."""
        ids, mask = self.tokenizer.encode([text for texts in captions for text in texts])
        params, told = {"text": self.params["text"]}, (ids, mask)
        if self.mesh is not None:
            params, told = spread(self.mesh, params), replicate(self.mesh, told)
        features = jnp.asarray(jax.device_get(self._text(params, *told)))
        shape = (len(captions), len(captions[0]))
        return mask.reshape(*shape, -1), features.reshape(*shape, *features.shape[1:])

    def check_parts(self) -> None:
        """Refuses (UserError) given frames and shots for a model that cannot be told of them."""
        if self.dit.one_time:
            raise UserError(
                f"dit.model={self.config.dit.model} knows one time for all tokens and one prompt:"
                " neither given frames nor shots are allowed"
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
        sampler: str | None = None,
        eta: float | None = None,
        variance: str | None = None,
    ) -> list[Result]:
        """`num` videos for each prompt, with seeds `seed`, `seed` + 1, ... in order.

        prompts: what to show; for a model of classes, the name or number of one (see `label`).
        seconds: length, rounded up to the next clip length (default: that of training). fps:
        frames a second. size: (height, width) in pixels. given: what every video must contain, or
        one list for each prompt (all of the same shapes and times). shots: when each shot begins,
        in seconds, and its caption, beside the prompt, which is the whole clip's; or one list for
        each prompt. The others are as in the config's `sample`. Raises UserError.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        settings = self.settings(
            sampler=sampler, steps=steps, guidance=guidance, push=push, eta=eta, variance=variance
        )
        fps = self.config.data.fps if fps is None else fps
        height, width = size or tuple(self.config.data.size)
        p = self.config.vae.patch[0]
        if not (0 < fps <= 240) or (seconds is not None and not 0 < seconds <= 3600):
            raise UserError(f"seconds {seconds}, fps {fps}: up to 3600 s and 240 fps are allowed")
        if not (0 < height <= 8192 and 0 < width <= 8192):
            raise UserError(f"size {height}x{width}: 1x1 to 8192x8192 pixels are allowed")
        if num < 1 or not prompts:
            raise UserError(f"{len(prompts)} prompts, num {num}: at least one of each is needed")
        frames = self.config.data.frames if seconds is None else clip_frames(seconds, fps, p)
        if given and len(given) == len(prompts) and not isinstance(given[0], Given):
            per_prompt: Any = [list(parts) for parts in given]  # type: ignore[arg-type]
        else:
            per_prompt = [list(given)] * len(prompts)
        shot_lists = _per_prompt(shots, prompts)
        if any(per_prompt) or any(shot_lists):
            self.check_parts()
        labels = [self.label(prompt) if self.classes else -1 for prompt in prompts]
        for listed in shot_lists:
            check_shots(listed, frames / fps)
        most = max(len(listed) for listed in shot_lists)
        told = [
            shot_list({"caption": prompt, "shots": listed}, most)
            for prompt, listed in zip(prompts, shot_lists, strict=True)
        ]
        rows = [
            Ask(*told[i], seed + i * num + k, per_prompt[i], labels[i])
            for i in range(len(prompts))
            for k in range(num)
        ]
        self.tokenizer.encode(prompts)  # refuses a long prompt before any work
        for listed in shot_lists:
            self.tokenizer.encode([caption for _, caption in listed], "shot")
        results: list[Result] = []
        batch = min(self.config.sample.batch, len(rows))
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            full = [part[i % len(part)] for i in range(batch)]
            latents = self._generate(full, frames, fps, height, width, settings)
            for ask, latent in zip(part, latents, strict=False):
                made = {
                    "prompt": ask.captions[0], "seed": ask.seed, "frames": frames, "fps": fps,
                    "size": [height, width], **settings.__dict__,
                }  # fmt: skip
                if ask.label >= 0:
                    made["class"] = ask.label
                if begun := int(np.isfinite(ask.starts).sum()):
                    pairs = zip(ask.starts[:begun].tolist(), ask.captions[1:], strict=False)
                    made["shots"] = [[round(start, 6), caption] for start, caption in pairs]
                parts = functools.partial(self._parts, latent[None], ask.given, height, width)
                results.append(Result(made, parts))
        return results

    def _generate(
        self,
        rows: Sequence[Ask],
        frames: int,
        fps: float,
        height: int,
        width: int,
        settings: Settings,
    ) -> np.ndarray:
        """Normalised latents (B, n, h, w, Z) of videos."""
        mask, features = self.text([row.captions for row in rows])
        starts = np.stack([row.starts for row in rows])
        p = self.config.vae.patch[0]
        count, h, w, channels = latent_shape(self.config, frames, height, width)
        clean = np.zeros((len(rows), count, h, w, channels), np.float32)
        times, is_given = [latent_times(count, p, fps)], [np.zeros(count, bool)]
        spans = [self._spans(row.given, frames) for row in rows]
        for position, span in enumerate(spans[0]):
            video = np.stack([parts[position].video for parts in spans])
            latent = np.asarray(self.encode(video))
            length = latent.shape[1]
            if span.frame == 0:
                clean[:, :length] = latent
                is_given[0][:length] = True
            else:
                clean = np.concatenate([clean, latent], axis=1)
                times.append(latent_times(length, p, fps, span.frame / fps))
                is_given.append(np.ones(length, bool))
        all_times = np.broadcast_to(np.concatenate(times), (len(rows), clean.shape[1]))
        all_given = np.broadcast_to(np.concatenate(is_given), all_times.shape)
        seeds = jnp.asarray([row.seed for row in rows], jnp.uint32)
        labels = jnp.asarray([row.label for row in rows], jnp.int32) if self.classes else None
        # By way of the host: what the encoder made is bound to its device, zeros are not, and the
        # denoiser would be compiled for each.
        told = jnp.asarray(clean), jnp.asarray(all_given), jnp.asarray(all_times, jnp.float32)
        shots = starts if starts.size else None
        made = self.denoise(mask, features, shots, *told, seeds, labels, settings=settings)
        return np.asarray(made[:, :count])  # its rows as arrays of the device are a program each

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

    def _spans(self, given: Sequence[Given], frames: int) -> list[Given]:
        """Given frames cut, or the last one held, to spans of 1 + k·p frames inside the clip."""
        p = self.config.vae.patch[0]
        spans = []
        for part in given:
            if not 0 <= part.frame < frames:
                raise UserError(f"given at frame {part.frame}: the clip has 0 to {frames - 1}")
            video = part.video[: frames - part.frame]
            video = video[: 1 + (len(video) - 1) // p * p]
            spans.append(Given(video, part.frame))
        return spans


def narrow(params: dict[str, Any], dtypes: Mapping[str, Any]) -> dict[str, Any]:
    """The same dict, the denoiser's kernels now in `dtypes` (see `operand_dtypes`): what is used
    in another dtype alone need not be kept. One after another, so that no two copies are of all."""
    flat = flatten_dict(params.pop("dit"), sep="/")
    for path in flat:
        flat[path] = jnp.asarray(flat[path], dtypes.get(path))
    params["dit"] = unflatten_dict(flat, sep="/")
    return params


def _per_prompt(shots: Any, prompts: Sequence[str]) -> list[Sequence[Shot]]:
    """One shot list for each prompt."""
    shots = list(shots)
    each = bool(shots) and (not shots[0] or not isinstance(shots[0][0], int | float))
    if each and len(shots) != len(prompts):
        raise UserError(f"{len(shots)} shot lists for {len(prompts)} prompts: one each is needed")
    return shots if each else [shots] * len(prompts)


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
    workdir: str | Path,
    overrides: ConfigDict | None = None,
    mesh: Mesh | None = None,
    watch: Watch | None = None,
) -> Model:
    """A trained workdir as a `Model`: config.json, tokenizer.json and the newest good checkpoints.

    `overrides` replaces the config's `sample` and `run` (what changes no weight). With a `mesh` the
    denoiser and the text encoder are never whole on one device. Raises UserError where a part is
    missing or damaged.
    """
    workdir = Path(workdir)
    config = overrides if overrides is not None else read_config(workdir)
    tokenizer = build_tokenizer(config, workdir)
    encoder = build_text_encoder(config, tokenizer)
    params: dict[str, Any] = {}
    meta: dict[str, Any] = {}
    for stage in ("vae", "dit"):
        directory = workdir / "checkpoints" / stage
        step = newest_everywhere(directory)
        if step is None:
            raise UserError(f"{directory} holds no checkpoint; train or import it first")
        split = None if mesh is None or stage == "vae" else functools.partial(param_sharding, mesh)
        params |= restore_ema(directory, step, split)
        params.pop("discriminator", None)  # which is of use in training alone
        meta = load_meta(directory, step)
    content = text_content(config)
    if any(meta["fields"].get(name) != value for name, value in content.items()):
        raise UserError(
            f"text.path={config.text.path} holds another text encoder than that of {workdir}"
        )
    with contextlib.nullcontext() if mesh is None else host_memory():
        if encoder.frozen:
            ids = np.zeros((1, tokenizer.length), np.int32)
            params["text"] = encoder.init(jax.random.key(0), ids, ids > 0)
        if empty := wordless(config, encoder, tokenizer, params.get("text")):
            params["empty"] = empty
    if mesh is not None:
        params |= spread(mesh, {"text": params["text"]})
    statistics = {name: np.asarray(v, np.float32) for name, v in meta["latents"].items()}
    classes = read_classes(config, workdir)
    return Model(config, tokenizer, encoder, params, statistics, mesh, classes, watch)
