"""What a configuration may say: everything that a part would refuse late, refused at once."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vdit import build
from vdit.config import LATER, STAGES
from vdit.data.labels import QUESTIONS
from vdit.data.world.oracle import ATTRIBUTES
from vdit.diffusion import schedule
from vdit.diffusion.prediction import PREDICTIONS, WEIGHTS
from vdit.diffusion.sampler import SAMPLERS
from vdit.errors import UserError
from vdit.models import dit_paper, lpips, text, text_folder, unet, vivit
from vdit.models.discriminator import GROUPS
from vdit.models.dit import AXES, REMAT, TEXTS, preset, skipped
from vdit.nn.linear import ACTIVATIONS
from vdit.runtime import attention
from vdit.runtime.machine import DTYPES

# Fields of numbers above 0.
POSITIVE = (
    "data.fps", "latents.clips", "vae.train.batch", "vae.train.steps", "vae.train.accumulate",
    "vae.window", "vae.channels", "vae.chunk", "dit.train.batch", "dit.train.steps",
    "dit.train.accumulate", "sample.steps", "sample.batch", "sample.zoom", "text.length",
    "run.log_every", "run.save_every", "run.keep", "run.unroll", "run.lost",
    "classify.train.batch", "classify.train.steps", "classify.train.accumulate",
    "classify.heldout",
)  # fmt: skip


def check(config: ConfigDict, platform: str | None = None) -> None:
    """Refuses what the parts would refuse late, or not at all; `platform` as in `runs_here`."""
    _check_names(config)
    attention.check(config.run.attention, platform)
    _check_numbers(config)
    _check_text(config)
    _check_source(config)
    _check_vae(config)
    _check_losses(config)
    _check_window(config)
    _check_chunk(config)
    if "classify" in config.stages:
        _check_classify(config)
    _check_label(config)
    if config.dit.model == "paper":
        _check_paper(config)
    elif config.text.encoder == "none":
        raise UserError(
            f"text.encoder=none with dit.model={config.dit.model}: only models of classes go"
            " without"
        )
    if config.dit.model == "unet":
        _check_unet(config)
    if config.data.shapes:
        _check_shapes(config)
    _check_diffusion(config)


def _check_names(config: ConfigDict) -> None:
    """Refuses rows of tables that there are not."""
    tables: dict[str, Iterable[str]] = {
        "run.dtype": DTYPES, "run.attention": attention.KERNELS,
        "run.sequence": attention.SEQUENCE, "run.remat": REMAT, "data.source": build.SOURCES,
        "text.encoder": text.ENCODERS, "vae.model": build.VAES, "vae.lpips_net": lpips.NETS,
        "dit.model": build.DITS, "dit.axes": AXES, "dit.text": TEXTS,
        "dit.process": schedule.PROCESSES, "dit.prediction": PREDICTIONS,
        "dit.loss_weight": WEIGHTS, "sample.sampler": SAMPLERS, "classify.activation": ACTIVATIONS,
    }  # fmt: skip
    for name, table in tables.items():
        build.choose(dict.fromkeys(table), name, _value(config, name))
    preset(config.dit.preset)
    vivit.preset(config.classify.preset)
    for stage in config.stages:
        if stage not in STAGES:
            raise UserError(f"stages: {stage!r} is unknown; known are {', '.join(STAGES)}")


def _value(config: ConfigDict, name: str) -> Any:
    """The field of a dotted name."""
    return functools.reduce(lambda part, field: part[field], name.split("."), config)


def _check_numbers(config: ConfigDict) -> None:
    """Refuses numbers that are out of any range."""
    sizes = {
        "vae.patch": 3, "data.size": 2, "data.objects": 2, "data.shots": 2, "dit.patch": 2,
    }  # fmt: skip
    for name, size in sizes.items():
        value = _value(config, name)
        if len(value) != size or min(value) < 1:
            raise UserError(f"{name} is {value}: {size} numbers of at least 1 are allowed")
    for name in POSITIVE:
        if _value(config, name) <= 0:
            raise UserError(f"{name} is {_value(config, name)}: a number above 0 is allowed")
    if config.run.stuck < 0:
        raise UserError(f"run.stuck is {config.run.stuck}: seconds, or 0 for ever, are allowed")
    if not 0.0 <= config.dit.caption_drop <= 1.0:
        raise UserError(f"dit.caption_drop is {config.dit.caption_drop}: 0 to 1 is allowed")
    if config.data.frames < 1 or (config.data.frames - 1) % config.vae.patch[0]:
        p = config.vae.patch[0]
        raise UserError(f"data.frames is {config.data.frames}: 1 + k*{p} is allowed (vae.patch)")


def _check_source(config: ConfigDict) -> None:
    """Refuses a source's fields that another does not take, or that are not possible."""
    data = config.data
    _check_tfds(config)
    if data.source in build.OF_SHOTS:
        build.source(config, "train", Path())  # its own limits, before anything is trained
    if data.source != "playground" and data.detail != LATER["data.detail"]:
        raise UserError(f"data.detail with data.source={data.source}: only playground takes it")
    if data.source not in build.OF_SHOTS and tuple(data.shots) != (1, 1):
        known = " and ".join(build.OF_SHOTS)
        raise UserError(f"data.shots with data.source={data.source}: only {known} take it")
    if config.dit.caption_drop and not build.most_shots(config):
        raise UserError("dit.caption_drop needs clips of several captions: data.shots")


