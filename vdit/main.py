"""The command: `python -m vdit.main --config=FILE[:ARG] [--workdir=DIR] [--config.field=value]`.

--mode=run runs the configuration's stages, --mode=sample generates videos from a trained workdir,
--mode=eval scores it, --mode=features writes a classifier's features of videos, --mode=serve is a
page to play with.

Exit status: 2 for wrong input, in one line; 143 and 130 after SIGTERM and Ctrl-C, 1 where the loss
is not finite or a process is lost or stuck (docs/pods.md): the same command continues.
"""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vdit import shipped
from vdit.config import command
from vdit.errors import EXPECTED, Diverged, Interrupted, UserError
from vdit.flags import (
    CONFIG,
    COORDINATOR,
    MODE,
    PROCESS,
    PROCESSES,
    REQUEST,
    help_text,
    parse,
)
from vdit.flags import FLAGS as FLAGS

if TYPE_CHECKING:  # imports JAX, which help and wrong flags do without
    from vdit.runtime.processes import Member


def work(path: str | None, workdir: Path) -> None:
    """The mode, in the only process or in one of several."""
    import jax

    from vdit import run
    from vdit.config import default
    from vdit.runtime import compiled, files, machine, preemption, processes

    preemption.listen()
    config = default() if path is None else CONFIG.value
    who = _member()
    if who is not None:
        processes.connect(who, config.run.lost)
    processes.check()
    compiled.keep()
    if jax.default_backend() == "cpu":
        machine.keep_freed_memory()
    stopped = None  # in all processes, at the same step
    with processes.Watch(shipped.outputs(workdir), config.run.lost, config.run.stuck) as watch:
        try:
            with files.refusing(workdir, reading=True):
                if MODE.value == "run":
                    run.run(config, workdir, watch)
                else:
                    request = {flag.name: flag.value for flag in REQUEST}
                    run.MODES[MODE.value](CONFIG.value, workdir, watch, request)
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

    return processes.member(COORDINATOR.value, PROCESSES.value, PROCESS.value, os.environ)


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
        print(__doc__ + "\n" + help_text())
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
