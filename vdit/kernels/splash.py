"""JAX's splash attention for TPUs: a Pallas kernel with ids that never stores the logits.

Dimension key: B batch, L query tokens, S key tokens, N heads, K head dim.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from vdit.kernels.chunked import PADDING_ID, even_chunks, pad
from vdit.nn.dot_product import Ids

LANES = 128  # the kernel's blocks are multiples of it
BLOCK = 512  # queries, and keys, at a time


def attend(
    q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array,
    q_id_BL: Ids = None, k_id_BS: Ids = None, *, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """What `vdit.nn.dot_product.attend` computes, on a TPU (anywhere with `interpret`, slowly).

    Any L and S: they are padded to blocks of a multiple of 128, padding with an id of its own. Ids
    are integers of at least 0, and every query must see at least one key. Logits, softmax and sums
    are float32; the result, returned as float32, has been rounded to the dtype of q.
    """
    _, block_q, length = even_chunks(q_BLNK.shape[1], BLOCK, LANES)
    _, block_k, keys = even_chunks(k_BSNK.shape[1], BLOCK, LANES)
    if q_id_BL is None and keys > k_BSNK.shape[1]:  # to mask the padding
        q_id_BL, k_id_BS = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q_BLNK, k_BSNK))
    ids = None
    if q_id_BL is not None:
        assert k_id_BS is not None
        ids = splash.SegmentIds(
            pad(q_id_BL.astype(jnp.int32), length, PADDING_ID),
            pad(k_id_BS.astype(jnp.int32), keys, PADDING_ID),
        )
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((length, keys))] * q_BLNK.shape[2]),
        block_sizes=splash.BlockSizes(
            block_q=block_q, block_kv=block_k, block_kv_compute=block_k,
            block_q_dkv=block_q, block_kv_dkv=block_k, block_kv_dkv_compute=block_k,
            block_q_dq=block_q, block_kv_dq=block_k,
        ),
        interpret=interpret,
    )  # fmt: skip
    scale = q_BLNK.shape[-1] ** -0.5  # the kernel does not scale
    q_BNLK, k_BNSK, v_BNSK = (
        pad(x, padded).swapaxes(1, 2)
        for x, padded in ((q_BLNK * scale, length), (k_BSNK, keys), (v_BSNK, keys))
    )
    out_BNLK = jax.vmap(kernel)(q_BNLK, k_BNSK, v_BNSK, ids)
    return out_BNLK.swapaxes(1, 2)[:, : q_BLNK.shape[1]].astype(jnp.float32)
