"""From a configuration to the parts that it names: sources, models, processes, text encoders."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config import LATER, STAGES
from vdit.data.labels import QUESTIONS, by_caption, by_truth
from vdit.data.loader import Source
from vdit.data.mixture import Mixture
from vdit.data.world.oracle import ATTRIBUTES
from vdit.data.world.playground.shots import PlaygroundShots
from vdit.data.world.playground.source import Playground
from vdit.data.world.shots import Shots
from vdit.data.world.source import World
from vdit.diffusion import schedule
from vdit.diffusion.prediction import PREDICTIONS, WEIGHTS
from vdit.diffusion.sampler import SAMPLERS
from vdit.errors import UserError
from vdit.models import dit_paper, lpips, text, text_folder, unet, vivit, weights
from vdit.models.autoencoder import Autoencoder
from vdit.models.discriminator import GROUPS, Discriminator
from vdit.models.dit import AXES, REMAT, TEXTS, DiT, preset, skipped
from vdit.models.dit_paper import DiTPaper
from vdit.models.minilm import POSITIONS, minilm_tokenizer
from vdit.models.vae import VAE
from vdit.models.vae_conv import ConvVAE
from vdit.nn.attention import Attend
from vdit.nn.linear import ACTIVATIONS
from vdit.nn.patch import padded
from vdit.runtime import attention
from vdit.runtime.files import write_text
from vdit.runtime.machine import DTYPES, operand_dtype
from vdit.runtime.mesh import gather


def choose(table: Any, what: str, name: str) -> Any:
    """table[name]; an unknown name is refused with the list of the known ones."""
    if name not in table:
        raise UserError(f"{what}={name!r}: known are {', '.join(sorted(table))}")
    return table[name]


def check(config: ConfigDict, platform: str | None = None) -> None:
    """Refuses what the parts would refuse late, or not at all; `platform` as in `runs_here`."""
    choose(dict.fromkeys(DTYPES), "run.dtype", config.run.dtype)
    choose(attention.KERNELS, "run.attention", config.run.attention)
    attention.check(config.run.attention, platform)
    choose(dict.fromkeys(attention.SEQUENCE), "run.sequence", config.run.sequence)
    choose(DITS, "dit.model", config.dit.model)
    preset(config.dit.preset)
    choose(SOURCES, "data.source", config.data.source)
    _check_tfds(config)
    choose(AXES, "dit.axes", config.dit.axes)
    _check_window(config)
    _check_text(config)
    choose(REMAT, "run.remat", config.run.remat)
    choose(text.ENCODERS, "text.encoder", config.text.encoder)
    if config.text.encoder in text_folder.FAMILIES:
        text_encoder(config, tokenizer(config, Path()))  # reads no tensor yet
    elif config.text.path:
        known = ", ".join(text_folder.FAMILIES)
        raise UserError(
            f"text.path is given with text.encoder={config.text.encoder}: only {known} take it"
        )
    choose(schedule.PROCESSES, "dit.process", config.dit.process)
    choose(PREDICTIONS, "dit.prediction", config.dit.prediction)
    choose(WEIGHTS, "dit.loss_weight", config.dit.loss_weight)
    choose(SAMPLERS, "sample.sampler", config.sample.sampler)
    vivit.preset(config.classify.preset)
    choose(ACTIVATIONS, "classify.activation", config.classify.activation)
    for stage in config.stages:
        if stage not in STAGES:
            raise UserError(f"stages: {stage!r} is unknown; known are {', '.join(STAGES)}")
    sizes = {
        "vae.patch": 3, "data.size": 2, "data.objects": 2, "data.shots": 2, "dit.patch": 2,
    }  # fmt: skip
    for name, size in sizes.items():
        section, field = name.split(".")
        value = config[section][field]
        if len(value) != size or min(value) < 1:
            raise UserError(f"{name} is {value}: {size} numbers of at least 1 are allowed")
    choose(VAES, "vae.model", config.vae.model)
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
    _check_losses(config)
    p = config.vae.patch[0]
    _check_chunk(config)
    if config.data.frames < 1 or (config.data.frames - 1) % p:
        raise UserError(f"data.frames is {config.data.frames}: 1 + k*{p} is allowed (vae.patch)")
    heads = config.vae.heads
    if config.vae.model == "vivit" and (heads < 1 or config.vae.width % (2 * heads)):
        raise UserError(
            f"vae.heads {heads} must cut vae.width {config.vae.width} into even shares"
        )
    positive = {
        "data.fps": config.data.fps, "latents.clips": config.latents.clips,
        "vae.train.batch": config.vae.train.batch, "dit.train.batch": config.dit.train.batch,
        "vae.train.steps": config.vae.train.steps, "dit.train.steps": config.dit.train.steps,
        "vae.train.accumulate": config.vae.train.accumulate,
        "dit.train.accumulate": config.dit.train.accumulate,
        "vae.window": config.vae.window, "vae.channels": config.vae.channels,
        "vae.chunk": config.vae.chunk,
        "sample.steps": config.sample.steps, "sample.batch": config.sample.batch,
        "sample.zoom": config.sample.zoom, "run.log_every": config.run.log_every,
        "run.save_every": config.run.save_every, "run.keep": config.run.keep,
        "run.unroll": config.run.unroll, "run.lost": config.run.lost,
        "text.length": config.text.length,
        "classify.train.batch": config.classify.train.batch,
        "classify.train.steps": config.classify.train.steps,
        "classify.train.accumulate": config.classify.train.accumulate,
        "classify.heldout": config.classify.heldout,
    }  # fmt: skip
    for name, value in positive.items():
        if value <= 0:
            raise UserError(f"{name} is {value}: a number above 0 is allowed")
    if config.run.stuck < 0:
        raise UserError(f"run.stuck is {config.run.stuck}: seconds, or 0 for ever, are allowed")
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
    if config.data.source in OF_SHOTS:
        source(config, "train", Path())  # its own limits, before anything is trained
    if config.data.source != "playground" and config.data.detail != LATER["data.detail"]:
        raise UserError(
            f"data.detail with data.source={config.data.source}: only playground takes it"
        )
    if config.data.source not in OF_SHOTS and tuple(config.data.shots) != (1, 1):
        raise UserError(
            f"data.shots with data.source={config.data.source}: only"
            f" {' and '.join(OF_SHOTS)} take it"
        )
    if not 0.0 <= config.dit.caption_drop <= 1.0:
        raise UserError(f"dit.caption_drop is {config.dit.caption_drop}: 0 to 1 is allowed")
    if config.dit.caption_drop and not most_shots(config):
        raise UserError("dit.caption_drop needs clips of several captions: data.shots")
    dit = config.dit
    if dit.learned_variance and process(config).points is None:
        raise UserError(
            f"dit.learned_variance needs a table as dit.process=ddpm, not {dit.process}"
        )
    learned = config.sample.sampler == "ddpm" and config.sample.variance == "learned"
    if learned and not dit.learned_variance:
        raise UserError("sample.variance=learned needs a model with dit.learned_variance=True")
    times = functools.partial(
        schedule.sample_times,
        process(config),
        logit_normal=dit.logit_normal or None,
        shift=dit.shift,
    )
    # Traced, so that no device is touched: these refuse what does not fit the process.
    jax.eval_shape(times, jax.ShapeDtypeStruct((1,), jnp.float32))
    sample = config.sample
    steps = sample.steps, sample.shift or dit.shift, sample.spacing
    jax.eval_shape(lambda: schedule.timesteps(process(config), *steps))
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
    net = choose(lpips.NETS, "vae.lpips_net", config.vae.lpips_net)
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
    """Refuses rows that hold their text where they cannot."""
    choose(dict.fromkeys(TEXTS), "dit.text", config.dit.text)
    read_by = config.text.encoder, config.dit.model
    if config.text.padding and read_by != ("clip", "unet"):
        raise UserError(
            f"text.padding=True with text.encoder={read_by[0]} and dit.model={read_by[1]}: clip and"
            " unet are allowed"
        )
    where = config.dit.model, config.dit.axes
    if config.dit.text == "context" and (where != ("vdit", "joint") or most_shots(config)):
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


def token_shards(config: ConfigDict, mesh: Mesh | None) -> int:
    """What a row's tokens are filled up to a multiple of, so that a mesh can split them; 1 where a
    denoiser's attention needs the clip's grid."""
    joint = config.dit.model == "vdit" and config.dit.axes == "joint"
    return mesh.shape["sequence"] if mesh is not None and joint else 1


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
    for name in OF_TFDS:
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
    if most_shots(config):
        raise UserError("data.shapes with data.shots: packed rows know one caption a clip")
    for shape in config.data.shapes:
        if not _is_shape(shape, p):
            raise UserError(
                f"data.shapes has {shape!r}: (1 + k*{p} frames, height, width, fps) is allowed"
            )
    if config.data.source in ENDLESS:
        training_clips(config, Path())  # its own limits, before anything is trained
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
    if config.data.shapes or most_shots(config):
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
        check_classes(config, len(QUESTIONS[label].classes))
    if source == "tfds" and config.data.template != LATER["data.template"]:
        raise UserError("data.template with data.label: a class's caption is its name alone")


def check_classes(config: ConfigDict, count: int) -> None:
    """Refuses a model of another number of classes than its source has."""
    if config.dit.paper.classes != count:
        raise UserError(
            f"dit.paper.classes is {config.dit.paper.classes}: {count} is allowed, the number of"
            f" classes of data.source={config.data.source} by data.label={config.data.label}"
        )


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
        classifier(config).init, jax.random.key(0), jax.ShapeDtypeStruct(video, jnp.float32)
    )


def _shape(config: ConfigDict) -> dict[str, Any]:
    """Frames, size and rate of the base clips."""
    data = config.data
    return {"frames": data.frames, "size": tuple(data.size), "fps": data.fps}


def _world(config: ConfigDict, split: str, workdir: Path, **options: Any) -> World:
    del workdir
    options = {**_shape(config), "objects": tuple(config.data.objects), **options}
    return World(config.seed, split, **options)


def _shots(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Shots:
    del workdir
    options = {**_shape(config), "objects": tuple(config.data.objects), **options}
    return Shots(
        config.seed, split, shots=tuple(config.data.shots), align=config.vae.patch[0], **options
    )


def _playground(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Any:
    del workdir
    options = {**_shape(config), "objects": tuple(config.data.objects), **options}
    options["detail"] = config.data.detail
    if not most_shots(config):
        return Playground(config.seed, split, **options)
    shots, align = tuple(config.data.shots), config.vae.patch[0]
    return PlaygroundShots(config.seed, split, shots=shots, align=align, **options)


def _folder(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Any:
    from vdit.data.folder import Folder

    return Folder(
        config.data.path,
        **{**_shape(config), **options},
        stride=config.data.stride,
        seed=config.seed,
        split=split,
        cache=workdir / "clips",
        skipped_path=workdir / "skipped.jsonl",
    )


def _folder_shapes(config: ConfigDict, workdir: Path) -> Mixture:
    """Of the films that train clips of the base shape, each at those shapes that suit its aspect.

    Raises `UserError` for a shape that suits none.
    """
    from vdit.data.folder import fitting, write_skipped

    base = source(config, "train", workdir)
    shapes, root = config.data.shapes, Path(config.data.path)
    sizes = [(int(height), int(width)) for _, height, width, _ in shapes]
    files = [row.file for row in base.rows]
    shown = fitting(root, files, sizes, workdir / "clips" / "aspects.json")
    sources, skipped = [], list(base.skipped)
    for i, (frames, _, _, fps) in enumerate(shapes):
        parts = [row for row in base.rows if i in shown[row.file]]
        if not parts:
            raise UserError(
                f"data.shapes has {tuple(shapes[i])!r}: every film of {root} has an aspect that"
                " another shape suits better; leave it out"
            )
        options = {"frames": int(frames), "size": sizes[i], "fps": fps, "parts": parts}
        sources.append(source(config, "train", workdir, **options))
        skipped += sources[-1].skipped
    write_skipped(workdir / "skipped.jsonl", skipped)
    rates = [float(shape[3]) for shape in shapes]
    mixture = Mixture(sources, rates, endless=False, to_the_end=True)
    mixture.skipped = list(dict.fromkeys(skipped))
    return mixture


def _tfds(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Source:
    from vdit.data.tfds import VideoSet

    return VideoSet(
        config.data.path,
        **{**_shape(config), **options},
        **{name: config.data[name] for name in OF_TFDS if name != "template"},
        template="{label}" if config.data.label else config.data.template,
        stride=config.data.stride,
        seed=config.seed,
        split=split,
        checked=workdir / "tfds.json",
        skipped_path=workdir / "skipped.jsonl",
    )


OF_TFDS = ("name", "native_fps", "template", "video_field", "caption_field")
SOURCES = {
    "world": _world, "shots": _shots, "playground": _playground, "folder": _folder, "tfds": _tfds,
}  # fmt: skip
OF_SHOTS = ("shots", "playground")  # sources that take data.shots
ENDLESS = ("world", "playground")  # sources that simulate clips of one caption


def most_shots(config: ConfigDict) -> int:
    """How many shots a clip has at most; 0 where it has one caption alone."""
    source, most = config.data.source, config.data.shots[1]
    return most if source == "shots" or (source == "playground" and most > 1) else 0


def source(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Any:
    """The clips of a split ("train" or "heldout"), with data.label as `Classed`."""
    make = choose(SOURCES, "data.source", config.data.source)
    clips, label = make(config, split, workdir, **options), config.data.label
    if not label:
        return clips
    if config.data.source == "world":
        return by_truth(clips, label)
    if config.data.source == "tfds":
        if clips.classes is None:
            raise UserError(f"data.label={label}: {clips.name} has no ClassLabel for a caption")
        return by_caption(clips, clips.classes)
    other = make(config, "heldout" if split == "train" else "train", workdir, **options)
    return by_caption(clips, sorted({*clips.captions, *other.captions}))


def token_pixels(config: ConfigDict) -> tuple[int, int]:
    """Rows and columns of pixels of one token: videos are padded to a multiple of them."""
    (_, q, r), (a, b) = config.vae.patch, config.dit.patch
    return q * a, r * b


def latent_shape(
    config: ConfigDict, frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """Latents (t, h, w, Z) of a clip, padded to whole tokens."""
    return vae(config).latent_shape(frames, *padded((height, width), token_pixels(config)))


def training_clips(config: ConfigDict, workdir: Path) -> Any:
    """The clips that are encoded for the DiT: the train split, or its mixture of data.shapes."""
    if not config.data.shapes:
        return source(config, "train", workdir)
    if config.data.source == "folder":
        return _folder_shapes(config, workdir)
    sources = [
        source(
            config, "train", workdir, frames=int(frames), size=(int(height), int(width)), fps=fps
        )
        for frames, height, width, fps in config.data.shapes
    ]
    rates = [float(shape[3]) for shape in config.data.shapes]
    return Mixture(sources, rates, endless=config.data.source in ENDLESS)


# Where a network runs: on one device or, in steps, on a mesh. `platform` says for what kind of
# machine it is, where that is neither the mesh's nor this one.


def _attend(config: ConfigDict, mesh: Mesh | None, platform: str | None) -> Attend:
    choose(attention.KERNELS, "run.attention", config.run.attention)
    return attention.kernel(config.run.attention, mesh, platform, config.run.sequence)


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
    widths, decoder_widths = _widths(config)
    if config.vae.model == "kl" and (
        config.vae.groups < 1 or any(width % config.vae.groups for width in widths)
    ):
        raise UserError(f"vae.groups is {config.vae.groups}: it must divide widths {widths}")
    if config.vae.residual:
        _conv(config, None, None).check()
    elif config.vae.model == "causal" and any(width % 2 for width in decoder_widths):
        raise UserError(
            f"the decoder's width times vae.multipliers is {decoder_widths}: even numbers are"
            " allowed"
        )


def _widths(config: ConfigDict) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of a convolutional autoencoder's levels, in the encoder and in the decoder."""
    vae, both = config.vae, (config.vae.width, config.vae.decoder_width or config.vae.width)
    first, second = (tuple(width * m for m in vae.multipliers) for width in both)
    return first, second


