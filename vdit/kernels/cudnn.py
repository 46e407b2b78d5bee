"""cuDNN's fused attention on NVIDIA GPUs, for the inputs that it supports.

Dimension key: B batch, L query tokens, S key tokens, N heads, K head dim.
"""

import jax
import jax.numpy as jnp

from vdit.kernels import chunked
from vdit.nn import dot_product
from vdit.nn.attention import Attend
from vdit.nn.dot_product import Ids

WIDEST = 128  # head dim that every GPU with this kernel takes

# Logits of all rows and heads (1 GiB) from which inputs that cuDNN does not support go in chunks.
# While they fit, XLA is faster: on an H200, 2 heads over 32,768 tokens (2**31 logits), 6.4 times
# forward and 8 times with the gradient.
ROOM = 2**28


def supports(q_BLNK: jax.Array, k_BSNK: jax.Array, q_id_BL: Ids = None) -> bool:
    """Whether cuDNN supports these: dense, 16-bit operands, K a multiple of 8 and at most 128,
    and L and S even (JAX refuses the gradient of odd ones)."""
    length, width = q_BLNK.shape[1], q_BLNK.shape[-1]
    narrow = q_BLNK.dtype in (jnp.bfloat16, jnp.float16)
    fits = width % 8 == 0 and width <= WIDEST and length % 2 == 0 and k_BSNK.shape[1] % 2 == 0
    return q_id_BL is None and narrow and fits


def fallback(q_BLNK: jax.Array, k_BSNK: jax.Array) -> Attend:
    """The kernel where cuDNN has none: XLA's as far as the logits fit, then chunks."""
    batch, length, heads, _ = q_BLNK.shape
    return dot_product.attend if batch * heads * length * k_BSNK.shape[1] < ROOM else chunked.attend


def attend(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array,
    q_id_BL: Ids = None, k_id_BS: Ids = None,
) -> jax.Array:  # fmt: skip
    """What `vdit.nn.dot_product.attend` computes, on a GPU.

    cuDNN computes what it `supports` and rounds the result to 16 bits; all else goes to `fallback`.
    """
    if not supports(q_BLNK, k_BSNK, q_id_BL):
        return fallback(q_BLNK, k_BSNK)(q_BLNK, k_BSNK, v_BSNK, q_id_BL, k_id_BS)
    out_BLNK = jax.nn.dot_product_attention(q_BLNK, k_BSNK, v_BSNK, implementation="cudnn")
    return out_BLNK.astype(jnp.float32)
