"""The command: `python -m vdit.main --config=FILE[:ARG] [--workdir=DIR] [--config.field=value]`.

--mode=run runs the configuration's stages, --mode=sample generates videos from a trained workdir,
--mode=eval scores it, --mode=features writes a classifier's features of videos.

Exit status: 2 for wrong input, in one line; 143 and 130 after SIGTERM and Ctrl-C, 1 where the loss
is not finite or a process is lost or stuck (docs/pods.md): the same command continues.
"""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from vdit import shipped
from vdit.config import command
from vdit.errors import EXPECTED, Diverged, Interrupted, UserError

if TYPE_CHECKING:  # imports JAX, which help and wrong flags do without
    from vdit.runtime.processes import Member

FLAGS = flags.FLAGS
MODES = ("run", "sample", "eval", "features")  # functions of vdit/run.py, which imports JAX

CONFIG = config_flags.DEFINE_config_file("config", None, "NAME[:ARGUMENT] or FILE.py[:ARGUMENT]")
_WORKDIR = flags.DEFINE_string("workdir", None, "where everything is written; or trained weights")
_MODE = flags.DEFINE_string("mode", "run", f"one of {', '.join(MODES)}")
_REQUEST = (
    flags.DEFINE_multi_string("prompt", [], "sample: a caption; may be given again"),
    flags.DEFINE_string("negative", None, "sample: a caption that guidance leads away from"),
    flags.DEFINE_float("seconds", None, "sample: length of the video"),
    flags.DEFINE_float("fps", None, "sample: frames a second"),
    flags.DEFINE_string("size", None, "sample: HEIGHTxWIDTH in pixels"),
    flags.DEFINE_integer("num", 1, "sample: videos a prompt"),
    flags.DEFINE_integer("seed", 0, "sample: seed of the first video"),
    flags.DEFINE_multi_string("given", [], "sample: FILE@SECONDS, frames to condition on"),
    flags.DEFINE_string("shots", None, "sample: JSON file, captions with the times they start"),
    flags.DEFINE_multi_string("lora", [], "sample: FILE[:WEIGHT], adapters to merge"),
    flags.DEFINE_multi_string("video", [], "features: a video's file; may be given again"),
    flags.DEFINE_string("out", None, "sample, eval, features: output folder (in the workdir)"),
)
# Several processes, where JAX does not detect them (it does on TPU pods, with Slurm and Open MPI).
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT on which process 0 listens")
_PROCESSES = flags.DEFINE_integer("processes", None, "how many; 1: alone, whatever JAX detects")
_PROCESS = flags.DEFINE_integer("process", None, "index of this process, from 0")


def parse(argv: Sequence[str]) -> tuple[str | None, Path]:
    """Reads the flags: the config's path as given, and the workdir (runs/NAME[-ARGUMENT])."""
    path = next((a.split("=", 1)[1] for a in argv if a.lstrip("-").startswith("config=")), None)
    file, _, argument = (path or "").partition(":")
    command.check_flags(argv[1:], FLAGS)
    if path is not None:
        command.load(path)  # what is wrong in it is said without ml_collections' traceback
    try:
        rest = FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; flags are --name=value")
    if _MODE.value not in MODES:
        raise UserError(f"--mode={_MODE.value}: known are {', '.join(MODES)}")
    if unused := [flag.name for flag in _REQUEST if flag.present and flag.name not in
                  flags_of(_MODE.value)]:  # fmt: skip
        raise UserError(f"--{unused[0]}: not a flag of --mode={_MODE.value}")
    if path is None and _MODE.value == "run":
        raise UserError("give --config=base, or another experiment")
    if path is None and not _WORKDIR.value:
        raise UserError("give --workdir=DIR, or --config=FILE for runs/NAME")
    name = "-".join(filter(None, [Path(file).stem, argument]))
    workdir = Path(_WORKDIR.value or Path("runs") / name)
    if _MODE.value == "run":
        shipped.refuse_training(workdir)
    return path, workdir


def flags_of(mode: str) -> dict[str, str]:
    """The flags that a mode reads, with their help: those of no mode in particular, and its own,
    whose help begins with the modes that read it."""
    found = {}
    for flag in FLAGS.get_key_flags_for_module("vdit.main"):
        modes, colon, text = flag.help.partition(": ")
        if not {*modes.split(", ")} <= {*MODES}:
            modes, text = "", flag.help
        if flag.name != "mode" and (not modes or mode in modes.split(", ")):
            found[flag.name] = text.partition(";\n")[0]
    return found


def work(path: str | None, workdir: Path) -> None:
    """The mode, in the only process or in one of several."""
    import jax

    from vdit import run
    from vdit.config import default
    from vdit.runtime import files, machine, preemption, processes

    preemption.listen()
    config = default() if path is None else CONFIG.value
    who = _member()
    if who is not None:
        processes.connect(who, config.run.lost)
    processes.check()
    if jax.default_backend() == "cpu":
        machine.keep_freed_memory()
    stopped = None  # in all processes, at the same step
    with processes.Watch(shipped.outputs(workdir), config.run.lost, config.run.stuck) as watch:
        try:
            with files.refusing(workdir, reading=True):
                if _MODE.value == "run":
                    run.run(config, workdir, watch)
                else:
                    request = {flag.name: flag.value for flag in _REQUEST}
                    run.MODES[_MODE.value](CONFIG.value, workdir, watch, request)
        except Interrupted as error:
            stopped = error
        except (UserError, Diverged) as error:
            watch.failed(error)
            raise
        except Exception as error:
            if isinstance(error, RuntimeError | ValueError | OSError):
                watch.wait()  # another process's end may be the cause: a collective that broke
            watch.failed(error)
            raise
        processes.together("end")
    processes.disconnect()
    if stopped is not None:
        raise stopped


def _member() -> "Member | None":
    from vdit.runtime import processes

    return processes.member(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, os.environ)


def child(path: str | None, workdir: Path) -> int:
    """`work` in one of several processes; returns the exit status."""
    try:
        work(path, workdir)
        return 0
    except EXPECTED as error:
        return command.failed(error)


def main(argv: Sequence[str] | None = None) -> int:
    """The whole program; returns the exit status."""
    argv = sys.argv = command.plain(sys.argv if argv is None else argv)  # read by ml_collections
    if any(arg in ("--help", "-h", "--helpfull") for arg in argv):
        print(__doc__ + "\n" + FLAGS.module_help(sys.modules[__name__]))
        return 0
    try:
        path, workdir = parse(argv)
        if _member() is not None:
            from vdit.runtime import processes

            run_child = functools.partial(child, path, workdir)
            return processes.supervised(run_child, shipped.outputs(workdir))
        work(path, workdir)
    except EXPECTED as error:
        return command.failed(error)
    except KeyboardInterrupt:
        return command.stopped()
    return 0


if __name__ == "__main__":
    command.leave(main())
