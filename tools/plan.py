"""Estimates what a run needs on TPUs, without a TPU.

    python -m tools.plan --config=experiments/X.py --topology=v5p:4x4x8 [--config.field=value]
        [--mesh=data:2,fsdp:64] [--mode=train|sample] [--stage=dit] [--best=3] [--fast] [--row]

Estimates the step by formula, then compiles the run's actual step with XLA's TPU compiler (package
libtpu, on any Linux machine) and prints both: bytes per device, FLOPs, collectives by mesh axis, a
lower bound of the step time from the chip's rates, and chip-hours of the run. --mode=sample does
this for the denoising scan of sample.batch videos. Without --mesh it estimates all meshes (for
training also with half and twice the batch and every rematerialisation policy) and compiles the
best --best. --fast skips the compiler; --row adds a row for docs/scale.md. A plan that does not fit
is a one-line error, exit status 2.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vdit.config import default, joined
from vdit.errors import UserError
from vdit.runtime.mesh import make_mesh, mesh_sizes
from vdit.train import check_batch

from . import parsers
from .flags import read_config, read_mesh
from .planning.chips import GIB, Topology, topology
from .planning.compiler import compiled_of, devices_of
from .planning.estimate import (
    Estimate,
    Model,
    Options,
    decode_flops,
    estimate,
    model_of,
    sampling_of,
    state_bytes,
    with_,
)
from .planning.hlo import collectives, kernels
from .planning.step import lower_sampling, lower_training, token_grid, without_folder

ROOM = 0.9  # usable share of a device's memory


def meshes(count: int) -> Iterator[dict[str, int]]:
    """Every power-of-two mesh of `count` devices with at most 8 along tensor and 256 along
    sequence."""
    few = [2**i for i in range(9) if count % 2**i == 0]
    for tensor, sequence in itertools.product(few[:4], few):
        rest, left = divmod(count, tensor * sequence)
        if not left:
            for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
                yield {
                    "data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "sequence": sequence,
                }  # fmt: skip


class Plan(NamedTuple):
    """A configuration, a mesh, and the estimate for both."""

    config: ConfigDict
    sizes: dict[str, int]
    model: Model
    made: Estimate


def options_of(config: ConfigDict, mode: str, stage: str) -> Options:
    if mode == "sample":
        return Options(config.sample.batch)
    return Options(config[stage].train.batch, config[stage].train.accumulate)


def check_plan(config: ConfigDict, mode: str, stage: str, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh that does not divide the batch, the heads or a clip's tokens."""
    joined.check_mesh(config, sizes)
    if mode == "sample" or stage == "dit":
        check_tokens(config, sizes["sequence"])
    if mode == "train":
        check_batch(stage, config[stage].train, sizes)
        return
    rows = config.sample.batch * (2 if config.sample.guidance != 1.0 else 1)
    if rows % (sizes["data"] * sizes["fsdp"]):
        raise UserError(
            f"sample.batch {config.sample.batch}: data times fsdp, {sizes['data'] * sizes['fsdp']},"
            f" must divide its {rows} rows (two for a guided video)"
        )


def check_tokens(config: ConfigDict, shards: int) -> None:
    """Refuses shards that would not split a clip's tokens: a network that takes no padding would
    compute all of them on each device."""
    if config.data.shapes or config.dit.model == "vdit" and config.dit.axes == "joint":
        return  # rows are padded
    tokens = math.prod(token_grid(config))
    if tokens % shards:
        raise UserError(
            f"mesh sequence={shards}: it must divide the {tokens:,} tokens of a clip"
            f" (dit.model={config.dit.model})"
        )


