"""How fast vdit is: steps and sampling in JAX, beside PyTorch and the network's bare matmuls.

    python -m tools.bench [--only=dit,vae,sampling,compile,checkpoint,attention,loader]
                          [--torch-python=PYTHON]
                          [--width=384 --depth=12 --tokens=512 --batch=4 --levels=2 --steps=50]
                          [--repeats=5] [--json=FILE]

    dit       the DiT's forward pass and train step, layers unrolled as a run has them
    vae       the autoencoder's train step, at the size of experiments/base.py
    sampling  the Euler scan, unguided, beside as many bare forward passes of the same batch
    compile   seconds to trace and compile the train step of 24 scanned layers, beside 4
    checkpoint  how long a train loop waits for a save of the DiT, its moments and its average: as
              the trainer saves, in the background, and if it waited for files and digests
    attention a narrow DiT's forward pass (width 64, two blocks) by its axes, from 4,096 to 65,536
              tokens, and the slope of its time over them; the memory of the chunked kernel
    loader    clips a second by source, size and threads, beside PyTorch's DataLoader with PyAV on
              the same films; the memory that 10,000 clips leave (tools/bench_loader.py)

A train step is forward, backward, clipping by the global norm and AdamW. PyTorch runs the same
network (tools/bench_torch.py; outputs and first losses are compared before anything is timed) in a
process of its own, eager and compiled, with the number of threads that is faster in eager mode.
"matmuls" is the sum of all matrix products of the computation, each timed by itself in JAX as
plain (M, K) x (K, N); "matmuls as written" contracts and batches them as the network does.
Contenders take turns (A B A B); what took SLOW times the fastest in its first turn has no second.
Without torch the table has no PyTorch lines. Exit status 2 for wrong arguments.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tools import bench_loader
from tools.flags import Parser
from tools.planning.products import Product, flops, products
from vdit import build
from vdit.config import default
from vdit.diffusion.prediction import to_x0_eps
from vdit.diffusion.sampler import sample, sampler
from vdit.diffusion.schedule import process, timesteps
from vdit.errors import UserError
from vdit.kernels import chunked, xla
from vdit.models.dit import AXES, DiT
from vdit.objectives.diffusion import dense_tokens
from vdit.runtime import attention
from vdit.runtime.checkpoint import Checkpoints
from vdit.runtime.files import write_text
from vdit.runtime.machine import keep_freed_memory
from vdit.runtime.optimizer import make_optimizer
from vdit.tokens import Condition, Layout, text_condition

PARTS = ("dit", "vae", "sampling", "compile", "checkpoint", "attention", "loader")
DTYPES = ("float32", "bfloat16")
CHANNELS, TEXT_TOKENS, TEXT_WIDTH = 24, 48, 128  # of the default configuration
LEARNING_RATE = 1e-4
CHECKED = 3  # train steps whose losses PyTorch must share
AGREE = 1e-3  # relative difference up to which two networks are the same
SLOW = 3.0  # times the fastest: not worth a second turn
SAMPLING_TURNS = 3  # at most: each is a hundred forward passes
SHALLOW, DEEP = 4, 24  # layers whose compile times are compared
LENGTHS = (4096, 16_384, 65_536)  # tokens of one clip, in frames of 16 x 16
LINEAR = 1.2  # slope of log time over log length up to which it is called linear

Run = Callable[[], float]  # does the work once and gives its seconds
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A network with its inputs.

    `output(params, inputs)` and `loss(params, inputs)` are made for a dtype of matmul operands;
    `options` say to PyTorch what to build.
    """

    name: str
    title: str
    params: Any
    inputs: Arrays
    output: Callable[[str], Callable[..., jax.Array]]
    loss: Callable[[str], Callable[..., jax.Array]]
    options: dict[str, Any]
    forwards: dict[str, Run] = field(default_factory=dict)  # compiled already, by dtype


# --------------------------------------------------------------------------------------------------
# The networks


def perturbed(params: Any) -> Any:
    """Zero-initialised gates would let both sides agree on nothing, and zeros are no work."""
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(1)
    moved = [leaf + 0.02 * random.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, moved)


