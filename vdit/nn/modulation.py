"""adaLN-Zero (Peebles and Xie 2023, section 3.2): layer norms that are scaled and shifted, and
branches that are gated, by vectors of the noise level.

A row holds tokens of several noise levels, one for each of its K slots. Vectors are computed once a
slot and gathered by slot index; what is gathered is gathered again for the gradient, so a layer
keeps a row's vectors, not each token's.

Dimension key: B batch rows, L tokens, D width, K slots.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit.nn.linear import Linear, layer_norm, zeros
from vdit.nn.product import Matmul

SUMMED_SLOTS = 4  # up to so many slots gathering is a sum, beyond a matrix product


def gather_slots(vector_BKD: jax.Array, slot_BLK: jax.Array | None) -> jax.Array:
    """Each token's vector (B, L, D) of its row's K by its slot, one-hot; (B, 1, D) where K is 1,
    and `slot_BLK` is not read."""
    slots = vector_BKD.shape[1]
    if slots == 1:
        return vector_BKD
    assert slot_BLK is not None
    if slots > SUMMED_SLOTS:  # a one-hot product: its transpose is a product too, no scatter
        return jnp.einsum("BLK,BKD->BLD", slot_BLK, vector_BKD)
    terms = [slot_BLK[..., k, None] * vector_BKD[:, k, None] for k in range(slots)]
    return functools.reduce(jnp.add, terms)


def scale_shift(
    x_BLD: jax.Array, shift_BKD: jax.Array, scale_BKD: jax.Array, slot_BLK: jax.Array | None
) -> jax.Array:
    """x (1 + scale) + shift, of each token's slot."""
    return x_BLD * (1 + gather_slots(scale_BKD, slot_BLK)) + gather_slots(shift_BKD, slot_BLK)


_scale_shift_again = jax.checkpoint(scale_shift, prevent_cse=False)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gate(x_BLD: jax.Array, gate_BKD: jax.Array, slot_BLK: jax.Array | None) -> jax.Array:
    """A residual branch's output times the gate of each token's slot."""
    return gather_slots(gate_BKD, slot_BLK) * x_BLD


def modulate(
    x_BLD: jax.Array, shift_BKD: jax.Array, scale_BKD: jax.Array,
    slot_BLK: jax.Array | None = None, epsilon: float = 1e-6,
) -> jax.Array:  # fmt: skip
    """adaLN: layer norm, then scale and shift of each token's slot."""
    return _scale_shift_again(layer_norm(x_BLD, epsilon), shift_BKD, scale_BKD, slot_BLK)


class Modulation(nn.Module):
    """`parts` vectors (B, K, D) of the conditioning vectors of a row's slots; zero at the start."""

    parts: int
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(self, condition_BKD: jax.Array) -> list[jax.Array]:
        features, wide = self.parts * condition_BKD.shape[-1], self.matmul.float32
        linear = Linear(features, kernel_init=zeros, matmul=wide, name="modulation")
        return jnp.split(linear(nn.silu(condition_BKD)), self.parts, axis=-1)


def embed_level(features: jax.Array, width: int, matmul: Matmul) -> jax.Array:
    """The vector (..., width) of sine-cosine features of a noise level: Linear, SiLU, Linear.

    Two layers of the module that calls it: "level_in" and "level_out".
    """
    hidden = nn.silu(Linear(width, matmul=matmul.float32, name="level_in")(features))
    return Linear(width, matmul=matmul.float32, name="level_out")(hidden)
