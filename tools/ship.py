"""Writes a trained workdir into the package, where `--workdir=NAME` and `vdit.load(NAME)` find it.

    python -m tools.ship --workdir=DIR --name=NAME [--replace] [--into=vdit/weights]

vdit/weights/NAME gets the EMA of the stages vae and, if it is trained, dit in bfloat16,
config.json, the tokenizer, digests of all files, and card.json: scores, training time, the commit
that is checked out. All weights in the package may have 25 MB together. It is written completely or
not at all; weights of that name are replaced with --replace alone. Exit status 2 for invalid
arguments or workdirs.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes

from vdit.errors import UserError
from vdit.loading import read_stage, stages_of
from vdit.published.weights import read_header
from vdit.report import stage_values
from vdit.runtime.checkpoint import write_digests
from vdit.runtime.files import write_text
from vdit.runtime.metrics import read
from vdit.runtime.progress import say
from vdit.sample import load
from vdit.shipped import CARD, ROOT

from .export_weights import own
from .parsers import Parser

MOST = 25 * 10**6  # bytes of all weights in the package


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it; empty outside of one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return ""


def card_of(workdir: Path, folder: Path) -> dict[str, Any]:
    """What a user wants to know of the weights."""
    rows = read(workdir)
    seconds = {
        stage: round(values["seconds"])
        for stage, values in stage_values(rows).items()
        if stage in ("vae", "dit") and "seconds" in values
    }
    machine: dict[str, Any] = next((row for row in reversed(rows) if row["stage"] == "run"), {})
    tensors = {
        stage: read_header(path)
        for stage in ("vae", "dit") if (path := folder / f"{stage}.safetensors").exists()
    }  # fmt: skip
    return {
        "commit": commit(),
        "parameters": {
            stage: sum(tensor.size for tensor in found.values()) // 2  # bfloat16
            for stage, found in tensors.items()
        },
        "trained": {"seconds": seconds} | {
            name: machine[name] for name in ("device", "jax", "python") if name in machine
        },
        "scores": [
            {name: value for name, value in row.items() if name not in ("stage", "step")}
            for row in rows if row["stage"] == "eval"
        ],
    }  # fmt: skip


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ship(workdir: Path, name: str, into: Path, replace: bool) -> int:
    """Writes INTO/NAME; returns its bytes."""
    target = into / name
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise UserError(f"--name={name}: small letters, digits, - and _ are allowed")
    if target.exists() and not replace:
        raise UserError(f"{target} already exists; --replace replaces it")
    stages = stages_of(workdir)
    if "vae" not in stages:
        raise UserError(f"{workdir} has no trained stage vae")
    temporary = into / f".{name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        own(workdir, temporary, dtype=ml_dtypes.bfloat16)
        write_text(temporary / CARD, json.dumps(card_of(workdir, temporary), indent=1) + "\n")
        write_digests(temporary)
        for path in temporary.iterdir():  # safetensors are written for their owner alone
            path.chmod(0o644)
        if "dit" in stages:
            load(temporary)  # what cannot be read back is not shipped
        else:
            read_stage(temporary, "vae")
        others = sum(size(path) for path in into.iterdir() if path not in (temporary, target))
        if others + size(temporary) > MOST:
            raise UserError(
                f"{name} has {size(temporary) / 1e6:.1f} MB, the other weights {others / 1e6:.1f}:"
                f" {MOST / 1e6:.0f} MB together are allowed"
            )
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size(target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(
        prog="ship", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--replace", action="store_true", help="weights of that name")
    parser.add_argument("--into", type=Path, default=ROOT, help="the folder of all weights")
    try:
        options = parser.parse_args(arguments)
        done = ship(options.workdir, options.name, options.into, options.replace)
    except UserError as error:
        print(f"ship: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    say(f"{options.into / options.name}: {done / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
