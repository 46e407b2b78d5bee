"""Attention as XLA compiles it: exact, materialises the logits; right for short rows and tests.

Dimension key: B batch, L query tokens, S key tokens, N heads, K head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp

from vdit.nn.product import alone, row_major

# Where a CPU goes row by row: from so many logits in all on, which its caches do not hold (32 MiB),
# with so many in a row (1 MiB). Measured on two cores, forward passes only: 1.1 to 2.9 times as
# fast; with a gradient, for which all weights are kept, it was slower.
ALL_LOGITS, ROW_LOGITS = 2**23, 2**18


def attend(
    q_BLNK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    q_id_BL: jax.Array | None = None,
    k_id_BS: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v with float32 logits; a query sees the keys of its own id.

    Without ids every query sees every key. Every query must see at least one key. The products'
    operands have the dtype of q, k and v, in the gradient too; the result is float32.
    """
    same = None
    if q_id_BL is not None:
        assert k_id_BS is not None
        same = q_id_BL[:, None, :, None] == k_id_BS[:, None, None, :]
    return _attend(q_BLNK, k_BSNK, v_BSNK, same)


def attend_biased(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, bias_BNLS: jax.Array, scale: float
) -> jax.Array:
    """softmax(scale q k^T + bias) v in float32: for a bias of positions, or a mask that is no id.

    The bias's B and N may be 1. A key that is not to be seen has the lowest float32 for its bias.
    """
    logits = _einsum("BLNK,BSNK->BNLS", q_BLNK * scale, k_BSNK) + bias_BNLS
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSNK.dtype)
    return _einsum("BNLS,BSNK->BNLK", weights, v_BSNK).swapaxes(1, 2)


def _einsum(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A batch of products in float32, stored in the order of `pattern`'s result."""
    return row_major(jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32), a.dtype)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, same: jax.Array | None) -> jax.Array:
    row = q.shape[1] * q.shape[2] * k.shape[1]
    if alone() and row >= ROW_LOGITS and row * len(q) >= ALL_LOGITS:
        return jax.lax.platform_dependent(q, k, v, same, cpu=_row_by_row, default=_output)
    return _output(q, k, v, same)


def _output(*of_rows: Any) -> jax.Array:
    return _forward(*of_rows)[0]


def _row_by_row(*of_rows: Any) -> jax.Array:
    singles = tuple(x if x is None else x[:, None] for x in of_rows)
    return jax.lax.map(lambda row: _output(*row), singles)[:, 0]


def _forward(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, same_B1LS: jax.Array | None
) -> tuple[jax.Array, Any]:
    scale = q_BLNK.shape[-1] ** -0.5
    logits = _einsum("BLNK,BSNK->BNLS", q_BLNK * scale, k_BSNK)
    if same_B1LS is not None:
        logits = jnp.where(same_B1LS, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSNK.dtype)
    out = _einsum("BNLS,BSNK->BNLK", weights, v_BSNK).swapaxes(1, 2)
    return out, (q_BLNK, k_BSNK, v_BSNK, weights)


def _backward(saved: Any, gradient_BLNK: jax.Array) -> tuple[Any, ...]:
    """The gradient of softmax attention (FlashAttention, arXiv:2205.14135, appendix B.2).

    Its D is the sum of the weights times their gradient, not of the output times its own: equal,
    but the subtraction cancels to rounding when both come from the same numbers. The gradients of
    k and v contract over queries: written as (K, L) x (L, S) they read the weights as they lie,
    the other way round they would transpose (L, S).
    """
    q, k, v, weights = saved
    scale = q.shape[-1] ** -0.5
    gradient = gradient_BLNK.astype(v.dtype)
    to_weights = _einsum("BLNK,BSNK->BNLS", gradient, v)
    share = (weights * to_weights).sum(-1, keepdims=True)
    to_logits = (weights * (to_weights - share)).astype(q.dtype)

    def over_queries(a_BLNK: jax.Array, b_BNLS: jax.Array) -> jax.Array:
        a_BNKL = row_major(a_BLNK.transpose(0, 2, 3, 1), a_BLNK.dtype)
        return _einsum("BNKL,BNLS->BNKS", a_BNKL, b_BNLS).transpose(0, 3, 1, 2)

    to_q = scale * _einsum("BNLS,BSNK->BNLK", to_logits, k).swapaxes(1, 2)
    to_k = scale * over_queries(q, to_logits)
    to_v = over_queries(gradient, weights)
    return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
