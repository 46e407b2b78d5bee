"""The training stages: compress (vae), encode once (latents), denoise (dit); name (classify)."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit import initial
from vdit.config.autoencoder import build_discriminator, build_lpips, build_vae
from vdit.config.classifier import answer_counts, build_classifier
from vdit.config.denoiser import (
    auxiliary_losses,
    build_denoiser,
    conditions_content,
    targets,
    training_times,
)
from vdit.config.identity import (
    DEPENDS,
    changed,
    differences,
    digest,
    of_networks,
    read_config,
    stage_fields,
    stored_fields,
)  # fmt: skip
from vdit.config.joined import times_of
from vdit.config.lora import BASE_DTYPES
from vdit.config.text import build_text_encoder, build_tokenizer, text_content
from vdit.data import sources
from vdit.data.clips import tell_skipped
from vdit.data.labels import Labelled, Masked
from vdit.data.latents import Latents
from vdit.data.loader import PackedBatches, batches
from vdit.data.packing import Sample, budget_of, draw_sample, padding
from vdit.denoiser import Denoiser
from vdit.diffusion.schedule import seen
from vdit.encode import cache_latents as cache_latents
from vdit.errors import UserError
from vdit.loading import Base, read_base, read_stage, refuse_changed
from vdit.model import settings_of, steered
from vdit.models.chunks import row_places
from vdit.models.text import TextEncoder
from vdit.nn.lora import flat, narrowed
from vdit.nn.patch import to_float
from vdit.objectives.classify import answers, classify_objective
from vdit.objectives.diffusion import Dense, Rows, denoising_objective
from vdit.objectives.distill import distilled
from vdit.objectives.lora import lora
from vdit.objectives.objective import Objective
from vdit.objectives.packed import Packed
from vdit.objectives.vae import Adversary, Perceptual, on_crops, vae_objective
from vdit.published.lpips import read_weights
from vdit.runtime.checkpoint import IMPORTED, restore_ema
from vdit.runtime.machine import host_memory
from vdit.runtime.mesh import data_process, param_sharding, replicated
from vdit.runtime.processes import zero_first
from vdit.runtime.progress import say
from vdit.shipped import find
from vdit.tokens import Budget, Patterns, pattern_shares, patterns
from vdit.train import Params, Runtime, fit


def stage_meta(
    config: ConfigDict, stage: str, content: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a checkpoint says of itself: the fields that it depends on, the content of the data set
    and of a text encoder's folder among them, and their digest."""
    fields = stage_fields(config, stage) | dict(content or {})
    if "text" in DEPENDS[stage]:
        fields |= (conditions_content if "dit" in DEPENDS[stage] else text_content)(config)
    return {"stage": stage, "fields": fields, "digest": digest(fields)}


def refuse_other_data(
    config: ConfigDict, stage: str, meta: Mapping[str, Any], content: Mapping[str, str]
) -> None:
    """Raises `UserError` if a checkpoint's `meta` is of another data set than `content`, the one of
    `sources.identity`."""
    was, now = (known.get(CONTENT) for known in (meta["fields"], content))
    if was and now and was != now:
        raise UserError(
            f"stage {stage} was trained on another data set than data.path={config.data.path}: a"
            " file has changed, is new or is missing; choose another --workdir"
        )


CONTENT = "data.content"  # of the files in data.path, among the fields of a checkpoint
# Of a stage's training, what may change before its last step: the cure of one that diverged.
CURES = r"\.train\.(\w+\.)?(learning_rate|adam_learning_rate|weight_decay|clip)"


