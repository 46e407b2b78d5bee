"""The timed computations in JAX: each function compiles and returns a warm `Run`."""

import argparse
import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vdit.diffusion.prediction import to_x0_eps
from vdit.diffusion.sampler import sample, sampler
from vdit.diffusion.schedule import process, timesteps
from vdit.models.dit import DiT
from vdit.runtime import attention
from vdit.runtime.optimizer import make_optimizer
from vdit.runtime.products import Product, flops, products
from vdit.tokens import dense_tokens, text_condition

from .cases import (
    CHANNELS,
    TEXT_TOKENS,
    TEXT_WIDTH,
    Case,
    Run,
    context,
    dit_inputs,
    dit_loss,
    dit_model,
    perturbed,
)

LEARNING_RATE = 1e-4
CHECKED = 3  # train steps whose losses PyTorch must match


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds until the result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def optimizer() -> optax.GradientTransformation:
    """AdamW with a constant learning rate and gradient clipping."""
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
    """The compiled forward pass."""
    if dtype not in case.forwards:
        params, inputs = jax.device_put((case.params, case.inputs))
        compiled = jax.jit(case.output(dtype)).lower(params, inputs).compile()
        jax.block_until_ready(compiled(params, inputs))
        case.forwards[dtype] = lambda: seconds_of(lambda: compiled(params, inputs))
    return case.forwards[dtype]


def train_run(case: Case, dtype: str) -> tuple[Run, list[float]]:
    """The compiled train step, and the losses of its first steps."""
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
    """The compiled sampling scan."""
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
    """Traces and compiles the train step of a scanned stack."""
    inputs = jax.tree.map(jnp.asarray, dit_inputs(options))
    model = dit_model(options, "float32", depth=depth, unroll=1)
    shapes = jax.eval_shape(
        lambda key: model.init(key, inputs["x"], *context(inputs)), jax.random.key(0)
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
    """The forward pass over one clip."""

    run: Run  # compiled and warm
    flops: int  # of the matrix products
    temporaries: int  # bytes, from the compiler


def length_case(axes: str, length: int) -> Length:
    """The forward pass of a small DiT over one clip of `length` tokens."""
    model = DiT(width=64, depth=2, heads=1, axes=axes, attend=attention.kernel("auto"))
    count, random = length // 256, np.random.default_rng(0)
    latent = random.standard_normal((1, count, 16, 16, CHANNELS), np.float32)
    times = 0.4 * np.arange(count, dtype=np.float32)[None]
    x, layout = dense_tokens(
        jnp.asarray(latent), (1, 1), jnp.asarray(times), jnp.zeros((1, count), bool)
    )
    first = dense_tokens(  # parameters do not depend on the length
        jnp.asarray(latent[:, :1]), (1, 1), jnp.asarray(times[:, :1]), jnp.zeros((1, 1), bool)
    )
    text = random.standard_normal((1, 1, TEXT_TOKENS, TEXT_WIDTH), np.float32)
    mask = jnp.ones(text.shape[:3], bool)
    level = jnp.asarray([[600.0, 0.0]])
    condition = text_condition(jnp.asarray(text), mask, jnp.asarray(text.mean(2)), level)
    params = perturbed(jax.jit(model.init)(jax.random.key(0), *first, condition))
    compiled = jax.jit(model.apply).lower(params, x, layout, condition).compile()
    jax.block_until_ready(compiled(params, x, layout, condition))
    memory: Any = compiled.memory_analysis()
    work = flops(jax.make_jaxpr(model.apply)(params, x, layout, condition).jaxpr)
    run = lambda: seconds_of(lambda: compiled(params, x, layout, condition))  # noqa: E731
    return Length(run, work, memory.temp_size_in_bytes)


def gradient_temporaries(attend: Any, length: int) -> int:
    """Temporary memory of the compiled gradient of a kernel, in bytes."""
    x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
    grad = jax.grad(lambda q, k, v: jnp.square(attend(q, k, v)).sum(), (0, 1, 2))
    memory: Any = jax.jit(grad).lower(x, x, x).compile().memory_analysis()
    return memory.temp_size_in_bytes


# --------------------------------------------------------------------------------------------------
# Bare matmuls


@functools.cache  # the forward pass and the train step share many
def product_run(product: Product) -> Run:
    """A compiled matrix product."""
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
    """The products of a forward pass or train step, after dead-code elimination."""
    if task == "forward":
        function: Any = case.output(dtype)
    else:
        function = jax.grad(case.loss(dtype))
    return products(jax.make_jaxpr(function)(case.params, case.inputs).jaxpr)


def sum_run(found: Counter[Product]) -> Run:
    """Total seconds of all products, each timed once and weighted by its count."""
    runs = [(count, product_run(product)) for product, count in found.items()]
    return lambda: sum(count * run() for count, run in runs)


def plain(found: Counter[Product]) -> Counter[Product]:
    made: Counter[Product] = Counter()
    for product, count in found.items():
        made[product.plain()] += count
    return made


def matmul_runs(case: Case, task: str, dtype: str) -> dict[str, Run]:
    """All products as plain matmuls, and as the network lays them out."""
    found = products_of(case, task, dtype)
    return {
        f"matmuls {dtype}": sum_run(plain(found)),
        f"matmuls {dtype}, as written": sum_run(found),
    }
