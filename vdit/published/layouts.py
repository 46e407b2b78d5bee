"""Denoisers in diffusers' folders, read by their family (`families.FAMILIES`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.published import families
from vdit.published.family import Denoiser
from vdit.published.weights import CONFIG_BYTES, check_fixed, fields, read_json

STEM = "diffusion_pytorch_model"  # of the weights' files
LAYOUTS = families.of(Denoiser)
# Folders of a pipeline's denoisers, each with that of a second one, or "".
DENOISERS = dict(pair for layout in LAYOUTS.values() for pair in layout.folders)
# Folders of a pipeline's other parts that are read.
PARTS = ("vae", "text_encoder", "image_encoder")


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
