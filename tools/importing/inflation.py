"""A ViViT's parameters from those of an image model (Arnab et al. 2021, section 3.4).

Dimension key: t h w tubelets along each axis, L tokens (a class token is the first), D width,
E values of an image's patch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vdit.nn.axes import Grid


def inflate(kernel_ED: jax.Array, frames: int) -> jax.Array:
    """A tubelet's kernel (frames·E, D): an image patch's (E, D) over `frames` in each (Eq. 8)."""
    return jnp.tile(kernel_ED / frames, (frames, 1))


def central_frame(kernel_ED: jax.Array, frames: int) -> jax.Array:
    """A tubelet's kernel (frames·E, D), zero but at frame frames // 2 (Eq. 9)."""
    place = jnp.arange(frames) == frames // 2
    return (place[:, None, None] * kernel_ED[None]).reshape(-1, kernel_ED.shape[-1])


def cubic(old: int, new: int) -> np.ndarray:
    """Weights (new, old) of cubic interpolation from `old` to `new` positions along an axis.

    Cubic convolution (Keys 1981, Eq. 15) with a = -3/4 and edges repeated: torch's "bicubic", with
    which transformers' ViT takes images of other sizes.
    """
    a, at = -0.75, (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        place = np.floor(at).astype(int) + tap
        s = np.abs(at - place)
        near, far = (a + 2) * s**3 - (a + 3) * s**2 + 1, a * (s**3 - 5 * s**2 + 8 * s - 4)
        weights[np.arange(new), np.clip(place, 0, old - 1)] += np.where(s <= 1, near, far)
    return weights.astype(np.float32)


def fit_positions(position_LD: jax.Array, old: Grid, new: Grid) -> jax.Array:
    """Learned positions of one grid of tubelets, resized to another; a class token's stays.

    An image's are repeated over time (section 3.4), a video's averaged over time for a grid of one
    frame; rows and columns are interpolated.
    """
    first = len(position_LD) - math.prod(old)
    x_thwD = position_LD[first:].reshape(*old, -1)
    if old[1:] != new[1:]:
        rows, columns = (cubic(*sizes) for sizes in zip(old[1:], new[1:], strict=True))
        exact = jax.lax.Precision.HIGHEST
        x_thwD = jnp.einsum("thwD,ih,jw->tijD", x_thwD, rows, columns, precision=exact)
    if old[0] != new[0]:
        x_thwD = jnp.broadcast_to(x_thwD.mean(0, keepdims=True), (*new, x_thwD.shape[-1]))
    return jnp.concatenate([position_LD[:first], x_thwD.reshape(-1, x_thwD.shape[-1])])


def from_image(
    image: Mapping[str, Any], video: Mapping[str, Any], old: Grid, new: Grid,
    start: Callable[[jax.Array, int], jax.Array] = central_frame,
) -> dict[str, Any]:  # fmt: skip
    """Initialises a ViViT from an image model, ViT or Model 1 (section 3.4).

    Args:
      image: the image model's parameters, of the same width, depth and rows and columns of a patch.
        Its class token and that token's position are dropped if `video` has none. The tubelets of a
        video model (Model 1) are kept.
      video: parameters of any of the four models, from `init`; kept where `image` has none, as is
        the head.
      old, new: the grids of tubelets of the positions of `image` and `video`
        (`ViViT.position_grid`).
      start: `central_frame` or `inflate`.

    Model 3's attention over time is zero at the start: its output projection is, so that a block
    begins as the image model's. (The paper sets all its weights to zero, from where none learns.)
    """
    theirs = traverse_util.flatten_dict(dict(image))
    made = traverse_util.flatten_dict(dict(video))
    place = ("encoder", "position")
    if ("encoder", "token") in theirs.keys() - made.keys():
        theirs[place] = theirs[place][1:]
    for path, value in made.items():
        if path[0] == "head" or path[0] == "temporal":
            continue
        if path == ("embed_video", "kernel"):
            made[path] = start(theirs[path], len(value) // len(theirs[path]))
        elif path == place:
            made[path] = fit_positions(theirs[path], old, new)
        elif path in theirs:
            made[path] = theirs[path]
        elif path[:4] == ("encoder", "blocks", "time", "o"):
            made[path] = jnp.zeros_like(value)
    return traverse_util.unflatten_dict(made)