def _check_vae(config: ConfigDict) -> None:
    """Refuses an autoencoder that is none, and fields that another model has."""
    for name in ("pixels", "residual", "decoder_width"):
        value = config.vae[name]
        if config.vae.model != "causal" and value != LATER[f"vae.{name}"]:
            raise UserError(
                f"vae.{name} is {value} with vae.model={config.vae.model}: only causal takes it"
            )
    if config.vae.model != "vivit":
        _check_conv(config)
    least = 4 * max(config.vae.patch[1:])
    if config.vae.tile and config.vae.tile < least:
        raise UserError(f"vae.tile is {config.vae.tile}: 0 (none) and {least} or more are allowed")
    heads = config.vae.heads
    if config.vae.model == "vivit" and (heads < 1 or config.vae.width % (2 * heads)):
        raise UserError(
            f"vae.heads {heads} must cut vae.width {config.vae.width} into even shares"
        )


def _check_diffusion(config: ConfigDict) -> None:
    """Refuses a process, times and a sampler that do not go together."""
    dit, sample, process = config.dit, config.sample, build.process(config)
    if dit.learned_variance and process.points is None:
        raise UserError(
            f"dit.learned_variance needs a table as dit.process=ddpm, not {dit.process}"
        )
    learned = sample.sampler == "ddpm" and sample.variance == "learned"
    if learned and not dit.learned_variance:
        raise UserError("sample.variance=learned needs a model with dit.learned_variance=True")
    times = functools.partial(
        schedule.sample_times, process, logit_normal=dit.logit_normal or None, shift=dit.shift
    )
    # Traced, so that no device is touched: these refuse what does not fit the process.
    jax.eval_shape(times, jax.ShapeDtypeStruct((1,), jnp.float32))
    steps = sample.steps, sample.shift or dit.shift, sample.spacing
    jax.eval_shape(lambda: schedule.timesteps(process, *steps))
    check_push(config, sample.push, sample.skip)


def check_push(config: ConfigDict, push: float, skip: Sequence[float]) -> None:
    """Refuses a weaker answer (sample.push, sample.skip) that a denoiser cannot give."""
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


