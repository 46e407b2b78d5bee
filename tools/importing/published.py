"""Imports published folders by their family's kind (`vdit.published.families`).

Reads and validates configurations and headers, no tensor data.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vdit import stages
from vdit.config.autoencoder import build_vae
from vdit.config.classes import CLASSES, to_json
from vdit.config.denoiser import conditions_content
from vdit.config.text import build_text_encoder, build_tokenizer, look_through_text
from vdit.errors import UserError
from vdit.initial import denoiser_shapes
from vdit.models.vae_conv import ConvVAE
from vdit.published import (
    families,
    image_folder,
    layouts,
    text_folder,
    vae_folder,
    vivit_folder,
    weights,
)
from vdit.published.family import Autoencoder, Classifier, Denoiser
from vdit.published.text_folder import TOKENIZER_BYTES

from . import classifier as classifiers
from .classifier import Target
from .parts import Import, Part, configured, part_of

# The flags of folders, and their names in a pipeline's folder.
PARTS = {
    "source": "transformer", "vae": "vae", "text": "text_encoder", "image": "image_encoder",
}  # fmt: skip


def planned(
    source: Path, vae: Path | None = None, text: Path | None = None, target: Target | None = None,
    image: Path | None = None,
) -> Import:  # fmt: skip
    """The import of a published folder."""
    found = folders(source, {"vae": vae, "text": text, "image": image})
    folder = found["denoiser"]
    said = weights.read_json(folder / "config.json", weights.CONFIG_BYTES)
    name, family = families.named(said) or ("", None)
    if target is not None and not isinstance(family, Classifier):
        known = " or ".join(families.of(Classifier))
        raise UserError(f"--config with {folder}: only a folder of {known} takes it")
    if not isinstance(family, Autoencoder | Classifier):
        return denoiser(source, found)
    if len(found) > 1:
        flags = "--vae, --text or --image"
        raise UserError(f"{flags} with {folder} of {name}: only a denoiser takes them")
    return classifier(folder, target) if isinstance(family, Classifier) else autoencoder(folder)


def folders(source: Path, given: Mapping[str, Path | None]) -> dict[str, Path]:
    """The folders "denoiser", and, if they exist, "low" (a second denoiser) and `layouts.PARTS`."""
    for flag, path in {"source": source, **given}.items():
        if path is not None and path.suffix in weights.PICKLES:
            raise UserError(
                f"--{flag}={path} is a pickle, which is not read: give the folder {PARTS[flag]}/ of"
                " the release for diffusers, which has it as safetensors"
            )
        if path is not None and not path.is_dir():
            raise UserError(f"--{flag}={path}: there is no such folder")
    found = {name: source / name for name in layouts.PARTS if (source / name).is_dir()}
    names = [name for name in layouts.DENOISERS if (source / name).is_dir()]
    if found and not names:
        raise UserError(f"{source} holds no folder {' or '.join(layouts.DENOISERS)}")
    found |= {PARTS[flag]: path for flag, path in given.items() if path is not None}
    found["denoiser"] = source / names[0] if names else source
    second = layouts.DENOISERS[names[0]] if names else ""
    return found | ({"low": source / second} if second and (source / second).is_dir() else {})


def class_names(source: Path, count: int) -> list[str]:
    """The names of a pipeline's classes, in order; empty if it has none."""
    path = source / "model_index.json"
    labels = weights.read_json(path, TOKENIZER_BYTES).get("id2label") if path.exists() else None
    if not labels or not count:
        return []
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(count)}:
        raise UserError(f"{path}: id2label does not name the classes 0 to {count - 1}")
    return [str(labels[str(i)]) for i in range(count)]


def vae_fields(folder: Path, module: ConvVAE) -> dict[str, Any]:
    """vdit's fields for an autoencoder; `UserError` if they cannot express it."""
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
    """The latents' mean and standard deviation in an autoencoder's folder; empty without them."""
    statistics = vae_folder.read_statistics(folder) or {}
    return {name: [float(x) for x in values] for name, values in statistics.items()}


def autoencoder(folder: Path) -> Import:
    """A folder of an autoencoder."""
    module, plan = vae_folder.read_module(folder)
    config = configured({"stages": ("vae",), **vae_fields(folder, module)})
    if not module.causal:
        config.data.frames = 1
    part = part_of(config, "vae", folder, plan)
    if spread := statistics_of(folder):
        part.meta["latents"] = spread
    return Import(config, {"vae": part}, {})


