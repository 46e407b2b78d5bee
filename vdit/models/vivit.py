"""ViViT (Arnab et al. 2021, arXiv:2103.15691), a video classifier, and ViT.

A video is embedded as tubelets, or as the patches of uniformly sampled frames; one of the paper's
four models encodes the tokens, and a linear head classifies. Model 1 on one frame with tubelets of
one frame is ViT (Dosovitskiy et al. 2021). Parameters of the blocks lead with a layer axis.

Dimension key: B batch, T frames, H height, W width, C colours; t h w tokens along each axis,
L tokens (a class token is the first), D width, N heads, K head dim, E values of a tubelet.
"""

import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vdit.errors import UserError
from vdit.nn import dot_product
from vdit.nn.attention import Attend, Attention
from vdit.nn.axes import Grid, split_heads
from vdit.nn.linear import MLP, LayerNorm, Linear, zeros
from vdit.nn.patch import patchify
from vdit.nn.product import Matmul
from vdit.nn.stack import Gather, stack

# B, L and H are the paper's (section 4.1), S is DeiT's; nano is for CPUs, smoke for tests.
SIZES: dict[str, dict[str, int]] = {
    "smoke": {"width": 32, "depth": 2, "heads": 2, "temporal_depth": 1},
    "nano": {"width": 128, "depth": 4, "heads": 4, "temporal_depth": 2},
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "H": {"width": 1280, "depth": 32, "heads": 16},
}

# The paper's names: rows and columns x frames. x1 is for sampled frames.
TUBELETS: dict[str, tuple[int, int, int]] = {
    f"{side}x{frames}": (frames, side, side) for side in (8, 14, 16, 32) for frames in (1, 2, 4, 8)
}

# "B/16x2" is ViViT-B/16x2.
PRESETS: dict[str, dict[str, Any]] = {
    f"{size}/{tubelet}": {**SIZES[size], "patch": TUBELETS[tubelet]}
    for size in SIZES
    for tubelet in TUBELETS
}


def preset(name: str) -> dict[str, Any]:
    """Width, depth, heads and patch of a row of `PRESETS`, or of WIDTHxDEPTHxHEADS/SIDExFRAMES."""
    if name in PRESETS:
        return PRESETS[name]
    match = re.fullmatch(r"(\d{1,5})x(\d{1,4})x(\d{1,4})/(\d{1,4})x(\d{1,4})", name)
    numbers = [int(n) for n in match.groups()] if match else [0]
    if min(numbers) < 1 or numbers[0] % numbers[2]:
        known = ", ".join(sorted(PRESETS))
        raise UserError(
            f"classify.preset={name!r}: known are {known}, and WIDTHxDEPTHxHEADS/SIDExFRAMES with"
            " heads that cut the width"
        )
    width, depth, heads, side, frames = numbers
    return {"width": width, "depth": depth, "heads": heads, "patch": (frames, side, side)}


# The attention layers of a block, in turn; each splits its heads evenly over its axes.
ATTENTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "joint": (("joint",),),  # Model 1
    "factorised_encoder": (("joint",),),  # Model 2: over a frame's places, then over frames
    "factorised_self_attention": (("space",), ("time",)),  # Model 3, Eq. 4 to 6
    "factorised_dot_product": (("space", "time"),),  # Model 4, Eq. 7
}
WITHOUT_TOKEN = ("factorised_self_attention", "factorised_dot_product")
POOLS = ("token", "mean")


