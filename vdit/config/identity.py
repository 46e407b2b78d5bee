"""What a workdir is of: its config.json, and the fields that each stage's result depends on.

Sections are imported late: `vdit.report` reads config.json without JAX.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vdit.config import default
from vdit.errors import UserError
from vdit.runtime.files import write_text

# Of config.json. A new field at its default changes no digest and needs no new version; another
# meaning, name or default of a field does.
VERSION = 2
CONFIG = "config.json"

# What each stage's result depends on, but for the sections' free fields: more steps are no
# conflict, another model is.
DEPENDS: dict[str, tuple[str, ...]] = {
    "vae": ("seed", "data", "vae"),
    "latents": ("seed", "data", "vae", "latents", "text"),
    "dit": ("seed", "data", "vae", "latents", "text", "dit"),
    "classify": ("seed", "data", "classify"),
}


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    """{"vae.width": 192, ...} of a section, as JSON has the values."""
    if not isinstance(value, ConfigDict):
        return {prefix: json.loads(json.dumps(value))}
    return {k: v for name in value for k, v in _flat(value[name], f"{prefix}.{name}").items()}


def stage_fields(config: ConfigDict, stage: str) -> dict[str, Any]:
    """The fields that a stage's result depends on and that differ from their defaults, flat."""
    from vdit.config.joined import SECTIONS

    first = default()
    fields: dict[str, Any] = {}
    for name in DEPENDS[stage]:
        free = {f"{name}.{field}" for field in SECTIONS[name].free} if name in SECTIONS else ()
        usual = _flat(first[name], name)
        for field, value in _flat(config[name], name).items():
            if field not in free and value != usual[field]:
                fields[field] = value
    return fields


def digest(fields: dict[str, Any]) -> str:
    """SHA-256 of fields, the same whatever their order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], most: int = 3) -> str:
    """The fields in which two runs differ, as one readable line."""
    usual = {k: v for name, part in default().items() for k, v in _flat(part, name).items()}
    old, new = usual | old, usual | new
    changed = [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]
    more = f" and {len(changed) - most} more" if len(changed) > most else ""
    return "; ".join(changed[:most]) + more


def to_json(config: ConfigDict) -> str:
    """The content of config.json: every field, overrides included."""
    return json.dumps({"version": VERSION, **config.to_dict()}, indent=1) + "\n"


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes config.json."""
    write_text(workdir / CONFIG, to_json(config))


def stored_fields(workdir: Path, lenient: bool = False) -> dict[str, Any]:
    """The fields in a workdir's config.json, as JSON has them.

    Raises `UserError` where it is of another version, and where it is missing or damaged; `lenient`
    takes that for no fields.
    """
    path = Path(workdir) / CONFIG
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
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


def read_config(workdir: Path) -> ConfigDict:
    """The config.json of a workdir, as a locked config."""
    from vdit.runtime import attention

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tuples(item) for name, item in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    config = default()
    try:
        config.update(tuples(stored_fields(workdir)))
    except (KeyError, TypeError, AttributeError) as error:
        path = Path(workdir) / CONFIG
        raise UserError(f"{path} does not fit this version of vdit: {error}") from error
    if not attention.runs_here(config.run.attention):  # trained on another kind of machine
        config.run.attention = "auto"
    return config