def classifier(folder: Path, target: Target | None) -> Import:
    """A folder of a ViT or ViViT, as a classifier or as the initialisation of `target`."""
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
    """A denoiser with the other parts of its pipeline."""
    folder = found["denoiser"]
    others = [name for family in families.of(Autoencoder).values() for name in family.classes]
    others += [f"model_type {name}" for name in families.of(Classifier)]
    name, numbers = layouts.read_layout(folder, others)
    layout = layouts.LAYOUTS[name]
    try:
        changes = layout.to_vdit(numbers)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    index = source / "model_index.json"
    said = weights.read_json(index, TOKENIZER_BYTES) if index.exists() else None
    try:
        changes |= layout.pipeline(said, changes, "low" in found)
    except UserError as error:
        raise UserError(f"{index}: {error}") from error
    changes |= layout.schedule(source / "scheduler" / "scheduler_config.json")
    plans: dict[str, tuple[Path, weights.Plan]] = {}
    statistics = layout.latents(changes["vae.channels"])
    if "vae" in found:
        channels, side = changes["vae.channels"], numbers.get("sample_size", 0)
        fields, plan = its_autoencoder(found["vae"], folder, layout, channels, side)
        changes |= fields
        statistics = statistics_of(found["vae"])
        plans["vae"] = found["vae"], plan
    if changes.get("text.encoder") in text_folder.FAMILIES and "text_encoder" in found:
        changes["text.path"] = str(found["text_encoder"].absolute())
    if changes.get("dit.wan.image") and "image_encoder" in found:
        changes["dit.wan.image_path"] = str(found["image_encoder"].absolute())
    config = configured(changes)
    width = numbers.get(layout.text, 1)
    if config.text.path:
        check_text(config, folder, width)
    check_image(config, folder)
    more: dict[str, Any] = {}
    abstract, layers = denoiser_shapes(config, width), layout.layers(numbers)
    for stage, where in (("dit", folder), ("low", found.get("low"))):
        if where is None:
            continue
        if layouts.read_layout(where, others) != (name, numbers):
            raise UserError(f"{where / 'config.json'} is of another network than {folder}")
        tensors = weights.read_headers(where, layouts.STEM)
        plan = weights.plan(tensors, abstract, layout.rows, layout.others, where, layers)
        plans[stage] = where, plan
        imported = {"digest": weights.digest(tensors), "numbers": numbers, "layout": name}
        imported["source"] = str(source.absolute())
        more[stage] = {"latents": statistics, "imported": imported}
    # A denoiser may be imported without the folders of its encoders.
    content = conditions_content(config)
    parts = {}
    for stage, (where, made) in plans.items():
        fields = stages.stage_fields(config, stage) | (content if stage in more else {})
        meta = {"stage": stage, "fields": fields, "digest": stages.digest(fields)}
        parts[stage] = Part(where, made, meta | more.get(stage, {}))
    classes = class_names(source, config.dit.paper.classes)
    return Import(config, parts, {CLASSES: to_json(classes)} if classes else {})


def its_autoencoder(
    vae: Path, folder: Path, layout: Denoiser, channels: int, side: int
) -> tuple[dict[str, Any], weights.Plan]:
    """vdit's fields for a pipeline's autoencoder, and its plan; `UserError` if it does not fit
    latents of so many channels. `side`: rows and columns of latents, 0 for any."""
    weights.read_config(vae, layout.autoencoders, "_class_name")
    module, plan = vae_folder.read_module(vae)
    if module.channels != channels:
        raise UserError(
            f"{vae} has latents of {module.channels} channels; allowed by {folder}: {channels}"
        )
    fields = vae_fields(vae, module)
    if side:
        pixels = side * module.patch[1]
        fields |= {"data.size": (pixels, pixels), "sample.zoom": max(1, 256 // pixels)}
    return fields, plan


def check_image(config: ConfigDict, folder: Path) -> None:
    """Refuses an image encoder's folder that does not fit the denoiser in `folder`."""
    path, wanted = config.dit.wan.image_path, config.dit.wan.image
    if not path:
        return
    encoder = image_folder.read(path)
    weights.look_through(encoder.plan)
    if encoder.module.width != wanted:
        raise UserError(
            f"{path} has features of {encoder.module.width} numbers; allowed by {folder}: {wanted}"
        )


def check_text(config: ConfigDict, folder: Path, width: int) -> None:
    """Refuses a text encoder's folder that does not fit the denoiser in `folder`."""
    encoder = build_text_encoder(config, build_tokenizer(config, Path()))
    look_through_text(config)
    if encoder.dim != width:
        raise UserError(
            f"{config.text.path} has features of {encoder.dim} numbers; allowed by {folder}:"
            f" {width}"
        )
