"""Pixels, and patches of pixels or latents as tokens and back, always in the order (t, h, w).

Dimension key: B batch, T frames, H height, W width, C channels, p q r patch sizes in (t, h, w).
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

Array = TypeVar("Array", jax.Array, np.ndarray)


def patchify(x_BTHWC: Array, patch: tuple[int, int, int]) -> Array:
    """(B, T·p, H·q, W·r, C) to (B, T, H, W, p·q·r·C); the sizes must divide."""
    p, q, r = patch
    return rearrange(x_BTHWC, "B (T p) (H q) (W r) C -> B T H W (p q r C)", p=p, q=q, r=r)


def unpatchify(x_BTHWE: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """The inverse of `patchify`."""
    p, q, r = patch
    return rearrange(x_BTHWE, "B T H W (p q r C) -> B (T p) (H q) (W r) C", p=p, q=q, r=r)


def padded(size: tuple[int, int], multiple: tuple[int, int]) -> tuple[int, int]:
    """Height and width, each up to the next multiple."""
    (h, w), (q, r) = size, multiple
    return -(-h // q) * q, -(-w // r) * r


def pad_to_multiple(x_BTHWC: jax.Array, multiple: tuple[int, int]) -> jax.Array:
    """Pads height and width at the bottom and right, by the edge's pixels, to a multiple."""
    pads = [(-size) % m for size, m in zip(x_BTHWC.shape[2:4], multiple, strict=True)]
    return jnp.pad(x_BTHWC, ((0, 0), (0, 0), (0, pads[0]), (0, pads[1]), (0, 0)), mode="edge")


def to_float(video: jax.Array) -> jax.Array:
    """Pixels of 0 to 255 to [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: jax.Array) -> jax.Array:
    """[-1, 1] to uint8 pixels, rounded and clipped."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