def _conv(config: ConfigDict, mesh: Mesh | None, platform: str | None) -> ConvVAE:
    widths, decoder_widths = _widths(config)
    causal = config.vae.model == "causal"
    return ConvVAE(
        patch=tuple(config.vae.patch),
        channels=config.vae.channels,
        widths=widths,
        decoder_widths=decoder_widths,
        blocks=config.vae.blocks,
        causal=causal,
        groups=0 if causal else config.vae.groups,
        pixels=config.vae.pixels,
        residual=config.vae.residual,
        attend=_attend(config, mesh, platform),
        dtype=operand_dtype(config.run.dtype, mesh, platform),
    )


def _vivit(config: ConfigDict, mesh: Mesh | None, platform: str | None) -> VAE:
    fields = (
        "channels", "width", "encoder_depth", "decoder_depth", "heads", "window", "mlp_ratio",
        "activation", "detail",
    )  # fmt: skip
    return VAE(
        patch=tuple(config.vae.patch),
        attend=_attend(config, mesh, platform),
        unroll=config.run.unroll,
        dtype=operand_dtype(config.run.dtype, mesh, platform),
        gather=gather(mesh),
        **{name: config.vae[name] for name in fields},
    )


VAES = {"vivit": _vivit, "kl": _conv, "causal": _conv}


