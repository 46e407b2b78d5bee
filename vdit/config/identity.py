"""The identity of a workdir: config.json with its version, and what each stage's result depends on.

Sections are imported late, so that `vdit.report` reads config.json without JAX.
"""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vdit.config import default
from vdit.errors import UserError
from vdit.runtime.files import read_text, write_text

# The version of config.json. It goes up when a field gets another meaning, name or default; a new
# field needs no new version, since digests cover only fields that differ from their defaults.
VERSION = 3

# What each stage's result depends on, except for the sections' free fields: a run may continue with
# more steps, but not with another model.
DEPENDS: dict[str, tuple[str, ...]] = {
    "vae": ("seed", "init", "data", "vae"),
    "latents": ("seed", "init", "data", "vae", "latents", "text"),
    "dit": ("seed", "init", "data", "vae", "latents", "text", "dit"),
    "low": ("seed", "init", "data", "vae", "latents", "text", "dit"),
    "classify": ("seed", "data", "classify"),
}

# The groups of parameters that each stage trains and that are used afterwards: a discriminator and
# the heads of auxiliary losses serve training alone.
USED: dict[str, tuple[str, ...]] = {
    "vae": ("vae",), "dit": ("dit", "text"), "low": ("dit",), "classify": ("vivit",)
}  # fmt: skip

# What may differ between weights that were imported and the training that begins with them.
OF_TRAINING = (
    r"(seed|data|latents)\b"
    r"|vae\.(train|kl_weight|l1_weight|body_weight|crop|lpips_\w+|adversarial_\w+)\b"
    r"|dit\.(train|given|shift|logit_normal|loss_weight|text_drop|caption_drop|pack|auxiliary"
    r"|distill)\b"
)


def flat(value: Any, prefix: str) -> dict[str, Any]:
    """A section as {"vae.width": 192, ...}, with values as JSON stores them."""
    if not isinstance(value, ConfigDict):
        return {prefix: json.loads(json.dumps(value))}
    return {k: v for name in value for k, v in flat(value[name], f"{prefix}.{name}").items()}


def stage_fields(config: ConfigDict, stage: str) -> dict[str, Any]:
    """The fields that a stage's result depends on, where they differ from their defaults."""
    from vdit.config.joined import SECTIONS

    first = default()
    fields: dict[str, Any] = {}
    for name in DEPENDS[stage]:
        free = {f"{name}.{field}" for field in SECTIONS[name].free} if name in SECTIONS else ()
        usual = flat(first[name], name)
        for field, value in flat(config[name], name).items():
            if field not in free and value != usual[field]:
                fields[field] = value
    return fields


def of_networks(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that shape the networks: those that count where weights begin another training."""
    return {name: value for name, value in fields.items() if not re.match(OF_TRAINING, name)}


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The names of the fields in which two runs differ."""
    usual = {k: v for name, part in default().items() for k, v in flat(part, name).items()}
    old, new = usual | old, usual | new
    return [name for name in sorted(old | new) if old.get(name) != new.get(name)]


def digest(fields: dict[str, Any]) -> str:
    """SHA-256 of fields in any order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], most: int = 3) -> str:
    """The fields in which two runs differ, in one line; at most `most` of them."""
    usual = {k: v for name, part in default().items() for k, v in flat(part, name).items()}
    old, new = usual | old, usual | new
    names = changed(old, new)
    said = [f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in names[:most]]
    return "; ".join(said) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes config.json: the version and all fields, overrides included."""
    fields = {"version": VERSION, **config.to_dict()}
    write_text(workdir / "config.json", json.dumps(fields, indent=1) + "\n")


def stored_fields(workdir: Path, lenient: bool = False) -> dict[str, Any]:
    """The fields in a workdir's config.json, as JSON stores them.

    Raises `UserError` if it has another version, or is missing or damaged; `lenient` returns no
    fields in the latter two cases.
    """
    path = Path(workdir) / "config.json"
    try:
        saved = json.loads(read_text(path))
        if not isinstance(saved, dict):
            raise ValueError("an object is expected")
    except (OSError, ValueError) as error:
        if lenient:
            return {}
        if isinstance(error, OSError):
            raise UserError(f"{path}: {error.strerror}; is {workdir} a vdit workdir?") from error
        raise UserError(f"{path} is not JSON: {error}") from error
    version = saved.pop("version", None)
    if version != VERSION:
        raise UserError(
            f"{path} was written by another version of vdit (configuration version {version}, not"
            f" {VERSION}): choose another --workdir, or use that version"
        )
    return saved


def inherit(config: ConfigDict, workdir: Path) -> None:
    """Fills the fields that are None, which an experiment leaves to an imported workdir, with the
    values in the workdir's config.json."""
    names = [k for part in config for k, v in flat(config[part], part).items() if v is None]
    if not names:
        return
    if not (Path(workdir) / "config.json").exists():
        raise UserError(
            f"{workdir} holds no config.json, from which {names[0]} and {len(names) - 1} more"
            " fields are taken: give the --workdir that tools.import_weights has written"
        )
    stored = read_config(workdir)
    config.update_from_flattened_dict({name: value_of(stored, name) for name in names})


def value_of(config: ConfigDict, name: str) -> Any:
    """The field with a dotted name."""
    return functools.reduce(lambda part, field: part[field], name.split("."), config)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def read_config(workdir: Path) -> ConfigDict:
    """The locked configuration in a workdir's config.json."""
    from vdit.runtime import attention

    config = default()
    try:
        config.update(_tuples(stored_fields(workdir)))
    except (KeyError, TypeError, AttributeError) as error:
        path = Path(workdir) / "config.json"
        raise UserError(f"{path} does not fit this version of vdit: {error}") from error
    if not attention.runs_here(config.run.attention):  # trained on another kind of machine
        config.run.attention = "auto"
    return config
