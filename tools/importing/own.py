"""Imports the output of `tools.export_weights --own`."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vdit import initial, shipped
from vdit.config import joined
from vdit.config.classes import CLASSES
from vdit.config.identity import read_config
from vdit.config.text import look_through_text
from vdit.errors import UserError
from vdit.published import weights
from vdit.published.text_folder import TOKENIZER_BYTES
from vdit.runtime.checkpoint import DIGESTS
from vdit.shipped import OWN

from ..planning.step import training
from .parts import Import, part_of

COPIED = ("tokenizer.json", CLASSES)


def own(source: Path) -> Import:
    """A workdir that was exported under vdit's names, validated by digests and headers."""
    if (source / DIGESTS).exists():
        shipped.verify(source)
    config = read_config(source)
    joined.check(config)
    look_through_text(config)
    said = weights.read_json(source / OWN, weights.CONFIG_BYTES).get("stages")
    if not isinstance(said, dict) or not said or said.keys() - {"vae", "dit", "low", "classify"}:
        raise UserError(f"{source / OWN} names no stages of vdit")
    parts = {}
    for stage, meta in said.items():
        file = source / f"{stage}.safetensors"
        shapes, tensors = own_shapes(config, stage, source), weights.read_headers(source, stage)
        plan = weights.plan(tensors, shapes, [(r"(.*)", r"\1", None)], (), file)
        part = parts[stage] = part_of(config, stage, file, plan, groups=True)
        if stage in ("dit", "low") or (isinstance(meta, dict) and "latents" in meta):
            part.meta["latents"] = own_statistics(meta, config.vae.channels, source / OWN)
    copied = [source / name for name in COPIED if (source / name).exists()]
    files = {f.name: weights.read_bytes(f, TOKENIZER_BYTES).decode() for f in copied}
    return Import(config, parts, files)


def own_shapes(config: ConfigDict, stage: str, source: Path) -> dict[str, Any]:
    """The abstract parameters of a stage, by group."""
    if stage != "classify":
        return initial.shapes(config, stage, source)
    step = training(config, stage)
    return jax.eval_shape(functools.partial(step.objective.init, jax.random.key(0)), step.batch)


def own_statistics(meta: Any, channels: int, path: Path) -> dict[str, list[float]]:
    """The latents' mean and standard deviation, as numbers."""
    try:
        statistics = {name: [float(x) for x in meta["latents"][name]] for name in ("mean", "std")}
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: the latents' mean and std are not there as numbers") from error
    values = np.array([*statistics.values()])
    if values.shape != (2, channels) or not np.isfinite(values).all() or values[1].min() <= 0:
        raise UserError(f"{path}: the latents' mean and std: {channels} numbers, std above 0")
    return statistics