def _check_losses(config: ConfigDict) -> None:
    """Refuses losses of the autoencoder that are not possible, or whose weights are not there."""
    for name in ("lpips_weight", "adversarial_weight", "adversarial_start"):
        if config.vae[name] < 0:
            raise UserError(f"vae.{name} is {config.vae[name]}: 0 or more is allowed")
    width, levels = config.vae.adversarial_width, config.vae.adversarial_levels
    if width < GROUPS or width % GROUPS:
        raise UserError(f"vae.adversarial_width is {width}: a multiple of {GROUPS} is allowed")
    if levels < 1 or (config.vae.adversarial_weight and min(config.data.size) < 2**levels):
        raise UserError(
            f"vae.adversarial_levels is {levels}: at least 1, and as often as data.size"
            f" {tuple(config.data.size)} can be halved, is allowed"
        )
    net = lpips.NETS[config.vae.lpips_net]
    if config.vae.lpips_weight:
        if min(config.data.size) < net.least:
            raise UserError(
                f"data.size is {tuple(config.data.size)}: vae.lpips_net={config.vae.lpips_net}"
                f" needs {net.least} rows and columns or more"
            )
        lpips.weights_file(config.vae.lpips_net)


def _check_window(config: ConfigDict) -> None:
    """Refuses a window that is none, or that nothing reads."""
    window, axes = tuple(config.dit.window), config.dit.axes
    if len(window) != 3 or min(window) < 1:
        raise UserError(f"dit.window is {window}: 3 numbers of at least 1 are allowed")
    if axes != "windowed" and window != LATER["dit.window"]:
        raise UserError(f"dit.window is given with dit.axes={axes}: only windowed takes it")
    if axes == "windowed" and config.dit.model != "vdit":
        raise UserError(f"dit.axes=windowed with dit.model={config.dit.model}: vdit is allowed")


def _check_text(config: ConfigDict) -> None:
    """Refuses an encoder's fields that another does not take, and a text in places without any."""
    if config.text.encoder in text_folder.FAMILIES:
        build.text_encoder(config, build.tokenizer(config, Path()))  # reads no tensor yet
    elif config.text.path:
        known = ", ".join(text_folder.FAMILIES)
        raise UserError(
            f"text.path is given with text.encoder={config.text.encoder}: only {known} take it"
        )
    read_by = config.text.encoder, config.dit.model
    if config.text.padding and read_by != ("clip", "unet"):
        raise UserError(
            f"text.padding=True with text.encoder={read_by[0]} and dit.model={read_by[1]}: clip and"
            " unet are allowed"
        )
    where = config.dit.model, config.dit.axes
    if config.dit.text == "context" and (where != ("vdit", "joint") or build.most_shots(config)):
        raise UserError(
            f"dit.text=context with dit.model={where[0]}, dit.axes={where[1]} and data.source="
            f"{config.data.source}: vdit, joint and sources of one caption a clip are allowed"
        )


def _check_chunk(config: ConfigDict) -> None:
    """Refuses chunks of a clip that are none, and what cannot be continued or read."""
    chunk, p = config.eval.chunk, config.vae.patch[0]
    if not chunk:
        return
    low, high = (1 + 2 * p) / config.data.fps, config.data.frames / config.data.fps
    if config.data.source != "world" or config.dit.model != "vdit":
        raise UserError(
            f"eval.chunk is {chunk:g}: 0 is allowed with data.source={config.data.source} and"
            f" dit.model={config.dit.model}; it needs world and vdit"
        )
    if not low <= chunk < high:
        raise UserError(
            f"eval.chunk is {chunk:g} seconds: 0 and {low:g} to less than {high:g} are allowed"
        )


