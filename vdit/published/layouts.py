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
    """Numbers in a token's text features that a denoiser reads; 1 if it reads none.

    `params` are flat, with "/" between the names.
    """
    for end in (layout.text_kernel for layout in LAYOUTS.values() if layout.text_kernel):
        for path, kernel in params.items():
            if path.endswith(end):
                return kernel.shape[-2]
    return 1


def architecture(fields: Config, sizes: Sizes) -> dict[str, Any]:
    """The fields that determine what a denoiser computes, equal for equal networks."""
    named = ("dit.model", "dit.patch", "dit.axes", "dit.learned_variance")
    groups = ("dit.paper.", "dit.unet.")
    found = {k: v for k, v in fields.items() if k in named or k.startswith(groups)}
    if not found["dit.paper.span"]:  # positions that count tokens
        found["dit.paper.span"] = float(sizes.latent[1] // found["dit.patch"][0])
    if found["dit.model"] == "unet":  # whose size is not dit.preset's
        return {k: v for k, v in found.items() if not k.startswith("dit.paper.")}
    return found | {"preset": {"activation": "gelu"} | preset(fields["dit.preset"])}


def to_layout(
    fields: Config, sizes: Sizes, defaults: Config
) -> tuple[Denoiser, dict[str, Any]] | None:
    """The layout of a denoiser, and its config.json; None if diffusers has no such network.

    `fields` are the configuration's, flat ("dit.patch"), and `defaults` those of a new one.
    """
    if sizes.latent[1] != sizes.latent[2] or fields["dit.patch"][0] != fields["dit.patch"][1]:
        return None
    for layout in LAYOUTS.values():
        try:
            found = layout.from_vdit(fields, sizes)
            theirs = {**defaults, **layout.to_vdit(found)}
        except UserError:
            continue
        same = architecture(theirs, sizes) == architecture(fields, sizes)
        if same and theirs["data.frames"] == sizes.latent[0]:
            fixed = {name: layout.fixed[name] for name in layout.written}
            return layout, {"_class_name": layout.classes[0], **fixed, **found}
    return None
