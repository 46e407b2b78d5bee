"""The flags of `vdit.main`, without JAX: help and wrong flags are answered at once."""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vdit import shipped
from vdit.config import command
from vdit.errors import UserError

FLAGS = flags.FLAGS
MODES = (
    "run",
    "sample",
    "eval",
    "features",
    "serve",
)  # functions of vdit/run.py, which imports JAX

CONFIG = config_flags.DEFINE_config_file("config", None, "NAME[:ARGUMENT] or FILE.py[:ARGUMENT]")
WORKDIR = flags.DEFINE_string("workdir", None, "where everything is written; or trained weights")
MODE = flags.DEFINE_string("mode", "run", f"one of {', '.join(MODES)}")
REQUEST = (
    flags.DEFINE_multi_string("prompt", [], "sample: a caption; may be given again"),
    flags.DEFINE_string("negative", None, "sample: a caption that guidance leads away from"),
    flags.DEFINE_float("seconds", None, "sample: length of the video"),
    flags.DEFINE_float("fps", None, "sample: frames a second"),
    flags.DEFINE_string("size", None, "sample: HEIGHTxWIDTH in pixels"),
    flags.DEFINE_integer("num", 1, "sample: videos a prompt"),
    flags.DEFINE_integer("seed", 0, "sample: seed of the first video"),
    flags.DEFINE_multi_string("given", [], "sample: FILE@SECONDS, frames to condition on"),
    flags.DEFINE_string("shots", None, "sample: JSON file, captions with the times they start"),
    flags.DEFINE_multi_string("lora", [], "sample, serve: [low=]FILE[:WEIGHT], adapters"),
    flags.DEFINE_multi_string("video", [], "features: a video's file; may be given again"),
    flags.DEFINE_string("out", None, "sample, eval, features, serve: output folder"),
    flags.DEFINE_string("host", "127.0.0.1", "serve: address to listen on; others need a token"),
    flags.DEFINE_integer("port", 8000, "serve: port to listen on; 0: any that is free"),
    flags.DEFINE_string("token", None, "serve: the token to ask for; a random one is printed"),
)
# Several processes, where JAX does not detect them (it does on TPU pods, with Slurm and Open MPI).
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT on which process 0 listens")
PROCESSES = flags.DEFINE_integer("processes", None, "how many; 1: alone, whatever JAX detects")
PROCESS = flags.DEFINE_integer("process", None, "index of this process, from 0")


def parse(argv: Sequence[str]) -> tuple[str | None, Path]:
    """Reads the flags: the config's path as given, and the workdir (runs/NAME[-ARGUMENT])."""
    command.check_folder()
    path = next((a.split("=", 1)[1] for a in argv if a.lstrip("-").startswith("config=")), None)
    file, _, argument = (path or "").partition(":")
    command.check_flags(argv[1:], FLAGS)
    if path is not None:
        command.load(path)  # what is wrong in it is said without ml_collections' traceback
    try:
        rest = FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(command.of_flags(error)) from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; flags are --name=value")
    if MODE.value not in MODES:
        raise UserError(f"--mode={MODE.value}: known are {', '.join(MODES)}")
    if unused := [flag.name for flag in REQUEST if flag.present and flag.name not in
                  flags_of(MODE.value)]:  # fmt: skip
        raise UserError(f"--{unused[0]}: not a flag of --mode={MODE.value}")
    if path is None and MODE.value == "run":
        raise UserError("give --config=base, or another experiment")
    if path is None and not WORKDIR.value:
        raise UserError("give --workdir=DIR, or --config=FILE for runs/NAME")
    name = "-".join(filter(None, [Path(file).stem, argument]))
    workdir = Path(WORKDIR.value or Path("runs") / name)
    if MODE.value == "run":
        shipped.refuse_training(workdir)
    return path, workdir


def flags_of(mode: str) -> dict[str, str]:
    """The flags that a mode reads, with their help: those of no mode in particular, and its own,
    whose help begins with the modes that read it."""
    found = {}
    for flag in FLAGS.get_key_flags_for_module(__name__):
        modes, colon, text = flag.help.partition(": ")
        if not {*modes.split(", ")} <= {*MODES}:
            modes, text = "", flag.help
        if flag.name != "mode" and (not modes or mode in modes.split(", ")):
            found[flag.name] = text.partition(";\n")[0]
    return found


def help_text() -> str:
    """Each flag with its help."""
    return FLAGS.module_help(sys.modules[__name__])
