"""Benchmarks on CPU: training and sampling in JAX against PyTorch and bare matmuls.

    python -m tools.bench [--only=dit,wan,vae,sampling,compile,checkpoint,attention,loader]
                          [--torch-python=PYTHON]
                          [--width=384 --depth=12 --tokens=512 --batch=4 --levels=2 --steps=50]
                          [--repeats=5] [--json=FILE]

    dit       the DiT's forward pass and train step, layers unrolled as in a run
    wan       forward pass and train step of two of Wan's blocks on 4,096 tokens, against diffusers'
    vae       the autoencoder's train step, at the size of experiments/base.py
    sampling  the unguided Euler scan against as many bare forward passes of the same batch
    compile   seconds to trace and compile the train step of 24 scanned layers, against 4
    checkpoint  how long the training loop waits for a save of the DiT, its moments and its EMA:
              asynchronous, as the trainer saves, and synchronous
    attention forward pass of a narrow DiT (width 64, two blocks) for each setting of axes, from
              4,096 to 65,536 tokens, and how it scales; the memory of the chunked kernel
    loader    clips per second by source, size and threads, against PyTorch's DataLoader with PyAV
              on the same files; memory growth over 10,000 clips (tools/benching/loader.py)

A train step is forward, backward, clipping by the global norm and AdamW. PyTorch runs the same
network (tools/benching/torch_process.py; outputs and first losses are compared before timing) in a
separate process, eager and compiled, with the number of threads that is faster in eager mode.
"matmuls" is the sum of all matrix products of the computation, each timed alone in JAX as a plain
(M, K) x (K, N); "matmuls as written" contracts and batches them as the network does. Runs are
interleaved (A B A B); one that takes SLOW times the fastest in the first round is not repeated.
Without torch the table has no PyTorch rows. Exit status 2 for wrong arguments.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax

from vdit.config import default
from vdit.errors import UserError
from vdit.models.dit import AXES
from vdit.runtime import attention
from vdit.runtime.checkpoint import Checkpoints
from vdit.runtime.files import write_text
from vdit.runtime.machine import keep_freed_memory

from . import parsers
from .benching import loader
from .benching.cases import DTYPES, Case, Run, dit_case, vae_case
from .benching.pytorch import Torch
from .benching.report import Report, over_torch, say, take_turns
from .benching.runs import (
    compile_run,
    forward_run,
    gradient_temporaries,
    length_case,
    matmul_runs,
    optimizer,
    products_of,
    scan_run,
    seconds_of,
    train_run,
)
from .benching.wan import wan_case
from .parsers import NUMBERS, PARTS

SAMPLING_TURNS = 3  # at most: each is 100 forward passes
SHALLOW, DEEP = 4, 24  # layers whose compile times are compared
LENGTHS = (4096, 16_384, 65_536)  # tokens of one clip, in frames of 16 x 16
LINEAR = 1.2  # largest slope of log time over log length that counts as linear


def bench_case(
    case: Case, tasks: Sequence[str], torch: Torch, turns: int, report: Report
) -> dict[str, dict[str, list[float]]]:
    """Times forward passes and train steps of a network; seconds by task and run."""
    print(f"\n{case.title}")
    trains = {dtype: train_run(case, dtype) for dtype in DTYPES if "train" in tasks}
    print(torch.load(case, trains["float32"][1] if trains else []), flush=True)
    made = {}
    for task in tasks:
        say(f"{case.name} {task}: compiling in JAX")
        runs = {}
        for dtype in DTYPES:
            run = forward_run(case, dtype) if task == "forward" else trains[dtype][0]
            runs[f"JAX {dtype}{' operands' * (dtype != 'float32')}"] = run
        say(f"{case.name} {task}: compiling in PyTorch")
        runs |= torch.runs(case, task)
        say(f"{case.name} {task}: compiling matmuls")
        for dtype in DTYPES:
            runs |= matmul_runs(case, task, dtype)
        made[task] = take_turns(runs, turns, f"{case.name} {task}")
        found = products_of(case, task, "float32")
        gflop = sum(product.flops() * count for product, count in found.items()) / 1e9
        report.table(case.name, task, made[task], gflop)
    return made


def bench_sampling(case: Case, torch: Torch, options: argparse.Namespace, report: Report) -> None:
    """The sampling scan against bare forward passes, in the faster dtype."""
    steps, batch = options.steps, options.batch
    print(f"\nsampling: {steps} Euler steps, unguided, {batch} x {options.tokens} tokens")
    forwards = {dtype: forward_run(case, dtype) for dtype in DTYPES}
    probes = {dtype: min(run(), run()) for dtype, run in forwards.items()}
    dtype = min(DTYPES, key=probes.__getitem__)
    scan, bare = f"JAX {dtype}, scan", f"{steps} bare forward passes, JAX {dtype}"
    forward = forwards[dtype]
    runs: dict[str, Run] = {
        scan: scan_run(case, dtype, steps),
        bare: lambda: sum(forward() for _ in range(steps)),
    }
    variants = {name: run() for name, run in torch.runs(case, "forward").items()}
    if variants:
        best = min(variants, key=variants.__getitem__)
        kind = "bfloat16" if "bfloat16" in best else "float32"
        n = torch.threads[f"{case.name} forward {kind}"]
        runs[best] = torch.run("sample", kind, "compile" in best, n)
    seconds = take_turns(runs, min(options.repeats, SAMPLING_TURNS), "sampling")
    report.table("sampling", f"{steps} steps", seconds, None)
    ratios = [a / b for a, b in zip(seconds[scan], seconds[bare], strict=True)]
    what = f"sampling: scan over {steps} bare forward passes"
    report.target("sampling", what, statistics.median(ratios), 1.05, most=True)
    report.target("sampling", "sampling: PyTorch's best over JAX", over_torch(seconds), 1.8, False)


def bench_compile(options: argparse.Namespace, report: Report) -> None:
    """Compile time of a deep scanned stack against a shallow one."""
    runs = {f"{n} layers, unroll=1": compile_run(options, n) for n in (SHALLOW, DEEP)}
    seconds = take_turns(runs, options.repeats, "compile")
    report.table("compile", "train step, scanned layers", seconds, None)
    shallow, deep = seconds.values()
    value = statistics.median(deep) / statistics.median(shallow)
    what = f"compile: {DEEP} layers over {SHALLOW}"
    report.target("compile", what, value, 1.3, most=True)


def checkpoint_runs(options: argparse.Namespace, folder: Path) -> dict[str, Run]:
    """Seconds for which saving the DiT's training state blocks the loop."""
    params = dit_case(options).params
    state = {"params": params, "opt": optimizer().init(params)}
    checkpoints, steps = Checkpoints(folder, keep=1), itertools.count()

    def run(wait: bool) -> float:
        def save() -> None:
            checkpoints.save(next(steps), state, params, None, {})
            if wait:
                checkpoints.wait()

        seconds = seconds_of(save)
        checkpoints.wait()  # so that saves do not overlap
        return seconds

    run(True)  # starts the threads of orbax
    return {"synchronous": lambda: run(True), "asynchronous": lambda: run(False)}


