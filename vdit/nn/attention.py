"""Multi-head attention layers: over tokens (self and cross), and causal over time.

Dimension key: B batch, L query tokens, S key tokens, T time, P places, D width, N heads,
K head dim.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from vdit.nn.dot_product import Ids
from vdit.nn.linear import Initializer, Linear, RMSNorm, xavier
from vdit.nn.product import Matmul
from vdit.nn.rotary import rotary_angles, rotate

Attend = Callable[..., jax.Array]
Angles = tuple[jax.Array, jax.Array]


class Attention(nn.Module):
    """Attention of x_BLD over itself, or over memory_BSE, with qk-norm and rotary positions.

    `attend(q_BLNK, k_BSNK, v_BSNK, q_id, k_id)` is the kernel; a query sees the keys whose id
    equals its own (all of them where ids are None). `qkv_bias` without `qk_norm` is the attention
    of Vaswani et al. 2017.
    """

    heads: int
    attend: Attend
    out_init: Initializer = xavier
    matmul: Matmul = Matmul()
    qk_norm: bool = True
    qkv_bias: bool = False

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, memory_BSE: jax.Array | None = None, angles: Angles | None = None,
        q_id_BL: Ids = None, k_id_BS: Ids = None,
    ) -> jax.Array:  # fmt: skip
        width = x_BLD.shape[-1]
        memory = x_BLD if memory_BSE is None else memory_BSE

        def heads(x: jax.Array, name: str) -> jax.Array:
            out = Linear(width, use_bias=self.qkv_bias, name=name, matmul=self.matmul)(x)
            return out.reshape(*x.shape[:-1], self.heads, -1)

        q, k, v = heads(x_BLD, "q"), heads(memory, "k"), heads(memory, "v")
        if self.qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        dtype = self.matmul.dtype
        out = self.attend(q.astype(dtype), k.astype(dtype), v.astype(dtype), q_id_BL, k_id_BS)
        last = Linear(width, kernel_init=self.out_init, name="o", matmul=self.matmul)
        return last(out.reshape(x_BLD.shape))


@struct.dataclass
class TimeState:
    """The key-value cache of causal attention: the last window - 1 frames."""

    key: jax.Array  # (B, window - 1, P, N, K), rotated
    value: jax.Array  # (B, window - 1, P, N, K)


class CausalTimeAttention(nn.Module):
    """Causal attention over time at each place: a frame sees itself and the `window` - 1 before.

    `start` is the index of x's first frame in its clip; `state` is the cache of the frames before
    it, so that a clip in chunks gives the same as a clip at once.
    """

    heads: int
    window: int
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(
        self, x_BTPD: jax.Array, start: jax.Array, state: TimeState
    ) -> tuple[jax.Array, TimeState]:
        _, frames, _, width = x_BTPD.shape
        past = self.window - 1

        def heads(name: str) -> jax.Array:
            out = Linear(width, use_bias=False, matmul=self.matmul, name=name)(x_BTPD)
            return out.reshape(*out.shape[:-1], self.heads, -1)

        q = RMSNorm(name="q_norm")(heads("q"))
        k, v = RMSNorm(name="k_norm")(heads("k")), heads("v")
        time = (start + jnp.arange(frames)).astype(jnp.float32)
        cos, sin = rotary_angles(time[None, :, None], q.shape[-1], (100.0,))
        angles = cos[:, :, :, None], sin[:, :, :, None]  # (1, T, 1, 1, K/2)
        q, k = rotate(q, angles) * q.shape[-1] ** -0.5, rotate(k, angles)
        k = jnp.concatenate([state.key, k], axis=1)
        v = jnp.concatenate([state.value, v], axis=1)
        # Key s is the frame `start - past + s`; before frame 0 there is none.
        back = past + jnp.arange(frames)[:, None] - jnp.arange(frames + past)[None]
        exists = (start - past + jnp.arange(frames + past))[None] >= 0
        seen = (back >= 0) & (back < self.window) & exists
        logits = jnp.einsum("BTPNK,BSPNK->BPNTS", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(seen[None, None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1)
        out = jnp.einsum("BPNTS,BSPNK->BTPNK", weights, v, preferred_element_type=jnp.float32)
        out = Linear(width, name="o", matmul=self.matmul)(out.reshape(x_BTPD.shape))
        return out, TimeState(k[:, k.shape[1] - past :], v[:, v.shape[1] - past :])
