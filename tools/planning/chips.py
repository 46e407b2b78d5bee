"""TPU chips by the vendor's data sheets, and names of topologies."""

import math
import re
from typing import NamedTuple

from vdit.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One chip. `ici` is the total one-way bandwidth of its links."""

    hbm: float  # bytes
    flops: float  # bf16, a second
    hbm_rate: float  # bytes a second
    ici: float  # bytes a second
    axes: int  # of the torus
    source: str


# ICI: half of the table's bidirectional rate, or its Gbps over 8 where that is one way.
DOCS = "docs.cloud.google.com/tpu/docs/"
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1200e9, 300e9, 3, DOCS + "v4"),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, 2, DOCS + "v5e"),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, 3, DOCS + "v5p"),
    "v6e": Chip(32 * GIB, 918e12, 1638e9, 400e9, 2, DOCS + "v6e"),
    "tpu7x": Chip(192 * GIB, 2307e12, 7380e9, 600e9, 3, DOCS + "tpu7x"),
}
CORES = {"v4": 2, "tpu7x": 2}  # devices per chip in the compiler's topologies


def topology(name: str) -> tuple[str, int]:
    """Kind of chip and number of devices of "v5p:4x4x8"; `UserError` for any other form."""
    kind, _, dims = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", dims):
        raise UserError(
            f"--topology={name}: KIND:AxB or KIND:AxBxC is allowed, with kind one of"
            f" {', '.join(CHIPS)}, as v5p:4x4x8"
        )
    sizes = [int(size) for size in dims.split("x")]
    if len(sizes) != CHIPS[kind].axes:
        raise UserError(
            f"--topology={name}: {kind} has {CHIPS[kind].axes} dimensions, {len(sizes)} are given"
        )
    return kind, math.prod(sizes) * CORES.get(kind, 1)


def device(kind: str) -> Chip:
    """One device of a kind: a chip, or its share of one."""
    chip, cores = CHIPS[kind], CORES.get(kind, 1)
    return chip._replace(
        hbm=chip.hbm / cores, flops=chip.flops / cores, hbm_rate=chip.hbm_rate / cores,
        ici=chip.ici / cores,
    )  # fmt: skip
