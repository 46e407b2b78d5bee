"""Ends of a run that are no bug: `vdit.main` prints their line and exits with their status.

Imported first by every command, which a signal ends with one line from then on.
"""

import contextlib
import itertools
import os
import shutil
import signal
import sys
from typing import Any, NoReturn

COMMANDS = ("vdit", "tools")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
HALF_WRITTEN: set[Any] = set()  # files and folders, deleted by a process that a signal ends


class UserError(ValueError):
    """A wrong input: says on one line what was given, what is allowed, and where."""

    status = 2


class Diverged(RuntimeError):
    """Loss or state became NaN or infinite; the line names the last good checkpoint."""

    status = 1


class Interrupted(RuntimeError):
    """A signal asked to stop; the work is saved and the same command continues."""

    status = 128 + signal.SIGTERM  # of Ctrl-C: 130


EXPECTED = (UserError, Diverged, Interrupted)


def say_stopped() -> None:
    """Deletes what is half written and prints the line of a process that a signal ends."""
    for path in list(HALF_WRITTEN):
        with contextlib.suppress(OSError):
            os.unlink(path)
        for _ in range(3):  # other threads may write into a folder
            shutil.rmtree(path, ignore_errors=True)
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")  # the cursor, which a progress bar hides
    with contextlib.suppress(OSError):
        os.write(2, b"vdit: stopped; the same command goes on\n")


def stop(number: int, frame: object = None) -> NoReturn:
    """A signal's handler: ends the process at once, with status 130 for Ctrl-C, 143 for SIGTERM."""
    say_stopped()
    os._exit(128 + number)


def _is_command() -> bool:
    """Whether python -m vdit[.NAME] or -m tools.NAME, or the script vdit, is being imported, not
    another's program."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name == "-m":
        name = next((b for a, b in itertools.pairwise(sys.orig_argv) if a == "-m"), "")
    return name.split(".")[0] in COMMANDS


if _is_command():
    for each in SIGNALS:
        signal.signal(each, stop)
