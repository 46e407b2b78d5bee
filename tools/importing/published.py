"""What published folders become: pipelines, denoisers, autoencoders, ViTs and ViViTs.

All is checked by configurations and headers; no tensor is read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.importing import classifier as classifiers
from tools.importing.classifier import Target
from tools.importing.parts import Import, Part, configured, part_of, shapes
from vdit import stages
from vdit.config.autoencoder import build_vae
from vdit.config.classes import CLASSES, to_json
from vdit.config.text import build_text_encoder, build_tokenizer, look_through_text, text_content
from vdit.errors import UserError
from vdit.models import layouts, vae_folder, vivit_folder, weights
from vdit.models.text_folder import TOKENIZER_BYTES
from vdit.models.vae_conv import ConvVAE


def planned(
    source: Path, vae: Path | None = None, text: Path | None = None, target: Target | None = None
) -> Import:
    """What is to be imported, checked by headers; no tensor is read."""
    found = folders(source, vae, text)
    folder = found["denoiser"]
    said = weights.read_json(folder / "config.json", weights.CONFIG_BYTES)
    kind = str(said.get("_class_name") or said.get("model_type"))
    alone = kind in vae_folder.FAMILIES or kind in vivit_folder.FAMILIES
    if target is not None and kind not in vivit_folder.FAMILIES:
        raise UserError(f"--config with {folder}: only a ViT's or ViViT's folder takes it")
    if alone and len(found) > 1:
        raise UserError(f"--vae or --text with {folder} of {kind}: only a denoiser takes them")
    if not alone:
        return denoiser(source, found)
    return classifier(folder, target) if kind in vivit_folder.FAMILIES else autoencoder(folder)


def folders(source: Path, vae: Path | None, text: Path | None) -> dict[str, Path]:
    """The folders "denoiser", and "vae" and "text_encoder" where they are."""
    for flag, path in (("source", source), ("vae", vae), ("text", text)):
        if path is not None and not path.is_dir():
            raise UserError(f"--{flag}={path}: there is no such folder")
    found = {name: source / name for name in layouts.PARTS if (source / name).is_dir()}
    denoisers = [found.pop(name) for name in ("transformer", "unet") if name in found]
    if found and not denoisers:
        raise UserError(f"{source} holds no folder transformer or unet")
    given = {"vae": vae, "text_encoder": text}
    more = {name: path for name, path in given.items() if path is not None}
    return found | more | {"denoiser": (denoisers or [source])[0]}


# A scheduler's fields for each table, and what vdit calls what its network predicts.
TABLES: dict[str, dict[str, Any]] = {
    "ddpm": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012
    },
}  # fmt: skip
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def read_schedule(source: Path, process: str) -> dict[str, Any]:
    """What a pipeline's scheduler says for the configuration: spacing of steps, prediction.

    `UserError` where its noise is not the table `process`.
    """
    path = source / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return {"sample.spacing": "leading"}  # diffusers' default
    config = weights.read_json(path, weights.CONFIG_BYTES)
    for field, value in {
        "num_train_timesteps": 1000, **TABLES[process], "clip_sample": False,
        "thresholding": False, "rescale_betas_zero_snr": False, "trained_betas": None,
    }.items():  # fmt: skip
        if config.get(field, value) != value:
            raise UserError(f"{path}: {field} is {config[field]!r}; allowed: {value!r}")
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in ("leading", "trailing"):
        raise UserError(f"{path}: timestep_spacing is {spacing!r}; allowed: leading, trailing")
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise UserError(f"{path}: prediction_type is {kind!r}; allowed: {', '.join(PREDICTIONS)}")
    return {"sample.spacing": spacing, "dit.prediction": PREDICTIONS[kind]}


def class_names(source: Path, count: int) -> list[str]:
    """The names of a pipeline's classes, in order; none if it does not tell them."""
    path = source / "model_index.json"
    named = weights.read_json(path, TOKENIZER_BYTES).get("id2label") if path.exists() else None
    if not named or not count:
        return []
    if not isinstance(named, dict) or set(named) != {str(i) for i in range(count)}:
        raise UserError(f"{path}: id2label does not name the classes 0 to {count - 1}")
    return [str(named[str(i)]) for i in range(count)]


