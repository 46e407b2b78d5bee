"""LPIPS, a perceptual distance of images (Zhang et al. 2018, arXiv:1801.03924).

The distance between features of AlexNet or VGG16, normalised and weighted by channel.

Dimension key: N images, H height, W width, C channels.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit.nn.conv import convolve
from vdit.nn.linear import zeros

# ImageNet's mean and deviation, for colours in [-1, 1].
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Net(NamedTuple):
    """Convolutions with ReLU, some after max pooling."""

    convs: tuple[tuple[int, int, int, int], ...]  # features, kernel size, stride, padding
    pooled: tuple[int, ...]  # convolutions whose input is pooled
    window: int  # of the pooling, whose stride is 2
    taken: tuple[int, ...]  # convolutions whose output is compared
    least: int  # the fewest rows and columns of an image


NETS = {
    "alex": Net(
        ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)),
        (1, 2), 3, (0, 1, 2, 3, 4), 31,
    ),
    "vgg": Net(
        tuple((width, 3, 1, 1) for width in (64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6),
        (2, 4, 7, 10), 2, (1, 3, 6, 9, 12), 16,
    ),
}  # fmt: skip


def unit(x_NHWC: jax.Array) -> jax.Array:
    """Features normalised to length 1 at each place; zeros stay zeros, with a gradient of 0."""
    square = jnp.square(x_NHWC).sum(-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0.0, square, 1.0)) + 1e-10
    return jnp.where(square > 0.0, x_NHWC / length, 0.0)


class LPIPS(nn.Module):
    """Two sets of images (N, H, W, 3) in [-1, 1] to their distances (N,); `net` is of `NETS`."""

    net: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, first_NHWC: jax.Array, second_NHWC: jax.Array) -> jax.Array:
        net, count = NETS[self.net], len(first_NHWC)
        mean, deviation = (jnp.array(x).reshape(1, 1, 1, 3) for x in (MEAN, DEVIATION))
        x = (jnp.concatenate([first_NHWC, second_NHWC]) - mean) / deviation
        distance = jnp.zeros(count)
        for i, (width, side, stride, margin) in enumerate(net.convs):
            if i in net.pooled:
                x = nn.max_pool(x, (net.window, net.window), (2, 2))
            shape, init = (side, side, x.shape[-1], width), nn.initializers.lecun_normal()
            kernel = self.param(f"kernel{i}", init, shape, jnp.float32)
            bias = self.param(f"bias{i}", zeros, (width,), jnp.float32).reshape(1, 1, 1, -1)
            x = nn.relu(convolve(x, kernel, stride, (margin, margin), self.dtype) + bias)
            if i in net.taken:
                share = self.param(f"share{i}", nn.initializers.ones_init(), (width,), jnp.float32)
                apart = jnp.square(unit(x[:count]) - unit(x[count:]))
                distance += (apart * share.reshape(1, 1, 1, -1)).sum(-1).mean((1, 2))
        return distance
