"""classes.json of a workdir: the names of a model's classes, in order."""

import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vdit.config import shared
from vdit.errors import UserError
from vdit.runtime.files import read_text, write_text

CLASSES = "classes.json"


def check_classes(config: ConfigDict, count: int) -> None:
    """Refuses a denoiser with another number of classes than the source has."""
    if config.dit.paper.classes != count:
        fields = "dit.paper.classes data.source data.label"
        raise shared.refusal(config, fields, f"{count} is allowed, the number of its classes")


def write_classes(config: ConfigDict, workdir: Path, classes: Sequence[str]) -> None:
    """Writes the denoiser's classes."""
    check_classes(config, len(classes))
    write_text(workdir / CLASSES, to_json(classes))


def to_json(classes: Sequence[str]) -> str:
    """The content of classes.json."""
    return json.dumps(list(classes), ensure_ascii=False, indent=1) + "\n"


def read_classes(config: ConfigDict, workdir: Path) -> list[str]:
    """The denoiser's classes; none for a denoiser without classes."""
    count = config.dit.paper.classes if config.dit.model == "paper" else 0
    return read_names(count, workdir / CLASSES)


def read_names(count: int, path: Path) -> list[str]:
    """The names of `count` classes; numbers where there is no file."""
    if not count or not path.exists():
        return [str(i) for i in range(count)]
    try:
        names = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(names, list) or len(names) != count:
        raise UserError(f"{path}: a list of {count} names is expected")
    return [str(name) for name in names]
