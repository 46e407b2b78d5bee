"""Networks in public layouts: a network's family and config.json, and safetensors files."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vdit.errors import UserError
from vdit.models.dit import preset
from vdit.models.vae_conv import ConvVAE
from vdit.published.family import Config, Denoiser, Sizes
from vdit.published.layouts import LAYOUTS
from vdit.published.vae_folder import FAMILIES, FIELDS
from vdit.published.weights import Row


def _copy(source: Path, to: Path) -> None:
    """Copies a file or a folder, with the content of links."""
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, to)


# How a part of a pipeline that was not trained comes into another folder.
PLACES: dict[str, Callable[[Path, Path], Any]] = {"link": os.symlink, "copy": _copy}
SHARD_BYTES = 5 * 10**9  # of a file; more tensors go into another shard


def text_width(params: Mapping[str, Any]) -> int:
    """Width of the text features that a denoiser reads; 1 if it reads none.

    `params` are flat, with names joined by "/".
    """
    for end in (layout.text_kernel for layout in LAYOUTS.values() if layout.text_kernel):
        for path, kernel in params.items():
            if path.endswith(end):
                return kernel.shape[-2]
    return 1


def architecture(fields: Config, sizes: Sizes) -> dict[str, Any]:
    """The fields that determine a denoiser's architecture, equal for equal networks."""
    names = ("dit.model", "dit.patch", "dit.axes", "dit.learned_variance")
    groups = ("dit.paper.", "dit.unet.", "dit.wan.")
    kept = {k: v for k, v in fields.items() if k in names or k.startswith(groups)}
    for name in ("token_times", "boundary", "image_path"):  # a pipeline's
        kept.pop(f"dit.wan.{name}")
    if not kept["dit.paper.span"]:  # positions that count tokens
        kept["dit.paper.span"] = float(sizes.latent[1] // kept["dit.patch"][0])
    if kept["dit.model"] == "unet":  # its size is not in dit.preset
        return {k: v for k, v in kept.items() if not k.startswith("dit.paper.")}
    return kept | {"preset": {"activation": "gelu"} | preset(fields["dit.preset"])}


def to_layout(
    fields: Config, sizes: Sizes, defaults: Config
) -> tuple[Denoiser, dict[str, Any]] | None:
    """The family of a denoiser and its config.json; None if diffusers has no such network.

    `fields` and `defaults` are a configuration's and the default one's, flat ("dit.patch").
    """
    square = sizes.latent[1] == sizes.latent[2] and len(set(fields["dit.patch"])) == 1
    for layout in LAYOUTS.values():
        if not square and not layout.any_size:
            continue
        try:
            config = layout.from_vdit(fields, sizes)
            theirs = {**defaults, **layout.to_vdit(config)}
        except UserError:
            continue
        same = architecture(theirs, sizes) == architecture(fields, sizes)
        if same and (layout.any_size or theirs["data.frames"] == sizes.latent[0]):
            fixed = {name: layout.fixed[name] for name in layout.written}
            return layout, {"_class_name": layout.classes[0], **fixed, **config}
    return None


def autoencoder_folder(
    module: Any, statistics: Mapping[str, Any] | None
) -> tuple[dict[str, Any], Sequence[Row]] | None:
    """The config.json and the key table of an autoencoder; None if diffusers does not have it.

    `statistics` are the latents' "mean" and "std" as lists, if known.
    """
    if not isinstance(module, ConvVAE):
        return None
    for name, family in FAMILIES.items():
        config = {"_class_name": name, **family.to_config(module)}
        try:
            theirs = family.from_config(config, Path())
        except UserError:
            continue
        if all(getattr(module, field) == getattr(theirs, field) for field in FIELDS):
            if statistics is not None:
                config |= family.scaling(list(statistics["mean"]), list(statistics["std"]))
            return config, family.rows(module)
    return None


def write(path: Path, tensors: Iterable[tuple[str, Callable[[], np.ndarray]]]) -> None:
    """Writes tensors, each given by its function, to a safetensors file.

    More than `SHARD_BYTES` go to several shards with an index beside `path`, as Hugging Face's
    libraries read and write them. Memory holds one shard at a time.
    """
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        file = path.with_name(f"{path.stem}-{len(shards) + 1:05}.safetensors")
        save_file(held, file, {"format": "pt"})
        shards.append((file, [*held]))
        held.clear()

    for name, make in tensors:
        array = np.asarray(make(), order="C")
        if held and size + array.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(shards) == 1:
        os.replace(shards[0][0], path)
        return
    named: dict[str, str] = {}
    for file, names in shards:
        renamed = file.with_stem(f"{file.stem}-of-{len(shards):05}")
        os.replace(file, renamed)
        named |= dict.fromkeys(names, renamed.name)
    index = {"metadata": {"total_size": total}, "weight_map": named}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    path.with_name(f"{path.name}.index.json").write_text(text, encoding="utf-8")
