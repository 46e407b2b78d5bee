"""The parts of a model, read from a trained workdir."""

import contextlib
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config.classes import read_classes
from vdit.config.denoiser import build_denoiser
from vdit.config.identity import read_config
from vdit.config.text import build_text_encoder, build_tokenizer, text_content
from vdit.errors import UserError
from vdit.models.text import TextEncoder, Tokenizer
from vdit.runtime import averages
from vdit.runtime.checkpoint import load_meta, read_newest, restore_ema
from vdit.runtime.machine import host_memory
from vdit.runtime.mesh import param_sharding, spread


class Parts(NamedTuple):
    """The arguments of `sample.Model`."""

    config: ConfigDict
    tokenizer: Tokenizer
    encoder: TextEncoder
    params: dict[str, Any]  # groups vae, dit and text; and the "empty" text, if there is one
    statistics: dict[str, np.ndarray]  # "mean" and "std" of the latents
    classes: list[str]  # their names, for a class-conditional model


def read_parts(
    workdir: Path, overrides: ConfigDict | None = None, mesh: Mesh | None = None
) -> Parts:
    """config.json, tokenizer.json and the newest good checkpoints; see `vdit.sample.load`."""
    config = overrides if overrides is not None else read_config(workdir)
    tokenizer = build_tokenizer(config, workdir)
    encoder = build_text_encoder(config, tokenizer)
    params: dict[str, Any] = {}
    meta: dict[str, Any] = {}
    for stage in ("vae", "dit"):
        directory = workdir / "checkpoints" / stage
        split = None if mesh is None or stage == "vae" else functools.partial(param_sharding, mesh)

        def read(step: int, directory: Path = directory, split: Any = split) -> Any:
            if config.sample.ema and directory.name == "dit":
                folder = averages.folder(workdir, "dit")
                groups = averages.chosen(folder, step, config.sample.ema, split)
            else:
                groups = restore_ema(directory, step, split)
            return groups, load_meta(directory, step)

        _, (groups, meta) = read_newest(directory, read)
        # A discriminator and the heads of auxiliary losses serve training alone.
        params |= {name: groups[name] for name in ("vae", "dit", "text") if name in groups}
    content = text_content(config)
    if any(meta["fields"].get(name) != value for name, value in content.items()):
        raise UserError(
            f"text.path={config.text.path} holds another text encoder than that of {workdir}"
        )
    with contextlib.nullcontext() if mesh is None else host_memory():
        if encoder.frozen:
            ids = np.zeros((1, tokenizer.length), np.int32)
            params["text"] = encoder.init(jax.random.key(0), ids, ids > 0)
        denoiser = build_denoiser(config, encoder)
        if empty := denoiser.empty_text(tokenizer, params.get("text")):
            params["empty"] = empty
    if mesh is not None:
        params |= spread(mesh, {"text": params["text"]})
    statistics = {name: np.asarray(v, np.float32) for name, v in meta["latents"].items()}
    classes = read_classes(config, workdir)
    return Parts(config, tokenizer, encoder, params, statistics, classes)