def check_mesh(config: ConfigDict, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh that the denoiser's heads do not go with, where one is trained."""
    if "dit" not in config.stages:
        return
    where, all_heads = f"dit.preset={config.dit.preset}", (preset(config.dit.preset)["heads"],)
    if config.dit.model == "unet":
        where, all_heads = "dit.unet.heads", tuple(config.dit.unet.heads)
    try:
        for heads in all_heads:
            attention.check_mesh(config.run.attention, config.run.sequence, heads, sizes)
    except UserError as error:
        raise UserError(f"{error} ({where})") from error


def _check_tfds(config: ConfigDict) -> None:
    """Refuses fields of the source tfds that another does not take, or that are not possible."""
    for name in build.OF_TFDS:
        value = config.data[name]
        if config.data.source != "tfds" and value != LATER[f"data.{name}"]:
            raise UserError(
                f"data.{name} is given with data.source={config.data.source}: only tfds takes it"
            )
    if "{label}" not in config.data.template:
        raise UserError(f"data.template is {config.data.template!r}: it has no {{label}}")
    if not 0 <= config.data.native_fps <= 1000:
        raise UserError(
            f"data.native_fps is {config.data.native_fps}: 0 (what the set says) to 1000 is allowed"
        )


def _is_shape(shape: Any, p: int) -> bool:
    """Whether it is (frames, height, width, fps), with 1 + k·p frames."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 4:
        return False
    if not all(isinstance(x, (int, float)) and 0 < x < math.inf for x in shape):
        return False
    return all(int(x) == x for x in shape[:3]) and (shape[0] - 1) % p == 0


def _check_shapes(config: ConfigDict) -> None:
    """Refuses shapes that are no clips, and what packed rows cannot be trained for."""
    p = config.vae.patch[0]
    if build.most_shots(config):
        raise UserError("data.shapes with data.shots: packed rows know one caption a clip")
    for shape in config.data.shapes:
        if not _is_shape(shape, p):
            raise UserError(
                f"data.shapes has {shape!r}: (1 + k*{p} frames, height, width, fps) is allowed"
            )
    if config.data.source in build.ENDLESS:
        build.training_clips(config, Path())  # its own limits, before anything is trained
    given = config.dit.given
    if min(given.values()) < 0 or given.text + given.prefix <= 0:
        raise UserError(
            f"dit.given is {dict(given)}: shares of 0 and more, text and prefix not both 0, are"
            " allowed with data.shapes"
        )
    if config.dit.axes != "joint":
        raise UserError(f"data.shapes with dit.axes={config.dit.axes}: packed rows go joint")
    if len(config.dit.pack) != 3 or min(config.dit.pack) < 0:
        raise UserError(f"dit.pack is {config.dit.pack}: three numbers of at least 0 are allowed")


def _check_one_time(config: ConfigDict) -> None:
    """Refuses what a model that knows one time for all tokens cannot be trained for."""
    model, given = config.dit.model, config.dit.given
    if config.data.shapes or build.most_shots(config):
        raise UserError(
            f"dit.model={model} with data.shapes or data.shots: clips of one shape, each"
            " with one caption or class, are allowed"
        )
    if wrong := [name for name in given if name != "text" and given[name] > 0]:
        raise UserError(
            f"dit.given.{wrong[0]}={given[wrong[0]]} with dit.model={model}, which knows one time"
            " for all tokens: 0 is allowed for all but text"
        )


def _check_unet(config: ConfigDict) -> None:
    """Refuses what no U-Net can be, or can be trained for."""
    dit = config.dit
    sizes = {name: value for name, value in dit.unet.items() if name != "linear"}
    unet.check(**sizes)
    if (dit.preset, dit.axes) != ("nano", "joint"):
        raise UserError(
            f"dit.preset={dit.preset}, dit.axes={dit.axes} with dit.model=unet: its size is"
            " dit.unet's, and nano and joint, the defaults, are allowed"
        )
    _check_one_time(config)


def _check_label(config: ConfigDict) -> None:
    """Refuses classes that a source does not have, or that no model here is told."""
    label, source, asks = config.data.label, config.data.source, config.dit.paper.classes
    asks = asks if config.dit.model == "paper" else 0
    if bool(label) != bool(asks) and "dit" in config.stages:
        raise UserError(
            f"data.label={label!r} with {asks} classes of dit.model={config.dit.model}: a model of"
            " classes (dit.model=paper, dit.paper.classes) needs data.label, and no other takes it"
        )
    if not label:
        return
    known = {"world": ATTRIBUTES, "folder": ("caption",), "tfds": ("caption",)}.get(source, ())
    if label not in known:
        allowed = ", ".join(known) or "none"
        raise UserError(f"data.label={label!r} with data.source={source}: allowed are {allowed}")
    if source == "world":
        if tuple(config.data.objects) != (1, 1):
            raise UserError(
                f"data.objects is {tuple(config.data.objects)}: (1, 1) is allowed with data.label,"
                " which is of one body"
            )
        build.check_classes(config, len(QUESTIONS[label].classes))
    if source == "tfds" and config.data.template != LATER["data.template"]:
        raise UserError("data.template with data.label: a class's caption is its name alone")


def _check_paper(config: ConfigDict) -> None:
    """Refuses what no DiT of the paper can be, or can be trained for."""
    dit, paper = config.dit, config.dit.paper
    size = preset(dit.preset)
    dit_paper.check(paper.conditioning, dit.axes, size["width"], size["depth"], size["heads"])
    if bool(paper.classes) == paper.text:
        raise UserError(
            f"dit.paper.classes={paper.classes} with dit.paper.text={paper.text}: one of both is"
            " allowed, classes or a text"
        )
    if paper.text == (config.text.encoder == "none"):
        raise UserError(
            f"text.encoder={config.text.encoder} with dit.paper.text={paper.text}: none is allowed"
            " where nothing reads a text, and only there"
        )
    _check_one_time(config)


def _check_classify(config: ConfigDict) -> None:
    """Refuses a stage classify that has no labels, or no model."""
    if config.data.source != "world":
        raise UserError(
            f"data.source is {config.data.source}: the stage classify needs labels, which only"
            " world gives"
        )
    if tuple(config.data.objects) != (1, 1):
        raise UserError(
            f"data.objects is {tuple(config.data.objects)}: (1, 1) is allowed with the stage"
            " classify, whose labels are of one body"
        )
    names = tuple(config.classify.questions)
    if not names or len(set(names)) < len(names):
        raise UserError(f"classify.questions is {names}: different names, at least one")
    if not 0.0 <= config.classify.smoothing < 1.0:
        raise UserError(
            f"classify.smoothing is {config.classify.smoothing}: 0 to less than 1 is allowed"
        )
    video = (1, config.data.frames, *config.data.size, 3)
    # Traced, so that nothing is computed: it refuses a model or a size that is not possible.
    jax.eval_shape(
        build.classifier(config).init, jax.random.key(0), jax.ShapeDtypeStruct(video, jnp.float32)
    )


def _check_conv(config: ConfigDict) -> None:
    """Refuses sizes that no convolutional autoencoder has."""
    levels, (p, q, r) = tuple(config.vae.multipliers), config.vae.patch
    side = max(config.vae.pixels, 1) * 2 ** max(len(levels) - 1, 0)
    times = (1,) if config.vae.model == "kl" else tuple(2**i for i in range(len(levels)))
    if not levels or min(levels) < 1 or (q, r) != (side, side) or p not in times:
        raise UserError(
            f"vae.patch is {(p, q, r)} with {len(levels)} vae.multipliers, vae.pixels="
            f"{config.vae.pixels} and vae.model={config.vae.model}: {side} rows and columns are"
            f" allowed, and {times} frames"
        )
    for name in ("blocks", "width", "pixels"):
        if config.vae[name] < 1:
            raise UserError(f"vae.{name} is {config.vae[name]}: numbers above 0 are allowed")
    if config.vae.decoder_width < 0:
        raise UserError(f"vae.decoder_width is {config.vae.decoder_width}: 0 or more is allowed")
    widths, decoder_widths = build.conv_widths(config)
    if config.vae.model == "kl" and (
        config.vae.groups < 1 or any(width % config.vae.groups for width in widths)
    ):
        raise UserError(f"vae.groups is {config.vae.groups}: it must divide widths {widths}")
    if config.vae.residual:
        build.conv(config, None, None).check()
    elif config.vae.model == "causal" and any(width % 2 for width in decoder_widths):
        raise UserError(
            f"the decoder's width times vae.multipliers is {decoder_widths}: even numbers are"
            " allowed"
        )
