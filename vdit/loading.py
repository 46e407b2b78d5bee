"""The parts of a model, read from a trained workdir or from an exported one."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit import shipped
from vdit.config.classes import read_classes
from vdit.config.denoiser import build_denoiser, build_image_encoder, conditions_content
from vdit.config.identity import USED, read_config
from vdit.config.shared import value_of
from vdit.config.text import build_text_encoder, build_tokenizer
from vdit.errors import UserError
from vdit.models.text import TextEncoder, Tokenizer
from vdit.runtime import averages
from vdit.runtime.checkpoint import load_meta, read_newest, restore_ema, saved_shapes
from vdit.runtime.machine import host_memory
from vdit.runtime.mesh import param_sharding, spread
from vdit.shipped import Stage


class Parts(NamedTuple):
    """The arguments of `sample.Model`."""

    config: ConfigDict
    tokenizer: Tokenizer
    encoder: TextEncoder
    # Groups vae, dit and text, of two experts "low"; and the "empty" text, if there is one, and
    # those of the image encoder
    params: dict[str, Any]
    statistics: dict[str, np.ndarray]  # "mean" and "std" of the latents
    classes: list[str]  # their names, for a class-conditional model


def read_stage(
    workdir: Path, stage: str, place: Callable[[Any], Any] | None = None, ema: float = 0.0
) -> Stage:
    """The newest good checkpoint of a stage, with the groups that are used after training; see
    `restore_ema` for `place`. With `ema` the denoiser is the average of that length."""
    folder = averages.folder(workdir, stage) if ema and stage == "dit" else None
    if shipped.is_exported(workdir):
        if folder is not None:
            raise UserError(f"sample.ema={ema:g}: {workdir} is exported, with one average: 0")
        return shipped.read(workdir, stage, place)
    directory = workdir / "checkpoints" / stage

    def read(step: int) -> Any:
        if folder is not None:
            return averages.chosen(folder, step, ema, place), load_meta(directory, step)
        return restore_ema(directory, step, place), load_meta(directory, step)

    step, (groups, meta) = read_newest(directory, read)
    return Stage(step, {name: groups[name] for name in USED[stage] if name in groups}, meta)


def stages_of(workdir: Path) -> list[str]:
    """The stages that are trained, or exported."""
    if shipped.is_exported(workdir):
        return shipped.stages_of(workdir)
    return [stage for stage in USED if (workdir / "checkpoints" / stage).is_dir()]


def read_meta(workdir: Path, stage: str) -> dict[str, Any]:
    """The metadata that `read_stage` would read."""
    if shipped.is_exported(workdir):
        return shipped.read_meta(workdir, stage)
    directory = workdir / "checkpoints" / stage
    return read_newest(directory, lambda step: load_meta(directory, step))[1]


def stage_shapes(workdir: Path, stage: str) -> dict[str, tuple[int, ...]]:
    """Path ("dit/blocks/...") -> shape of the parameters that `read_stage` would read."""
    if shipped.is_exported(workdir):
        return shipped.shapes(workdir, stage)
    directory = workdir / "checkpoints" / stage
    _, saved = read_newest(directory, lambda step: saved_shapes(directory, step, "ema"))
    return {name: x.shape for name, x in saved.items() if name.split("/")[0] in USED[stage]}


def read_parts(
    workdir: Path, overrides: ConfigDict | None = None, mesh: Mesh | None = None
) -> Parts:
    """config.json, tokenizer.json and the newest good checkpoints; see `vdit.sample.load`."""
    config = overrides if overrides is not None else read_config(workdir)
    tokenizer = build_tokenizer(config, workdir)
    encoder = build_text_encoder(config, tokenizer)
    params: dict[str, Any] = {}
    meta: dict[str, Any] = {}
    experts = ("dit", "low") if config.dit.model == "wan" and config.dit.wan.boundary else ()
    for stage in ("vae", *(experts or ("dit",))):
        split = None if mesh is None or stage == "vae" else functools.partial(param_sharding, mesh)
        _, groups, meta = read_stage(workdir, stage, split, config.sample.ema)
        params |= {name: groups[name] for name in ("vae", "text") if name in groups}
        if "dit" in groups:  # a single device may not hold two experts
            to_host = mesh is None and stage in experts
            params[stage] = jax.device_get(groups["dit"]) if to_host else groups["dit"]
        del groups
    for name, value in conditions_content(config).items():
        if meta["fields"].get(name) != value:
            path, what = "dit.wan.image_path", "image"
            if name == "text.content":
                path, what = "text.path", "text"
            where = f"{path}={value_of(config, path)}"
            raise UserError(f"{where} holds another {what} encoder than that of {workdir}")
    images = build_image_encoder(config)
    with contextlib.nullcontext() if mesh is None else host_memory():
        if encoder.frozen:
            ids = np.zeros((1, tokenizer.length), np.int32)
            params["text"] = encoder.init(jax.random.key(0), ids, ids > 0)
        if images is not None:
            params["image"] = images.load()
        denoiser = build_denoiser(config, encoder)
        if empty := denoiser.empty_text(tokenizer, params.get("text")):
            params["empty"] = empty
    if mesh is not None:
        params |= spread(mesh, {"text": params["text"]})
    statistics = {name: np.asarray(v, np.float32) for name, v in meta["latents"].items()}
    classes = read_classes(config, workdir)
    return Parts(config, tokenizer, encoder, params, statistics, classes)
