"""Collectives of a compiled program, by kind and mesh axis."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
    "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COMPUTATION = re.compile(r"^(?:ENTRY )?%([^ ]+) \(.*\{$")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?(%[^,} ]+)")
MESH = re.compile(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
                  r" \{([^}]*)\}")  # fmt: skip
IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
CUSTOM = re.compile(r'%([^ ]+?)[.\d]* = .*custom_call_target="(tpu_custom_call|__cu[^"]+)"')

# Reasons for collectives; others are flagged.
GRADIENTS = "sums over the batch: gradients, loss, norms"
REASONS = {
    ("all-gather", "fsdp"): "parameters before they are used",
    ("reduce-scatter", "fsdp"): "gradients, split as the parameters are",
    ("all-gather", "fsdp+sequence"): "parameters before they are used",
    ("reduce-scatter", "fsdp+sequence"): "gradients, split as the parameters are",
    ("ring", "fsdp+sequence"): "parameters or gradients, a shard at a time beside the product",
    ("ring", "fsdp"): "parameters or gradients, a shard at a time beside the product",
    ("all-reduce", "data"): GRADIENTS,
    ("all-reduce", "fsdp"): GRADIENTS,
    ("all-reduce", "data+fsdp"): GRADIENTS,
    ("reduce-scatter", "data+fsdp"): "gradients, split as the parameters are",
    ("all-reduce", "tensor"): "partial sums over heads and mlp columns",
    ("reduce-scatter", "tensor"): "partial sums over heads and mlp columns",
    ("all-gather", "sequence"): "keys and values of all tokens",
    ("all-to-all", "sequence"): "heads for tokens around attention, and back (ulysses)",
    ("collective-permute", "sequence"): "keys and values: round the ring, or of the next window",
    ("all-reduce", "sequence"): "sums over tokens: gradients",
    ("reduce-scatter", "sequence"): "gradients of keys and values",
    ("all-reduce", "data+fsdp+sequence"): "sums over tokens: gradients, loss, norms",
    ("all-reduce", "data+sequence"): "sums over tokens: gradients, loss, norms",
    ("all-reduce", "fsdp+sequence"): "sums over tokens: gradients, loss, norms",
}
# Of sampling, besides.
ROWS = "rows of one video: what they know, and their predictions"
SAMPLING = {(kind, axes): ROWS for kind in ("all-to-all", "collective-permute")
            for axes in ("data", "fsdp", "data+fsdp")}  # fmt: skip


class Row(NamedTuple):
    """All collectives of one kind over the same axes, in one step."""

    kind: str
    axes: str
    times: int
    sent: float  # bytes that one device sends
    reason: str  # empty if unexplained


def size_of(shapes: str) -> list[int]:
    """Bytes of every array in an HLO shape."""
    found = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
    return [
        BYTES[kind] * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
        for kind, dims in found
        if kind in BYTES
    ]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def groups_of(line: str) -> np.ndarray | list[list[int]] | None:
    """Groups of communicating devices, by position in the mesh; None if not parsed."""
    if found := MESH.search(line):
        sizes = [int(n) for n in re.findall(r"=(\d+)", found[1])]
        ids = np.arange(int(np.prod(sizes)))
        if found[2]:
            ids = ids.reshape(numbers(found[2])).transpose(numbers(found[3]))
        ids = ids.reshape(sizes)
        axes = re.findall(r"'axis_(\d+)'(?!:)", found[4])
        if not axes or len(axes) != len(found[4].split(",")):
            return None
        last = [int(axis) for axis in axes]
        order = [axis for axis in range(len(sizes)) if axis not in last] + last
        return ids.transpose(order).reshape(-1, int(np.prod([sizes[axis] for axis in last])))
    if found := IOTA.search(line):
        ids = np.arange(int(np.prod(numbers(found[3])))).reshape(numbers(found[3]))
        if found[4]:
            ids = ids.transpose(numbers(found[4]))
        return ids.reshape(int(found[1]), int(found[2]))
    if found := LISTED.search(line):
        return [numbers(part) for part in re.findall(r"\{([\d, ]*)\}", found[1])]
    return None


def axes_of(groups: np.ndarray | list[list[int]] | None, mesh: Mapping[str, int]) -> str:
    """The axes along which the members of a group differ, as "data+fsdp"; "?" if not parsed."""
    if groups is None:
        return "?"
    names, sizes = list(mesh), tuple(mesh.values())
    differ = np.zeros(len(names), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group, np.int64), sizes), axis=-1)
        differ |= (places != places[:1]).any(0)
    return "+".join(name for name, is_in in zip(names, differ, strict=True) if is_in)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of an HLO module, and the name of the entry computation."""
    made: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            name = found[1]
            made[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            made[name].append(line)
    return made, entry


def trips(line: str, made: Mapping[str, list[str]]) -> int:
    """The trip count of a while loop: from XLA, or the constant its counter is compared with."""
    if found := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line):
        return int(found[1])
    found = re.search(r"condition=%([^, ]+)", line)
    lines = made.get(found[1], []) if found else []
    constants = [int(n) for n in re.findall(r"constant\((\d+)\)", "\n".join(lines))]
    return max(constants, default=1)


def counts(made: Mapping[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs in one step, with loops unrolled."""
    calls: dict[str, Counter[str]] = defaultdict(Counter)
    for name, lines in made.items():
        for line in lines:
            times = trips(line, made) if " while(" in line else 1
            for called in CALLED.findall(line):
                calls[name][called.lstrip("%")] += times
    total: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        total[name] += times
        for called, n in calls[name].items():
            if called in made:
                visit(called, times * n)

    visit(entry, 1)
    return total


def kernels(text: str) -> Counter[str]:
    """How often a step calls each kernel that XLA did not generate: Pallas's by the names of its
    functions ("splash_mha_fwd_residuals"), cuDNN's and cuBLAS's by their targets."""
    made, entry = computations(text)
    often, found = counts(made, entry), Counter[str]()
    for name, lines in made.items():
        for line in lines:
            if (call := CUSTOM.search(line)) and often.get(name):
                found[call[1] if call[2] == "tpu_custom_call" else call[2]] += often[name]
    return found


def collectives(text: str, mesh: Mapping[str, int], mode: str = "train") -> list[Row]:
    """The collectives of an optimised HLO module, most bytes first.

    Ring sends within a product that XLA split into windows are of kind "ring".
    """
    made, entry = computations(text)
    often = counts(made, entry)
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for name, lines in made.items():
        for line in lines:
            match = COLLECTIVE.search(line)
            if match is None or not often.get(name):
                continue
            shapes, kind, started = match[1], match[2], match[3]
            groups = groups_of(line)
            axes = axes_of(groups, mesh)
            if axes == "":  # groups of one device do not communicate
                continue
            n = 2 if groups is None else len(groups[0])
            sizes = size_of(shapes)
            whole = max(sizes, default=0) if started else sum(sizes)
            share = {
                "all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1,
                "all-to-all": (n - 1) / n, "collective-permute": 1,
            }[kind]  # fmt: skip
            # XLA overlaps a product with its gather or reduction by windows.
            ring = kind == "collective-permute" and "/dot_general" in line
            row = found[("ring" if ring else kind, axes)]
            row[0] += often[name]
            row[1] += often[name] * whole * share
    reasons = REASONS | (SAMPLING if mode == "sample" else {})
    rows = [
        Row(kind, axes, int(count), sent, reasons.get((kind, axes), ""))
        for (kind, axes), (count, sent) in found.items()
    ]
    return sorted(rows, key=lambda row: -row.sent)