def vae(config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None) -> Autoencoder:
    """The autoencoder, for one device or for steps on a mesh."""
    return choose(VAES, "vae.model", config.vae.model)(config, mesh, platform)


def lpips_net(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> lpips.LPIPS:
    """The network that the autoencoder's reconstructions are compared by."""
    return lpips.LPIPS(config.vae.lpips_net, operand_dtype(config.run.dtype, mesh, platform))


def discriminator(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> Discriminator:
    """The network that the autoencoder learns to fool."""
    dtype = operand_dtype(config.run.dtype, mesh, platform)
    return Discriminator(config.vae.adversarial_width, config.vae.adversarial_levels, dtype)


def _paper(config: ConfigDict, **options: Any) -> DiTPaper:
    return DiTPaper(patch=tuple(config.dit.patch), **config.dit.paper, **options)


def _vdit(config: ConfigDict, **options: Any) -> DiT:
    return DiT(window=tuple(config.dit.window), text=config.dit.text, **options)


def _unet(config: ConfigDict, **options: Any) -> unet.UNet:
    shared = ("learned_variance", "attend", "unroll", "remat", "dtype")
    return unet.UNet(**config.dit.unet, **{name: options[name] for name in shared})


DITS: dict[str, Any] = {"vdit": _vdit, "paper": _paper, "unet": _unet}


def dit(config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None) -> Any:
    """The denoiser, for one device or for steps on a mesh."""
    return choose(DITS, "dit.model", config.dit.model)(
        config,
        **preset(config.dit.preset),
        axes=config.dit.axes,
        learned_variance=config.dit.learned_variance,
        attend=_attend(config, mesh, platform),
        unroll=config.run.unroll,
        remat=config.run.remat,
        dtype=operand_dtype(config.run.dtype, mesh, platform),
        gather=gather(mesh),
    )


def questions(config: ConfigDict) -> dict[str, int]:
    """What the classifier is asked, and how many answers there are to each."""
    if config.classify.classes:
        return {"class": config.classify.classes}
    return {
        name: len(choose(QUESTIONS, "classify.questions", name).classes)
        for name in config.classify.questions
    }


def classifier(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> vivit.ViViT:
    """The ViViT that answers all questions by one head, for one device or for steps on a mesh."""
    return vivit.ViViT(
        sum(questions(config).values()),
        **vivit.preset(config.classify.preset),
        model=config.classify.model,
        pool=config.classify.pool,
        activation=config.classify.activation,
        mlp_ratio=config.classify.mlp_ratio,
        epsilon=config.classify.epsilon,
        attend=_attend(config, mesh, platform),
        samples=config.classify.samples,
        unroll=config.run.unroll,
        remat=config.run.remat,
        dtype=operand_dtype(config.run.dtype, mesh, platform),
        gather=gather(mesh),
    )


def process(config: ConfigDict) -> schedule.Process:
    """The noise process."""
    return schedule.process(config.dit.process)


def tokenizer(config: ConfigDict, workdir: Path, captions: Any = None) -> text.Tokenizer:
    """The tokenizer in the workdir; made from `captions()` (and saved) if it is not there yet.

    That of an encoder in a folder is read from the folder each time.
    """
    name = config.text.encoder
    if name == "none":
        return text.Tokenizer(text.no_tokenizer(), 1)
    if name in text_folder.FAMILIES:
        read = text_folder.read_tokenizer(name, config.text.path)
        chunk = text_folder.positions(name, config.text.path)
        if config.text.padding and chunk is not None and config.text.length > chunk:
            raise UserError(
                f"text.length is {config.text.length} with text.padding: {chunk}, the positions of"
                f" text.path={config.text.path}, are allowed"
            )
        return text.Tokenizer(read, config.text.length, config.text.padding, chunk)
    path = workdir / "tokenizer.json"
    if not path.exists():
        if captions is None:
            raise UserError(f"{path} is missing: the workdir holds no trained text model")
        if name == "minilm":
            made = minilm_tokenizer()
        else:
            made = text.learned_tokenizer(captions(), config.text.vocab)
        write_text(path, made)
    chunk = POSITIONS if name == "minilm" else None
    return text.Tokenizer(path.read_text(encoding="utf-8"), config.text.length, chunk=chunk)


CLASSES = "classes.json"


def write_classes(config: ConfigDict, workdir: Path, classes: Sequence[str]) -> None:
    """classes.json: the names of a model's classes, in order."""
    check_classes(config, len(classes))
    write_text(workdir / CLASSES, to_json(classes))


def to_json(classes: Sequence[str]) -> str:
    """The content of classes.json."""
    return json.dumps(list(classes), ensure_ascii=False, indent=1) + "\n"


def read_classes(config: ConfigDict, workdir: Path) -> list[str]:
    """The names of a model's classes; numbers where it has none, nothing if it has no classes."""
    count = config.dit.paper.classes if config.dit.model == "paper" else 0
    return _read_names(count, workdir / CLASSES)


def answers(config: ConfigDict, workdir: Path) -> dict[str, list[str]]:
    """The names of the answers to each question of the classifier in a workdir."""
    if config.classify.classes:
        return {"class": _read_names(config.classify.classes, workdir / CLASSES)}
    return {name: list(QUESTIONS[name].classes) for name in questions(config)}


def _read_names(count: int, path: Path) -> list[str]:
    if not count or not path.exists():
        return [str(i) for i in range(count)]
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(names, list) or len(names) != count:
        raise UserError(f"{path}: a list of {count} names is expected")
    return [str(name) for name in names]


class Vocabulary(NamedTuple):
    """What a text encoder's shapes follow from: the tokens that a tokenizer knows."""

    vocab: int


def text_encoder(
    config: ConfigDict,
    tokens: text.Tokenizer | Vocabulary,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> text.TextEncoder:
    """The text encoder."""
    options: dict[str, Any] = {}
    if config.text.encoder == "learned":
        options = {
            "vocab": tokens.vocab,
            "width": config.text.width,
            "depth": config.text.depth,
            "heads": config.text.heads,
            "unroll": min(config.run.unroll, config.text.depth),
            "dtype": operand_dtype(config.run.dtype, mesh, platform),
            "gather": gather(mesh),
        }
    if config.text.encoder in text_folder.FAMILIES:
        options = {"path": config.text.path, "vocab": tokens.vocab}
    return text.encoder(config.text.encoder, **options)


def look_through_text(config: ConfigDict) -> None:
    """Reads the folder of a text encoder; `UserError` for a number that is not finite."""
    if config.text.encoder in text_folder.FAMILIES:
        _, plan = text_folder.read_module(config.text.encoder, config.text.path)
        weights.look_through(plan)


def text_content(config: ConfigDict) -> dict[str, str]:
    """What identifies an encoder beside the configuration's fields: the content of its folder."""
    if config.text.encoder not in text_folder.FAMILIES:
        return {}
    return {"text.content": text_folder.content(config.text.encoder, config.text.path)}


def wordless(
    config: ConfigDict, encoder: text.TextEncoder, tokenizer: text.Tokenizer, params: Any = None
) -> dict[str, np.ndarray]:
    """Features and mask of the text without words, where that stands for no text.

    So it does in a published model with its pretrained encoder (`params`, read if not given); other
    models have a null key.
    """
    told = config.dit.model == "unet" or (config.dit.model == "paper" and config.dit.paper.text)
    if not told or not encoder.frozen:
        return {}
    ids, mask = tokenizer.empty()
    params = encoder.init(jax.random.key(0), ids, mask) if params is None else params
    return {"features": text.encode_features(encoder, params, ids, mask)[0], "mask": mask[0]}
