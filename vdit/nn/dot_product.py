"""Dot-product attention as XLA compiles it: exact, and the logits are materialised.

Dimension key: B batch, L query tokens, S key tokens, N heads, K head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from vdit.nn.product import row_major

Ids = jax.Array | None  # of tokens (B, L): a query sees the keys of its own id; None: all keys

# A CPU goes through the batch row by row where all logits exceed its caches (32 MiB) and those of a
# row are worth an iteration (1 MiB). Measured on two cores: 1.1 to 2.9 times as fast forward;
# slower with a gradient, for which all weights are kept.
ALL_LOGITS, ROW_LOGITS = 2**23, 2**18


def attend(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array,
    q_id_BL: Ids = None, k_id_BS: Ids = None, *, on_cpu: bool = False,
) -> jax.Array:  # fmt: skip
    """softmax(q k^T / sqrt(K)) v with float32 logits; a query sees the keys of its own id.

    Without ids every query sees every key. Every query must see at least one key. The products'
    operands have the dtype of q, k and v, in the gradient too; the result is float32. `on_cpu` (one
    device of XLA's CPU backend) is faster there and computes the same up to rounding.
    """
    same = None
    if q_id_BL is not None:
        assert k_id_BS is not None
        same = q_id_BL[:, None, :, None] == k_id_BS[:, None, None, :]
    return _attend(q_BLNK, k_BSNK, v_BSNK, same, on_cpu)


def attend_biased(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, bias_BNLS: jax.Array, scale: float
) -> jax.Array:
    """softmax(scale q k^T + bias) v in float32: for a bias of positions, or a mask that is no id.

    The bias's B and N may be 1. The bias of a masked key is the lowest float32.
    """
    logits = _einsum("BLNK,BSNK->BNLS", q_BLNK * scale, k_BSNK) + bias_BNLS
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSNK.dtype)
    return _einsum("BNLS,BSNK->BNLK", weights, v_BSNK).swapaxes(1, 2)


def _einsum(pattern: str, a: jax.Array, b: jax.Array, on_cpu: bool = False) -> jax.Array:
    """A batch of products in float32, stored in the order of `pattern`'s result."""
    out = jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)
    return row_major(out, a.dtype, on_cpu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, same: jax.Array | None, on_cpu: bool
) -> jax.Array:
    row = q.shape[1] * q.shape[2] * k.shape[1]
    if not (on_cpu and row >= ROW_LOGITS and row * len(q) >= ALL_LOGITS):
        return _forward(q, k, v, same, on_cpu)[0]

    def one(row: Any) -> jax.Array:
        q, k, v, same = row
        return _forward(q, k, v, same, on_cpu)[0]

    rows = tuple(x if x is None else x[:, None] for x in (q, k, v, same))
    return jax.lax.map(one, rows)[:, 0]


def _forward(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, same_B1LS: jax.Array | None,
    on_cpu: bool,
) -> tuple[jax.Array, Any]:  # fmt: skip
    scale = q_BLNK.shape[-1] ** -0.5
    logits = _einsum("BLNK,BSNK->BNLS", q_BLNK * scale, k_BSNK, on_cpu)
    if same_B1LS is not None:
        logits = jnp.where(same_B1LS, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSNK.dtype)
    out = _einsum("BNLS,BSNK->BNLK", weights, v_BSNK, on_cpu).swapaxes(1, 2)
    return out, (q_BLNK, k_BSNK, v_BSNK, weights)


def _backward(on_cpu: bool, saved: Any, gradient_BLNK: jax.Array) -> tuple[Any, ...]:
    """The gradient of softmax attention (FlashAttention, arXiv:2205.14135, appendix B.2).

    Its D is the sum of the weights times their gradient, not of the output times its own: equal,
    but the subtraction cancels to rounding when both come from the same numbers. The gradients of
    k and v contract over queries: written as (K, L) x (L, S) they read the weights as they lie,
    the other way round they would transpose (L, S).
    """
    q, k, v, weights = saved
    scale = q.shape[-1] ** -0.5
    gradient = gradient_BLNK.astype(v.dtype)
    einsum = functools.partial(_einsum, on_cpu=on_cpu)
    to_weights = einsum("BLNK,BSNK->BNLS", gradient, v)
    delta = (weights * to_weights).sum(-1, keepdims=True)
    to_logits = (weights * (to_weights - delta)).astype(q.dtype)

    def over_queries(a_BLNK: jax.Array, b_BNLS: jax.Array) -> jax.Array:
        a_BNKL = row_major(a_BLNK.transpose(0, 2, 3, 1), a_BLNK.dtype, on_cpu)
        return einsum("BNKL,BNLS->BNKS", a_BNKL, b_BNLS).transpose(0, 3, 1, 2)

    to_q = scale * einsum("BNLS,BSNK->BNLK", to_logits, k).swapaxes(1, 2)
    to_k = scale * over_queries(q, to_logits)
    to_v = over_queries(gradient, weights)
    return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
