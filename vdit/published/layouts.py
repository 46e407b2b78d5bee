"""Denoisers in diffusers' folders, read and written by their family (`families.FAMILIES`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.models.dit import preset
from vdit.published import families
from vdit.published.family import Config, Denoiser, Sizes
from vdit.published.weights import CONFIG_BYTES, check_fixed, fields, read_json

STEM = "diffusion_pytorch_model"  # of the weights' files
LAYOUTS = families.of(Denoiser)
# Folders of a pipeline's parts that are read.
PARTS = (*dict.fromkeys(layout.folder for layout in LAYOUTS.values()), "vae", "text_encoder")


def read_layout(folder: Path, others: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """The name of a folder's layout, and the fields of its config.json.

    `UserError` for an unknown class, or a variant of a known one; `others` are further classes that
    the error names as allowed.
    """
    path = folder / "config.json"
    config = read_json(path, CONFIG_BYTES)
    name, layout = families.named(config) or ("", None)
    if not isinstance(layout, Denoiser):
        names = [c for known in LAYOUTS.values() for c in known.classes]
        shown = str(config.get("_class_name"))[:100]
        allowed = " or ".join([*names, *others])
        raise UserError(f"{path}: _class_name is {shown!r}; allowed: {allowed}")
    check_fixed(config, layout.fixed, path)
    return name, fields(config, layout.defaults, folder) | layout.more(config, folder)


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
    groups = ("dit.paper.", "dit.unet.")
    kept = {k: v for k, v in fields.items() if k in names or k.startswith(groups)}
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
    if sizes.latent[1] != sizes.latent[2] or fields["dit.patch"][0] != fields["dit.patch"][1]:
        return None
    for layout in LAYOUTS.values():
        try:
            config = layout.from_vdit(fields, sizes)
            theirs = {**defaults, **layout.to_vdit(config)}
        except UserError:
            continue
        same = architecture(theirs, sizes) == architecture(fields, sizes)
        if same and theirs["data.frames"] == sizes.latent[0]:
            fixed = {name: layout.fixed[name] for name in layout.written}
            return layout, {"_class_name": layout.classes[0], **fixed, **config}
    return None
