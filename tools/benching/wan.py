"""Blocks of Wan's transformer, at a small width, as diffusers has them.

Dimension key: B batch, t h w tokens along each axis, L tokens, C token channels, Z latent channels,
S text tokens, E their width.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdit.models.wan import Wan
from vdit.nn.patch import unpatchify
from vdit.published.wan.transformer import ROWS
from vdit.published.weights import unload
from vdit.runtime.attention import kernel
from vdit.runtime.machine import matmul
from vdit.tokens import Condition, Layout, dense_tokens, text_condition

from .cases import Arrays, Case, perturbed

DEPTH, GRID, CHANNELS, TEXT = 2, (4, 32, 32), 16, (512, 128)
DIFFUSERS = ROWS[: len(ROWS) // 2]


def network(options: argparse.Namespace, dtype: str) -> Wan:
    """Heads of 128 channels, and MLPs as wide against the tokens as those of 1.3B."""
    heads, hidden = max(1, options.width // 128), options.width * 8960 // 1536
    run = {"unroll": DEPTH, "attend": kernel("auto"), "matmul": matmul(dtype)}
    return Wan(options.width, DEPTH, heads, hidden, text_length=TEXT[0], **run)  # type: ignore


def context(inputs: Mapping[str, jax.Array]) -> tuple[jax.Array, Layout, Condition]:
    """Tokens (1, L, C) of the latents "video" (1, t, 2 h, 2 w, Z), and what they are known with."""
    frames, text = GRID[0], inputs["text"][:, None]
    given = jnp.zeros((1, frames), bool)
    x, layout = dense_tokens(inputs["video"], (2, 2), jnp.zeros((1, frames)), given)
    mask = jnp.ones(text.shape[:3], bool)
    return x, layout, text_condition(text, mask, text[:, :, 0], inputs["level"])


def wan_case(options: argparse.Namespace) -> Case:
    """Two blocks between patch embedding and head; 4,096 tokens, 512 text tokens."""
    random, (t, h, w) = np.random.default_rng(0), GRID
    shapes = {"video": (1, t, 2 * h, 2 * w, CHANNELS), "text": (1, *TEXT)}
    shapes["target"] = shapes["video"]
    inputs: Arrays = {n: random.standard_normal(s, np.float32) for n, s in shapes.items()}
    inputs["level"] = np.array([[600.0]], np.float32)
    model = network(options, "float32")
    params = jax.jit(lambda key: model.init(key, *context(inputs)))(jax.random.key(0))["params"]  # type: ignore
    params = perturbed(params)

    def output(dtype: str) -> Any:
        model = network(options, dtype)

        def run(params: Any, inputs: Mapping[str, jax.Array]) -> jax.Array:
            out: Any = model.apply({"params": params}, *context(inputs))
            return unpatchify(out.reshape(1, *GRID, -1), (1, 2, 2))

        return run

    def loss(dtype: str) -> Any:
        run = output(dtype)
        return lambda params, inputs: jnp.square(run(params, inputs) - inputs["target"]).mean()

    config = {
        "num_attention_heads": model.heads, "attention_head_dim": options.width // model.heads,
        "in_channels": CHANNELS, "out_channels": CHANNELS, "text_dim": TEXT[1],
        "ffn_dim": model.hidden, "num_layers": DEPTH,
    }  # fmt: skip
    return Case(
        name="wan",
        title=f"Wan: width {options.width}, {DEPTH} layers, {model.heads} heads,"
        f" {t * h * w} tokens, {TEXT[0]} text tokens",
        params=params,
        inputs=inputs,
        output=output,
        loss=loss,
        options={"config": config},
        tensors={name: give() for name, give in unload(params, DIFFUSERS)},
    )
