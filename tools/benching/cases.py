"""The benchmarked networks and their inputs."""

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdit.config import default
from vdit.config.autoencoder import build_vae
from vdit.models.dit import DiT
from vdit.runtime.machine import matmul
from vdit.tokens import Condition, Layout, text_condition

DTYPES = ("float32", "bfloat16")
CHANNELS, TEXT_TOKENS, TEXT_WIDTH = 24, 48, 128  # of the default configuration

Run = Callable[[], float]  # runs once and returns the seconds
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A network with its inputs.

    `output(params, inputs)` and `loss(params, inputs)` are built for a dtype of matmul operands;
    `options` describe the network to PyTorch.
    """

    name: str
    title: str
    params: Any
    inputs: Arrays
    output: Callable[[str], Callable[..., jax.Array]]
    loss: Callable[[str], Callable[..., jax.Array]]
    options: dict[str, Any]
    tensors: Any = None  # the parameters as PyTorch's network has them; None: as here
    forwards: dict[str, Run] = field(default_factory=dict)  # compiled functions, by dtype


def perturbed(params: Any) -> Any:
    """Perturbs parameters: with zero-initialised gates the comparison would be trivial."""
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(1)
    moved = [leaf + 0.02 * random.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, moved)


def context(inputs: Mapping[str, jax.Array]) -> tuple[Layout, Condition]:
    """Positions and condition of the tokens."""
    layout = Layout(inputs["position"], inputs["slot"], jnp.ones_like(inputs["slot"]))
    text, mask, pooled = (inputs[name][:, None] for name in ("text", "mask", "pooled"))
    condition = text_condition(text, mask, pooled, inputs["level"])
    return layout, condition


def dit_inputs(options: argparse.Namespace) -> Arrays:
    """A dense batch of noisy tokens; with two levels the first eighth of each row is clean."""
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
    """The DiT of a run, with heads of 64 as in the DiT paper if the width allows."""
    run = default().run
    sizes = {"width": options.width, "depth": options.depth, "heads": heads(options.width)}
    runs = {"unroll": run.unroll, "remat": run.remat, "matmul": matmul(dtype)}
    return DiT(**{**sizes, **runs, **changes})


def heads(width: int) -> int:
    """The number of heads: of width 64, or 16 in a narrow network."""
    return width // 64 if width % 64 == 0 else width // 16


def dit_loss(model: DiT, params: Any, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """The mean squared error over all tokens."""
    out: Any = model.apply({"params": params}, inputs["x"], *context(inputs))
    return jnp.square(out - inputs["target"]).mean()


def dit_case(options: argparse.Namespace) -> Case:
    """The DiT of the flags."""

    def output(dtype: str) -> Any:
        model = dit_model(options, dtype)
        return lambda params, inputs: model.apply({"params": params}, inputs["x"], *context(inputs))

    inputs = dit_inputs(options)
    scanned = dit_model(options, "float32", unroll=1)
    first = {name: jnp.asarray(value[:1]) for name, value in inputs.items()}
    init = jax.jit(lambda key: scanned.init(key, first["x"], *context(first)))
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
        made[dtype] = build_vae(config)
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
