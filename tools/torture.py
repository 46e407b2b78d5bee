"""Kills runs at random times and compares what the same command then makes of them, to the bit.

    python -m tools.torture [--kills=100] [--seed=0] [--layout=PROCESSESxDEVICES[,AXIS:SIZE,...]]

Runs all stages of a tiny model, saving after every step, ends them by SIGKILL, and starts the same
command again until it is done: checkpoints (every array of every step that is kept), latents,
metrics without times, samples and all other files must be those of a run that nothing disturbed.
--layout may be given again; by default they are one device, eight devices and two processes of two
devices, of which one alone is killed now and then. The devices are fake ones of this machine's CPU.

Prints a line a kill, and a table. Exit status 1 if a run did not end equal, 2 for wrong arguments.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.flags import Parser
from tools.torturing import kills
from tools.torturing.runs import layout_of
from vdit.errors import UserError

LAYOUTS = ("1x1", "1x8,data:2,fsdp:2,tensor:2", "2x2,data:2,fsdp:2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    parser = Parser(
        prog="torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", action="append")
    parser.add_argument("--folder", type=Path, help="where runs are written, and failed ones stay")
    try:
        options = parser.parse_args(arguments)
        if options.kills < 1 or options.seed < 0:
            raise UserError("--kills of 1 and more and --seed of 0 and more are allowed")
        layouts = [layout_of(text) for text in options.layout or LAYOUTS]
    except UserError as error:
        print(f"torture: {error}", file=sys.stderr)
        return 2
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"torture: {time.monotonic() - began:.0f} s: {line}", file=sys.stderr, flush=True)

    made, failures = kills.kills(layouts, options.kills, options.seed, folder.resolve(), say)
    print(kills.table(made))
    print("\n".join(failures) or f"{len(made)} of {len(made)} kills: all runs equal to the bit")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
