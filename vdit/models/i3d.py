"""I3D (Carreira and Zisserman 2017, arXiv:1705.07750): the features of the Fréchet video distance.

Batch norms are folded into the convolutions (`published/i3d.py`).

Dimension key: B videos, T frames, H height, W width, C channels; K classes of Kinetics.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

CLASSES = 400
LEAST = 9  # frames: two remain for the last pooling
SIDE = 224
# Each layer: a convolution (features, kernel size, stride), a max pooling (window and stride in
# time, window in space), or the widths of an inception module's branches.
LAYERS: dict[str, tuple[int, ...]] = {
    "Conv3d_1a_7x7": (64, 7, 2), "MaxPool3d_2a_3x3": (1, 3), "Conv3d_2b_1x1": (64, 1, 1),
    "Conv3d_2c_3x3": (192, 3, 1), "MaxPool3d_3a_3x3": (1, 3),
    "Mixed_3b": (64, 96, 128, 16, 32, 32), "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": (3, 3), "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64), "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64), "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": (2, 2), "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}  # fmt: skip
# An inception module's convolutions: name, kernel size, and which input ("": the module's own).
BRANCHES = (
    ("Branch_0/Conv3d_0a_1x1", 1, ""), ("Branch_1/Conv3d_0a_1x1", 1, ""),
    ("Branch_1/Conv3d_0b_3x3", 3, "Branch_1/Conv3d_0a_1x1"), ("Branch_2/Conv3d_0a_1x1", 1, ""),
    ("Branch_2/Conv3d_0b_3x3", 3, "Branch_2/Conv3d_0a_1x1"),
    ("Branch_3/Conv3d_0b_1x1", 1, "pooled"),
)  # fmt: skip
JOINED = tuple(BRANCHES[i][0] for i in (0, 2, 4, 5))


def pool(x_BTHWC: jax.Array, window: tuple[int, int, int], stride: tuple[int, int, int]) -> Any:
    """Max pooling, padded to ceil(length / stride)."""
    return nn.max_pool(x_BTHWC, window, stride, "SAME")


class I3D(nn.Module):
    """Videos (B, T, H, W, 3) in [-1, 1] to logits (B, K), averaged over time."""

    def conv(self, x_BTHWC: jax.Array, name: str, width: int, side: int, stride: int) -> jax.Array:
        """A padded convolution with bias."""
        shape = (side, side, side, x_BTHWC.shape[-1], width)
        name = name.replace("/", ".")
        kernel = self.param(f"{name}.kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param(f"{name}.bias", nn.initializers.zeros_init(), (width,))
        kinds = ("NDHWC", "DHWIO", "NDHWC")
        out = jax.lax.conv_general_dilated(
            x_BTHWC, kernel, (stride,) * 3, "SAME", dimension_numbers=kinds
        )
        return out + bias.reshape(1, 1, 1, 1, -1)

    def mixed(self, x_BTHWC: jax.Array, name: str, widths: tuple[int, ...]) -> jax.Array:
        """An inception module."""
        made = {"": x_BTHWC, "pooled": pool(x_BTHWC, (3, 3, 3), (1, 1, 1))}
        for (branch, side, origin), width in zip(BRANCHES, widths, strict=True):
            made[branch] = nn.relu(self.conv(made[origin], f"{name}/{branch}", width, side, 1))
        return jnp.concatenate([made[branch] for branch in JOINED], axis=-1)

    @nn.compact
    def __call__(self, video_BTHWC: jax.Array) -> jax.Array:
        x = video_BTHWC
        for name, sizes in LAYERS.items():
            match name.split("_")[0], sizes:
                case "Conv3d", (width, side, stride):
                    x = nn.relu(self.conv(x, name, width, side, stride))
                case "MaxPool3d", (time, space):
                    x = pool(x, (time, space, space), (time if time < 3 else 2, 2, 2))
                case _:
                    x = self.mixed(x, name, sizes)
        x = nn.avg_pool(x, (2, x.shape[2], x.shape[3]), (1, 1, 1), "VALID")
        return self.conv(x, "Logits/Conv3d_0c_1x1", CLASSES, 1, 1).mean((1, 2, 3))
