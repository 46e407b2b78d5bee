"""A workdir that `tools.export_weights --own` wrote, checked by headers."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tools.importing.parts import Import, part_of, shapes
from tools.planning.step import text_params, training
from vdit.config import joined
from vdit.config.classes import CLASSES
from vdit.config.identity import read_config
from vdit.config.text import build_text_encoder, build_tokenizer, look_through_text
from vdit.errors import UserError
from vdit.published import weights
from vdit.published.text_folder import TOKENIZER_BYTES

OWN = "vdit.json"  # of an exported workdir: what its stages say of themselves
COPIED = ("tokenizer.json", CLASSES)


def groups_of(stage: str) -> tuple[str, ...]:
    """The groups of parameters of a stage that are of use behind training."""
    return {"vae": ("vae",), "dit": ("dit", "text"), "classify": ("vivit",)}[stage]


def own(source: Path) -> Import:
    """A workdir that was exported under vdit's own names, checked by headers."""
    config = read_config(source)
    joined.check(config)
    look_through_text(config)
    said = weights.read_json(source / OWN, weights.CONFIG_BYTES).get("stages")
    if not isinstance(said, dict) or not said or said.keys() - {"vae", "dit", "classify"}:
        raise UserError(f"{source / OWN} names no stages of vdit")
    parts = {}
    for stage, told in said.items():
        file = source / f"{stage}.safetensors"
        made, tensors = own_shapes(config, stage, source), weights.read_headers(source, stage)
        plan = weights.plan(tensors, made, [(r"(.*)", r"\1", None)], (), file)
        part = parts[stage] = part_of(config, stage, file, plan, groups=True)
        if stage == "dit" or (isinstance(told, dict) and "latents" in told):
            part.meta["latents"] = own_statistics(told, config.vae.channels, source / OWN)
    there = [source / name for name in COPIED if (source / name).exists()]
    files = {f.name: weights.read_bytes(f, TOKENIZER_BYTES).decode() for f in there}
    return Import(config, parts, files)


def own_shapes(config: ConfigDict, stage: str, source: Path) -> dict[str, Any]:
    """The abstract parameters of a stage, by group."""
    if stage != "dit":
        made = training(config, stage)
        init = functools.partial(made.objective.init, jax.random.key(0))
        found = jax.eval_shape(init, made.batch)
        return {name: found[name] for name in groups_of(stage)}
    encoder = build_text_encoder(config, build_tokenizer(config, source))
    groups = {"dit": shapes(config, encoder.dim)}
    if not encoder.frozen:
        groups["text"] = text_params(encoder, config.text.length)
    return groups


def own_statistics(told: Any, channels: int, path: Path) -> dict[str, list[float]]:
    """The latents' mean and deviation, as numbers."""
    try:
        found = {name: [float(x) for x in told["latents"][name]] for name in ("mean", "std")}
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: the latents' mean and std are not there as numbers") from error
    values = np.array([*found.values()])
    if values.shape != (2, channels) or not np.isfinite(values).all() or values[1].min() <= 0:
        raise UserError(f"{path}: the latents' mean and std: {channels} numbers, std above 0")
    return found
