"""A trained model on its devices: the autoencoder and the denoising scan.

Dimension key: B videos, T frames, H height, W width; n latent frames, h w places, Z latent
channels, L tokens, C token channels, J captions of a video (the whole video's, then one a shot), S
text tokens of a caption, E text width, K shots.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config import joined
from vdit.config.autoencoder import build_vae
from vdit.config.denoiser import build_denoiser, build_process, token_pixels
from vdit.denoiser import Denoiser
from vdit.diffusion.guidance import guided, projected, pushed, within
from vdit.diffusion.sampler import (
    SAMPLERS,
    Denoise,
    Sampler,
    advance,
    begin,
    configured,
    initial_noise,
)
from vdit.diffusion.schedule import Process, seen
from vdit.errors import UserError
from vdit.models.autoencoder import decode_in_chunks, encode_in_chunks
from vdit.models.dit import without_attention
from vdit.models.text import TextEncoder
from vdit.nn.narrow import operand_dtypes
from vdit.nn.patch import pad_to_multiple, patchify, to_float, to_uint8, unpatchify
from vdit.runtime.machine import device_memory
from vdit.runtime.mesh import gather, replicate, replicated, sampling_mesh, spread
from vdit.runtime.processes import Watch
from vdit.tokens import dense_tokens, filled

LARGE = 10**8  # parameters of a denoiser whose steps take longer than to compile it again
TOGETHER = 2 / 3  # most of a device's memory that two experts may fill; activations need some


@dataclass(frozen=True)
class Settings:
    """How to sample, as in the config's `sample`."""

    sampler: str
    steps: int
    guidance: float
    options: tuple[tuple[str, Any], ...]  # of all samplers: name, value
    spacing: str
    shift: float
    push: float
    push_above: float
    skip: tuple[float, float]
    guidance_levels: tuple[float, float]
    guidance_parallel: float
    guidance_radius: float
    guidance_low: float = 0.0

    def make(self) -> Sampler:
        """The sampler, with those options that it has."""
        return configured(self.sampler, dict(self.options))

    def shown(self) -> dict[str, Any]:
        """Every setting by name, options among them."""
        shown: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            shown |= dict(value) if field.name == "options" else {field.name: value}
        return shown


def settings_of(config: ConfigDict, **changes: Any) -> Settings:
    """The config's sampling settings with changes; None means the config's.

    A sampler's options are the parameters of its function: their values are the fields of
    `config.sample` of the same names, where it has them. Raises `UserError`.
    """
    fields = [field.name for field in dataclasses.fields(Settings) if field.name != "options"]
    makes = map(inspect.signature, SAMPLERS.values())
    options = sorted({name for make in makes for name in make.parameters})
    if unknown := sorted(changes.keys() - {*fields, *options}):
        known = ", ".join((*fields, *options))
        raise UserError(f"unknown setting {unknown[0]!r} of sampling: known are {known}")
    values = {name: config.sample[name] for name in (*fields, *options) if name in config.sample}
    values |= {name: value for name, value in changes.items() if value is not None}
    kept = tuple((name, values.pop(name)) for name in options if name in values)
    for name, value in (*values.items(), *kept):
        if not all(math.isfinite(x) for x in jax.tree.leaves(value) if isinstance(x, float)):
            raise UserError(f"{name} {value}: a finite number is allowed")
    settings = Settings(options=kept, **values)
    settings.make()  # refuses unknown names and options at once
    joined.check_steering(config, settings)
    joined.times_of(config, settings)
    return settings