def refuse_other(config: ConfigDict, stage: str, runtime: Runtime, begins: bool = False) -> None:
    """A workdir that holds another model's checkpoints is refused, naming the difference. Imported
    weights may begin any training of these networks.

    Where a stage `begins` that goes on with another learning rate, this is printed and recorded.
    """
    stored_fields(runtime.workdir, lenient=True)  # refuses that of another version of vdit
    checkpoints = runtime.checkpoints(stage)
    if (meta := checkpoints.newest_meta()) is None:
        return
    old, new = dict(meta["fields"]) | {CONTENT: None}, stage_meta(config, stage)["fields"]
    step = checkpoints.latest() or IMPORTED
    if step == IMPORTED and stage != "classify":
        old, new = of_networks(old), of_networks(new)
    names, said = changed(old, new), differences(old, new)
    section = "dit" if stage == "low" else stage
    ended = step >= config[section].train.steps
    if names and (ended or not all(re.fullmatch(section + CURES, name) for name in names)):
        raise UserError(
            f"{runtime.workdir} holds stage {stage} of another run: {said};"
            " choose another --workdir"
        )
    refuse_other_data(config, stage, meta, runtime.content)
    if names and begins:
        say(f"{stage}: goes on from step {step}: {said}")
        runtime.metrics.write(stage, step, {"changed": said})


def reads_clips(config: ConfigDict) -> bool:
    """Whether one of the run's stages reads the training clips."""
    return not DEPENDS.keys().isdisjoint(config.stages)


# What each stage learns: an objective, for a mesh or for one device, on this kind of machine or on
# another `platform`. No data is read, so a step can be made from shapes alone.


