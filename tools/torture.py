"""Kills runs, breaks the disk below them, and compares what they come to, to the bit.

    python -m tools.torture [--kills=100] [--seed=0] [--signal=KILL|INT|TERM]
        [--layout=PROCESSESxDEVICES[,AXIS:SIZE,...]]
    python -m tools.torture --faults[=CHAIN,...]
    python -m tools.torture --memory [--steps=5000] [--requests=200]

Runs all stages of a tiny model, saving after every step, ends them by a signal at a random time,
and starts the same command again until it is done: checkpoints (every array of every step that is
kept), latents, metrics without times, samples and all other files must be those of a run that
nothing disturbed. --layout may be given again; by default they are one device, eight devices and
two processes of two devices, of which one alone is killed now and then. The devices are fake ones
of this machine's CPU. With INT and TERM a run must end with one line and status 130 or 143.

--faults runs through a disk that is full at each stage, folders that are mounted read-only, writes
that fail, files that may not grow, a slow disk and a clock that jumps (full and read-only as root):
each is one line and status 2, and without it the same command goes on, with the same end.

--memory shows the resident memory over a run of many steps and over many requests of one model.

Prints a line a kill or fault, and a table. Exit status 1 if a run did not end as it should, 2 for
wrong arguments.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from vdit.errors import UserError

from .parsers import Parser
from .torturing import faults, kills, memory
from .torturing.runs import layout_of

LAYOUTS = ("1x1", "1x8,data:2,fsdp:2,tensor:2", "2x2,data:2,fsdp:2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    parser = Parser(
        prog="torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=kills.SIGNALS, default="KILL")
    parser.add_argument("--layout", action="append")
    parser.add_argument("--faults", nargs="?", const=",".join(faults.CHAINS), metavar="CHAIN,...")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where runs are written, and failed ones stay")
    try:
        options = parser.parse_args(arguments)
        if options.kills < 1 or options.seed < 0 or min(options.steps, options.requests) < 50:
            raise UserError("--kills of 1, --seed of 0, --steps and --requests of 50 are the least")
        layouts = [layout_of(text) for text in options.layout or LAYOUTS]
        chains = options.faults.split(",") if options.faults else []
        if unknown := [name for name in chains if name not in faults.CHAINS]:
            raise UserError(f"--faults={unknown[0]}: known are {', '.join(faults.CHAINS)}")
    except UserError as error:
        print(f"torture: {error}", file=sys.stderr)
        return 2
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="torture-"))).resolve()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"torture: {time.monotonic() - began:.0f} s: {line}", file=sys.stderr, flush=True)

    if options.memory:
        text, flat = memory.measure(folder, options.steps, options.requests)
        print(text)
        return int(not flat)
    if chains:
        whole = kills.undisturbed(folder, faults.ALONE).workdir
        failures = [line for name in chains for line in faults.chain(name, whole, folder, say)]
        count = sum(len(faults.CHAINS[name]) for name in chains)
        print("\n".join(failures) or f"{count} of {count} faults: runs equal to the bit")
    else:
        made, failures = kills.kills(
            layouts, options.kills, options.seed, folder, say, kills.SIGNALS[options.signal]
        )
        print(kills.table(made))
        print("\n".join(failures) or f"{len(made)} of {len(made)} signals: runs equal to the bit")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
