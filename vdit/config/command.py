"""The command line as people write it, and the configuration file that it names."""

import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ml_collections import ConfigDict

from vdit.errors import UserError


def plain(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config FILE` as `--config=FILE`, and ~ expanded, which shells do only
    at the beginning of a word."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] in ("--config", "-config"):
            words[-1] = f"--config={word}"
        else:
            words.append(word)

    def expanded(word: str) -> str:
        name, equals, value = word.partition("=")
        text = name.lstrip("-") in ("prompt", "negative")
        if not word.startswith("-") or text or not value.startswith("~"):
            return word
        return name + equals + os.path.expanduser(value)

    return [expanded(word) for word in words]


def load(path: str) -> ConfigDict:
    """get_config of FILE.py[:ARGUMENT]. Raises `UserError`: the file's own, or one that names the
    line which raised.

    The file may import its package, or files beside it, wherever the command is started.
    """
    file, *argument = path.split(":", 1)
    if not Path(file).is_file():
        why = f" {file}; what follows the first colon is its argument" if argument else ""
        raise UserError(f"--config={path}: there is no such file{why}")
    root = Path(file).resolve().parent
    if not (root / "__init__.py").is_file():
        sys.path.append(str(root))
    else:
        while (root / "__init__.py").is_file():
            root = root.parent
        sys.path.insert(0, str(root))
    try:
        config = runpy.run_path(file)["get_config"](*argument)
    except UserError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        where = f"line {lines[-1]}: " if lines else ""
        said = " ".join(str(error).split())
        said = said if len(said) < 200 else f"{said[:80]} ... {said[-80:]}"
        raise UserError(f"--config={path}: {where}{type(error).__name__}: {said}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config gives no ConfigDict but {config!r:.60}")
    return config


STOPPED = 130  # exit status after Ctrl-C


def stopped() -> int:
    """Prints the line of a Ctrl-C; returns its exit status."""
    print("vdit: stopped; the same command goes on", file=sys.stderr)
    return STOPPED


def leave(status: int) -> NoReturn:
    """Ends the process; after Ctrl-C at once, or threads that still work print tracebacks."""
    if status == STOPPED:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
