"""All sections, and the checks that read several of them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vdit.config import STAGES, autoencoder, classifier, data, denoiser, run, sample, text
from vdit.config.classes import check_classes
from vdit.config.identity import flat
from vdit.config.shared import Section, refusal
from vdit.data import sources
from vdit.diffusion import schedule
from vdit.diffusion.guidance import check_guidance
from vdit.diffusion.sampler import configured
from vdit.errors import UserError
from vdit.models.dit import AXES, preset, skipped
from vdit.runtime import attention

SECTIONS: dict[str, Section] = {
    "data": data.SECTION,
    "text": text.SECTION,
    "vae": autoencoder.SECTION,
    "latents": autoencoder.LATENTS,
    "dit": denoiser.SECTION,
    "classify": classifier.SECTION,
    "sample": sample.SECTION,
    "eval": sample.EVAL,
    "mesh": run.MESH,
    "run": run.RUN,
}


def check(config: ConfigDict, platform: str | None = None) -> None:
    """Refuses a configuration that cannot run, before a run begins; `platform`: see `runs_here`."""
    for stage in config.stages:
        if stage not in STAGES:
            raise UserError(f"stages: {stage!r} is unknown; known are {', '.join(STAGES)}")
    if "low" in config.stages and not config.dit.wan.boundary:
        raise refusal(config, "stages dit.wan.boundary", "low is allowed for two experts")
    _check_numbers(config)
    for section in SECTIONS.values():
        section.check(config)
    attention.check(config.run.attention, platform)
    _check_clips(config)
    _check_classes(config)
    _check_text(config)
    network = denoiser.build_dit(config)
    if network.from_start:
        _check_given(config, ("text",) if network.one_time else ("text", "image", "prefix"))
    if config.data.shapes:
        _check_shapes(config)
    _check_sampling(config)
    _check_chunk(config)
    if "classify" in config.stages:
        _check_classify(config)
    for name, value in _numbers(config):  # last, for most fields have a narrower range
        if value < 0 and name not in SIGNED:
            raise UserError(f"{name} is {value}: 0 or more is allowed")


MOST_STEPS = 10_000  # of sampling
MOST = 2**31 - 1  # what a 32-bit integer holds
SIGNED = {f"config.mesh.{name}" for name in ("data", "fsdp", "tensor", "sequence")} | {
    "config.dit.logit_normal", "config.sample.guidance", "config.sample.push"
}  # fmt: skip


def _numbers(config: ConfigDict) -> Iterator[tuple[str, int | float]]:
    """All numbers of the configuration, by the names of their fields."""
    for name, value in flat(config, "config").items():
        numbers = value if isinstance(value, list) else [value]
        yield from ((name, x) for x in numbers if isinstance(x, int | float))


def _check_numbers(config: ConfigDict) -> None:
    """Refuses what is not finite or no array can have, and a seed that JAX or a world does not
    take."""
    for name, value in _numbers(config):
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}: finite numbers are allowed")
        if abs(value) > MOST and name != "config.seed":
            raise UserError(f"{name} is {value}: up to {MOST} is allowed")
    if not 0 <= config.seed < 2**32 - 1:  # stage dit draws with the next one
        raise UserError(f"config.seed is {config.seed}: 0 to {2**32 - 2} is allowed")


def _check_clips(config: ConfigDict) -> None:
    """Checks that the source has such clips, and that the autoencoder can encode them."""
    frames, p = config.data.frames, config.vae.patch[0]
    if frames < 1 or (frames - 1) % p:
        raise refusal(config, "data.frames vae.patch", f"1 + k*{p} is allowed")
    if not config.data.shapes:
        sources.check_limits(config)
    if config.vae.body_weight:
        sources.known(config, "bodies", "vae.body_weight")
    if config.dit.caption_drop and not sources.most_shots(config):
        fields = "dit.caption_drop data.source data.shots"
        raise refusal(config, fields, "clips of several captions are allowed")


def _is_shape(shape: Any, p: int) -> bool:
    """Whether it is (frames, height, width, fps), with 1 + k·p frames."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 4:
        return False
    if not all(isinstance(x, (int, float)) and 0 < x < math.inf for x in shape):
        return False
    return all(int(x) == x for x in shape[:3]) and (shape[0] - 1) % p == 0


def _check_shapes(config: ConfigDict) -> None:
    """Checks data.shapes, and that the denoiser can be trained on packed rows."""
    p = config.vae.patch[0]
    if sources.most_shots(config):
        raise refusal(config, "data.shapes data.shots", "one caption a clip is allowed")
    for shape in config.data.shapes:
        if not _is_shape(shape, p):
            raise UserError(
                f"data.shapes has {shape!r}: (1 + k*{p} frames, height, width, fps) is allowed"
            )
    sources.check_limits(config)
    given = config.dit.given
    if min(given.values()) < 0 or given.text + given.image + given.prefix <= 0:
        allowed = "shares of 0 and more, text, image and prefix not all 0, are allowed"
        raise UserError(f"dit.given is {dict(given)} with data.shapes: {allowed}")
    if config.dit.axes != "joint":
        raise refusal(config, "data.shapes dit.axes", "joint is allowed with packed rows")
    if len(config.dit.pack) != 3 or min(config.dit.pack) < 0:
        raise refusal(config, "dit.pack", "three numbers of at least 0 are allowed")


