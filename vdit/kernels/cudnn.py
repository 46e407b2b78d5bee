"""cuDNN's fused attention on NVIDIA GPUs, for the rows that it takes.

Dimension key: B batch, L query tokens, S key tokens, N heads, K head dim.
"""

import jax
import jax.numpy as jnp

from vdit.kernels import chunked
from vdit.nn import dot_product
from vdit.nn.attention import Attend
from vdit.nn.dot_product import Ids

WIDEST = 128  # head dim that every GPU with this kernel takes

# Logits of all rows and heads from which rows that cuDNN does not take go in chunks: 1 GiB of them.
# As long as they fit XLA's way is faster: on an H200, of 2 heads over 32,768 tokens (2**31), by 6.4
# times forward and 8 times with the gradient.
ROOM = 2**28


def takes(q_BLNK: jax.Array, k_BSNK: jax.Array, q_id_BL: Ids = None) -> bool:
    """Whether cuDNN takes these rows: dense, 16-bit operands, K a multiple of 8 and at most 128,
    and L and S even (JAX refuses the gradient of odd ones)."""
    length, width = q_BLNK.shape[1], q_BLNK.shape[-1]
    narrow = q_BLNK.dtype in (jnp.bfloat16, jnp.float16)
    fits = width % 8 == 0 and width <= WIDEST and length % 2 == 0 and k_BSNK.shape[1] % 2 == 0
    return q_id_BL is None and narrow and fits


def otherwise(q_BLNK: jax.Array, k_BSNK: jax.Array) -> Attend:
    """What attends on a GPU where cuDNN does not: XLA as far as there is room for the logits."""
    batch, length, heads, _ = q_BLNK.shape
    return dot_product.attend if batch * heads * length * k_BSNK.shape[1] < ROOM else chunked.attend


def attend(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array,
    q_id_BL: Ids = None, k_id_BS: Ids = None,
) -> jax.Array:  # fmt: skip
    """What `vdit.nn.dot_product.attend` computes, on a GPU.

    Rows that `takes` speaks of go to cuDNN, which rounds their result to 16 bits; all others go to
    XLA's or, long ones, to `vdit.kernels.chunked`.
    """
    if not takes(q_BLNK, k_BSNK, q_id_BL):
        return otherwise(q_BLNK, k_BSNK)(q_BLNK, k_BSNK, v_BSNK, q_id_BL, k_id_BS)
    out_BLNK = jax.nn.dot_product_attention(q_BLNK, k_BSNK, v_BSNK, implementation="cudnn")
    return out_BLNK.astype(jnp.float32)
