"""A judge of patches of video: which of them are real (PatchGAN, Isola et al. 2017).

Kernels look at three frames, their own and the two before: a judge of single frames cannot see
flicker. Groups of channels are normed within each frame, not over a batch, so what is said of a
sample does not depend on its neighbours.

Dimension key: B batch, T frames, H height, W width, C channels; h w patches.
"""

import flax.linen as nn
import jax

from vdit.nn.conv import Conv, GroupNorm, causal
from vdit.nn.product import Matmul

GROUPS = 8


class Discriminator(nn.Module):
    """Video (B, T, H, W, 3) in [-1, 1] to logits (B, T, h, w), high where it looks real.

    Each of `levels` convolutions halves height and width; a patch is what a logit depends on.
    """

    width: int = 64  # of the first level; twice that at each further one, up to eight times
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
