"""What a run will need on a TPU, before one is rented.

    python -m tools.plan --config=experiments/X.py --topology=v5p:4x4x8
        [--mesh=data:2,fsdp:64] [--mode=train|sample] [--stage=dit] [--fast]

Estimates the step by formula, then compiles the very step that the run would run with XLA's TPU
compiler (the package libtpu, on any Linux machine; no TPU is touched) and prints both: bytes on a
device, FLOPs, collectives by mesh axis, the least time that the rates of the chip allow, and
chip-hours of the whole run. Without --mesh all meshes are estimated, and the best that fits is
compiled. --fast leaves the compiler out. What does not fit is one line, exit status 2.
"""

import argparse
import importlib.util
import itertools
import math
import os
import runpy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tools.flags import Parser
from tools.planning.chips import CORES, GIB, Chip, device, topology
from tools.planning.estimate import Estimate, Model, estimate, model_of, with_
from tools.planning.hlo import collectives
from vdit import build
from vdit.errors import UserError
from vdit.models.dit import preset
from vdit.runtime.mesh import AXES, make_mesh, mesh_sizes
from vdit.train import check_batch

ROOM = 0.95  # share of a device's memory that a plan may fill by estimate
NEEDS = "libtpu is missing: pip install libtpu beside jax (pip install -e '.[tpu]'), or give --fast"


def read_config(path: str) -> ConfigDict:
    """get_config of experiments/X.py[:ARGUMENT]."""
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise UserError(f"--config={path}: there is no such file")
    return runpy.run_path(file)["get_config"](argument)


def read_mesh(text: str) -> dict[str, int]:
    """{"data": 2, "fsdp": 64} of data:2,fsdp:64."""
    made = {}
    for part in text.split(","):
        name, _, size = part.partition(":")
        if name not in AXES or not size.lstrip("-").isdigit():
            raise UserError(f"--mesh={text}: AXIS:SIZE,... is allowed, with {', '.join(AXES)}")
        made[name] = int(size)
    return made


def check_heads(config: ConfigDict, sizes: Mapping[str, int]) -> None:
    """Refuses more tensor shards than heads, or shards that do not divide them."""
    name, heads = f"dit.preset {config.dit.preset}", (preset(config.dit.preset)["heads"],)
    if config.dit.model == "unet":
        name, heads = "dit.unet", tuple(config.dit.unet.heads)
    if wrong := [n for n in heads if n % sizes["tensor"]]:
        raise UserError(
            f"mesh tensor={sizes['tensor']}: {name} has {wrong[0]} heads, which tensor must divide"
        )


def meshes(count: int) -> Iterator[dict[str, int]]:
    """Every mesh of `count` devices with at most 8 along tensor and sequence."""
    few = [n for n in (1, 2, 4, 8) if count % n == 0]
    for tensor, sequence in itertools.product(few, few):
        rest, left = divmod(count, tensor * sequence)
        if not left:
            for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
                yield {
                    "data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "sequence": sequence,
                }  # fmt: skip


def candidates(
    config: ConfigDict, stage: str, count: int, chip: Chip, remats: Sequence[str]
) -> list[tuple[Estimate, ConfigDict, dict[str, int]]]:
    """Meshes, accumulation and rematerialisation that are allowed, those that fit first, then
    the fastest by estimate."""
    found = []
    for remat in remats:
        model = model_of(with_(config, run__remat=remat), stage)
        for sizes, parts in itertools.product(meshes(count), (1, 2, 4, 8)):
            changed = with_(config, run__remat=remat, **{f"{stage}__train__accumulate": parts})
            try:
                check_batch(stage, changed[stage].train, sizes)
                check_heads(config, sizes)
            except UserError:
                continue
            found.append((estimate(model, changed[stage].train, sizes, chip), changed, sizes))
    # Of plans as fast by estimate the one with the fewest axes, and the fewest parts.
    return sorted(found, key=lambda plan: (
        plan[0].total > ROOM * chip.hbm, round(plan[0].seconds, 4),
        plan[1][stage].train.accumulate, sum(size > 1 for size in plan[2].values()),
    ))  # fmt: skip


def told(config: ConfigDict, stage: str, sizes: Mapping[str, int]) -> str:
    """A plan in one line."""
    axes = ",".join(f"{name}:{size}" for name, size in sizes.items() if size > 1) or "data:1"
    parts = config[stage].train.accumulate
    return f"--mesh={axes} accumulate={parts} remat={config.run.remat}"


