"""Attention as XLA compiles it: exact, materialises the logits; right for short rows and tests.

Dimension key: B batch, L query tokens, S key tokens, N heads, K head dim.
"""

import jax
import jax.numpy as jnp


def attend(
    q_BLNK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    q_id_BL: jax.Array | None = None,
    k_id_BS: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v with float32 logits; a query sees the keys of its own id.

    Without ids every query sees every key. Every query must see at least one key.
    """
    scale = q_BLNK.shape[-1] ** -0.5
    logits = jnp.einsum(
        "BLNK,BSNK->BNLS", q_BLNK * scale, k_BSNK, preferred_element_type=jnp.float32
    )
    if q_id_BL is not None:
        assert k_id_BS is not None
        same = q_id_BL[:, None, :, None] == k_id_BS[:, None, None, :]
        logits = jnp.where(same, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSNK.dtype)
    return jnp.einsum("BNLS,BSNK->BLNK", weights, v_BSNK, preferred_element_type=jnp.float32)
