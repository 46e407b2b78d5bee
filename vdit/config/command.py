"""The command line as people write it, and the configuration file that it names."""

import contextlib
import difflib
import importlib
import importlib.util
import os
import runpy
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from vdit.errors import Diverged, Interrupted, UserError

PACKAGE = Path(__file__).parents[1]
INSTALLED = PACKAGE / "experiments"  # as vdit.experiments; in a checkout they lie beside vdit
EXPERIMENTS = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "experiments"


def experiments() -> list[str]:
    """The names of vdit's experiments."""
    return sorted(path.stem for path in EXPERIMENTS.glob("[a-z]*.py"))


def named(path: str) -> str:
    """NAME[:ARGUMENT] of one of vdit's experiments as its file; any other path as it is."""
    file, colon, argument = path.partition(":")
    if file not in experiments() or Path(file).exists():
        return path
    return f"{EXPERIMENTS / file}.py{colon}{argument}"


def nearest(name: str, known: Iterable[str]) -> str:
    """What may be meant by an unknown name."""
    near = difflib.get_close_matches(name, known := [*known], n=1, cutoff=0.7)
    return f"is {near[0]} meant?" if near else f"known are {', '.join(known)}"


def check_flags(argv: Sequence[str], known: Iterable[str]) -> None:
    """Refuses (UserError) unknown flags, before what they belong to is imported."""
    known = {*known}
    for word in argv:
        name = word.lstrip("-").partition("=")[0]
        if not word.startswith("--") or name.startswith("config.") or name in known:
            continue
        if name.removeprefix("no") not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            hint = f"is --{near[0]} meant?" if near else "see --help"
            raise UserError(f"Unknown command line flag {name!r}: {hint}")


def plain(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config FILE` as `--config=FILE`, an experiment's name as its file, and
    ~ expanded, which shells do only at the beginning of a word."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] in ("--config", "-config"):
            words[-1] = f"--config={word}"
        else:
            words.append(word)

    def expanded(word: str) -> str:
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            value = named(value)
            word = name + equals + value
        text = name.lstrip("-") in ("prompt", "negative")
        if not word.startswith("-") or text or not value.startswith("~"):
            return word
        return name + equals + os.path.expanduser(value)

    return [expanded(word) for word in words]


def check_folder() -> None:
    """Refuses (UserError) a current folder that has been deleted: no path means anything there."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current folder is gone ({error.strerror}): cd to another") from error


def of_flags(error: Exception) -> str:
    """The line of an error that absl or ml_collections raises for a flag."""
    said: Any = error
    while isinstance(error, AttributeError | KeyError) and isinstance(said, Exception):
        said = said.args[0] if said.args else "of that name"
    unknown = "" if said is error else "--config has no field "
    return unknown + " ".join(str(said).split())


def load(path: str) -> ConfigDict:
    """get_config of FILE.py[:ARGUMENT]. Raises `UserError`: the file's own, or one that names the
    line which raised.

    The file may import its package, or files beside it, wherever the command is started.
    """
    file, *argument = path.split(":", 1)
    if not Path(file).is_file():
        why = f" {file}; what follows the first colon is its argument" if argument else ""
        names = f"; experiments are {', '.join(experiments())}" if Path(file).stem == file else ""
        raise UserError(f"--config={path}: there is no such file{why}{names}")
    root = Path(file).resolve().parent
    if not (root / "__init__.py").is_file():
        sys.path.append(str(root))
    else:
        while (root / "__init__.py").is_file():
            root = root.parent
        sys.path.insert(0, str(root))
    inside = Path(file).resolve().parent == INSTALLED.resolve()
    if inside or importlib.util.find_spec("experiments") is None:
        # Where vdit is installed, `from experiments import base` means vdit.experiments.
        with contextlib.suppress(ModuleNotFoundError):
            sys.modules["experiments"] = importlib.import_module("vdit.experiments")
    try:
        config = runpy.run_path(file)["get_config"](*argument)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        where = f"line {lines[-1]}: " if lines else ""
        said = " ".join(str(error).split())
        said = said if len(said) < 200 else f"{said[:80]} ... {said[-80:]}"
        raise UserError(f"--config={path}: {where}{type(error).__name__}: {said}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config gives no ConfigDict but {config!r:.60}")
    return config


def failed(error: UserError | Diverged | Interrupted) -> int:
    """Prints an expected error's line; returns its exit status."""
    print(f"vdit: {' '.join(str(error).split())}", file=sys.stderr)
    return error.status


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
