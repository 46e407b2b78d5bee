"""Lists, inspects, verifies and copies the checkpoints of a workdir.

    python -m tools.restore_checkpoint list    WORKDIR [--stage S]
    python -m tools.restore_checkpoint inspect WORKDIR [--stage S] [--step N]
    python -m tools.restore_checkpoint verify  WORKDIR [--stage S] [--step N]
    python -m tools.restore_checkpoint copy    WORKDIR --to DIR [--stage S] [--step N]
        [--mesh AXIS:SIZE,...] [--drop optimizer]

Defaults: all stages (for copy, the only one); for list and verify all steps, for inspect the newest
finished one, for copy the newest valid one. `copy` writes and verifies DIR/checkpoints/STAGE/STEP.
--mesh shards its arrays for a mesh over all local devices (a CPU has N of them with
XLA_FLAGS=--xla_force_host_platform_device_count=N). --drop optimizer omits the optimizer's state,
more than two thirds of the bytes: the copy samples and evaluates like the original; training
continues from its weights and step with a fresh optimizer (moments, warm-up, schedule).
WORKDIR may also name weights in the package, or be a folder of `tools.export_weights --own`, which
list, inspect and verify read. Exit status: 0, 1 for a damaged file (which is named), 2 for wrong
arguments.
"""

import argparse
import functools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vdit import shipped
from vdit.errors import UserError
from vdit.loading import read_meta, stage_shapes, stages_of
from vdit.runtime.checkpoint import (
    all_steps,
    damage,
    damaged,
    is_finished,
    load_meta,
    rewrite,
    saved_shapes,
)
from vdit.runtime.files import all_or_nothing
from vdit.runtime.mesh import param_sharding
from vdit.shipped import is_exported, is_name

from . import parsers
from .flags import mesh_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = parsers.restore_checkpoint(__doc__)
    try:
        options = parser.parse_args(arguments)
        if (options.to is not None) != (options.command == "copy"):
            raise UserError("copy needs --to DIR; the other commands do not take it; see --help")
        if options.command != "copy" and (options.mesh or options.drop):
            raise UserError("--mesh and --drop are allowed with copy alone; see --help")
        if is_name(options.workdir):
            options.workdir = shipped.ROOT / options.workdir  # verified by the commands
        if is_exported(options.workdir):
            return exported(options)
        return COMMANDS[options.command](options)
    except (UserError, OSError) as error:  # OSError: a folder that a running job has just deleted
        print(f"restore_checkpoint: {error}", file=sys.stderr)
        return 2


def chosen(options: argparse.Namespace) -> list[tuple[Path, int]]:
    """(folder of the stage, step) of every selected step; at least one."""
    root = options.workdir / "checkpoints"
    stages = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not stages:
        raise UserError(f"{options.workdir} holds no checkpoints: there is no {root}/STAGE")
    if options.stage is not None and options.stage not in stages:
        raise UserError(f"no stage {options.stage!r} in {root}: there are {', '.join(stages)}")
    found = []
    for stage in stages if options.stage is None else [options.stage]:
        steps = all_steps(root / stage)
        if options.step is None or options.step in steps:
            found += [(root / stage, n) for n in steps if options.step in (None, n)]
    if not found:
        known = {stage: all_steps(root / stage) for stage in stages}
        wanted = "no step" if options.step is None else f"no step {options.step}"
        raise UserError(f"{wanted} in {root}: there are {known}")
    return found


def size(folder: Path) -> int:
    """Total size of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def list_steps(options: argparse.Namespace) -> int:
    """Prints a line per step, without opening files."""
    for stage, step in chosen(options):
        folder = stage / str(step)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime))
        state = "finished" if is_finished(stage, step) else "UNFINISHED"
        print(f"{stage.name:10} {step:>9} {size(folder) / 1e6:10.1f} MB  {when}  {state}")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Prints the metadata, and shape, dtype and bytes of every array."""
    newest = {stage: step for stage, step in chosen(options) if is_finished(stage, step)}
    if not newest:
        raise UserError(f"{options.workdir}: no such step was finished; verify says more")
    for stage, step in newest.items():
        wrong = damage(stage, step)
        if wrong is not None:
            print(f"{stage.name}/{step}: {wrong}")
            return 1
        print(f"{stage.name}/{step}: {json.dumps(load_meta(stage, step), indent=1)}")
        for item in ("state", "ema"):
            total = 0
            for name, leaf in sorted(saved_shapes(stage, step, item).items()):
                leaf_bytes = math.prod(leaf.shape) * leaf.dtype.itemsize
                total += leaf_bytes
                print(f"  {item}/{name}  {leaf.shape}  {leaf.dtype}  {leaf_bytes:,} B")
            print(f"  {item}: {total / 1e6:.1f} MB")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Prints a line per step: good, or the first damaged file."""
    status = 0
    for stage, step in chosen(options):
        wrong = damage(stage, step)
        print(f"{stage.name}/{step}: {wrong or 'good'}")
        status = status if wrong is None else 1
    return status


def copy(options: argparse.Namespace) -> int:
    """Copies a valid step atomically, verified before and after."""
    found = chosen(options)
    stages = sorted({stage for stage, _ in found})
    if len(stages) > 1:
        names = ", ".join(stage.name for stage in stages)
        raise UserError(f"copy takes one stage: choose one of {names} with --stage")
    stage = stages[0]
    for _, step in reversed(found):
        wrong = damage(stage, step)
        if wrong is None:
            break
        print(f"{stage.name}/{step}: {wrong}")
    else:
        return 1
    target = options.to / "checkpoints" / stage.name / str(step)
    if target.exists():
        raise UserError(f"{target} is there already; choose another --to")
    mesh = mesh_of(options.mesh)
    temporary = target.with_name(f".{step}.{os.getpid()}.tmp")
    try:
        with all_or_nothing(temporary):
            temporary.mkdir(parents=True)
            if mesh is None and options.drop is None:
                shutil.copytree(stage / str(step), temporary / str(step))
            else:
                place = None if mesh is None else functools.partial(param_sharding, mesh)
                rewrite(stage, step, temporary, place, DROPPED.get(options.drop, ()))
            os.replace(temporary / str(step), target)
    except OSError as error:  # shutil.Error lists the files
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(f"cannot write {target}: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    wrong = damage(target.parent, step)
    print(f"{stage.name}/{step}: {wrong or f'good, copied to {target}'}")
    return 0 if wrong is None else 1


def exported(options: argparse.Namespace) -> int:
    """The commands for an exported folder."""
    folder = options.workdir
    if options.command == "copy" or options.step is not None:
        raise UserError(
            f"{folder} holds weights alone: `python -m tools.import_weights --source={folder}"
            " --workdir=DIR` makes checkpoints of them"
        )
    wrong = damaged(folder)
    if wrong is not None:
        print(f"{folder.name}: {wrong}")
        return 1
    for stage in stages_of(folder):
        if options.stage not in (None, stage):
            continue
        meta, arrays = read_meta(folder, stage), stage_shapes(folder, stage)
        count = sum(map(math.prod, arrays.values()))
        print(f"{stage}/{meta.get('step', 0)}: {count / 1e6:.1f} M parameters, good")
        if options.command == "inspect":
            print(json.dumps(meta, indent=1))
            print(*(f"  {name}  {shape}" for name, shape in sorted(arrays.items())), sep="\n")
    return 0


DROPPED = {"optimizer": ("opt",)}  # entries of the state that --drop leaves out
COMMANDS = {"list": list_steps, "inspect": inspect, "verify": verify, "copy": copy}

if __name__ == "__main__":
    sys.exit(main())
