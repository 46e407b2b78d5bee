"""Benchmarks on one NVIDIA GPU, with no package beyond a CUDA image of JAX.

    tools/bench_gpu.sh [--only=train,attention,denoise] [--kernels=cudnn] [--remat=none,dots]
                       [--dry] [--json=FILE]

    train      the train step of DiT-XL (bfloat16 operands, AdamW) on clips of experiments/xl.py,
               4,352 tokens: MFU at the largest batch that fits, for each attention kernel and
               rematerialisation policy
    attention  attention over 32,768 tokens, forward and backward, for each kernel
    denoise    four unguided Euler steps of the 2B model over one clip of 43,008 tokens

MFU counts the matrix products of the forward and backward pass (without rematerialisation and the
optimizer), relative to the chip's dense bfloat16 peak (`PEAKS`). A figure is the median of
`--repeats` runs, each timed until its result is ready. Configurations that exceed the GPU's memory
are reported as such. `--dry` runs the same programs at a small size, also on a CPU, to test them.
Exit status 2 for wrong arguments, and without a GPU.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vdit.diffusion.prediction import to_x0_eps
from vdit.diffusion.sampler import sample, sampler
from vdit.diffusion.schedule import process, timesteps
from vdit.errors import UserError
from vdit.models.dit import DiT, preset
from vdit.runtime.attention import KERNELS, runs_here
from vdit.runtime.files import write_text
from vdit.runtime.machine import matmul
from vdit.runtime.optimizer import make_optimizer
from vdit.runtime.products import flops
from vdit.tokens import Condition, Layout, text_condition

from .parsers import Parser

# Dense bfloat16 TFLOP/s of a chip whose name contains the key, from NVIDIA's data sheets.
PEAKS = {
    "H200": 989.4, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0,
    "B200": 2250.0, "L40S": 362.0, "L4": 121.0, "A10": 125.0, "RTX 4090": 165.2,
}  # fmt: skip
PARTS = ("train", "attention", "denoise")
REMATS = ("none", "dots", "full")
WORDS, WORD_WIDTH, CHANNELS = 128, 384, 64  # a caption of MiniLM's; 16 channels in patches of 2x2
STEPS = 4


class Size(NamedTuple):
    """Sizes of the benchmarks: full, or small for --dry."""

    train: str  # preset
    clip: int  # tokens of a clip
    batches: tuple[int, ...]  # the first one that fits is used
    attention: tuple[int, int, int]  # tokens, heads, width of a head
    denoise: str
    long: int  # tokens


WHOLE = Size("XL", 4352, (16, 8, 4, 2, 1), (32_768, 2, 128), "2B", 43_008)
DRY = Size("smoke", 64, (2,), (256, 2, 16), "smoke", 128)


class Row(NamedTuple):
    """A figure, and its target ("" for none)."""

    part: str
    what: str
    seconds: float
    figure: str
    asked: str = ""


def peak() -> float | None:
    """The device's dense bfloat16 FLOP/s; None if unknown."""
    kind = jax.devices()[0].device_kind
    rates = (rate for name, rate in PEAKS.items() if re.search(rf"{name}(?!\d)", kind))  # no L40
    return next((1e12 * rate for rate in rates), None)


def kernels() -> list[str]:
    """The attention kernels of this machine ("auto" chooses among the others)."""
    return [name for name in KERNELS if name != "auto" and runs_here(name)]


class Choice(NamedTuple):
    """Number of runs, and the kernels and policies to measure."""

    kernels: list[str]
    remats: list[str]
    repeats: int


