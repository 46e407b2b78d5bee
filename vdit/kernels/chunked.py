"""Exact attention in memory linear in length: an online softmax over chunks of keys.

FlashAttention (Dao et al., arXiv:2205.14135 and 2307.08691) as scans that any backend compiles: a
chunk of queries goes over the chunks of keys with a running maximum, sum and output. For the
gradient only the output and the log-sum-exp are saved; the weights are recomputed.

Dimension key: B batch, L query tokens, S key tokens, N heads, K head dim, n chunks, C queries of a
chunk, J keys of a chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from vdit.nn.dot_product import Ids
from vdit.nn.product import dot, transposed

CHUNK = 512  # queries, and keys, at a time
PADDING_ID = -1  # the id of padding; ids of tokens are at least 0
LOWEST = float(jnp.finfo(jnp.float32).min)


def attend(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array,
    q_id_BL: Ids = None, k_id_BS: Ids = None, *, chunk: int = CHUNK, on_cpu: bool = False,
) -> jax.Array:  # fmt: skip
    """What `vdit.nn.dot_product.attend` computes, `chunk` queries by `chunk` keys at a time.

    Any L and S; ids are integers of at least 0, and every query must see at least one key. The
    products' operands have the dtype of q, k and v, in the gradient too; the result is float32.
    `on_cpu`: on one device of XLA's CPU backend.
    """
    q_id_BL, k_id_BS = ids_for_padding(q_BLNK, k_BSNK, q_id_BL, k_id_BS, chunk)
    return _attend(q_BLNK, k_BSNK, v_BSNK, q_id_BL, k_id_BS, chunk, on_cpu)


def ids_for_padding(
    q_BLNK: jax.Array, k_BSNK: jax.Array, q_id_BL: Ids, k_id_BS: Ids, chunk: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """The ids; where there are none but keys are padded to whole chunks, one id for all tokens."""
    length, keys = q_BLNK.shape[1], k_BSNK.shape[1]
    if q_id_BL is None and even_chunks(keys, chunk)[2] > keys:  # to mask the padding
        return jnp.zeros((1, length), jnp.int32), jnp.zeros((1, keys), jnp.int32)
    return q_id_BL, k_id_BS


def even_chunks(length: int, most: int, multiple: int = 1) -> tuple[int, int, int]:
    """(n, size, n·size): the fewest chunks of one size that hold `length`, the size at most `most`
    and a multiple of `multiple`, as `most` is."""
    count = -(-length // most)
    size = -(-length // (count * multiple)) * multiple
    return count, size, count * size


def pad(x_BLx: jax.Array, length: int, value: int = 0) -> jax.Array:
    """x with its second axis padded to `length`."""
    widths = [(0, 0)] * x_BLx.ndim
    widths[1] = (0, length - x_BLx.shape[1])
    return jnp.pad(x_BLx, widths, constant_values=value)


def _cut(x_BLNK: jax.Array, chunk: int) -> jax.Array:
    """(n, B, N, C, K): the chunks in front, for a scan, and the heads before the tokens."""
    count, size, padded = even_chunks(x_BLNK.shape[1], chunk)
    x = pad(x_BLNK, padded)
    return x.reshape(x.shape[0], count, size, *x.shape[2:]).transpose(1, 0, 3, 2, 4)


def _joined(x_nBNCK: jax.Array, length: int) -> jax.Array:
    """(B, L, N, K) of chunks, without their padding."""
    count, batch, heads, size, width = x_nBNCK.shape
    x = x_nBNCK.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, heads, width)
    return x[:, :length]


def _cut_id(id_BL: Ids, chunk: int) -> jax.Array | None:
    """(n, B, C) ids of chunks; padding has `PADDING_ID`."""
    if id_BL is None:
        return None
    count, size, padded = even_chunks(id_BL.shape[1], chunk)
    padded_BL = pad(id_BL.astype(jnp.int32), padded, PADDING_ID)
    return padded_BL.reshape(id_BL.shape[0], count, size).swapaxes(0, 1)


def _tied(q: jax.Array, *ids: jax.Array | None) -> Any:
    """The ids, behind a barrier with q.

    Ids are the same for all layers of a stack, and Linen's scan hoists what depends on such inputs
    alone: without the barrier that is the mask of all chunks, L x S.
    """
    return jax.lax.optimization_barrier((q, *ids))[1:]


def _masked(logits_BNCJ: jax.Array, q_id_BC: Ids, k_id_BJ: Ids) -> jax.Array:
    if q_id_BC is None:
        return logits_BNCJ
    assert k_id_BJ is not None
    return jnp.where(q_id_BC[:, None, :, None] == k_id_BJ[:, None, None, :], logits_BNCJ, LOWEST)


def forward(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, q_id_BL: Ids, k_id_BS: Ids, chunk: int,
    on_cpu: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The output (B, L, N, K), and the log of the sum of its weights (B, L, N, 1)."""
    q_id_BL, k_id_BS = _tied(q_BLNK, q_id_BL, k_id_BS)
    scale = q_BLNK.shape[-1] ** -0.5
    keys = (_cut(k_BSNK, chunk), _cut(v_BSNK, chunk), _cut_id(k_id_BS, chunk))

    def of_queries(queries: Any) -> tuple[jax.Array, jax.Array]:
        q_BNCK, q_id_BC = queries

        def over_keys(carry: Any, some: Any) -> tuple[Any, None]:
            maximum, total, out = carry
            k_BNJK, v_BNJK, k_id_BJ = some
            logits = dot(q_BNCK * scale, transposed(k_BNJK, on_cpu), on_cpu)
            logits = _masked(logits, q_id_BC, k_id_BJ)
            new = jnp.maximum(maximum, logits.max(-1, keepdims=True))
            # While all keys were masked these weights are 1; at the first that is not, `rescale` is
            # 0.
            weights, rescale = jnp.exp(logits - new), jnp.exp(maximum - new)
            total = rescale * total + weights.sum(-1, keepdims=True)
            out = rescale * out + dot(weights.astype(v_BNJK.dtype), v_BNJK, on_cpu)
            return (new, total, out), None

        zero = jnp.zeros(q_BNCK.shape, jnp.float32)
        start = (jnp.full_like(zero[..., :1], LOWEST), zero[..., :1], zero)
        (maximum, total, out), _ = jax.lax.scan(over_keys, start, keys)
        return out / total, maximum + jnp.log(total)

    queries = (_cut(q_BLNK, chunk), _cut_id(q_id_BL, chunk))
    out_nBNCK, sums_nBNC1 = jax.lax.map(of_queries, queries)
    return _joined(out_nBNCK, q_BLNK.shape[1]), _joined(sums_nBNC1, q_BLNK.shape[1])


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, q_id: Ids, k_id: Ids, sums_BLN1: jax.Array,
    delta_BLN1: jax.Array, gradient_BLNK: jax.Array, chunk: int, on_cpu: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Algorithm 4 of arXiv:2205.14135: chunks of keys outside, chunks of queries inside.

    `delta` is their D, the sum of the gradient times the output. Gives float32 gradients of q, k
    and v; of a part of the keys, with the log-sum and the D of all keys.
    """
    scale = q.shape[-1] ** -0.5
    parts: Any = (
        *(_cut(x, chunk) for x in (q, gradient_BLNK, delta_BLN1, sums_BLN1)),
        _cut_id(q_id, chunk),
    )
    keys = (_cut(k, chunk), _cut(v, chunk), _cut_id(k_id, chunk))

    def over_keys(to_q_nBNCK: jax.Array, some: Any) -> tuple[jax.Array, Any]:
        k_BNJK, v_BNJK, k_id_BJ = some
        k_BNKJ, v_BNKJ = transposed(k_BNJK, on_cpu), transposed(v_BNJK, on_cpu)

        def over_queries(carry: Any, part: Any) -> tuple[Any, jax.Array]:
            to_k_BNKJ, to_v_BNKJ = carry
            (q_BNCK, gradient_BNCK, delta, sums, q_id_BC), to_q = part
            logits = _masked(dot(q_BNCK * scale, k_BNKJ, on_cpu), q_id_BC, k_id_BJ)
            weights = jnp.exp(logits - sums)
            to_weights = dot(gradient_BNCK, v_BNKJ, on_cpu)
            to_logits = (weights * (to_weights - delta)).astype(q.dtype)
            to_q = to_q + dot(to_logits, k_BNJK, on_cpu)
            to_k_BNKJ = to_k_BNKJ + dot(transposed(q_BNCK, on_cpu), to_logits, on_cpu)
            to_v = dot(transposed(gradient_BNCK, on_cpu), weights.astype(v.dtype), on_cpu)
            to_v_BNKJ = to_v_BNKJ + to_v
            return (to_k_BNKJ, to_v_BNKJ), to_q

        start = jnp.zeros(k_BNKJ.shape, jnp.float32), jnp.zeros(v_BNKJ.shape, jnp.float32)
        (to_k, to_v), to_q_nBNCK = jax.lax.scan(over_queries, start, (parts, to_q_nBNCK))
        return to_q_nBNCK, (scale * to_k.mT, to_v.mT)

    to_q, (to_k, to_v) = jax.lax.scan(over_keys, jnp.zeros(parts[0].shape, jnp.float32), keys)
    to_q = scale * _joined(to_q, q.shape[1])
    return to_q, _joined(to_k, k.shape[1]), _joined(to_v, v.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q: Any, k: Any, v: Any, q_id: Any, k_id: Any, chunk: int, on_cpu: bool) -> jax.Array:
    return forward(q, k, v, q_id, k_id, chunk, on_cpu)[0]


def _saving(
    q: Any, k: Any, v: Any, q_id: Any, k_id: Any, chunk: int, on_cpu: bool
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, sums = forward(q, k, v, q_id, k_id, chunk, on_cpu)
    return out, (q, k, v, q_id, k_id, out, sums)


def _gradients(chunk: int, on_cpu: bool, saved: Any, gradient_BLNK: jax.Array) -> tuple[Any, ...]:
    q, k, v, q_id, k_id, out, sums = saved
    gradient = gradient_BLNK.astype(v.dtype)
    delta = (gradient.astype(jnp.float32) * out).sum(-1, keepdims=True)
    to_q, to_k, to_v = backward(q, k, v, q_id, k_id, sums, delta, gradient, chunk, on_cpu)
    return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype), None, None


_attend.defvjp(_saving, _gradients)
