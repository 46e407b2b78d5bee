"""Ring attention (Liu et al., arXiv:2310.01889), for use inside `jax.shard_map`.

Keys and values are sharded; every device keeps its queries, and blocks of keys and values are
passed round the ring. Outputs of blocks are combined by their log-sums. In the backward pass the
blocks go round again, along with their gradients. Both passes are those of `vdit.kernels.chunked`
on one block, so memory is linear in a block's length.

Dimension key: B batch, L query tokens and S key tokens of a device, N heads, K head dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vdit.kernels import chunked
from vdit.nn.dot_product import Ids


class Ring(NamedTuple):
    """`size` devices of a mesh axis that pass to each other; `pairs` of (from, to)."""

    axis: str
    size: int
    pairs: tuple[tuple[int, int], ...]


def attend(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array,
    q_id_BL: Ids = None, k_id_BS: Ids = None, *, ring: Ring, chunk: int = chunked.CHUNK,
) -> jax.Array:  # fmt: skip
    """`chunked.attend` of one device's queries over the keys of all devices of the ring.

    Every query must see a key on some device.
    """
    q_id_BL, k_id_BS = chunked.ids_for_padding(q_BLNK, k_BSNK, q_id_BL, k_id_BS, chunk)
    return _attend(q_BLNK, k_BSNK, v_BSNK, q_id_BL, k_id_BS, ring, chunk)


def _next(tree: Any, ring: Ring) -> Any:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, ring.pairs), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q: Any, k: Any, v: Any, q_id: Any, k_id: Any, ring: Ring, chunk: int) -> jax.Array:
    return _forward(q, k, v, q_id, k_id, ring, chunk)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, q_id: Ids, k_id: Ids, ring: Ring, chunk: int
) -> tuple[jax.Array, Any]:
    def block(keys: Any) -> tuple[jax.Array, jax.Array]:
        k, v, k_id = keys
        return chunked.forward(q, k, v, q_id, k_id, chunk)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        keys, out, sums = carry
        keys = _next(keys, ring)
        more, more_sums = block(keys)
        # The log-sum of a block that is masked for a query is the lowest float32: it adds nothing.
        both = jnp.logaddexp(sums, more_sums)
        out = jnp.exp(sums - both) * out + jnp.exp(more_sums - both) * more
        return (keys, out, both), None

    local = k, v, k_id
    (_, out, sums), _ = jax.lax.scan(step, (local, *block(local)), length=ring.size - 1)
    return out, (q, k, v, q_id, k_id, out, sums)


def _backward(ring: Ring, chunk: int, saved: Any, gradient: jax.Array) -> tuple[Any, ...]:
    q, k, v, q_id, k_id, out, sums = saved
    gradient = gradient.astype(v.dtype)
    delta = (gradient.astype(jnp.float32) * out).sum(-1, keepdims=True)

    def block(carry: Any, _: None) -> tuple[Any, None]:
        (k, v, k_id), to_q, to_k, to_v = carry
        more = chunked.backward(q, k, v, q_id, k_id, sums, delta, gradient, chunk)
        to_q, to_k, to_v = (a + b for a, b in zip((to_q, to_k, to_v), more, strict=True))
        keys, to_k, to_v = _next(((k, v, k_id), to_k, to_v), ring)
        return (keys, to_q, to_k, to_v), None

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    carry: Any = ((k, v, k_id), *zeros)
    # After one step a device every block is back on its own device.
    (_, to_q, to_k, to_v), _ = jax.lax.scan(block, carry, length=ring.size)
    return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)