def _check_text(config: ConfigDict) -> None:
    """Checks that the denoiser takes the text encoder's features."""
    encoder, dit = config.text.encoder, config.dit
    if config.text.padding and (encoder, dit.model) != ("clip", "unet"):
        fields = "text.padding text.encoder dit.model"
        raise refusal(config, fields, "clip and unet are allowed")
    one_caption = (dit.model, dit.axes) == ("vdit", "joint") and not sources.most_shots(config)
    if dit.text == "context" and not one_caption:
        allowed = "vdit, joint and sources of one caption a clip are allowed"
        raise refusal(config, "dit.text dit.model dit.axes data.source", allowed)
    if dit.model != "paper" and encoder == "none":
        allowed = "only class-conditional networks (paper) work without text"
        raise refusal(config, "text.encoder dit.model", allowed)
    if dit.model == "paper" and dit.paper.text == (encoder == "none"):
        allowed = "none is allowed for networks without text, and only for them"
        raise refusal(config, "text.encoder dit.paper.text", allowed)


def _check_classes(config: ConfigDict) -> None:
    """Checks that the denoiser has the source's classes."""
    label, asks = config.data.label, config.dit.paper.classes
    asks = asks if config.dit.model == "paper" else 0
    if bool(label) != bool(asks) and "dit" in config.stages:
        allowed = "networks with classes (paper) need data.label, and no other takes it"
        raise refusal(config, "data.label dit.model dit.paper.classes", allowed)
    if label and (count := sources.class_count(config)):
        check_classes(config, count)


def _check_given(config: ConfigDict, tasks: tuple[str, ...]) -> None:
    """Refuses all tasks but these, and clips that such networks do not know."""
    given = config.dit.given
    if config.data.shapes or sources.most_shots(config):
        allowed = "clips of one shape, each with one caption or class, are allowed"
        raise refusal(config, "dit.model data.shapes data.shots", allowed)
    if wrong := [name for name in given if name not in tasks and given[name] > 0]:
        known = " and ".join(tasks)
        allowed = f"one time for all tokens: 0 is allowed for all but {known}"
        raise refusal(config, f"dit.given.{wrong[0]} dit.model", allowed)


def _check_sampling(config: ConfigDict) -> None:
    """Checks that sampler, denoiser and process fit together."""
    dit, sample = config.dit, config.sample
    learned = sample.sampler == "ddpm" and sample.variance == "learned"
    if learned and not dit.learned_variance:
        raise refusal(config, "sample.variance dit.learned_variance", "True is allowed")
    configured(sample.sampler, sample)  # refuses what the sampler does not take
    jax.eval_shape(lambda: times_of(config, sample))  # refuses what the process does not
    check_steering(config, sample)


def times_of(config: ConfigDict, settings: Any) -> jax.Array:
    """The grid of times t_0 > .. > t_n with the steps, shift and spacing of `settings`.

    dit.shift stands for a shift of 0; grids that set noise levels themselves are not shifted.
    """
    if not 1 <= settings.steps <= MOST_STEPS:
        raise UserError(f"sample.steps is {settings.steps}: 1 to {MOST_STEPS} is allowed")
    shift = settings.shift or config.dit.shift
    if settings.spacing not in schedule.SHIFTED:
        shift = 1.0
    process = denoiser.build_process(config)
    return schedule.timesteps(process, settings.steps, shift, settings.spacing)


def check_steering(config: ConfigDict, settings: Any) -> None:
    """Checks the options of guidance, and that the denoiser can be degraded for autoguidance."""
    check_guidance(settings.guidance_levels, settings.guidance_parallel, settings.guidance_radius)
    push, skip = settings.push, settings.skip
    if not push:
        return
    if config.dit.model != "vdit":
        raise UserError(f"sample.push is {push} with dit.model={config.dit.model}: 0 is allowed")
    depth = preset(config.dit.preset)["depth"] // len(AXES[config.dit.axes])
    if len(skip) != 2 or not skipped(depth, (skip[0], skip[1])):
        raise UserError(
            f"sample.skip is {tuple(skip)}: two shares of the depth between which one of its"
            f" {depth} layers has its middle are allowed"
        )


def _check_chunk(config: ConfigDict) -> None:
    """Checks eval.chunk: its length, and that clips can be continued and scored."""
    chunk, p = config.eval.chunk, config.vae.patch[0]
    if not chunk:
        return
    low, high = (1 + 2 * p) / config.data.fps, config.data.frames / config.data.fps
    if sources.chosen(config).score_chunks is None or config.dit.model != "vdit":
        known = sources.named(lambda row: row.score_chunks is not None)
        allowed = f"0, or {known} and vdit, are allowed"
        raise refusal(config, "eval.chunk data.source dit.model", allowed)
    if not low <= chunk < high:
        raise refusal(config, "eval.chunk", f"0 and {low:g} to less than {high:g} are allowed")


def _check_classify(config: ConfigDict) -> None:
    """Checks that the clips have labels, and that the classifier takes their shape."""
    sources.questions(config)
    video = (1, config.data.frames, *config.data.size, 3)
    # Traced, without computing: refuses a network or a size that is not possible.
    init = classifier.build_classifier(config).init
    jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct(video, jnp.float32))


def check_mesh(config: ConfigDict, sizes: Mapping[str, int]) -> None:
    """Checks that the mesh divides the denoiser's heads, if a denoiser is trained."""
    if {"dit", "low"}.isdisjoint(config.stages):
        return
    where, all_heads = denoiser.DENOISERS[config.dit.model].heads(config)
    try:
        for heads in all_heads:
            attention.check_mesh(config.run.attention, config.run.sequence, heads, sizes)
    except UserError as error:
        raise UserError(f"{error} ({where})") from error
