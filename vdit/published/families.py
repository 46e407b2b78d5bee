"""Every published family that vdit reads and writes: another one is a module and a row here."""

from collections.abc import Mapping
from typing import Any, TypeVar

from vdit.published import clip, dit, kl, t5, unet, vivit_folder
from vdit.published.family import Autoencoder, Classifier, Denoiser, ImageEncoder, TextEncoder
from vdit.published.wan import transformer as wan
from vdit.published.wan import vae as wan_vae

Family = Denoiser | Autoencoder | TextEncoder | ImageEncoder | Classifier
F = TypeVar("F", bound=Family)

# By vdit's name: of a text encoder it is that of config.text.encoder.
FAMILIES: dict[str, Family] = {
    "dit": dit.DIT,
    "latte": dit.LATTE,
    "unet": unet.FAMILY,
    "wan": wan.FAMILY,
    "kl": kl.FAMILY,
    "wan_vae": wan_vae.FAMILY,
    "t5": t5.T5_FAMILY,
    "umt5": t5.UMT5,
    "clip": clip.FAMILY,
    "clip_vision": clip.VISION,
    **vivit_folder.FAMILIES,
}


def of(kind: type[F]) -> dict[str, F]:
    """The families of one kind."""
    return {name: family for name, family in FAMILIES.items() if isinstance(family, kind)}


def named(config: Mapping[str, Any]) -> tuple[str, Family] | None:
    """The name and family of the class that a config.json names; None if it is unknown."""
    for name, family in FAMILIES.items():
        if config.get(family.field) in family.classes:
            return name, family
    return None
