"""Convolutions in space, causal in time, and the blocks of convolutional autoencoders.

A layer here takes x_BTHWC and what the frames before it left, None at the start of a clip, and
gives its output and what it leaves itself: `(x, state) -> (x, state)`. So a clip may come in
chunks. A layer that sees one frame at a time leaves ().

A convolution over time is one over space of frames that bring the frames before them along as
channels: on a CPU three times as fast as XLA's convolution in three dimensions, forward and back.

Dimension key: B batch, T frames, H height, W width, C channels, F features out; N frames of all
clips, L places of a frame; K taps in time, p q r factors in (t, h, w).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vdit.nn import dot_product
from vdit.nn.attention import Attend
from vdit.nn.linear import Initializer, Linear, RMSNorm, zeros
from vdit.nn.product import Matmul

State = Any  # a pytree of arrays; None at the start of a clip
Layer = Callable[[jax.Array, State], tuple[jax.Array, State]]
Pads = tuple[int, int]  # before and after, of rows and of columns alike


def chain(layers: Sequence[Layer], x: jax.Array, state: State) -> tuple[jax.Array, State]:
    """Layers one after another, each with its own part of the state."""
    states = (None,) * len(layers) if state is None else state
    after = []
    for layer, before in zip(layers, states, strict=True):
        x, left = layer(x, before)
        after.append(left)
    return x, tuple(after)


def _convolve(
    x_NHWC: jax.Array, kernel_HWCF: jax.Array, stride: int, pads: Pads, result: Any
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_NHWC,
        kernel_HWCF,
        (stride, stride),
        (pads, pads),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=result,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(
    x_NHWC: jax.Array, kernel_HWCF: jax.Array, stride: int, pads: Pads, dtype: Any
) -> jax.Array:
    """A convolution in space of operands cast to `dtype`, summed and returned in float32.

    In its gradient the cotangent is cast as well, as in `vdit.nn.product.product`.
    """
    return _convolve(x_NHWC.astype(dtype), kernel_HWCF.astype(dtype), stride, pads, jnp.float32)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, dtype: Any
) -> tuple[jax.Array, Any]:
    narrow = x.astype(dtype), kernel.astype(dtype)
    return _convolve(*narrow, stride, pads, jnp.float32), (*narrow, jnp.zeros((), x.dtype))


def _backward(
    stride: int, pads: Pads, dtype: Any, saved: Any, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel, like = saved
    _, pull = jax.vjp(lambda x, kernel: _convolve(x, kernel, stride, pads, dtype), x, kernel)
    to_x, to_kernel = pull(gradient.astype(dtype))
    return to_x.astype(like.dtype), to_kernel.astype(jnp.float32)


convolve.defvjp(_forward, _backward)


class Conv(nn.Module):
    """A convolution over `time` frames (none of them made up) and `space` x `space` pixels.

    T frames become 1 + (T - time) // step: `causal` puts the frames before the first in front. The
    kernel is (time, space, space, C, F), or without its first axis where `time` is 1.
    """

    features: int
    time: int = 1
    space: int = 3
    step: int = 1  # in time
    stride: int = 1  # in space
    matmul: Matmul = Matmul()
    margins: bool = False  # halving: on all sides
    kernel_init: Initializer | None = None  # None: LeCun's

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        batch, frames, _, _, width = x_BTHWC.shape
        taps = (self.time,) if self.time > 1 else ()
        shape = (*taps, self.space, self.space, width, self.features)
        lecun = nn.initializers.lecun_normal(in_axis=tuple(range(len(shape) - 1)))
        kernel = self.param("kernel", self.kernel_init or lecun, shape, jnp.float32)
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        if self.time > 1:
            count = max(1 + (frames - self.time) // self.step, 0)
            reach = (count - 1) * self.step + 1 if count else 0
            parts = [x_BTHWC[:, i : i + reach : self.step] for i in range(self.time)]
            x_BTHWC = jnp.concatenate(parts, axis=-1)
            kernel = rearrange(kernel, "K H W C F -> H W (K C) F")
        x_NHWC = x_BTHWC.reshape(-1, *x_BTHWC.shape[2:])
        # Halving looks at the right and lower neighbour, as a rule with no margin before the first.
        margin = self.space // 2
        pads = (margin, margin) if self.stride == 1 or self.margins else (0, margin)
        out = convolve(x_NHWC, kernel, self.stride, pads, self.matmul.dtype)
        out = out + bias[None, None, None]
        return out.reshape(batch, -1, *out.shape[1:])


def causal(conv: Conv, x_BTHWC: jax.Array, state: State) -> tuple[jax.Array, State]:
    """As many frames as came in: each sees itself and those before, which are 0 before the clip."""
    reach = conv.time - 1
    if not reach:
        return conv(x_BTHWC), ()
    batch, _, *rest = x_BTHWC.shape
    past = jnp.zeros((batch, reach, *rest), x_BTHWC.dtype) if state is None else state
    x_BTHWC = jnp.concatenate([past, x_BTHWC], axis=1)
    return conv(x_BTHWC), x_BTHWC[:, -reach:]


class GroupNorm(nn.Module):
    """Each frame and each of `groups` shares of its channels normed in float32 (Wu and He 2018)."""

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        shape, wide = x_BTHWC.shape[-1:], (1, 1, 1, 1, -1)
        scale = self.param("scale", nn.initializers.ones_init(), shape, jnp.float32)
        bias = self.param("bias", zeros, shape, jnp.float32)
        x = rearrange(x_BTHWC.astype(jnp.float32), "B T H W (G c) -> B T H W G c", G=self.groups)
        axes = (2, 3, 5)
        x = x - x.mean(axes, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + self.epsilon)
        return x.reshape(x_BTHWC.shape) * scale.reshape(wide) + bias.reshape(wide)


def norm(groups: int, name: str, epsilon: float = 1e-6) -> nn.Module:
    """Group norm with that epsilon, or RMS norm over channels where there are no groups.

    The latter's epsilon is so small that x / |x| is exact for what a network sees, and no smaller,
    for its gradient at 0.
    """
    return GroupNorm(groups, epsilon, name=name) if groups else RMSNorm(1e-12, name=name)


class Head(nn.Module):
    """Norm, SiLU and a causal convolution: a half of a residual block, or the end of a network."""

    features: int
    time: int
    groups: int
    matmul: Matmul = Matmul()
    epsilon: float = 1e-6
    kernel_init: Initializer | None = None

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, state: State) -> tuple[jax.Array, State]:
        x = nn.silu(norm(self.groups, "norm", self.epsilon)(x_BTHWC))
        kinds: dict[str, Any] = {"matmul": self.matmul, "kernel_init": self.kernel_init}
        return causal(Conv(self.features, self.time, **kinds, name="conv"), x, state)


class ResBlock(nn.Module):
    """Two heads beside the identity, or beside a linear map where the width changes.

    Between them a linear map of `told_BE` is added, where there is any.
    """

    features: int
    time: int  # frames that each of its kernels sees
    groups: int
    matmul: Matmul = Matmul()
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, x_BTHWC: jax.Array, state: State, told_BE: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        kinds = self.features, self.time, self.groups, self.matmul, self.epsilon
        layers: list[Layer] = [Head(*kinds, name=f"half{i}") for i in range(2)]
        if told_BE is not None:
            told = Linear(self.features, matmul=self.matmul, name="told")(told_BE)
            layers.insert(1, lambda x, state: (x + told[:, None, None, None], ()))
        out, state = chain(layers, x_BTHWC, state)
        if x_BTHWC.shape[-1] != self.features:
            x_BTHWC = Linear(self.features, matmul=self.matmul, name="shortcut")(x_BTHWC)
        return x_BTHWC + out, state


class FrameAttention(nn.Module):
    """Attention over the places of each frame, with one head, beside the identity."""

    groups: int
    fused: bool  # whether one kernel makes queries, keys and values
    attend: Attend = dot_product.attend
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, state: State) -> tuple[jax.Array, State]:
        del state
        width = x_BTHWC.shape[-1]
        x_NLC = norm(self.groups, "norm")(x_BTHWC).reshape(-1, *x_BTHWC.shape[2:])
        x_NLC = rearrange(x_NLC, "N H W C -> N (H W) C")
        linear = functools.partial(Linear, matmul=self.matmul)
        if self.fused:
            q, k, v = jnp.split(linear(3 * width, name="qkv")(x_NLC), 3, axis=-1)
        else:
            q, k, v = (linear(width, name=name)(x_NLC) for name in "qkv")
        heads = (part.astype(self.matmul.dtype)[:, :, None] for part in (q, k, v))
        out = linear(width, name="o")(self.attend(*heads, None, None)[:, :, 0])
        return x_BTHWC + out.reshape(x_BTHWC.shape), ()


class Down(nn.Module):
    """Half the height and width, and, where `time` is true, the rate.

    The first frame of a clip stays as it is in time; then each two become one, which sees the one
    before them: 1 + 2k frames become 1 + k.
    """

    time: bool
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, state: State) -> tuple[jax.Array, State]:
        width = x_BTHWC.shape[-1]
        x = Conv(width, stride=2, matmul=self.matmul, name="conv")(x_BTHWC)
        if not self.time:
            return x, ()
        halve = Conv(width, time=3, space=1, step=2, matmul=self.matmul, name="time")
        last = x[:, -1:]
        if state is None:
            return jnp.concatenate([x[:, :1], halve(x)], axis=1), last
        return halve(jnp.concatenate([state, x], axis=1)), last


class Up(nn.Module):
    """Twice the height and width, and, where `time` is true, the rate: 1 + k frames give 1 + 2k.

    The first frame of a clip stays alone, and those that follow do not see it in time.
    """

    features: int
    time: bool
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, state: State) -> tuple[jax.Array, State]:
        x, left = x_BTHWC, ()
        if self.time:
            split = 1 if state is None else 0
            double = Conv(2 * x.shape[-1], time=3, space=1, matmul=self.matmul, name="time")
            more, left = causal(double, x[:, split:], state)
            more = rearrange(more, "B T H W (p C) -> B (T p) H W C", p=2)
            x = jnp.concatenate([x[:, :split], more], axis=1)
        x = x.repeat(2, axis=2).repeat(2, axis=3)
        return Conv(self.features, matmul=self.matmul, name="conv")(x), left


def averaged(
    x_BTHWC: jax.Array, features: int, factors: tuple[int, int, int], begins: bool
) -> jax.Array:
    """Space and time folded into channels, of which groups are averaged to `features`.

    At the start of a clip the first frame is folded with zeros before it.
    """
    p, q, r = factors
    if begins:
        x_BTHWC = jnp.pad(x_BTHWC, ((0, 0), (p - 1, 0), (0, 0), (0, 0), (0, 0)))
    fold = "B (T p) (H q) (W r) C -> B T H W (C p q r)"
    x = rearrange(x_BTHWC, fold, p=p, q=q, r=r)
    return rearrange(x, "B T H W (F g) -> B T H W F g", F=features).mean(-1)


def duplicated(
    x_BTHWC: jax.Array, features: int, factors: tuple[int, int, int], begins: bool
) -> jax.Array:
    """Channels repeated to make up `features` of larger space and time; the inverse of `averaged`.

    At the start of a clip the first frame gives one alone.
    """
    p, q, r = factors
    x = x_BTHWC.repeat(features * p * q * r // x_BTHWC.shape[-1], axis=-1)
    x = rearrange(x, "B T H W (F p q r) -> B (T p) (H q) (W r) F", p=p, q=q, r=r)
    return x[:, p - 1 :] if begins else x