def told(inputs: Mapping[str, jax.Array]) -> tuple[Layout, Condition]:
    """Where the tokens are, and their condition."""
    layout = Layout(inputs["position"], inputs["slot"], jnp.ones_like(inputs["slot"]))
    text, mask, pooled = (inputs[name][:, None] for name in ("text", "mask", "pooled"))
    condition = text_condition(text, mask, pooled, inputs["level"])
    return layout, condition


def dit_inputs(options: argparse.Namespace) -> Arrays:
    """A dense batch of noisy tokens; with two levels the first eighth of each row is given."""
    batch, length = options.batch, options.tokens
    random = np.random.default_rng(0)
    index = np.arange(length)
    position = np.stack([index // 64 * 9.6, index // 8 % 8, index % 8], axis=-1)
    given = (index < length // 8) & (options.levels == 2)
    words = random.integers(TEXT_TOKENS // 2, TEXT_TOKENS + 1, batch)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    levels = np.array([600.0, 0.0][: options.levels], np.float32)
    return {
        "x": normal(batch, length, CHANNELS),
        "target": normal(batch, length, CHANNELS),
        "position": np.tile(position.astype(np.float32)[None], (batch, 1, 1)),
        "slot": np.tile(given.astype(np.int32)[None], (batch, 1)),
        "level": np.tile(levels[None], (batch, 1)),
        "text": normal(batch, TEXT_TOKENS, TEXT_WIDTH),
        "mask": np.arange(TEXT_TOKENS)[None] < words[:, None],
        "pooled": normal(batch, TEXT_WIDTH),
    }


def dit_model(options: argparse.Namespace, dtype: str, **changes: Any) -> DiT:
    """The DiT as a run has it; heads of 64 as in the DiT paper, where the width allows."""
    run = default().run
    sizes = {"width": options.width, "depth": options.depth, "heads": heads(options.width)}
    runs = {"unroll": run.unroll, "remat": run.remat, "dtype": jnp.dtype(dtype)}
    return DiT(**{**sizes, **runs, **changes})


def heads(width: int) -> int:
    """Heads of 64; of 16 in a network too narrow for that."""
    return width // 64 if width % 64 == 0 else width // 16


def dit_loss(model: DiT, params: Any, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """The mean squared error over all tokens."""
    out: Any = model.apply({"params": params}, inputs["x"], *told(inputs))
    return jnp.square(out - inputs["target"]).mean()


def dit_case(options: argparse.Namespace) -> Case:
    """The DiT of the flags."""

    def output(dtype: str) -> Any:
        model = dit_model(options, dtype)
        return lambda params, inputs: model.apply({"params": params}, inputs["x"], *told(inputs))

    inputs = dit_inputs(options)
    scanned = dit_model(options, "float32", unroll=1)
    first = {name: jnp.asarray(value[:1]) for name, value in inputs.items()}
    init = jax.jit(lambda key: scanned.init(key, first["x"], *told(first)))
    params = init(jax.random.key(0))["params"]
    return Case(
        name="dit",
        title=f"DiT: width {options.width}, {options.depth} layers, {scanned.heads} heads,"
        f" {options.batch} x {options.tokens} tokens, {TEXT_TOKENS + 1} text keys,"
        f" {options.levels} noise level{'s' * (options.levels > 1)} a row",
        params=perturbed(params),
        inputs=inputs,
        output=output,
        loss=lambda dtype: functools.partial(dit_loss, dit_model(options, dtype)),
        options={"depth": options.depth, "heads": scanned.heads, "steps": options.steps},
    )


def vae_case(config: Any) -> Case:
    """The autoencoder of a configuration, on random video."""
    made = {}
    for dtype in DTYPES:
        config.run.dtype = dtype
        made[dtype] = build.vae(config)
    model, batch = made["float32"], config.vae.train.batch
    height, width = config.data.size
    random = np.random.default_rng(0)
    shape = model.latent_shape(config.data.frames, height, width)
    pixels = (batch, config.data.frames, height, width, 3)
    inputs: Arrays = {
        "video": random.uniform(-1, 1, pixels).astype(np.float32),
        "noise": random.standard_normal((batch, *shape), np.float32),
    }
    first = [value[:1] for value in inputs.values()]
    params = jax.jit(lambda key: model.init(key, *first))(jax.random.key(0))["params"]

    def output(dtype: str) -> Any:
        return lambda params, inputs: made[dtype].apply(
            {"params": params}, inputs["video"], inputs["noise"]
        )[0]

    def loss(dtype: str) -> Any:
        def total(params: Any, inputs: Mapping[str, jax.Array]) -> jax.Array:
            variables = {"params": params}
            out: Any = made[dtype].apply(variables, inputs["video"], inputs["noise"])
            video, mean, log_variance = out
            kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
            return jnp.square(video - inputs["video"]).mean() + 1e-4 * kl.mean()

        return total

    fields = ("patch", "heads", "window", "encoder_depth", "decoder_depth", "detail")
    return Case(
        name="vae",
        title=f"VAE: width {model.width}, {model.encoder_depth} + {model.decoder_depth} layers,"
        f" {batch} clips of {config.data.frames} x {height} x {width}",
        params=perturbed(params),
        inputs=inputs,
        output=output,
        loss=loss,
        options={name: getattr(model, name) for name in fields},
    )


# --------------------------------------------------------------------------------------------------
# What is timed in JAX


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds until the result is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def optimizer() -> optax.GradientTransformation:
    """AdamW at a constant rate, gradients clipped."""
    return make_optimizer(
        "adamw", learning_rate=LEARNING_RATE, steps=1, schedule="constant", clip=1.0
    )


def train_step(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """step(params, opt, inputs) -> (params, opt, loss before the step)."""

    def step(params: Any, opt: Any, inputs: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, inputs)
        updates, opt = optimizer().update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return step


def forward_run(case: Case, dtype: str) -> Run:
    """The forward pass, compiled and warm."""
    if dtype not in case.forwards:
        params, inputs = jax.device_put((case.params, case.inputs))
        compiled = jax.jit(case.output(dtype)).lower(params, inputs).compile()
        jax.block_until_ready(compiled(params, inputs))
        case.forwards[dtype] = lambda: seconds_of(lambda: compiled(params, inputs))
    return case.forwards[dtype]


def train_run(case: Case, dtype: str) -> tuple[Run, list[float]]:
    """The train step, compiled and warm, and the losses of its first steps."""
    inputs = jax.device_put(case.inputs)
    params = jax.tree.map(jnp.array, case.params)
    state = params, optimizer().init(params)
    step = jax.jit(train_step(case.loss(dtype)), donate_argnums=(0, 1))
    compiled = step.lower(*state, inputs).compile()

    def run() -> jax.Array:
        nonlocal state
        *new, loss = compiled(*state, inputs)
        state = new[0], new[1]
        return loss

    losses = [float(run()) for _ in range(CHECKED)]
    return lambda: seconds_of(run), losses


def scan_run(case: Case, dtype: str, steps: int) -> Run:
    """The sampling scan, compiled and warm."""
    flow = process("flow")
    output = case.output(dtype)

    def scan(params: Any, inputs: dict[str, jax.Array], keys: jax.Array) -> jax.Array:
        known = (inputs["slot"] == 1)[..., None]
        clean = inputs["x"]

        def denoise(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            x_t = jnp.where(known, clean, x_t)
            level = inputs["level"].at[:, 0].set(flow.network_time(t))
            out = output(params, {**inputs, "x": x_t, "level": level})
            x0, _ = to_x0_eps("flow", flow, t, x_t, out)
            return jnp.where(known, clean, x0), None

        times = timesteps(flow, steps)
        return sample(denoise, clean, times, flow, sampler("euler"), keys)[0]

    params, inputs = jax.device_put((case.params, case.inputs))
    keys = jax.random.split(jax.random.key(0), case.inputs["x"].shape[0])
    compiled = jax.jit(scan).lower(params, inputs, keys).compile()
    jax.block_until_ready(compiled(params, inputs, keys))
    return lambda: seconds_of(lambda: compiled(params, inputs, keys))


def compile_run(options: argparse.Namespace, depth: int) -> Run:
    """Tracing and compiling the train step of a scanned stack."""
    inputs = jax.tree.map(jnp.asarray, dit_inputs(options))
    model = dit_model(options, "float32", depth=depth, unroll=1)
    shapes = jax.eval_shape(
        lambda key: model.init(key, inputs["x"], *told(inputs)), jax.random.key(0)
    )["params"]
    opt = jax.eval_shape(optimizer().init, shapes)

    def run() -> float:
        jax.clear_caches()
        start = time.perf_counter()
        step = train_step(functools.partial(dit_loss, model))
        jax.jit(step, donate_argnums=(0, 1)).lower(shapes, opt, inputs).compile()
        return time.perf_counter() - start

    return run


class Length(NamedTuple):
    """The forward pass over one clip of so many tokens."""

    run: Run  # compiled and warm
    flops: int  # of its matrix products
    temporaries: int  # bytes, by the compiler


def length_case(axes: str, length: int) -> Length:
    """A small DiT's forward pass over one clip of so many tokens."""
    model = DiT(width=64, depth=2, heads=1, axes=axes, attend=attention.kernel("auto"))
    count, random = length // 256, np.random.default_rng(0)
    latent = random.standard_normal((1, count, 16, 16, CHANNELS), np.float32)
    times = 0.4 * np.arange(count, dtype=np.float32)[None]
    x, layout = dense_tokens(
        jnp.asarray(latent), (1, 1), jnp.asarray(times), jnp.zeros((1, count), bool)
    )
    first = dense_tokens(  # parameters know no length
        jnp.asarray(latent[:, :1]), (1, 1), jnp.asarray(times[:, :1]), jnp.zeros((1, 1), bool)
    )
    text = random.standard_normal((1, 1, TEXT_TOKENS, TEXT_WIDTH), np.float32)
    mask = jnp.ones(text.shape[:3], bool)
    level = jnp.asarray([[600.0, 0.0]])
    told = text_condition(jnp.asarray(text), mask, jnp.asarray(text.mean(2)), level)
    params = perturbed(jax.jit(model.init)(jax.random.key(0), *first, told))
    compiled = jax.jit(model.apply).lower(params, x, layout, told).compile()
    jax.block_until_ready(compiled(params, x, layout, told))
    memory: Any = compiled.memory_analysis()
    work = flops(jax.make_jaxpr(model.apply)(params, x, layout, told).jaxpr)
    run = lambda: seconds_of(lambda: compiled(params, x, layout, told))  # noqa: E731
    return Length(run, work, memory.temp_size_in_bytes)


def gradient_temporaries(attend: Any, length: int) -> int:
    """Bytes that a kernel's compiled gradient needs besides its arguments and results."""
    x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
    grad = jax.grad(lambda q, k, v: jnp.square(attend(q, k, v)).sum(), (0, 1, 2))
    memory: Any = jax.jit(grad).lower(x, x, x).compile().memory_analysis()
    return memory.temp_size_in_bytes


# --------------------------------------------------------------------------------------------------
# Bare matmuls


@functools.cache  # forward pass and train step share many
def product_run(product: Product) -> Run:
    """The product, compiled and warm."""
    random = np.random.default_rng(0)
    left, right = (
        jnp.asarray(random.standard_normal(shape, np.float32), dtype)
        for shape, dtype in zip((product.left, product.right), product.dtypes, strict=False)
    )
    multiply = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=product.numbers,
        preferred_element_type=jnp.dtype(product.dtypes[2]),
    )
    compiled = jax.jit(multiply).lower(left, right).compile()
    jax.block_until_ready(compiled(left, right))
    return lambda: seconds_of(lambda: compiled(left, right))


def products_of(case: Case, task: str, dtype: str) -> Counter[Product]:
    """The products of a case's forward pass or train step (what gradients do not need is gone)."""
    if task == "forward":
        function: Any = case.output(dtype)
    else:
        function = jax.grad(case.loss(dtype))
    return products(jax.make_jaxpr(function)(case.params, case.inputs).jaxpr)


def sum_run(found: Counter[Product]) -> Run:
    """One turn: every product timed once, times how often it runs."""
    runs = [(count, product_run(product)) for product, count in found.items()]
    return lambda: sum(count * run() for count, run in runs)


def plain(found: Counter[Product]) -> Counter[Product]:
    made: Counter[Product] = Counter()
    for product, count in found.items():
        made[product.plain()] += count
    return made


def matmul_runs(case: Case, task: str, dtype: str) -> dict[str, Run]:
    """The floor, and what the layouts of the network's own products add to it."""
    found = products_of(case, task, dtype)
    return {
        f"matmuls {dtype}": sum_run(plain(found)),
        f"matmuls {dtype}, as written": sum_run(found),
    }


# --------------------------------------------------------------------------------------------------
# PyTorch, in a process of its own


# What `keep_freed_memory` tells glibc here, for a process that is to start.
KEPT = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31), "MALLOC_TOP_PAD_": str(2**26),
}  # fmt: skip


class Torch:
    """The other side; `missing` says why it is not there."""

    def __init__(self, python: str) -> None:
        self.python, self.missing = python, ""
        self.errors = tempfile.TemporaryFile("w+")
        self.threads: dict[str, int] = {}  # the faster number, by network, task and dtype
        try:
            self.process = subprocess.Popen(
                [python, str(Path(__file__).with_name("bench_torch.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
                env={**os.environ, **KEPT},
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"--torch-python={python}: {error.strerror}") from error
        self.version = self.ask(version=True).get("version", "")

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer; {"error": why} if there is none."""
        if not self.missing:
            try:
                assert self.process.stdin is not None and self.process.stdout is not None
                print(json.dumps(request), file=self.process.stdin, flush=True)
                line = self.process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if line:
                return json.loads(line)
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines()
            self.missing = f"{self.python}: {said[-1] if said else 'it ended'}"
        return {"error": self.missing}

    def load(self, case: Case, losses: list[float]) -> str:
        """Builds the case's network there; one line that says whether the two are the same."""
        if self.missing:
            return f"no PyTorch: {self.missing}"
        expected = jax.jit(case.output("float32"))(case.params, case.inputs)
        flat = {
            "params/" + "/".join(str(key.key) for key in path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(case.params)
        }
        flat |= {f"inputs/{name}": value for name, value in case.inputs.items()}
        flat |= {"expected/output": np.asarray(expected), "expected/losses": np.asarray(losses)}
        said = {**case.options, "network": case.name, "learning_rate": LEARNING_RATE}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.npz"
            np.savez(path, options=json.dumps(said), **flat)  # type: ignore[arg-type]
            answer = self.ask(load=str(path))
        if "error" in answer or not max(answer["output"], answer["losses"]) < AGREE:
            self.missing = f"its network is not the same: {answer}"
            return f"no PyTorch: {self.missing}"
        return (
            f"the same network in PyTorch {self.version}: outputs differ by at most"
            f" {answer['output']:.0e}, {len(losses)} train steps' losses by {answer['losses']:.0e}"
        )

    def run(self, task: str, dtype: str, compiled: bool, threads: int) -> Run:
        """One variant; NaN seconds if it fails."""

        def run() -> float:
            answer = self.ask(task=task, dtype=dtype, compiled=compiled, threads=threads)
            if "error" in answer:
                say(f"PyTorch {task} {dtype} compiled={compiled}: {answer['error']}")
            return answer.get("seconds", math.nan)

        return run

    def runs(self, case: Case, task: str) -> dict[str, Run]:
        """Eager and compiled, float32 and bfloat16, warm, each with the better thread count."""
        made: dict[str, Run] = {}
        if self.missing:
            return made
        counts = sorted({1, os.cpu_count() or 1})
        for dtype in DTYPES:
            known = self.threads
            if (name := f"{case.name} {task} {dtype}") not in known:
                probes = {n: self.run(task, dtype, False, n)() for n in counts}
                known[name] = min(probes, key=lambda n: (math.isnan(probes[n]), probes[n]))
            n = known[name]
            kind = "float32" if dtype == "float32" else "bfloat16 autocast"
            for compiled in (False, True):
                how = "torch.compile" if compiled else "eager"
                run = self.run(task, dtype, compiled, n)
                if not math.isnan(run()):
                    made[f"PyTorch {kind}, {how}, {n} thread{'s' * (n > 1)}"] = run
        return made

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):  # of a request that nobody was there to read
            assert self.process.stdin is not None
            self.process.stdin.close()
        self.process.wait()


# --------------------------------------------------------------------------------------------------
# Turns and tables


def say(text: str) -> None:
    """Progress, apart from the tables."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def take_turns(runs: Mapping[str, Run], turns: int, what: str) -> dict[str, list[float]]:
    """Seconds of every run, in turns; slow ones have only the first."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        say(f"{what}: turn {turn + 1} of {turns}")
        best = min((values[0] for values in seconds.values() if values), default=math.inf)
        for name, run in runs.items():
            if turn == 0 or seconds[name][0] <= SLOW * best:
                seconds[name].append(run())
    return seconds


@dataclass
class Report:
    """Prints what was measured, and keeps it as rows."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def table(
        self, part: str, task: str, seconds: Mapping[str, list[float]], gflop: float | None
    ) -> None:
        """One line a contender: median, range, rate, and PyTorch's best two over it."""
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        best32, best = best_torch(medians, "PyTorch float32"), best_torch(medians)
        print(f"\n{part} {task}" + (f", {gflop:.3g} GFLOP of matmuls" if gflop else ""))
        head = f"{'':44} {'median s':>9} {'least':>8} {'most':>8} {'n':>3}"
        print(f"{head} {'GFLOP/s':>8} {'PT fp32/it':>11} {'PT best/it':>11}")
        for name, values in seconds.items():
            median = medians[name]
            rate = "" if gflop is None else f"{gflop / median:.0f}"
            over = ["" if b is None else f"{b / median:.2f}" for b in (best32, best)]
            spread = f"{median:9.4f} {min(values):8.4f} {max(values):8.4f} {len(values):3}"
            print(f"{name:44} {spread} {rate:>8} {over[0]:>11} {over[1]:>11}".rstrip())
            row = {"part": part, "task": task, "name": name, "median": median, "seconds": values}
            self.rows.append(row | ({} if gflop is None else {"gflop": gflop}))
        sys.stdout.flush()

    def target(self, part: str, what: str, value: float | None, limit: float, most: bool) -> None:
        """Whether a ratio is where it should be; None: could not be measured."""
        if value is None:
            return
        reached = value <= limit if most else value >= limit
        print(
            f"{'reached ' if reached else 'MISSED  '} {what}: {value:.2f},"
            f" wanted at {'most' if most else 'least'} {limit:.2f}",
            flush=True,
        )
        row = {"part": part, "target": what, "value": value, "limit": limit, "reached": reached}
        self.rows.append(row)


def best_torch(medians: Mapping[str, float], prefix: str = "PyTorch") -> float | None:
    return min((s for name, s in medians.items() if name.startswith(prefix)), default=None)


def over_torch(seconds: Mapping[str, list[float]], prefix: str = "PyTorch") -> float | None:
    """PyTorch's best over JAX's best."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = best_torch(medians, prefix)
    return None if best is None else best / best_torch(medians, "JAX")  # type: ignore[operator]


def bench_case(
    case: Case, tasks: Sequence[str], torch: Torch, turns: int, report: Report
) -> dict[str, dict[str, list[float]]]:
    """Forward passes and train steps of one network; seconds by task and contender."""
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
    """The scan beside bare forward passes, in the dtype whose forward pass is faster."""
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
    """Compile time of a deep scanned stack beside a shallow one."""
    runs = {f"{n} layers, unroll=1": compile_run(options, n) for n in (SHALLOW, DEEP)}
    seconds = take_turns(runs, options.repeats, "compile")
    report.table("compile", "train step, scanned layers", seconds, None)
    shallow, deep = seconds.values()
    value = statistics.median(deep) / statistics.median(shallow)
    what = f"compile: {DEEP} layers over {SHALLOW}"
    report.target("compile", what, value, 1.3, most=True)


def checkpoint_runs(options: argparse.Namespace, folder: Path) -> dict[str, Run]:
    """Seconds that saving the DiT's whole training state stops its loop."""
    params = dit_case(options).params
    state = {"params": params, "opt": optimizer().init(params)}
    checkpoints, steps = Checkpoints(folder, keep=1), itertools.count()

    def run(wait: bool) -> float:
        def save() -> None:
            checkpoints.save(next(steps), state, params, None, {})
            if wait:
                checkpoints.wait()

        seconds = seconds_of(save)
        checkpoints.wait()  # the next save begins with nothing left of this one
        return seconds

    run(True)  # orbax makes its threads
    return {"synchronous": lambda: run(True), "asynchronous": lambda: run(False)}


def bench_checkpoint(options: argparse.Namespace, report: Report) -> None:
    """The time that a loop waits for an asynchronous save, beside a synchronous one."""
    with tempfile.TemporaryDirectory() as folder:
        runs = checkpoint_runs(options, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repeats):  # all of them, though one is meant to be far slower
            for name, run in runs.items():
                seconds[name].append(run())
    report.table("checkpoint", "save: parameters, moments, average", seconds, None)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    value = medians["asynchronous"] / medians["synchronous"]
    what = "checkpoint: loop stopped by an asynchronous save, over a synchronous one"
    report.target("checkpoint", what, value, 0.1, most=True)


def bench_attention(options: argparse.Namespace, report: Report) -> None:
    """Time, FLOPs and temporaries over length for each arrangement of axes, and the chunked
    kernel's memory."""
    for axes in AXES:
        cases = {length: length_case(axes, length) for length in LENGTHS}
        seconds = {
            f"{length:,} tokens": [case.run() for _ in range(options.repeats)]
            for length, case in cases.items()
        }  # a long clip is slower, not to be left out
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
    small, naive = (gradient_temporaries(m.attend, length) for m in (chunked, xla))
    print(f"temporaries of the gradient at {length:,} tokens: {small:,} bytes, xla {naive:,}")
    what = "attention: percent of xla's temporaries that chunked needs"
    report.target("attention", what, 100 * small / naive, 2.0, most=True)


def bench_loader_part(options: argparse.Namespace, report: Report) -> None:
    """Clips a second, and whether memory stays flat."""
    rows = bench_loader.measure(options.torch_python, say)
    print(f"\n{bench_loader.table(rows)}")
    if not any(row["source"].startswith("PyTorch") for row in rows):
        print("no DataLoader of PyTorch with PyAV there: its lines are left out")
    report.rows += [{"part": "loader", **row} for row in rows]
    say(f"loader: memory over {bench_loader.FLAT:,} clips")
    held, more = bench_loader.growth(bench_loader.World(0), bench_loader.FLAT)
    if held:
        print(f"memory after {bench_loader.FLAT // 10:,} clips {held:.0f} MiB")
        what = f"loader: MiB more after {bench_loader.FLAT:,} clips"
        report.target("loader", what, more, bench_loader.GROWTH, most=True)


def machine() -> str:
    """One line on what this was measured on."""
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
    """The flags, checked."""
    parser = Parser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--json", type=Path)
    numbers = {
        "width": 384, "depth": 12, "tokens": 512, "batch": 4, "levels": 2, "steps": 50,
        "repeats": 5,
    }  # fmt: skip
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    for part in options.only:
        if part not in PARTS:
            raise UserError(f"--only={part!r}: known are {', '.join(PARTS)}")
    for name in numbers:
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: 1 or more is allowed")
    if options.width % 16:
        raise UserError(f"--width={options.width}: a multiple of 16 is allowed")
    if options.levels > 2:
        raise UserError(f"--levels={options.levels}: 1 or 2 is allowed")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
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
            bench_loader_part(options, report)
        if options.json is not None:
            write_text(options.json, "".join(json.dumps(row) + "\n" for row in report.rows))
        return 0
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
