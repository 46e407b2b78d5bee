"""The parts of a model, read from a trained workdir or from an exported one."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit import shipped
from vdit.config.classes import read_classes
from vdit.config.denoiser import build_denoiser, build_image_encoder, conditions_content
from vdit.config.identity import USED, read_config, stored_fields
from vdit.config.shared import value_of
from vdit.config.text import build_text_encoder, build_tokenizer
from vdit.errors import UserError
from vdit.models.text import TextEncoder, Tokenizer
from vdit.nn.lora import merged_in_place
from vdit.published.lora import parse, read_adapters
from vdit.runtime import averages
from vdit.runtime.checkpoint import (
    load_meta,
    read_newest,
    restore_ema,
    restore_raw,
    saved_shapes,
)
from vdit.runtime.fingerprint import fingerprint
from vdit.runtime.machine import host_memory
from vdit.runtime.mesh import param_sharding, spread
from vdit.shipped import Stage, find

DENOISERS = ("dit", "low")  # stages: of two experts, the second for low noise levels


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
    workdir: Path, stage: str, place: Callable[[Any], Any] | None = None, ema: float = 0.0,
    raw: bool = False,
) -> Stage:  # fmt: skip
    """`read_own`, of adapters with their base: merged with its denoiser, or its other networks."""
    lora = adapters_in(workdir)
    if lora and _is_base_s(workdir, stage):
        return read_stage(base_of(workdir, lora), stage, place, 0.0, raw)
    step, groups, meta = read_own(workdir, stage, place, ema, raw)
    if "lora" in groups:
        base, low = read_base(base_of(workdir, lora), place, stage), groups["lora"]
        refuse_changed(meta, base, workdir)
        scale = (lora["alpha"] or lora["rank"]) / lora["rank"]
        groups = base.groups | {n: merged_in_place(base.groups[n], low[n], scale) for n in low}
    return Stage(step, groups, meta)


def adapters_in(workdir: Path) -> dict[str, Any]:
    """The section dit.lora of a workdir of adapters; empty for any other."""
    fields = stored_fields(workdir, lenient=True).get("dit", {}).get("lora", {})
    return fields if fields.get("rank") else {}


class Base(NamedTuple):
    """What adapters are trained on."""

    source: Path
    groups: dict[str, Any]  # parameters of the denoiser and of a learned text encoder
    latents: dict[str, list[float]]  # "mean" and "std", with which it normalises them
    digest: str  # of the parameters

    def statistics(self) -> dict[str, np.ndarray]:
        """As `Latents.statistics`."""
        return {name: np.asarray(value, np.float32) for name, value in self.latents.items()}


def base_of(workdir: Path, lora: Mapping[str, Any]) -> Path:
    """The folder of dit.lora.base."""
    if not (source := find(lora["base"])).joinpath("config.json").is_file():
        raise UserError(f"{workdir}: its base is not there: dit.lora.base is {lora['base']}")
    return source


def with_bases(workdir: Path) -> list[Path]:
    """A workdir, and of adapters the base, and its base."""
    lora = adapters_in(workdir)
    return [workdir, *(with_bases(base_of(workdir, lora)) if lora else ())]


def read_base(source: Path, place: Callable[[Any], Any] | None, stage: str = "dit") -> Base:
    """A base as it samples; see `restore_ema` for `place`."""
    _, groups, meta = read_stage(source, stage, place, read_config(source).sample.ema)
    return Base(source, groups, meta["latents"], fingerprint(groups))


def refuse_changed(meta: Mapping[str, Any], base: Base, workdir: Path) -> None:
    """Refuses adapters that were trained on other parameters."""
    if meta["base"] != base.digest:
        raise UserError(
            f"{workdir}: its base has changed: adapters were trained on {meta['base'][:12]}, and"
            f" dit.lora.base={base.source} now has parameters {base.digest[:12]}"
        )


def read_own(
    workdir: Path, stage: str, place: Callable[[Any], Any] | None = None, ema: float = 0.0,
    raw: bool = False,
) -> Stage:  # fmt: skip
    """The newest good checkpoint of a stage, with the groups that are used after training; see
    `restore_ema` for `place`. With `ema` the denoiser is the average of that length, with `raw` all
    are the parameters themselves."""
    folder = averages.folder(workdir, stage) if ema and stage == "dit" else None
    if shipped.is_exported(workdir):
        if folder is not None:
            raise UserError(f"sample.ema={ema:g}: {workdir} is exported, with one average: 0")
        if raw:
            raise UserError(f"{workdir} was not trained here: it has an EMA alone")
        return shipped.read(workdir, stage, place)
    directory = workdir / "checkpoints" / stage

    def read(step: int) -> Any:
        if folder is not None:
            return averages.chosen(folder, step, ema, place), load_meta(directory, step)
        if raw:
            return restore_raw(directory, step), load_meta(directory, step)
        return restore_ema(directory, step, place), load_meta(directory, step)

    step, (groups, meta) = read_newest(directory, read)
    used = {name: groups[name] for name in (*USED[stage], "lora") if name in groups}
    return Stage(step, used, meta)


def stages_of(workdir: Path) -> list[str]:
    """The stages that are trained, or exported; of adapters with those of their base."""
    folders = reversed(with_bases(workdir))
    return list(dict.fromkeys(stage for folder in folders for stage in own_stages(folder)))


def own_stages(workdir: Path) -> list[str]:
    """The stages that a workdir itself holds."""
    if shipped.is_exported(workdir):
        return shipped.stages_of(workdir)
    return [stage for stage in USED if (workdir / "checkpoints" / stage).is_dir()]


def _is_base_s(workdir: Path, stage: str) -> bool:
    """Whether a workdir of adapters leaves a stage to its base: of two experts, one may be left."""
    return stage not in (own_stages(workdir) or DENOISERS)


def read_meta(workdir: Path, stage: str) -> dict[str, Any]:
    """The metadata that `read_stage` would read."""
    lora = adapters_in(workdir)
    if lora and _is_base_s(workdir, stage):
        return read_meta(base_of(workdir, lora), stage)
    if shipped.is_exported(workdir):
        return shipped.read_meta(workdir, stage)
    directory = workdir / "checkpoints" / stage
    return read_newest(directory, lambda step: load_meta(directory, step))[1]


def stage_shapes(workdir: Path, stage: str) -> dict[str, tuple[int, ...]]:
    """Path ("dit/blocks/...") -> shape of the parameters that `read_stage` would read."""
    if lora := adapters_in(workdir):
        return stage_shapes(base_of(workdir, lora), stage)
    if shipped.is_exported(workdir):
        return shipped.shapes(workdir, stage)
    directory = workdir / "checkpoints" / stage
    _, saved = read_newest(directory, lambda step: saved_shapes(directory, step, "ema"))
    return {name: x.shape for name, x in saved.items() if name.split("/")[0] in USED[stage]}


def read_parts(
    workdir: Path, overrides: ConfigDict | None = None, mesh: Mesh | None = None,
    lora: Sequence[str] = (),
) -> Parts:  # fmt: skip
    """config.json, tokenizer.json and the newest good checkpoints; see `vdit.sample.load`."""
    config = overrides if overrides is not None else read_config(workdir)
    if shipped.is_exported(workdir) and "dit" not in stages_of(workdir):
        raise UserError(
            f"{workdir} has an autoencoder alone: --config.init={workdir.name} trains a denoiser of"
            " its latents"
        )
    tokenizer = build_tokenizer(config, workdir)
    encoder = build_text_encoder(config, tokenizer)
    params: dict[str, Any] = {}
    meta: dict[str, Any] = {}
    experts = DENOISERS if config.dit.model == "wan" and config.dit.wan.boundary else ()
    files = [parse(text) for text in lora]
    if not experts and any(file.stage == "low" for file in files):
        raise UserError("--lora=low=FILE: it is for the second of two experts (dit.wan.boundary)")
    for stage in ("vae", *(experts or ("dit",))):
        split = None if mesh is None or stage == "vae" else functools.partial(param_sharding, mesh)
        _, groups, meta = read_stage(workdir, stage, split, config.sample.ema)
        params |= {name: groups[name] for name in ("vae", "text") if name in groups}
        if "dit" in groups:  # a single device may not hold two experts
            for file in files:
                if file.stage == stage:
                    low = read_adapters(file.path, groups["dit"])
                    groups["dit"] = merged_in_place(groups["dit"], low, file.weight)
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