def vae_fields(folder: Path, module: ConvVAE) -> dict[str, Any]:
    """The configuration of an autoencoder; `UserError` for one that has none."""
    width, decoder_width = module.widths[0], module.decoder_widths[0]
    fields: dict[str, Any] = {
        "vae.model": "causal" if module.causal else "kl", "vae.patch": module.patch,
        "vae.channels": module.channels, "vae.width": width,
        "vae.multipliers": tuple(w // width for w in module.widths),
        "vae.blocks": module.blocks, "vae.groups": module.groups or 32, "vae.pixels": module.pixels,
        "vae.residual": module.residual,
        "vae.decoder_width": 0 if decoder_width == width else decoder_width,
    }  # fmt: skip
    made = build_vae(configured(fields))
    for name in vae_folder.FIELDS:
        ours, theirs = getattr(made, name), getattr(module, name)
        if ours != theirs:
            raise UserError(f"{folder}: its autoencoder has {name} {theirs}; allowed: {ours}")
    return fields


def statistics_of(folder: Path) -> dict[str, list[float]]:
    """The latents' mean and deviation that an autoencoder's folder says; nothing if it does not."""
    found = vae_folder.read_statistics(folder) or {}
    return {name: [float(x) for x in values] for name, values in found.items()}


def autoencoder(folder: Path) -> Import:
    """An autoencoder alone."""
    module, plan = vae_folder.read_module(folder)
    config = configured({"stages": ("vae",), **vae_fields(folder, module)})
    if not module.causal:
        config.data.frames = 1
    part = part_of(config, "vae", folder, plan)
    if spread := statistics_of(folder):
        part.meta["latents"] = spread
    return Import(config, {"vae": part}, {})


def classifier(folder: Path, target: Target | None) -> Import:
    """A ViT or ViViT as it is, or as the start of another network."""
    found = vivit_folder.read_module(folder)
    if target is not None:
        config, names = target.config, {}
        finish = classifiers.started(folder, found, target)
    else:
        config = configured(classifiers.fields(found))
        finish = classifiers.with_head(found, config)
        names = {CLASSES: to_json(found.classes)} if found.classes else {}
    part = part_of(config, "classify", folder, found.plan, finish=finish)
    return Import(config, {"classify": part}, names)


def denoiser(source: Path, found: Mapping[str, Path]) -> Import:
    """A denoiser and what a pipeline's folder has beside it."""
    folder = found["denoiser"]
    others = (*vae_folder.FAMILIES, *(f"model_type {kind}" for kind in vivit_folder.FAMILIES))
    name, numbers = layouts.read_layout(folder, others)
    layout = layouts.LAYOUTS[name]
    told = "cross_attention_dim" if name == "unet" else "caption_channels"  # width of its text
    try:
        changes = layout.to_vdit(numbers)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    changes |= read_schedule(source, changes["dit.process"])
    plans: dict[str, tuple[Path, weights.Plan]] = {}
    scale = [1.0 / layouts.SCALING] * changes["vae.channels"]
    statistics = {"mean": [0.0] * len(scale), "std": scale}
    if "vae" in found:
        module, plan = vae_folder.read_module(found["vae"])
        if module.causal:
            raise UserError(f"{found['vae']} is causal in time; allowed by {folder}: AutoencoderKL")
        changes |= vae_fields(found["vae"], module)
        if module.channels != numbers["in_channels"]:
            raise UserError(
                f"{found['vae']} has latents of {module.channels} channels; allowed by {folder}:"
                f" {numbers['in_channels']}"
            )
        pixels = numbers["sample_size"] * module.patch[1]
        changes |= {"data.size": (pixels, pixels), "sample.zoom": max(1, 256 // pixels)}
        statistics = statistics_of(found["vae"])
        plans["vae"] = found["vae"], plan
    if changes.get("text.encoder") in ("t5", "clip") and "text_encoder" in found:
        changes["text.path"] = str(found["text_encoder"].absolute())
    config = configured(changes)
    if config.text.path:
        encoder = build_text_encoder(config, build_tokenizer(config, Path()))
        look_through_text(config)
        if encoder.dim != numbers[told]:
            raise UserError(
                f"{config.text.path} has features of {encoder.dim} numbers; allowed by {folder}:"
                f" {numbers[told]}"
            )
    abstract = shapes(config, numbers.get(told, 1))
    tensors = weights.read_headers(folder, layouts.STEM)
    layers = layout.layers(numbers)
    plan = weights.plan(tensors, abstract, layout.rows, layout.others, folder, layers)
    plans["dit"] = folder, plan
    imported = {"digest": weights.digest(tensors), "numbers": numbers, "layout": name}
    more = {"dit": {"latents": statistics, "imported": imported}}
    # Without its text encoder's folder a denoiser is imported too, and then says nothing of it.
    content = text_content(config) if config.text.path else {}
    parts = {}
    for stage, (where, made) in plans.items():
        fields = stages.stage_fields(config, stage) | (content if stage == "dit" else {})
        meta = {"stage": stage, "fields": fields, "digest": stages.digest(fields)}
        parts[stage] = Part(where, made, meta | more.get(stage, {}))
    classes = class_names(source, config.dit.paper.classes)
    return Import(config, parts, {CLASSES: to_json(classes)} if classes else {})