def sample_frames(video_BTHWC: jax.Array, count: int) -> jax.Array:
    """The middle frames of `count` equal parts of the video (section 3.2, Figure 2)."""
    frames = video_BTHWC.shape[1]
    if not 1 <= count <= frames:
        raise UserError(f"vivit samples {count} frames of {frames}: 1 to {frames} are allowed")
    return video_BTHWC[:, [(2 * i + 1) * frames // (2 * count) for i in range(count)]]


class Block(nn.Module):
    """Pre-norm attention layers and an MLP, with residual connections (Eq. 2 to 6)."""

    grid: Grid
    attentions: tuple[tuple[str, ...], ...]
    heads: int
    mlp_ratio: float
    activation: str
    epsilon: float
    attend: Attend
    matmul: Matmul

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> tuple[jax.Array, None]:
        for axes in self.attentions:
            # Models 1, 2 and 4 have the same parameters, and Model 3's spatial attention those of
            # an image model, so the axes are not part of the name.
            name = "attention" if axes != ("time",) else "time"
            attention = Attention(
                self.heads, split_heads(self.attend, axes, self.grid), qk_norm=False,
                qkv_bias=True, matmul=self.matmul, name=name,
            )  # fmt: skip
            x_BLD = x_BLD + attention(LayerNorm(self.epsilon, name=f"{name}_norm")(x_BLD))
        hidden = int(x_BLD.shape[-1] * self.mlp_ratio)
        mlp = MLP(hidden, self.activation, matmul=self.matmul, name="mlp")
        return x_BLD + mlp(LayerNorm(self.epsilon, name="mlp_norm")(x_BLD)), None


class Encoder(nn.Module):
    """Class token, learned positions (Eq. 1), blocks and a last norm.

    (B, t·h·w, D) to the tokens (B, t·h·w, D) and the pooled features (B, D): the class token's
    output, or without one the mean.
    """

    depth: int
    token: bool
    options: dict[str, Any]  # of Block but its grid
    run: dict[str, Any]  # of `stack`: unroll, remat, gather

    @nn.compact
    def __call__(self, x_BLD: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
        batch, _, width = x_BLD.shape
        if self.token:
            token = self.param("token", zeros, (width,), jnp.float32)
            token_B1D = jnp.broadcast_to(token[None, None], (batch, 1, width))
            x_BLD = jnp.concatenate([token_B1D, x_BLD], axis=1)
        normal = nn.initializers.normal(0.02)
        x_BLD = x_BLD + self.param("position", normal, x_BLD.shape[1:], jnp.float32)[None]
        blocks = stack(Block, self.depth, **self.run)(grid, **self.options, name="blocks")
        x_BLD, _ = blocks(x_BLD)
        x_BLD = LayerNorm(self.options["epsilon"], name="norm")(x_BLD)
        if self.token:
            return x_BLD[:, 1:], x_BLD[:, 0]
        return x_BLD, x_BLD.mean(axis=1)


class Features(NamedTuple):
    """The features of a video."""

    tokens: jax.Array  # (B, t, h, w, D); of the factorised encoder's spatial transformer
    pooled: jax.Array  # (B, D)


class ViViT(nn.Module):
    """Video (B, T, H, W, C), pixels in [-1, 1], to logits (B, classes), or to `features`.

    Args:
      patch: frames, rows and columns of a tubelet; the remainder of the video is cropped (section
        3.2).
      samples: 0 for tubelets; otherwise the number of uniformly sampled frames, whose patches are
        tubelets of one frame.
      model: a row of `ATTENTIONS`.
      temporal_depth: layers of the factorised encoder's second transformer.
      pool: "token" or "mean". Models 3 and 4 have no class token (section 3.3).
      epsilon: of the norms.
      unroll, remat, gather: do not change the parameters.

    Raises `UserError` for a model, pool or video that is not possible.
    """

    classes: int
    width: int
    depth: int
    heads: int
    patch: tuple[int, int, int] = (2, 16, 16)
    samples: int = 0
    model: str = "joint"
    temporal_depth: int = 4
    pool: str = "token"
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    epsilon: float = 1e-6
    attend: Attend = dot_product.attend
    unroll: int = 1
    remat: str = "none"
    matmul: Matmul = Matmul()
    gather: Gather = None

    def setup(self) -> None:
        check(self.model, self.pool, self.patch, self.samples)
        options = {
            "attentions": ATTENTIONS[self.model], "heads": self.heads,
            "mlp_ratio": self.mlp_ratio, "activation": self.activation, "epsilon": self.epsilon,
            "attend": self.attend, "matmul": self.matmul,
        }  # fmt: skip
        run = {"unroll": self.unroll, "remat": self.remat, "gather": self.gather}
        common = self.pool == "token", options, run
        self.embed_video = Linear(self.width, matmul=self.matmul)
        self.encoder = Encoder(self.depth, *common)
        if self.model == "factorised_encoder":
            self.temporal = Encoder(self.temporal_depth, *common)
        self.head = Linear(self.classes, kernel_init=zeros, matmul=self.matmul.float32)

    def position_grid(self, frames: int, height: int, width: int) -> Grid:
        """The grid of the first transformer's learned positions."""
        t, h, w = (
            n // p for n, p in zip((self.samples or frames, height, width), self.patch, strict=True)
        )
        return (1 if self.model == "factorised_encoder" else t), h, w

    def features(self, video_BTHWC: jax.Array) -> Features:
        """The tokens, and the pooled features that the head classifies."""
        if self.samples:
            video_BTHWC = sample_frames(video_BTHWC, self.samples)
        shape = video_BTHWC.shape[1:4]
        t, h, w = (n // p for n, p in zip(shape, self.patch, strict=True))
        grid = t, h, w
        if min(grid) < 1:
            raise UserError(
                f"vivit: a video of {shape} frames, rows, columns is less than a tubelet of"
                f" {self.patch}"
            )
        whole = tuple(slice(n * p) for n, p in zip(grid, self.patch, strict=True))
        x_BthwD = self.embed_video(patchify(video_BTHWC[(slice(None), *whole)], self.patch))
        if self.model == "factorised_encoder":
            rows, frame = self.encoder(rearrange(x_BthwD, "B t h w D -> (B t) (h w) D"), (1, h, w))
            _, pooled = self.temporal(rearrange(frame, "(B t) D -> B t D", t=t), (t, 1, 1))
            return Features(rearrange(rows, "(B t) (h w) D -> B t h w D", t=t, h=h), pooled)
        tokens, pooled = self.encoder(rearrange(x_BthwD, "B t h w D -> B (t h w) D"), grid)
        return Features(rearrange(tokens, "B (t h w) D -> B t h w D", t=t, h=h), pooled)

    def __call__(self, video_BTHWC: jax.Array) -> jax.Array:
        return self.head(self.features(video_BTHWC).pooled)


def check(model: str, pool: str, patch: tuple[int, int, int], samples: int) -> None:
    """Validates a ViViT's model, pooling and tubelets."""
    if model not in ATTENTIONS:
        raise UserError(f"vivit model {model!r}: known are {', '.join(ATTENTIONS)}")
    if pool not in POOLS:
        raise UserError(f"vivit pool {pool!r}: known are {', '.join(POOLS)}")
    if pool == "token" and model in WITHOUT_TOKEN:
        raise UserError(f"vivit model {model} has no class token: only the pool mean is allowed")
    if samples and patch[0] != 1:
        raise UserError(
            f"vivit tubelets of {patch[0]} frames, {samples} sampled frames: sampled frames go"
            " with tubelets of one frame (such as 8x1), tubelets with samples 0"
        )
