"""What is imported: for each stage a folder, the plan of its parameters, and metadata."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vdit import stages
from vdit.config import default
from vdit.published import weights


@dataclass(frozen=True)
class Part:
    """The source of a stage: a folder, the plan of its parameters, and its checkpoint's metadata.

    With `groups`, the plan's paths start with the stage's groups of parameters; else they belong to
    its first group. `finish` converts the parameters that are read to the stage's.
    """

    folder: Path
    plan: weights.Plan
    meta: dict[str, Any]
    groups: bool = False
    finish: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Import:
    """The contents of a workdir."""

    config: ConfigDict
    parts: dict[str, Part]  # by stage
    files: dict[str, str]  # further files: name, content


def part_of(config: ConfigDict, stage: str, folder: Path, plan: weights.Plan, **more: Any) -> Part:
    """A part with the metadata of a checkpoint that was trained here."""
    return Part(folder, plan, stages.stage_meta(config, stage), **more)


def configured(changes: Mapping[str, Any]) -> ConfigDict:
    """The default configuration with changed fields ("dit.patch")."""
    config = default()
    config.update_from_flattened_dict(dict(changes))
    return config
