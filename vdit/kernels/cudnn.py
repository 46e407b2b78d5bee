"""cuDNN's fused attention on NVIDIA GPUs, for the rows that it takes.

Dimension key: B batch, L query tokens, S key tokens, N heads, K head dim.
"""

import jax
import jax.numpy as jnp

from vdit.kernels import chunked

WIDEST = 128  # head dim that every GPU with this kernel takes


def is_here() -> bool:
    """Whether this machine's first device has the kernel: NVIDIA's from compute capability 8 on
    (AMD's say "gfx90a")."""
    major, _, minor = getattr(jax.devices()[0], "compute_capability", "").partition(".")
    return major.isdigit() and minor.isdigit() and int(major) >= 8


def attend(
    q_BLNK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    q_id_BL: jax.Array | None = None,
    k_id_BS: jax.Array | None = None,
) -> jax.Array:
    """What `vdit.kernels.xla.attend` computes, on a GPU.

    Dense rows of 16-bit operands whose K is a multiple of 8 and at most 128 go to cuDNN, which
    rounds their result to 16 bits; rows with ids and all others go to `vdit.kernels.chunked`.
    """
    # Not run on a GPU yet: tests show which rows go where, and with which arguments.
    width = q_BLNK.shape[-1]
    takes = q_BLNK.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= WIDEST
    if q_id_BL is not None or not takes:
        return chunked.attend(q_BLNK, k_BSNK, v_BSNK, q_id_BL, k_id_BS)
    out_BLNK = jax.nn.dot_product_attention(q_BLNK, k_BSNK, v_BSNK, implementation="cudnn")
    return out_BLNK.astype(jnp.float32)
