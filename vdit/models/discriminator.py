"""PatchGAN discriminator (Isola et al. 2017) for video.

Convolutions are causal over three frames: a discriminator of single frames cannot see flicker.
Group norm is over each frame and not over the batch, so a sample's logits do not depend on its
neighbours.

Dimension key: B batch, T frames, H height, W width, C channels; h w patches.
"""

import flax.linen as nn
import jax

from vdit.nn.conv import Conv, GroupNorm, causal
from vdit.nn.product import Matmul

GROUPS = 8


class Discriminator(nn.Module):
    """Video (B, T, H, W, 3) in [-1, 1] to logits (B, T, h, w), high for real patches.

    Each of `levels` convolutions halves height and width; a patch is a logit's receptive field.
    """

    width: int = 64  # of the first level, doubled at each further one up to eight times
    levels: int = 3
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(self, video_BTHWC: jax.Array) -> jax.Array:
        x = video_BTHWC
        for i in range(self.levels + 1):
            width, stride = self.width * min(2**i, 8), 2 if i < self.levels else 1
            conv = Conv(width, time=3, stride=stride, matmul=self.matmul, name=f"conv{i}")
            x, _ = causal(conv, x, None)
            if i:
                x = GroupNorm(GROUPS, name=f"norm{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        return Conv(1, matmul=self.matmul, name="logits")(x)[..., 0]