def tried(measure: Callable[..., float], *arguments: Any) -> float:
    """Seconds of a run; NaN if out of memory."""
    try:
        return measure(*arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        return math.nan


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds after one warm-up run."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def model(name: str, attention: str, remat: str = "none") -> DiT:
    """A preset with bfloat16 operands and scanned layers."""
    return DiT(**preset(name), attend=KERNELS[attention], remat=remat, matmul=matmul("bfloat16"))


@functools.partial(jax.jit, static_argnums=(0, 1))
def inputs(batch: int, tokens: int) -> tuple[jax.Array, Layout, Condition]:
    """Noisy tokens of clips on a 16x16 grid, their positions, and a caption."""
    key = jax.random.key(0)
    index = jnp.arange(tokens)
    position = jnp.stack([index // 256 * 4.0, index // 16 % 16, index % 16], axis=-1)
    zero = jnp.zeros((batch, tokens), jnp.int32)
    layout = Layout(jnp.broadcast_to(position, (batch, tokens, 3)), zero, zero + 1)
    text = jax.random.normal(key, (batch, 1, WORDS, WORD_WIDTH))
    mask = jnp.ones((batch, 1, WORDS), bool)
    level = jnp.full((batch, 1), 600.0)
    condition = text_condition(text, mask, text.mean(2), level)
    return jax.random.normal(key, (batch, tokens, CHANNELS)), layout, condition


def loss(
    net: DiT, params: Any, x_BLC: jax.Array, layout: Layout, condition: Condition
) -> jax.Array:
    """A squared error; the target does not affect the time."""
    made: Any = net.apply({"params": params}, x_BLC, layout, condition)
    return jnp.square(made - x_BLC).mean()


def train_flops(name: str, tokens: int) -> int:
    """FLOPs of the forward and backward pass per clip, without rematerialisation."""
    net, given = model(name, "xla"), jax.eval_shape(lambda: inputs(1, tokens))
    params = jax.eval_shape(net.init, jax.random.key(0), *given)["params"]
    gradient = jax.make_jaxpr(jax.grad(functools.partial(loss, net)))(params, *given)
    return flops(gradient.jaxpr)


def train_step(size: Size, attention: str, remat: str) -> tuple[Any, Any, Any]:
    """A train step on parameters, moments and inputs, and its initialiser."""
    net = model(size.train, attention, remat)
    rule = make_optimizer("adamw", learning_rate=1e-4, steps=1, schedule="constant", clip=1.0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, moments: Any, *given: Any) -> Any:
        grads = jax.grad(functools.partial(loss, net))(params, *given)
        updates, moments = rule.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    return step, lambda *given: net.init(jax.random.key(0), *given)["params"], rule.init


def most_that_fit(size: Size, attention: str, remat: str) -> tuple[int, ...]:
    """The batches of `size` that may fit, by the compiled memory of one clip.

    One clip alone needs more than each of many, so batches 20% above the limit are tried.
    """
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return size.batches
    step, make, begin = train_step(size, attention, remat)
    given = jax.eval_shape(lambda: inputs(1, size.clip))
    params = jax.eval_shape(make, *given)
    state = params, jax.eval_shape(begin, params)
    need = step.lower(*state, *given).compile().memory_analysis()
    kept = need.argument_size_in_bytes
    return tuple(b for b in size.batches if kept + b * need.temp_size_in_bytes < 1.2 * limit)


def train_once(size: Size, batch: int, attention: str, remat: str, repeats: int) -> float:
    """Seconds of a train step."""
    step, make, begin = train_step(size, attention, remat)
    given = inputs(batch, size.clip)
    params = jax.jit(make)(*inputs(1, size.clip))
    state = params, jax.jit(begin)(params)
    del params

    def call() -> Any:
        nonlocal state
        state = step(*state, *given)
        return state

    return timed(call, repeats)


def train(size: Size, choice: Choice) -> Iterator[Row]:
    """Each kernel with each rematerialisation policy, at the largest batch that fits."""
    needed, rate = train_flops(size.train, size.clip), peak()
    for attention, remat in itertools.product(choice.kernels, choice.remats):
        batch, seconds = 1, math.nan
        for batch in most_that_fit(size, attention, remat):
            seconds = tried(train_once, size, batch, attention, remat, choice.repeats)
            if not math.isnan(seconds):
                break
        made = batch * needed / seconds
        figure = f"{made / 1e12:.1f} TFLOP/s" + (f", {100 * made / rate:.1f}% MFU" if rate else "")
        what = f"{size.train}, {batch} x {size.clip} tokens, {attention}, remat {remat}"
        yield Row("train", what, seconds, figure, "55% MFU, the best of them")


def attend_once(size: Size, attention: str, backward: bool, repeats: int) -> float:
    """Seconds of one layer's attention."""
    length, heads, width = size.attention
    key = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(one, (1, length, heads, width)).astype(jnp.bfloat16) for one in key
    )
    attend: Any = KERNELS[attention]
    if backward:
        attend = jax.grad(lambda *arrays: KERNELS[attention](*arrays).sum(), argnums=(0, 1, 2))
    run = jax.jit(attend)
    return timed(lambda: run(q, k, v), repeats)


def attention(size: Size, choice: Choice) -> Iterator[Row]:
    """Each kernel, forward and backward, against plain XLA."""
    length, heads, width = size.attention
    repeats = choice.repeats
    for backward in (False, True):
        plain = tried(attend_once, size, "xla", backward, repeats)
        for name in choice.kernels:
            seconds = plain if name == "xla" else tried(attend_once, size, name, backward, repeats)
            what = f"{length} tokens, {heads} heads of {width}, {name}, forward"
            what += " and backward" if backward else ""
            asked = "" if name == "xla" else "4 times, the best of them"
            yield Row("attention", what, seconds, f"{plain / seconds:.2f} times xla", asked)


def denoise_once(size: Size, attention: str, repeats: int) -> float:
    """Seconds of the Euler scan, all weights in bfloat16."""
    net, flow = model(size.denoise, attention), process("flow")
    made = jax.jit(net.init)(jax.random.key(0), *inputs(1, 256))["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), made)
    del made

    @jax.jit
    def scan(params: Any, x: jax.Array, layout: Layout, condition: Condition) -> jax.Array:
        def denoised(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            level = jnp.full_like(condition.level, flow.network_time(t))
            known = dataclasses.replace(condition, level=level)
            out: Any = net.apply({"params": params}, x_t, layout, known)
            return to_x0_eps("flow", flow, t, x_t, out)[0], None

        keys = jax.random.split(jax.random.key(0), 1)
        return sample(denoised, x, timesteps(flow, STEPS), flow, sampler("euler"), keys)[0]

    given = inputs(1, size.long)
    return timed(lambda: scan(params, *given), repeats)


def denoise(size: Size, choice: Choice) -> Iterator[Row]:
    """The Euler scan with each kernel."""
    for name in choice.kernels:
        seconds = tried(denoise_once, size, name, choice.repeats)
        what = f"{size.denoise}, {size.long} tokens, {STEPS} steps, {name}"
        yield Row("denoise", what, seconds, f"{seconds / STEPS:.3f} s a step", "8 s, the best")


def some(flag: str, value: str, known: Sequence[str]) -> list[str]:
    """Parses a comma-separated list of known names."""
    names = value.split(",")
    if wrong := [name for name in names if name not in known]:
        raise UserError(f"--{flag}={wrong[0]}: {', '.join(known)} are allowed")
    return names


def main(argv: Sequence[str]) -> int:
    """Runs the benchmarks; prints figures as they come, and writes them as JSON lines."""
    parser = Parser(prog="tools/bench_gpu.sh", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--kernels", default="", help="some of the attention kernels")
    parser.add_argument("--remat", default=",".join(REMATS), help="some of " + ", ".join(REMATS))
    parser.add_argument("--dry", action="store_true", help="a small size, on any machine")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="JSON lines of the figures")
    try:
        options = parser.parse_args(list(argv))
        parts = some("only", options.only, PARTS)
        remats = some("remat", options.remat, REMATS)
        if options.repeats < 1:
            raise UserError(f"--repeats={options.repeats}: 1 or more is allowed")
        if not options.dry and jax.default_backend() != "gpu":
            raise UserError(
                f"no GPU: this machine has {jax.default_backend()}; --dry tries the programs here"
            )
        names = some("kernels", options.kernels, kernels()) if options.kernels else kernels()
        choice = Choice(names, remats, options.repeats)
    except UserError as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return 2
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}" + (", a small size to try" if options.dry else ""))
    size, rows = DRY if options.dry else WHOLE, []
    measure = {"train": train, "attention": attention, "denoise": denoise}
    for part in parts:
        for row in measure[part](size, choice):
            rows.append(row)
            asked = f" (asked: {row.asked})" if row.asked and not options.dry else ""
            made = f"{row.seconds:.4f} s, {row.figure}{asked}"
            made = "does not fit" if math.isnan(row.seconds) else made
            print(f"{row.part}: {row.what}: {made}", flush=True)
    if options.json:
        fits = ((row, None if math.isnan(row.seconds) else row.seconds) for row in rows)
        lines = [{"device": device, **row._asdict(), "seconds": seconds} for row, seconds in fits]
        write_text(options.json, "".join(json.dumps(line) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
