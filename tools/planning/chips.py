"""TPU chips by the vendor's data sheets, names of topologies of TPUs and GPUs, and their links."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vdit.errors import UserError

from .gpus import GPUS, HOST

GIB = 2**30


class Chip(NamedTuple):
    """One chip. `ici` is the total one-way bandwidth of its links, to GPUs of the same host."""

    hbm: float  # bytes
    flops: float  # bf16, a second
    hbm_rate: float  # bytes a second
    ici: float  # bytes a second
    axes: int  # of the torus
    source: str
    network: float = 0.0  # GPUs: bytes a second to other hosts; 0: the links reach all


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


class Topology(NamedTuple):
    """Devices of one kind: a slice of TPUs, or hosts of GPUs with `host` devices each."""

    kind: str
    devices: int
    host: int = 0

    @property
    def platform(self) -> str:
        return "gpu" if self.kind in GPUS else "tpu"

    @property
    def cores(self) -> int:
        """Devices per chip."""
        return CORES.get(self.kind, 1)

    @property
    def chip(self) -> Chip:
        """One device: a chip, or its share of one."""
        if gpu := GPUS.get(self.kind):
            rates = gpu.memory, gpu.flops, gpu.memory_rate, gpu.link
            return Chip(*rates, 0, gpu.source, gpu.network)
        chip, cores = CHIPS[self.kind], self.cores
        return chip._replace(
            hbm=chip.hbm / cores, flops=chip.flops / cores, hbm_rate=chip.hbm_rate / cores,
            ici=chip.ici / cores,
        )  # fmt: skip

    def seconds(self, kind: str, axes: str, sent: float, sizes: Mapping[str, int]) -> float:
        """Seconds in which each device sends `sent` bytes by collectives along `axes` ("data+fsdp",
        as in `hlo.Row`) of a mesh.

        Between hosts a ring of m devices a host sends 1/m of them, by each device's share of the
        network; an all-to-all sends all that is for other hosts.
        """
        chip = self.chip
        if not chip.network or not sent:
            return sent / chip.ici
        here = [slice(None) if axis in axes.split("+") else 0 for axis in sizes]
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        group = devices[tuple(here)].reshape(-1) if axes != "?" else devices.reshape(-1)
        near = int((group < self.host).sum())
        if near == len(group):
            return sent / chip.ici
        share = (len(group) - near) / (len(group) - 1) if kind == "all-to-all" else 1 / near
        return max(sent / chip.ici, sent * share / chip.network)


def topology(name: str) -> Topology:
    """The devices of "v5p:4x4x8", "h200:8" or "h100:4x8" (hosts x devices); `UserError` for any
    other form."""
    kind, _, dims = name.partition(":")
    if kind not in {**CHIPS, **GPUS} or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims):
        raise UserError(
            f"--topology={name}: KIND:AxB or KIND:AxBxC is allowed, with kind one of"
            f" {', '.join(CHIPS)}, as v5p:4x4x8; or KIND:DEVICES or KIND:HOSTSxDEVICES, with one of"
            f" {', '.join(GPUS)}, as h200:8"
        )
    sizes = [int(size) for size in dims.split("x")]
    if kind in GPUS:
        *hosts, devices = sizes
        if len(hosts) > 1 or devices not in HOST:
            raise UserError(
                f"--topology={name}: a host has {', '.join(map(str, HOST))} GPUs; several hosts are"
                f" {kind}:HOSTSxDEVICES, as {kind}:4x8"
            )
        return Topology(kind, math.prod(sizes), devices)
    if len(sizes) != CHIPS[kind].axes:
        raise UserError(
            f"--topology={name}: {kind} has {CHIPS[kind].axes} dimensions, {len(sizes)} are given"
        )
    return Topology(kind, math.prod(sizes) * CORES.get(kind, 1))
