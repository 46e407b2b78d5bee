"""Low-rank adapters (LoRA, Hu et al. 2022): a tree that is laid beside parameters, or merged.

A layer's adapter lies beside its kernel W: `lora_down` and `lora_up`, whose product is the update
of W. Linear layers compute it apart, x @ W + (x @ down) @ up, without the gradient of a frozen W.

Dimension key: L stacked layers; I in, O out of a kernel, R rank; ... a convolution's window.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vdit.nn.stack import STACKED

DOWN, UP = "lora_down", "lora_up"
SCALE = "kernel_scale"  # beside an int8 kernel: that of each output
Flat = Mapping[str, Any]  # a tree with paths "a/b/c"


def flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def shapes(path: str, kernel: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the adapter of a kernel (L, ..., I, O) at `path`, by their paths."""
    layer, stacked = path.removesuffix("/kernel"), kernel[:1] if STACKED.search(path) else ()
    return {
        f"{layer}/{DOWN}": (*kernel[:-1], rank),
        f"{layer}/{UP}": (*stacked, rank, kernel[-1]),
    }


def scaled(adapters: Any, scale: Any) -> Any:
    """Adapters with their updates times `scale`."""
    low = flat(adapters)
    return unflatten_dict(
        {path: x if path.endswith(DOWN) else x * scale for path, x in low.items()}, sep="/"
    )


def beside(params: Any, adapters: Any) -> Any:
    """Parameters with adapters beside their kernels, as `nn.linear` and `nn.conv` read them."""
    return unflatten_dict(flat(params) | flat(adapters), sep="/")


def narrowed(path: str, kernel: jax.Array, dtype: Any) -> dict[str, jax.Array]:
    """A frozen kernel at `path` in bfloat16; or in int8, rounded to 127ths of each output's largest
    weight, if it is of a stacked linear layer."""
    if dtype != jnp.int8 or not STACKED.search(path) or kernel.ndim != 3:
        return {path: kernel.astype(jnp.bfloat16)}
    scale = jnp.abs(kernel.astype(jnp.float32)).max(1) / 127
    whole = jnp.round(kernel / jnp.maximum(scale, 1e-30)[:, None]).astype(jnp.int8)
    return {path: whole, path.removesuffix("kernel") + SCALE: scale}


def factors(module: Any) -> tuple[jax.Array, jax.Array]:
    """`lora_down` and `lora_up` beside a module's kernel."""
    return module.get_variable("params", DOWN), module.get_variable("params", UP)


def product(down: jax.Array, up: jax.Array) -> jax.Array:
    """down (..., I, R) @ up (R, O), in float32."""
    return jnp.einsum("...ir,ro->...io", down, up, preferred_element_type=jnp.float32)


def merged(params: Any, adapters: Any, scale: float = 1.0) -> Any:
    """The parameters with W + scale · down @ up for each kernel W that has an adapter; other leaves
    of `adapters`, a bias for example, are updates themselves."""
    whole, low = flat(params), flat(adapters)
    for path, update in low.items():
        if path.endswith(DOWN):
            continue
        if path.endswith(UP):
            down, path = (path.removesuffix(UP) + name for name in (DOWN, "kernel"))
            whole[path] = _added(whole[path], low[down], update, scale)
        else:
            whole[path] = (whole[path] + scale * update).astype(whole[path].dtype)
    return unflatten_dict(whole, sep="/")


def _added(kernel: jax.Array, down: jax.Array, up: jax.Array, scale: float) -> jax.Array:
    """kernel + scale · down @ up, one layer at a time: memory holds one layer's update."""

    def sum_of(kernel: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
        return (kernel + scale * product(down, up)).astype(kernel.dtype)

    kernel, down, up = (jnp.asarray(x) for x in (kernel, down, up))
    if up.ndim == 2:
        return sum_of(kernel, down, up)

    def layer(i: jax.Array, kernel: jax.Array) -> jax.Array:
        return kernel.at[i].set(sum_of(kernel[i], down[i], up[i]))

    return jax.lax.fori_loop(0, len(up), layer, kernel)


def merged_in_place(params: Any, adapters: Any, scale: float = 1.0) -> Any:
    """`merged`; the parameters are used up, and the result is where they were."""
    where = jax.tree.map(lambda x: x.sharding, params)
    merge = jax.jit(functools.partial(merged, scale=scale), donate_argnums=0, out_shardings=where)
    return merge(params, adapters)