class Codec:
    """Videos to normalised latents and back; `params` holds the group "vae"."""

    def __init__(
        self, config: ConfigDict, params: Mapping[str, Any], statistics: Mapping[str, np.ndarray]
    ) -> None:
        self.config, self.params, self.vae = config, params, build_vae(config)
        self.statistics = {name: jnp.asarray(value) for name, value in statistics.items()}
        self._encode, self._decode = jax.jit(self._encoded), jax.jit(self._decoded)
        self._pixels = jax.jit(to_uint8)

    def _encoded(self, params: Any, video: jax.Array, state: Any) -> Any:
        video = to_float(pad_to_multiple(video, token_pixels(self.config)))
        apply: Any = functools.partial(self.vae.apply, {"params": params["vae"]})
        return apply(video, state, method=self.vae.encode)[::2]

    def _decoded(self, params: Any, latent: jax.Array, state: Any) -> Any:
        params = {"params": params["vae"]}
        return self.vae.apply(params, latent, state, method=self.vae.decode)

    def encode(self, video_BTHWC: np.ndarray) -> jax.Array:
        """Normalised latents (B, n, h, w, Z) of videos of 1 + k·p frames with values 0 to 255."""
        encode = functools.partial(self._encode, {"vae": self.params["vae"]})
        p, chunk = self.config.vae.patch[0], self.config.vae.chunk
        latent = encode_in_chunks(encode, video_BTHWC, p, chunk)
        return (latent - self._shape("mean")) / self._shape("std")

    def stream(
        self, latent_BnhwZ: jax.Array | np.ndarray, height: int, width: int
    ) -> Iterator[np.ndarray]:
        """uint8 videos of normalised latents, in parts (B, t, height, width, 3)."""
        latent = latent_BnhwZ * self._shape("std") + self._shape("mean")
        decode, vae = functools.partial(self._decode, {"vae": self.params["vae"]}), self.config.vae
        for part in decode_in_chunks(decode, latent, tuple(vae.patch), vae.chunk, vae.tile):
            yield np.asarray(self._pixels(part))[:, :, :height, :width]

    def decode(self, latent_BnhwZ: jax.Array, height: int, width: int) -> np.ndarray:
        """uint8 videos (B, T, height, width, 3) of normalised latents."""
        return np.concatenate(list(self.stream(latent_BnhwZ, height, width)), axis=1)

    def _shape(self, name: str) -> jax.Array:
        return self.statistics[name].reshape(1, 1, 1, 1, -1)


class Inputs(NamedTuple):
    """What the scan needs to know of a batch of videos."""

    mask_BJS: Any
    features_BJSE: Any
    starts_BK: Any  # seconds at which shots begin; None for videos of one shot
    clean_BnhwZ: Any  # latents of given frames, 0 elsewhere; spans inside the clip are appended
    given_Bn: Any
    times_Bn: Any  # seconds
    seeds_B: Any
    label_B: Any  # class numbers, -1 for none; None unless the model is class-conditional
    negative: Any = None  # mask (B, J, S) and features (B, J, S, E) for the null rows of guidance
    beside_BnhwZ: Any = None  # of a network with channels beside the noisy ones
    image_BSE: Any = None  # an image's features, S of them


class Phase(NamedTuple):
    """The steps that one network takes: those from `first` on, before `last`."""

    network: str  # its group of parameters
    first: int
    last: int
    guidance: float


def phases_of(config: ConfigDict, settings: Settings) -> list[Phase]:
    """The networks in turn: of two experts, the second takes the steps below the boundary."""
    if config.dit.model != "wan" or not config.dit.wan.boundary:
        return [Phase("dit", 0, settings.steps, settings.guidance)]
    process = seen(build_process(config), settings.spacing)
    levels = process.network_time(joined.times_of(config, settings)[:-1])
    high = int((levels >= 1000.0 * config.dit.wan.boundary).sum())
    low = settings.guidance_low if settings.guidance != 1.0 else 0.0
    phases = [
        Phase("dit", 0, high, settings.guidance),
        Phase("low", high, settings.steps, low or settings.guidance),
    ]
    return [phase for phase in phases if phase.first < phase.last]


class Ready(NamedTuple):
    """Inputs as the sampler takes them."""

    denoise: Denoise
    process: Process
    shape: tuple[int, ...]  # (L, C) of a video's tokens
    latents: Callable[[jax.Array], jax.Array]  # (B, n, h, w, Z) of tokens (B, L, C)


Watcher = Callable[[int, Any], None]  # of steps that are done, and their x0 (B, n, h, w, Z)