def variants(
    config: ConfigDict, mode: str, stage: str, platform: str
) -> Iterator[tuple[ConfigDict, Model]]:
    """The search space besides meshes: rematerialisation, batch and accumulation."""
    if mode == "sample":
        yield config, sampling_of(config, platform)
        return
    wanted = config[stage].train.batch
    for remat in ("none", "dots", "full"):
        model = model_of(with_(config, run__remat=remat), stage, platform)
        batches = sorted({max(wanted // 2, 1), wanted, 2 * wanted})
        for batch, parts in itertools.product(batches, (1, 2, 4, 8)):
            train = {f"{stage}__train__batch": batch, f"{stage}__train__accumulate": parts}
            yield with_(config, run__remat=remat, **train), model


def search(config: ConfigDict, mode: str, stage: str, where: Topology) -> list[Plan]:
    """All valid plans: first those that fit, then by estimated time per sample."""
    room = ROOM * where.chip.hbm
    found: list[Plan] = []
    kept: dict[Any, Any] = {}
    tried = [(one, options_of(one, mode, stage), model) for one, model in
             variants(config, mode, stage, where.platform)]  # fmt: skip
    for sizes in meshes(where.devices):
        for one, options, model in tried:
            try:
                check_plan(one, mode, stage, sizes)
            except UserError:
                continue
            key = sizes["fsdp"], sizes["tensor"], sizes["sequence"]  # axes that shard the state
            kept[key] = kept.get(key) or state_bytes(model, sizes)
            made = estimate(model, options, sizes, where, one.run.sequence, kept[key])
            found.append(Plan(one, sizes, model, made))
    wanted = options_of(config, mode, stage).batch

    def order(plan: Plan) -> tuple[Any, ...]:
        options = options_of(plan.config, mode, stage)
        # Ties within 1%: prefer the configured batch, then less accumulation, then fewer axes.
        return (
            plan.made.held > room,
            round(100 * math.log(plan.made.seconds / options.batch)),
            options.batch != wanted, options.accumulate, plan.made.most,
            sum(size > 1 for size in plan.sizes.values()),
        )  # fmt: skip

    return sorted(found, key=order)


def flags_of(config: ConfigDict, mode: str, stage: str, sizes: Mapping[str, int]) -> str:
    """A plan as flags."""
    axes = ",".join(f"{name}:{size}" for name, size in sizes.items() if size > 1) or "data:1"
    if mode == "sample":
        return f"--mesh={axes} --config.sample.batch={config.sample.batch}"
    train = config[stage].train
    return (
        f"--mesh={axes} --config.{stage}.train.batch={train.batch}"
        f" --config.{stage}.train.accumulate={train.accumulate}"
        f" --config.run.remat={config.run.remat}"
    )


def times_of(plan: Plan, mode: str, stage: str, where: Topology, least: float, most: float) -> None:
    """Prints MFU, rates and chip-hours for a range of step times."""
    config, model = plan.config, plan.model
    batch = options_of(config, mode, stage).batch
    devices = math.prod(plan.sizes.values())
    chips, flops = devices / where.cores, batch * model.model_flops
    peak = devices * where.chip.flops
    print(
        f"MFU                  {flops / peak / most:.0%} where nothing overlaps,"
        f" {flops / peak / least:.0%} where all does"
    )
    if mode == "sample":
        print(f"seconds a clip       {least / batch:,.2f} to {most / batch:,.2f}")
        again = decode_flops(config, where.platform) / where.chip.flops
        print(f"  and its decoder    {again:,.2f} at least, on one device")
        return
    line = f"samples a second     {batch / most:,.2f} to {batch / least:,.2f}"
    if stage == "dit" and not config.data.shapes:
        tokens = math.prod(token_grid(config))
        line += f" ({tokens:,} tokens each: {batch * tokens / most:,.0f} to"
        line += f" {batch * tokens / least:,.0f} tokens a second)"
    print(line)
    steps = config[stage].train.steps
    low, high = (steps * seconds * chips / 3600 for seconds in (least, most))
    print(f"chip-hours           {low:,.0f} to {high:,.0f}, for {steps:,} steps")


def print_estimate(plan: Plan, mode: str, stage: str, where: Topology) -> None:
    """Prints the estimated bytes, FLOPs and times of a step and of the run."""
    chip, model, made = where.chip, plan.model, plan.made
    batch = options_of(plan.config, mode, stage).batch
    what = "of a step" if mode == "train" else f"of {batch} clips"
    print(f"parameters           {model.params / 1e6:,.1f} M")
    print(
        f"FLOPs                {batch * model.model_flops:.3g} {what}, and"
        f" {batch * model.again_flops:.3g} again"
    )
    print(
        f"seconds              {made.seconds:.4f} at least (compute {made.compute:.4f},"
        f" HBM {made.hbm:.4f}, links {made.ici:.4f})"
    )
    times_of(plan, mode, stage, where, made.seconds, made.most)
    of = f"{chip.hbm / GIB:.0f} ({where.kind}, {chip.source})"
    print(f"\nGiB on a device      estimate   of {of}")
    for name in ("params", "frozen", "optimizer", "ema", "inputs", "temporaries", "total"):
        print(f"  {name:18} {getattr(made, name) / GIB:9.3f}")
    if mode == "sample":
        print(f"  {'beside it':18} {made.beside / GIB:9.3f}  text encoder and autoencoder")


class Compiled(NamedTuple):
    """Results of compiling a plan."""

    state: int  # bytes per device, like temporaries
    temporaries: int
    rows: list[Any]  # collectives
    kernels: dict[str, int]  # calls by name
    seconds: float  # of compilation

    @property
    def total(self) -> int:
        return self.state + self.temporaries

    @property
    def sent(self) -> float:
        """Bytes."""
        return sum(row.sent for row in self.rows)


def compile_plan(plan: Plan, mode: str, stage: str, name: str, where: Topology) -> Compiled:
    """Compiles the step of the run."""
    count = math.prod(plan.sizes.values())
    mesh = make_mesh(plan.sizes, devices_of(name, where)[:count])
    began = time.monotonic()
    if mode == "train":
        lowered = lower_training(plan.config, stage, mesh)
    else:
        lowered = lower_sampling(plan.config, mesh)
    compiled = compiled_of(lowered, name, where.platform)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        collectives(text, plan.sizes, mode), kernels(text), time.monotonic() - began,
    )  # fmt: skip


def print_compiled(plan: Plan, got: Compiled, mode: str, stage: str, where: Topology) -> None:
    """Prints compiled against estimated memory, the collectives, and the resulting times."""
    made, chip = plan.made, where.chip
    print(f"\ncompiled in {got.seconds:.0f} s")
    print("GiB on a device      compiler   estimate")
    for name, real, guess in (
        ("arguments", got.state, made.kept), ("temporaries", got.temporaries, made.temporaries),
    ):  # fmt: skip
        print(f"  {name:18} {real / GIB:9.3f} {guess / GIB:10.3f}")
    print(
        f"  {'total':18} {got.total / GIB:9.3f} {made.total / GIB:10.3f}"
        f" ({made.total / got.total - 1:+.0%}), {got.total / chip.hbm:.0%} of the device's"
    )
    if got.kernels:
        called = ", ".join(f"{name} {count:,}" for name, count in sorted(got.kernels.items()))
        print(f"\nkernels, calls        {called}")
    if got.total > chip.hbm:
        raise UserError(f"{got.total / GIB:.1f} GiB do not fit into {chip.hbm / GIB:.0f} GiB")
    print("\ncollectives, one device              count      sent MB  why")
    for row in got.rows:
        reason = row.reason or "FLAGGED: no reason known, the compiler moves arrays about"
        print(f"  {row.kind:19} {row.axes:14} {row.times:7} {row.sent / 1e6:12,.1f}  {reason}")
    links = "ICI" if where.platform == "tpu" else "NVLink, PCIe and network"
    seconds = linked(plan, got, where)
    print(f"  all: {got.sent / 1e9:.2f} GB, {seconds:.4f} s of {links} at full rate\n")
    least, most = seconds_of(plan, got, where)
    print(f"with these           {least:.4f} s at least, {most:.4f} s where nothing overlaps")
    times_of(plan, mode, stage, where, least, most)


def linked(plan: Plan, got: Compiled, where: Topology) -> float:
    """Seconds of all collectives at the links' full rates."""
    return sum(where.seconds(row.kind, row.axes, row.sent, plan.sizes) for row in got.rows)


def seconds_of(plan: Plan, got: Compiled | None, where: Topology) -> tuple[float, float]:
    """Seconds of a step with full overlap, and with none."""
    made = plan.made if got is None else plan.made._replace(ici=linked(plan, got, where))
    return made.seconds, made.most


def row_of(plan: Plan, got: Compiled | None, options: argparse.Namespace, where: Topology) -> str:
    """A row of the table of docs/scale.md."""
    mode, stage, config = options.mode, options.stage, plan.config
    chip, devices = where.chip, math.prod(plan.sizes.values())
    least, most = seconds_of(plan, got, where)
    chosen = options_of(config, mode, stage)
    mfu = [
        chosen.batch * plan.model.model_flops / devices / chip.flops / seconds
        for seconds in (most, least)
    ]
    total = plan.made.total if got is None else got.total
    off = "" if got is None else f"{plan.made.total / got.total - 1:+.0%}"
    if mode == "sample":
        took = f"{least / chosen.batch:,.1f} to {most / chosen.batch:,.1f} a clip"
    else:
        hours = config[stage].train.steps * devices / where.cores / 3600
        took = f"{least:,.2f} to {most:,.2f} | {hours * least:,.0f} to {hours * most:,.0f}"
    axes = ",".join(f"{name}:{size}" for name, size in plan.sizes.items() if size > 1)
    return (
        f"| {options.config} | {mode} | {options.topology} | {axes} | {chosen.batch} |"
        f" {total / GIB:.2f} | {total / chip.hbm:.0%} | {off} | {mfu[0]:.0%} to {mfu[1]:.0%} |"
        f" {took} |"
    )


def given_plan(config: ConfigDict, options: argparse.Namespace, where: Topology) -> Plan:
    """The plan of --mesh; an error if it does not fit, with one that does."""
    mode, stage, chip = options.mode, options.stage, where.chip
    sizes = mesh_sizes(read_mesh(options.mesh), where.devices)
    check_plan(config, mode, stage, sizes)
    platform = where.platform
    model = sampling_of(config, platform) if mode == "sample" else model_of(config, stage, platform)
    made = estimate(model, options_of(config, mode, stage), sizes, where, config.run.sequence)
    if made.held > ROOM * chip.hbm:
        better = search(config, mode, stage, where)
        fits = better and better[0].made.held <= ROOM * chip.hbm
        would = flags_of(better[0].config, mode, stage, better[0].sizes) if fits else "more devices"
        raise UserError(
            f"{made.held / GIB:.1f} GiB by estimate do not fit into {ROOM:.0%} of"
            f" {chip.hbm / GIB:.0f} GiB of {where.kind}; this fits: {would}"
        )
    return Plan(config, sizes, model, made)


def plan_run(config: ConfigDict, options: argparse.Namespace, where: Topology) -> None:
    """Estimates, compiles and prints."""
    mode, stage, chip = options.mode, options.stage, where.chip
    if options.mesh:
        best = [given_plan(config, options, where)]
    else:
        found = search(config, mode, stage, where)
        if not found:
            check_plan(
                config, mode, stage, mesh_sizes({"data": -1}, where.devices)
            )  # raises the reason
        best = found[: max(options.best, 1)]
        print("best by estimate     GiB     seconds")
        for plan in found[: max(5, options.best)]:
            line = f"{plan.made.total / GIB:9.2f} {plan.made.seconds:11.4f}"
            print(f"  {line}  {flags_of(plan.config, mode, stage, plan.sizes)}")
        print()
        if best[0].made.held > ROOM * chip.hbm:
            least = min(plan.made.held for plan in found)
            raise UserError(
                f"--topology={options.topology}: at least {least / GIB:.1f} GiB a device by"
                f" estimate, {ROOM:.0%} of {chip.hbm / GIB:.0f} GiB are there; more devices are"
                " needed, or a smaller batch"
            )
    for number, plan in enumerate(best):
        print(f"{stage} on {options.topology}, {flags_of(plan.config, mode, stage, plan.sizes)}")
        if number == 0 or not options.fast:
            print_estimate(plan, mode, stage, where)
        got = None
        if not options.fast:
            try:
                got = compile_plan(plan, mode, stage, options.topology, where)
                print_compiled(plan, got, mode, stage, where)
            except UserError as error:
                if plan is best[-1]:
                    raise
                print(f"{' '.join(str(error).split())}\n")
                continue
        if options.row:
            print(f"\n{row_of(plan, got, options, where)}")
        if options.fast:
            return
        print()


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the flags; also returns unknown ones."""
    return parsers.plan(__doc__).parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    try:
        options, changes = parse(arguments)
        where = topology(options.topology)
        config = read_config(options.config, changes)
        if not options.fast:
            devices_of(options.topology, where)  # fails early without the compiler
        # A published text encoder's folder need not be at hand; its other checks are of the text.
        known: dict[str, Any] = {"text__encoder": "learned"} if without_folder(config) else {}
        if config.dit.lora.rank and not config.dit.lora.base:  # nor need the base of adapters
            known["dit__lora"] = default().dit.lora
        joined.check(with_(config, **known), where.platform)
        plan_run(config, options, where)
        return 0
    except UserError as error:
        print(f"plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