def bench_checkpoint(options: argparse.Namespace, report: Report) -> None:
    """Blocking time of an asynchronous save against a synchronous one."""
    with tempfile.TemporaryDirectory() as folder:
        runs = checkpoint_runs(options, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repeats):  # all of them, although one is far slower
            for name, run in runs.items():
                seconds[name].append(run())
    report.table("checkpoint", "save: parameters, moments, average", seconds, None)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    value = medians["asynchronous"] / medians["synchronous"]
    what = "checkpoint: loop stopped by an asynchronous save, over a synchronous one"
    report.target("checkpoint", what, value, 0.1, most=True)


def bench_attention(options: argparse.Namespace, report: Report) -> None:
    """Scaling of time, FLOPs and temporaries with length for each setting of axes, and memory of
    the chunked kernel."""
    for axes in AXES:
        cases = {length: length_case(axes, length) for length in LENGTHS}
        seconds = {
            f"{length:,} tokens": [case.run() for _ in range(options.repeats)]
            for length, case in cases.items()
        }  # not by turns, which would skip long clips
        report.table("attention", axes, seconds, None)
        of_each: dict[str, list[float]] = {
            "time": [statistics.median(values) for values in seconds.values()],
            "FLOPs": [case.flops for case in cases.values()],
            "temporaries": [case.temporaries for case in cases.values()],
        }
        for name, values in of_each.items():
            slope = math.log(values[-1] / values[0]) / math.log(LENGTHS[-1] / LENGTHS[0])
            what = f"attention: {axes}, slope of log {name} over log length"
            if axes == "joint":
                print(f"{what}: {slope:.2f}")
            else:
                report.target("attention", what, slope, LINEAR, most=True)
    length = LENGTHS[len(LENGTHS) // 2]
    small, naive = (
        gradient_temporaries(attention.kernel(name), length) for name in ("chunked", "xla")
    )
    print(f"temporaries of the gradient at {length:,} tokens: {small:,} bytes, xla {naive:,}")
    what = "attention: percent of xla's temporaries that chunked needs"
    report.target("attention", what, 100 * small / naive, 2.0, most=True)


def bench_clips(options: argparse.Namespace, report: Report) -> None:
    """Clips per second, and memory growth."""
    rows = loader.measure(options.torch_python, say)
    print(f"\n{loader.table(rows)}")
    if not any(row["source"].startswith("PyTorch") for row in rows):
        print("PyTorch's DataLoader with PyAV is not available: its rows are omitted")
    report.rows += [{"part": "loader", **row} for row in rows]
    say(f"loader: memory over {loader.FLAT:,} clips")
    held, more = loader.growth(loader.World(0), loader.FLAT)
    if held:
        print(f"memory after {loader.FLAT // 10:,} clips {held:.0f} MiB")
        what = f"loader: MiB more after {loader.FLAT:,} clips"
        report.target("loader", what, more, loader.GROWTH, most=True)


def machine() -> str:
    """Describes the hardware and the version of JAX on one line."""
    model, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        flags = next((line for line in lines if line.startswith("flags")), "")
        known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in flags]
        model = " ".join([*names[:1], *known])
    device = jax.devices()[0]
    return f"{os.cpu_count()} cores, {model}; jax {jax.__version__} on {device.device_kind}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses and validates the flags."""
    options = parsers.bench(__doc__).parse_args(arguments)
    options.only = options.only.split(",")
    for part in options.only:
        if part not in PARTS:
            raise UserError(f"--only={part!r}: known are {', '.join(PARTS)}")
    for name in NUMBERS:
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: 1 or more is allowed")
    if options.width % 16:
        raise UserError(f"--width={options.width}: a multiple of 16 is allowed")
    if options.levels > 2:
        raise UserError(f"--levels={options.levels}: 1 or 2 is allowed")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; returns the exit status."""
    try:
        options = parse(arguments)
        jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
        keep_freed_memory()  # as vdit.main does
        report = Report([vars(options) | {"machine": machine(), "json": str(options.json)}])
        torch = Torch(options.torch_python)
        print(machine())
        if {"dit", "sampling"} & set(options.only):
            case = dit_case(options)
            tasks = ("forward", "train") if "dit" in options.only else ()
            made = bench_case(case, tasks, torch, options.repeats, report)
            for what, task, prefix, least in (
                ("forward, PyTorch's best over JAX", "forward", "PyTorch", 1.8),
                ("train step, PyTorch's best float32 over JAX", "train", "PyTorch float32", 1.5),
                ("train step, PyTorch's best over JAX (stretch)", "train", "PyTorch", 1.0),
            ):
                if task in made:
                    ratio = over_torch(made[task], prefix)
                    report.target("dit", f"dit: {what}", ratio, least, most=False)
            if "sampling" in options.only:
                bench_sampling(case, torch, options, report)
        if "wan" in options.only:
            made = bench_case(
                wan_case(options), ("forward", "train"), torch, options.repeats, report
            )
            for task, seconds in made.items():
                what = f"wan {task}, PyTorch's best over JAX"
                report.target("wan", what, over_torch(seconds), 1.0, most=False)
        if "vae" in options.only:
            bench_case(vae_case(default()), ("train",), torch, options.repeats, report)
        torch.close()
        if "compile" in options.only:
            bench_compile(options, report)
        if "checkpoint" in options.only:
            bench_checkpoint(options, report)
        if "attention" in options.only:
            bench_attention(options, report)
        if "loader" in options.only:
            bench_clips(options, report)
        if options.json is not None:
            write_text(options.json, "".join(json.dumps(row) + "\n" for row in report.rows))
        return 0
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