class Scan:
    """The denoising scan, compiled once for each mesh and phase.

    `params` holds the group "dit", with two experts "low", and, if there is one, the "empty" text
    of `Denoiser.empty_text`. Experts are on the host and, where the device's memory does not hold
    both, take turns on it. See `sample.Model` for `mesh` and `watch`.
    """

    def __init__(
        self, config: ConfigDict, encoder: TextEncoder, params: dict[str, Any],
        mesh: Mesh | None = None, watch: Watch | None = None,
    ) -> None:  # fmt: skip
        self.config, self.encoder, self.params, self.mesh = config, encoder, params, mesh
        self._compiled: dict[Mesh | None, Any] = {}
        self._stepwise: dict[Mesh | None, tuple[Any, Any]] = {}
        self._networks: dict[tuple[Mesh | None, str], Any] = {}
        self._watch, self._begun = watch or Watch(), list[Any]()
        self.done: Callable[[int], None] | None = None  # told of each step, on one device
        self._times = np.zeros(0)

    def _tell(self, t: Any) -> None:
        """A step at time t begins."""
        if self.done is not None:
            self.done(int((self._times > float(np.max(t)) + 1e-6).sum()))

    def __call__(
        self, inputs: Inputs, settings: Settings, watch: Watcher | None = None
    ) -> jax.Array:
        """Normalised latents (B, n, h, w, Z), unchanged where given.

        With `watch`, which is called after each step, steps are calls of one program that is the
        same for any number of steps and any guidance but 1; what it raises ends them.
        """
        phases = phases_of(self.config, settings)
        guided = any(phase.guidance != 1.0 for phase in phases)
        mesh = self.mesh or sampling_mesh(inputs.clean_BnhwZ.shape[0] * (2 if guided else 1))
        if mesh is None:
            self._times = np.asarray(joined.times_of(self.config, settings))
            return self._steps(mesh, inputs, settings, phases, watch)
        program = settings, [x.shape for x in jax.tree.leaves(inputs)]
        self._watch.step("sample", len(self._begun) + 1, first=program not in self._begun)
        self._begun.append(program)
        try:
            with jax.set_mesh(mesh):
                latent = jax.device_get(self._steps(mesh, inputs, settings, phases, watch))
        finally:
            self._watch.rest()
        return jnp.asarray(latent)

    def _steps(
        self, mesh: Mesh | None, inputs: Inputs, settings: Settings, phases: list[Phase],
        watch: Watcher | None = None,
    ) -> jax.Array:  # fmt: skip
        """The phases in turn; each goes on from x and the sampler's state of the one before."""
        if mesh not in self._compiled:
            run = self.compiled(mesh)
            if not self._compiled:
                plain = dataclasses.replace(settings, push=0.0)  # autoguidance changes none
                dtypes = operand_dtypes(run, self.params, inputs, settings=plain)
                for network in {"dit", "low"} & self.params.keys():
                    narrow(self.params, dtypes, network)
            self._compiled[mesh] = run
        given, start = inputs if mesh is None else replicate(mesh, inputs), None
        if watch is not None:
            return self._one_by_one(mesh, given, settings, phases, watch)
        for phase in phases:
            params = self._placed(mesh, phase.network)
            start = self._compiled[mesh](params, given, start, settings=settings, phase=phase)
            if len(phases) > 1:  # the next one's parameters may need this one's memory
                jax.block_until_ready(start)
        assert start is not None
        return start

    def _one_by_one(
        self, mesh: Mesh | None, given: Inputs, settings: Settings, phases: list[Phase],
        watch: Watcher,
    ) -> jax.Array:  # fmt: skip
        """The phases step by step."""
        if mesh not in self._stepwise:
            denoiser, options = build_denoiser(self.config, self.encoder, mesh), ("settings",)
            self._stepwise[mesh] = tuple(
                jax.jit(functools.partial(run, denoiser, gather(mesh)), static_argnames=options,
                        out_shardings=everywhere(mesh))
                for run in (self._begin, self._step)
            )  # type: ignore[assignment]  # fmt: skip
        begun, step = self._stepwise[mesh]
        times, start = np.asarray(joined.times_of(self.config, settings), np.float32), None
        for phase in phases:
            params, scale = self._placed(mesh, phase.network), np.float32(phase.guidance)
            # A program's static settings are without those that it is given.
            any_scale = 1.0 if phase.guidance == 1.0 else 2.0
            fixed = dataclasses.replace(settings, steps=1, guidance=any_scale)
            start = begun(params, given, settings=fixed) if start is None else start
            for i in range(phase.first, phase.last):
                place = times[i : i + 2], np.int32(i + 1), scale
                start, x0, latents = step(params, given, start, *place, settings=fixed)
                watch(i + 1, jax.block_until_ready(x0))
        return latents

    def _begin(
        self, denoiser: Denoiser, gather: Callable[[Any], Any] | None, params: dict[str, Any],
        inputs: Inputs, *, settings: Settings,
    ) -> Any:  # fmt: skip
        """x and the sampler's state before the first step."""
        params = gather(params) if gather else params
        shape = self._ready(denoiser, False, params, inputs, settings).shape
        keys_B = jax.vmap(jax.random.key)(inputs.seeds_B)
        return begin(settings.make(), initial_noise(keys_B, shape), keys_B)

    def _step(
        self, denoiser: Denoiser, gather: Callable[[Any], Any] | None, params: dict[str, Any],
        inputs: Inputs, start: Any, times: jax.Array, number: jax.Array, scale: jax.Array, *,
        settings: Settings,
    ) -> Any:  # fmt: skip
        """One step from times[0] to times[1]: x and the sampler's state, x0's latents and x's."""
        params = gather(params) if gather else params
        ready = self._ready(denoiser, False, params, inputs, settings, scale)
        keys_B, sampler = jax.vmap(jax.random.key)(inputs.seeds_B), settings.make()
        start, made = advance(
            ready.denoise, start, times, ready.process, sampler, keys_B, number, every_step=True
        )
        return start, ready.latents(made.x0[0]), ready.latents(start[0])

    def compiled(self, mesh: Mesh | None, platform: str | None = None) -> Any:
        """run(params, inputs, settings=...) for a mesh, or for one device of `platform` (by default
        this one)."""
        denoiser = build_denoiser(self.config, self.encoder, mesh, platform)
        # JAX does not keep programs with a callback in its compilation cache: only where steps take
        # long, or nothing is kept, do they tell of themselves.
        cached = getattr(jax.config, "jax_compilation_cache_dir", None)
        networks = [self.params[name] for name in ("dit", "low") if name in self.params]
        slow = not cached or sum(x.size for x in jax.tree.leaves(networks)) > LARGE
        tell = mesh is None and self.done is not None and slow
        run = functools.partial(self._run, denoiser, gather(mesh), tell)
        static = ("settings", "phase")
        return jax.jit(run, static_argnames=static, out_shardings=everywhere(mesh))

    def _placed(self, mesh: Mesh | None, network: str) -> dict[str, Any]:
        """A network's parameters, and the empty text's, where the scan runs."""
        if (mesh, network) not in self._networks:
            if self._takes_turns(mesh):
                self._networks.clear()
            params = {"dit": self.params[network]}
            params |= {"empty": self.params["empty"]} if "empty" in self.params else {}
            on_mesh = functools.partial(spread, mesh) if mesh is not None else None
            self._networks[mesh, network] = (on_mesh or jax.device_put)(params)
        return self._networks[mesh, network]

    def _takes_turns(self, mesh: Mesh | None) -> bool:
        """Whether there are two experts, on the host, that would fill too much of a device."""
        leaves = jax.tree.leaves([self.params.get(name) for name in ("dit", "low")])
        limit, split = device_memory(), 1 if mesh is None else mesh.size // mesh.shape["data"]
        if limit is None or "low" not in self.params or not isinstance(leaves[0], np.ndarray):
            return False
        return sum(leaf.nbytes for leaf in leaves) / split > TOGETHER * limit

    def _run(
        self, denoiser: Denoiser, gather: Callable[[Any], Any] | None, tell: bool,
        params: dict[str, Any], inputs: Inputs, start: Any = None, *, settings: Settings,
        phase: Phase | None = None,
    ) -> Any:  # fmt: skip
        """The latents after the last phase, x and the sampler's state after any other."""
        phase = phase or Phase("dit", 0, settings.steps, settings.guidance)
        settings = dataclasses.replace(settings, guidance=phase.guidance)
        params = gather(params) if gather else params
        ready = self._ready(denoiser, tell, params, inputs, settings)
        keys_B, sampler = jax.vmap(jax.random.key)(inputs.seeds_B), settings.make()
        if start is None:
            start = begin(sampler, initial_noise(keys_B, ready.shape), keys_B)
        times = joined.times_of(self.config, settings)[phase.first : phase.last + 1]
        start, _ = advance(
            ready.denoise, start, times, ready.process, sampler, keys_B, phase.first + 1
        )
        return start if phase.last < settings.steps else ready.latents(start[0])

    def _ready(
        self, denoiser: Denoiser, tell: bool, params: dict[str, Any], inputs: Inputs,
        settings: Settings, scale: jax.Array | None = None,
    ) -> Ready:  # fmt: skip
        """The denoiser with its inputs; see `steered` for `scale`."""
        process = seen(denoiser.process, settings.spacing)
        denoiser = dataclasses.replace(denoiser, process=process)
        place = inputs.times_Bn, inputs.given_Bn, inputs.starts_BK
        clean, layout = dense_tokens(inputs.clean_BnhwZ, denoiser.patch, *place)
        (batch, length, _), grid = clean.shape, layout.grid
        assert grid is not None
        layout = filled(layout, denoiser.multiple)
        known = layout.given()[:, :length, None]
        beside = inputs.beside_BnhwZ
        if beside is not None:
            beside = patchify(beside, (1, *denoiser.patch)).reshape(batch, length, -1)
        rows = (
            clean, known, layout, inputs.mask_BJS, inputs.features_BJSE, inputs.label_B, beside,
            inputs.image_BSE,
        )  # fmt: skip
        if settings.guidance != 1.0:
            null = *rows[:3], *(inputs.negative or rows[3:5]), *rows[5:]
            rows = jax.tree.map(lambda *x: jnp.concatenate(x), rows, null)
        all_clean, all_known, all_layout, mask, features, label, beside, image = rows
        all_layout = jax.tree.map(denoiser.constrain, all_layout)
        drop = (jnp.arange(len(all_clean)) >= batch) & (inputs.negative is None)
        conditions = denoiser.condition(features, mask, drop, label, params.get("empty"))
        conditions = dataclasses.replace(conditions, beside=beside, image=image)

        def denoise(params: Any, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
            # x_t has all rows, or the conditional half.
            known, clean, layout, condition = jax.tree.map(
                lambda x: x[: len(x_t)], (all_known, all_clean, all_layout, conditions)
            )
            if tell:
                jax.debug.callback(self._tell, t)
            # A video's two rows may lie on two devices.
            x_t = jnp.where(known, clean, x_t)
            denoised = denoiser(params, x_t, t, layout, condition)
            return jnp.where(known, clean, denoised.x0), denoised.share

        steer = steered(denoise, params["dit"], settings, process, scale)

        def latents(x: jax.Array) -> jax.Array:
            return unpatchify(x.reshape(batch, *grid, -1), (1, *denoiser.patch))

        return Ready(steer, process, clean.shape[1:], latents)


def steered(
    denoise: Callable[..., tuple[jax.Array, Any]], params: Any, settings: Settings,
    process: Process, scale: jax.Array | None = None,
) -> Denoise:  # fmt: skip
    """The denoiser with these parameters, classifier-free guidance and autoguidance; `scale`: that
    of guidance where it is no constant of the program."""
    plain: Denoise = functools.partial(denoise, params)
    weak: Denoise | None = None
    project: Callable[..., jax.Array] | None = None

    def push(t: jax.Array) -> jax.Array:
        return jnp.where(process.sigma(t) > settings.push_above, settings.push, 0.0)

    if settings.push:
        weak = functools.partial(denoise, without_attention(params, settings.skip))
    alone = pushed(plain, weak, push) if weak else plain
    if settings.guidance == 1.0:
        return alone
    parallel, radius = settings.guidance_parallel, settings.guidance_radius
    if (parallel, radius) != (1.0, 0.0):
        project = functools.partial(projected, parallel=parallel, radius=radius)
    both = guided(plain, settings.guidance if scale is None else scale, weak, push, project)
    levels = settings.guidance_levels
    return both if levels == (0.0, 1.0) else within(process, levels, both, alone)


def everywhere(mesh: Mesh | None) -> Any:
    """The sharding of results that every process has."""
    return None if mesh is None else replicated(mesh)


def narrow(
    params: dict[str, Any], dtypes: Mapping[str, Any], network: str = "dit"
) -> dict[str, Any]:
    """The same dict, with a denoiser's kernels in `dtypes` (see `operand_dtypes`): drops float32
    copies that are no longer used, leaf by leaf, so that memory never holds both copies of all."""
    flat = flatten_dict(params.pop(network), sep="/")
    for path, leaf in flat.items():
        on_host = isinstance(leaf, np.ndarray)
        flat[path] = (np if on_host else jnp).asarray(leaf, dtypes.get(path))
    params[network] = unflatten_dict(flat, sep="/")
    return params