def devices_of(name: str) -> Any:
    """The devices of a topology, from libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(NEEDS)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu raises bare errors
        raise UserError(f"--topology={name}: libtpu says: {str(error).splitlines()[0]}") from error


def compiled_of(lowered: Any, what: str) -> Any:
    """The compiled step; too much memory is a `UserError`."""
    try:
        return lowered.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{what} does not fit, the compiler says: {line}") from error


def print_estimate(
    config: ConfigDict, stage: str, model: Model, made: Estimate, sizes: Mapping[str, int],
    kind: str,
) -> None:
    """Bytes, FLOPs, the least time of a step, and what the whole run takes."""
    options, chip = config[stage].train, device(kind)
    flops = options.batch * model.model_flops
    chips = math.prod(sizes.values()) // CORES.get(kind, 1)
    peak = math.prod(sizes.values()) * chip.flops
    print(f"parameters           {model.params / 1e6:,.1f} M")
    print(f"FLOPs of a step      {flops:.3g}, and {options.batch * model.again_flops:.3g} again")
    print(
        f"least time, seconds  {made.seconds:.4f} (compute {made.compute:.4f}, HBM {made.hbm:.4f},"
        f" ICI {made.ici:.4f}); MFU at most {flops / peak / made.seconds:.0%}"
    )
    rate = options.batch / made.seconds
    print(f"samples a second     {rate:,.1f} at most")
    if stage == "dit" and not config.data.shapes:
        from tools.planning.step import token_grid

        print(f"tokens a second      {rate * math.prod(token_grid(config)):,.0f} at most")
    hours = options.steps * made.seconds * chips / 3600
    print(f"chip-hours           {hours:,.0f} at least, for {options.steps:,} steps")
    print(f"\nGiB on a device      estimate   of {chip.hbm / GIB:.0f} ({kind}, {chip.source})")
    for name in ("params", "optimizer", "ema", "temporaries", "total"):
        print(f"  {name:18} {getattr(made, name) / GIB:9.3f}")


def print_compiled(
    compiled: Any, made: Estimate | None, sizes: Mapping[str, int], kind: str
) -> None:
    """The compiler's memory beside the estimate, and the collectives."""
    memory, chip = compiled.memory_analysis(), device(kind)
    state, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    print("\nGiB on a device      compiler   estimate")
    lines: list[Any] = [("arguments", state, None), ("temporaries", temporaries, None)]
    if made is not None:
        kept = made.params + made.optimizer + made.ema
        lines = [("arguments", state, kept), ("temporaries", temporaries, made.temporaries)]
    for name, got, guess in lines:
        print(f"  {name:18} {got / GIB:9.3f}" + ("" if guess is None else f" {guess / GIB:10.3f}"))
    total = state + temporaries
    off = "" if made is None else f" {made.total / GIB:10.3f} ({made.total / total - 1:+.0%})"
    print(f"  {'total':18} {total / GIB:9.3f}{off}")
    if total > chip.hbm:
        raise UserError(f"{total / GIB:.1f} GiB do not fit into {chip.hbm / GIB:.0f} GiB")
    rows = collectives(compiled.as_text(), sizes)
    print("\ncollectives of a step, one device    count      sent MB  why")
    for row in rows:
        reason = row.reason or "FLAGGED: no reason known, the compiler moves arrays about"
        print(f"  {row.kind:19} {row.axes:14} {row.times:7} {row.sent / 1e6:12,.1f}  {reason}")
    sent = sum(row.sent for row in rows)
    print(f"  all: {sent / 1e9:.2f} GB, {sent / chip.ici:.4f} s of ICI at its full rate")


def plan_training(config: ConfigDict, options: argparse.Namespace, kind: str, count: int) -> None:
    stage, chip = options.stage, device(kind)
    if options.mesh:
        sizes = mesh_sizes(read_mesh(options.mesh), count)
        check_batch(stage, config[stage].train, sizes)
        check_heads(config, sizes)
    else:
        found = candidates(config, stage, count, chip, ("none", "dots", "full"))
        if not found:
            raise UserError(
                f"{stage}.train.batch {config[stage].train.batch}: no mesh of {count} devices can"
                " share it; a multiple of the devices is allowed"
            )
        print("best by estimate     GiB     seconds")
        for made, changed, at in found[:5]:
            line = f"{made.total / GIB:9.2f} {made.seconds:11.4f}"
            print(f"  {line}  {told(changed, stage, at)}")
        print()
        _, config, sizes = found[0]
    model = model_of(config, stage)
    made = estimate(model, config[stage].train, sizes, chip)
    print(f"{stage} on {options.topology}, {told(config, stage, sizes)}")
    print_estimate(config, stage, model, made, sizes, kind)
    if made.total > ROOM * chip.hbm:
        better = candidates(config, stage, count, chip, ("full",))
        fits = better and better[0][0].total <= ROOM * chip.hbm
        would = told(better[0][1], stage, better[0][2]) if fits else "only more devices"
        raise UserError(
            f"{made.total / GIB:.1f} GiB by estimate do not fit into {chip.hbm / GIB:.0f} GiB of"
            f" {kind}; what would fit: {would}"
        )
    if options.fast:
        return
    from tools.planning.step import lower_training

    mesh = make_mesh(sizes, devices_of(options.topology))
    began = time.monotonic()
    compiled = compiled_of(lower_training(config, stage, mesh), options.topology)
    print(f"\ncompiled in {time.monotonic() - began:.0f} s")
    print_compiled(compiled, made, sizes, kind)


def plan_sampling(config: ConfigDict, options: argparse.Namespace, kind: str) -> None:
    """The denoising scan, which runs on one device."""
    if options.fast:
        raise UserError("--mode=sample --fast: sampling has no estimate; leave --fast out")
    from tools.planning.step import lower_sampling

    mesh = make_mesh({"data": 1}, devices_of(options.topology)[:1])
    compiled = compiled_of(lower_sampling(config, mesh), options.topology)
    print(f"{config.sample.batch} videos, {config.sample.steps} steps, on one device of {kind}")
    print_compiled(compiled, None, mesh_sizes({}, 1), kind)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked."""
    parser = Parser(
        prog="plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--mesh", default="")
    parser.add_argument("--mode", choices=("train", "sample"), default="train")
    parser.add_argument("--stage", choices=("vae", "dit", "classify"), default="dit")
    parser.add_argument("--fast", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Plans and prints; returns the exit status."""
    try:
        options = parse(arguments)
        kind, count = topology(options.topology)
        config = read_config(options.config)
        if not options.fast:
            devices_of(options.topology)  # what cannot be compiled is said first
        build.check(config, "tpu")
        if options.mode == "sample":
            plan_sampling(config, options, kind)
        else:
            plan_training(config, options, kind, count)
        return 0
    except UserError as error:
        print(f"plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