def compression(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> Objective:
    """What stage vae learns."""
    vae, perceptual, adversary = config.vae, None, None
    side, count = vae.crop
    if vae.lpips_weight:
        perceptual = Perceptual(build_lpips(config, mesh, platform), vae.lpips_weight)
    if vae.adversarial_weight:
        judge = build_discriminator(config, mesh, platform)
        start = vae.adversarial_start * vae.train.batch * (count if side else 1)
        adversary = Adversary(judge, vae.adversarial_weight, start)
    model = build_vae(config, mesh, platform)
    weights, others = (vae.kl_weight, vae.l1_weight), (perceptual, adversary)
    objective = vae_objective(model, *weights, *others, vae.body_weight)
    return on_crops(objective, side, count) if side else objective


def _denoising(config: ConfigDict, denoiser: Denoiser, rows: Rows) -> Objective:
    losses = auxiliary_losses(config, denoiser.network)
    return denoising_objective(denoiser, rows, config.dit.loss_weight, losses)


def pattern_table(config: ConfigDict) -> Patterns:
    """The patterns of given spans that clips of this configuration can have."""
    frames = build_vae(config).latent_shape(config.data.frames, 1, 1)[0]
    return patterns(frames, config.vae.patch[0], config.data.fps)


def denoising(
    config: ConfigDict, encoder: TextEncoder, mesh: Mesh | None = None,
    platform: str | None = None, longest: tuple[int, int] | None = None, stage: str = "dit",
) -> Objective:  # fmt: skip
    """What stage dit (or low) learns of clips that are all alike: every pattern of given spans.

    `longest`: tokens of their longest captions, if they are known.
    """
    table, dit = pattern_table(config), config.dit
    shares = pattern_shares(table, dict(dit.given))
    times = training_times(config, stage)
    rows = Dense(table, shares, times, dit.text_drop, dit.caption_drop, longest)
    denoiser = build_denoiser(config, encoder, mesh, platform)
    objective = _denoising(config, denoiser, rows)
    return distilling(config, objective, denoiser, rows) if dit.distill.steps else objective


def distilling(
    config: ConfigDict, objective: Objective, denoiser: Denoiser, rows: Dense
) -> Objective:
    """What a denoiser learns from the steps that its teacher takes, as that samples by default."""
    teacher, made = read_config(find(config.dit.lora.base or config.init)), config.dit.distill
    settings = settings_of(teacher, steps=made.steps * made.parts)
    if settings.guidance_levels != (0.0, 1.0):
        raise UserError(
            f"dit.distill.steps: its teacher's sample.guidance_levels is"
            f" {settings.guidance_levels}: (0, 1) is allowed"
        )
    process = seen(denoiser.process, settings.spacing)
    steer = functools.partial(steered, settings=settings, process=process)
    times = np.asarray(times_of(teacher, settings))
    ends = times_of(teacher, dataclasses.replace(settings, steps=made.steps))
    if not np.allclose(times[:: made.parts], ends, atol=1e-6):
        raise UserError(
            f"dit.distill: {made.steps} steps of sample.spacing={settings.spacing} are not some of"
            f" {settings.steps}: trailing is allowed"
        )
    denoiser = dataclasses.replace(denoiser, process=process)
    return distilled(objective, denoiser, rows, steer, times, made.parts)


def packed_denoising(
    config: ConfigDict, encoder: TextEncoder, budget: Budget, mesh: Mesh | None = None,
    platform: str | None = None,
) -> Objective:  # fmt: skip
    """What stage dit learns of clips of data.shapes, in rows of one length."""
    rows = Packed(budget, training_times(config), config.dit.text_drop)
    return _denoising(config, build_denoiser(config, encoder, mesh, platform), rows)


def classification(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> Objective:
    """What stage classify learns."""
    model = build_classifier(config, mesh, platform)
    return classify_objective(model, answer_counts(config), config.classify.smoothing)


def train_vae(config: ConfigDict, runtime: Runtime) -> Params:
    """Stage vae: the EMA parameters of the autoencoder. An imported one is trained only if the
    run's stages name it, that of a base of adapters never."""
    place = functools.partial(param_sharding, runtime.mesh)
    if config.dit.lora.rank:
        return read_stage(find(config.dit.lora.base), "vae", place).params
    refuse_other(config, "vae", runtime, begins=True)
    checkpoints = runtime.checkpoints("vae")
    if "vae" not in config.stages and checkpoints.latest() == IMPORTED:
        return restore_ema(checkpoints.directory, IMPORTED, place)
    options, seed = config.vae.train, config.seed
    meta = stage_meta(config, "vae", runtime.content)
    objective = compression(config, runtime.mesh)
    with zero_first("clips"):
        clips = sources.source(config, "train", runtime.workdir)
    tell_skipped(clips)
    named: tuple[str, ...] = ("video",)
    if config.vae.body_weight:
        named += ("bodies",)
        clips = Masked(clips, sources.known(config, "bodies", "vae.body_weight"))
    share = data_process(runtime.mesh)
    stream = batches(clips, options.batch, seed, named, config.data.threads, process=share)
    frozen = {"lpips": read_weights(config.vae.lpips_net)} if config.vae.lpips_weight else {}
    return fit(
        "vae", objective, stream, options, runtime, seed=seed, frozen=frozen, meta=meta,
        begin=initial.begin(config, "vae"),
    )  # fmt: skip


def train_low(config: ConfigDict, runtime: Runtime, latents: Latents) -> Params:
    """Stage low: the second of two experts, which has the lower noise levels."""
    return train_dit(config, runtime, latents, "low")


def train_dit(config: ConfigDict, runtime: Runtime, latents: Latents, stage: str = "dit") -> Params:
    """Stage dit: the EMA parameters of the denoiser (and of the learned text encoder)."""
    refuse_other(config, stage, runtime, begins=True)
    tokenizer = build_tokenizer(config, runtime.workdir)
    encoder = build_text_encoder(config, tokenizer, runtime.mesh)
    text = "features" if "features" in latents[0] else "ids"
    if missing := [name for name in targets(config) if name not in latents[0]]:
        raise UserError(f"dit.auxiliary needs {', '.join(missing)} of each clip: no source has it")
    make = packed_rows if config.data.shapes else dense_batches
    objective, stream = make(config, runtime, latents, encoder, text, stage)
    # A denoiser knows one normalisation: a run that goes on with one keeps it.
    checkpoints, place = runtime.checkpoints(stage), functools.partial(param_sharding, runtime.mesh)
    base = read_base(find(config.dit.lora.base), place, stage) if config.dit.lora.rank else None
    learned = base.statistics() if base else initial.statistics(config, checkpoints)
    statistics = learned or latents.statistics()
    known = checkpoints.newest_meta() or {}
    frozen: dict[str, Any] = dict(statistics)
    if encoder.frozen and text == "ids":
        ids = np.zeros((1, tokenizer.length), np.int32)
        frozen["text"] = encoder.init(jax.random.key(0), ids, ids > 0)
    denoiser = build_denoiser(config, encoder)
    with host_memory():  # a large encoder, for one text
        if empty := denoiser.empty_text(tokenizer, frozen.get("text")):
            frozen["empty"] = empty
    meta = stage_meta(config, stage, runtime.content) | {
        "latents": {name: [float(v) for v in value] for name, value in statistics.items()},
        "vae": stage_meta(config, "vae", runtime.content)["digest"],
        **({"imported": known["imported"]} if "imported" in known else {}),
    }
    if config.dit.distill.steps and not base:
        frozen["base"] = read_base(find(config.init), place).groups
    if base:
        objective, frozen["base"], meta["base"] = adapted(config, runtime, objective, base, stage)
    options, seed = config.dit.train, config.seed + 1
    return fit(
        stage, objective, stream, options, runtime, seed=seed, frozen=frozen, meta=meta,
        begin=initial.begin(config, stage),
    )  # fmt: skip


def adapted(
    config: ConfigDict, runtime: Runtime, objective: Objective, base: Base, stage: str
) -> tuple[Objective, dict[str, Any], str]:
    """The objective of adapters, the frozen parameters beside them, and their digest; uses `base`
    up."""
    made, stored = config.dit.lora, runtime.checkpoints(stage).newest_meta()
    refuse_changed(stored or {"base": base.digest}, base, runtime.workdir)
    dtype, denoiser = BASE_DTYPES[made.base_dtype], flat(base.groups.pop("dit"))
    for path in list(denoiser):  # leaf by leaf: memory never holds both copies of all
        if dtype and path.endswith("kernel"):
            denoiser |= narrowed(path, denoiser[path], dtype)
    groups = base.groups | {"dit": unflatten_dict(denoiser, sep="/")}
    return lora(objective, made.paths, made.rank, made.alpha, made.dropout), groups, base.digest


Trained = tuple[Objective, Iterator[Mapping[str, np.ndarray]]]  # what is learned, and from what


def dense_batches(
    config: ConfigDict, runtime: Runtime, latents: Latents, encoder: TextEncoder, text: str,
    stage: str = "dit",
) -> Trained:  # fmt: skip
    """Clips that are all alike, with every pattern of given spans; text is "ids" or "features"."""
    there = {name.rstrip("0123456789") for name in pattern_table(config).names}
    there |= {"image"} if "prefix" in there else set()
    given = config.dit.given
    if short := [name for name in given if given[name] > 0 and name not in there]:
        say(f"dit: clips of {config.data.frames} frames are too short to train {', '.join(short)}")
    # Published models see a text without words as well, which has a length of its own.
    longest = latents.longest() if config.dit.model == "vdit" else None
    objective = denoising(config, encoder, runtime.mesh, longest=longest, stage=stage)
    optional = ("features", "starts", "label", "beside", "image")
    more = tuple(name for name in optional if name in latents[0])
    fields = ("latent", "ids", "mask", *more, *targets(config))
    batch, threads = config.dit.train.batch, config.data.threads
    share = data_process(runtime.mesh)
    return objective, batches(latents, batch, config.seed + 1, fields, threads, process=share)


def packed_rows(
    config: ConfigDict, runtime: Runtime, latents: Latents, encoder: TextEncoder, text: str,
    stage: str = "dit",
) -> Trained:  # fmt: skip
    """Clips of data.shapes side by side in rows of one length; dit.train.batch counts rows."""
    patch, p = tuple(config.dit.patch), config.vae.patch[0]
    sizes = latents.sizes(patch)
    budget = budget_of(sizes, tuple(config.dit.pack), config.text.length)
    shares, table_of = dict(config.dit.given), functools.cache(patterns)
    more = targets(config)

    def read(clip: int, ordinal: int) -> Sample:
        element = latents[clip]
        frames = int(element.get("frames", len(element["latent"])))
        table = table_of(frames, p, float(element["fps"]))
        told = element["mask"][: row_places(element["mask"])]
        words = element[text][: len(told)]
        return draw_sample(element, words, told, ordinal, table, shares, config.seed + 1, more)

    stream = PackedBatches(
        read, sizes, budget, config.dit.train.batch, config.seed + 1, patch, config.data.threads,
        data_process(runtime.mesh),
    )  # fmt: skip
    plan = stream.plan(0)
    empty = padding(plan, sizes, budget)
    say(
        f"dit: {len(sizes.tokens)} clips of {sizes.tokens.min()} to {sizes.tokens.max()} tokens in"
        f" {len(plan)} rows of {budget.tokens} tokens, {100 * empty:.1f}% of them padding"
    )
    if runtime.checkpoints(stage).latest() is None:
        runtime.metrics.truncate(stage, -1)  # a run that was stopped before its first checkpoint
        packing = {"rows": len(plan), "row_tokens": budget.tokens, "padding": empty}
        runtime.metrics.write(stage, 0, packing)
    return packed_denoising(config, encoder, budget, runtime.mesh), stream


def refuse_foreign_head(config: ConfigDict) -> None:
    """A head of other classes than the world's questions can be neither trained nor scored."""
    if config.classify.classes:
        raise UserError(
            f"classify.classes is {config.classify.classes}, of an imported head: 0 is allowed"
            " where clips have labels; tools.import_weights --config=FILE makes a new head"
        )


def accuracy(
    config: ConfigDict, clips: Labelled, guess: Callable[[np.ndarray], np.ndarray]
) -> dict[str, Any]:
    """How often guess(video (B, T, H, W, 3)) -> (B, Q) is right on the first clips, by question.

    Beside it the share of the commonest answer, which is what one reaches without looking.
    """
    count, batch = config.classify.heldout, config.classify.train.batch
    guesses, labels = [], []
    for start in range(0, count, batch):
        rows = [clips[i] for i in range(start, min(start + batch, count))]
        video = np.stack([row["video"] for row in rows])
        video = np.resize(video, (batch, *video.shape[1:]))  # one shape, one compilation
        guesses.append(guess(video)[: len(rows)])
        labels += [row["label"] for row in rows]
    told = np.stack(labels)
    right = (np.concatenate(guesses) == told).mean(0)
    row: dict[str, Any] = {"heldout_clips": count}
    for i, name in enumerate(config.classify.questions):
        row[f"heldout_accuracy_{name}"] = float(right[i])
        row[f"heldout_commonest_{name}"] = float(np.bincount(told[:, i]).max() / count)
    return row


def train_classifier(config: ConfigDict, runtime: Runtime) -> Params:
    """Stage classify: the EMA parameters of the ViViT; at every checkpoint a row of `accuracy`."""
    refuse_other(config, "classify", runtime, begins=True)
    refuse_foreign_head(config)
    options, seed = config.classify.train, config.seed
    meta = stage_meta(config, "classify", runtime.content)
    questions, objective = answer_counts(config), classification(config, runtime.mesh)
    model = build_classifier(config, runtime.mesh)
    with zero_first("clips"):
        clips = sources.labelled(config, "train", runtime.workdir)
        heldout = sources.labelled(config, "heldout", runtime.workdir)
    fields, share = ("video", "label"), data_process(runtime.mesh)
    stream = batches(clips, options.batch, seed, fields, config.data.threads, process=share)

    @functools.partial(jax.jit, out_shardings=replicated(runtime.mesh))
    def guess(params: Any, video: jax.Array) -> list[jax.Array]:
        logits: Any = model.apply({"params": params["vivit"]}, to_float(video))
        return [part.argmax(-1) for part in answers(logits, questions).values()]

    def score(params: Params, step: int) -> None:
        with jax.set_mesh(runtime.mesh):
            row = accuracy(config, heldout, lambda video: np.stack(guess(params, video), axis=-1))
        runtime.metrics.write("classify", step, row)
        say(f"classify: step {step}, {config.classify.heldout} held-out clips: " + ", ".join(
            f"{name} {row[f'heldout_accuracy_{name}']:.2f}"
            f" (commonest {row[f'heldout_commonest_{name}']:.2f})"
            for name in questions
        ))  # fmt: skip

    return fit(
        "classify", objective, stream, options, runtime, seed=seed, frozen={}, meta=meta,
        preview=score,
    )  # fmt: skip
