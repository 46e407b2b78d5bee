"""Causal convolutions over video, and the blocks of convolutional autoencoders.

Every layer is `(x_BTHWC, state) -> (x, state)`. The state carries what the layer needs of the
frames before (None at the start of a clip), so a clip can be streamed in chunks; that of a layer
that sees one frame at a time is ().

A convolution over time is a 2D convolution of frames that are stacked along channels: on a CPU
three times as fast as XLA's 3D convolution, forward and backward.

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

from vdit.nn import dot_product, lora
from vdit.nn.attention import Attend
from vdit.nn.linear import Initializer, Linear, RMSNorm, zeros
from vdit.nn.product import Matmul

State = Any  # a pytree of arrays; None at the start of a clip
Layer = Callable[[jax.Array, State], tuple[jax.Array, State]]
Pads = tuple[int, int]  # before and after, of rows and of columns alike


def chain(layers: Sequence[Layer], x: jax.Array, state: State) -> tuple[jax.Array, State]:
    """Layers in sequence; the state is a tuple of theirs."""
    states = (None,) * len(layers) if state is None else state
    new_states = []
    for layer, old in zip(layers, states, strict=True):
        x, new = layer(x, old)
        new_states.append(new)
    return x, tuple(new_states)


def _convolve(
    x_NHWC: jax.Array, kernel_HWCF: jax.Array, stride: int, pads: Pads, result: Any
) -> jax.Array:
    kinds: Any = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "preferred_element_type": result}
    return jax.lax.conv_general_dilated(x_NHWC, kernel_HWCF, (stride,) * 2, (pads,) * 2, **kinds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(
    x_NHWC: jax.Array, kernel_HWCF: jax.Array, stride: int, pads: Pads, dtype: Any
) -> jax.Array:
    """A 2D convolution of operands cast to `dtype`, summed and returned in float32.

    In the gradient the cotangent is cast too, as in `vdit.nn.product.product`.
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
    """A convolution over `time` frames, unpadded, and `space` x `space` pixels, padded.

    T frames become 1 + (T - time) // step (`causal` prepends the frames before the first). The
    kernel is (time, space, space, C, F), without its first axis where `time` is 1.
    """

    features: int
    time: int = 1
    space: int = 3
    step: int = 1  # in time
    stride: int = 1  # in space
    matmul: Matmul = Matmul()
    symmetric: bool = False  # strided: padding on all sides, not at the right and bottom alone
    kernel_init: Initializer | None = None  # None: LeCun normal

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        batch, frames, _, _, width = x_BTHWC.shape
        taps = (self.time,) if self.time > 1 else ()
        shape = (*taps, self.space, self.space, width, self.features)
        lecun = nn.initializers.lecun_normal(in_axis=tuple(range(len(shape) - 1)))
        kernel = self.param("kernel", self.kernel_init or lecun, shape, jnp.float32)
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        if self.has_variable("params", lora.DOWN):
            kernel = kernel + lora.product(*lora.factors(self))
        if self.time > 1:
            count = max(1 + (frames - self.time) // self.step, 0)
            reach = (count - 1) * self.step + 1 if count else 0
            parts = [x_BTHWC[:, i : i + reach : self.step] for i in range(self.time)]
            x_BTHWC = jnp.concatenate(parts, axis=-1)
            kernel = rearrange(kernel, "K H W C F -> H W (K C) F")
        x_NHWC = x_BTHWC.reshape(-1, *x_BTHWC.shape[2:])
        pad = self.space // 2
        pads = (pad, pad) if self.stride == 1 or self.symmetric else (0, pad)
        out = convolve(x_NHWC, kernel, self.stride, pads, self.matmul.dtype)
        out = out + bias[None, None, None]
        return out.reshape(batch, -1, *out.shape[1:])


def causal(conv: Conv, x_BTHWC: jax.Array, state: State) -> tuple[jax.Array, State]:
    """`conv` of each frame and those before it (zeros before the clip): as many as came in."""
    reach = conv.time - 1
    if not reach:
        return conv(x_BTHWC), ()
    batch, _, *rest = x_BTHWC.shape
    past = jnp.zeros((batch, reach, *rest), x_BTHWC.dtype) if state is None else state
    x_BTHWC = jnp.concatenate([past, x_BTHWC], axis=1)
    return conv(x_BTHWC), x_BTHWC[:, -reach:]


class GroupNorm(nn.Module):
    """Group norm (Wu and He 2018) of each frame, in float32."""

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
    """Group norm, or RMS norm over channels where `groups` is 0.

    The latter's epsilon vanishes beside any activation, yet keeps the gradient at 0 finite.
    """
    return GroupNorm(groups, epsilon, name=name) if groups else RMSNorm(1e-12, name=name)


class NormConv(nn.Module):
    """Norm, SiLU, causal convolution: half of a residual block, or the head of a network."""

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
    """A residual block: two `NormConv`s, and a linear shortcut where the width changes.

    Between the two a linear map of `embedding_BE` (a noise level's) is added, if given.
    """

    features: int
    time: int  # frames that each of its kernels sees
    groups: int
    matmul: Matmul = Matmul()
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, x_BTHWC: jax.Array, state: State, embedding_BE: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        kinds = self.features, self.time, self.groups, self.matmul, self.epsilon
        layers: list[Layer] = [NormConv(*kinds, name=f"half{i}") for i in range(2)]
        if embedding_BE is not None:
            bias_BF = Linear(self.features, matmul=self.matmul, name="told")(embedding_BE)
            layers.insert(1, lambda x, state: (x + bias_BF[:, None, None, None], ()))
        out, state = chain(layers, x_BTHWC, state)
        if x_BTHWC.shape[-1] != self.features:
            x_BTHWC = Linear(self.features, matmul=self.matmul, name="shortcut")(x_BTHWC)
        return x_BTHWC + out, state


class FrameAttention(nn.Module):
    """Single-head attention within each frame, with a residual connection."""

    groups: int
    fused: bool  # one kernel for queries, keys and values
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


class Downsample(nn.Module):
    """Halves height and width, and with `time` the frame rate: 1 + 2k frames become 1 + k.

    The first frame of a clip stays by itself in time; then each two become one, which also sees the
    frame before them.
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


class Upsample(nn.Module):
    """Doubles height and width, and with `time` the frame rate: 1 + k frames become 1 + 2k.

    The first frame of a clip stays one frame, and those after it do not see it in time.
    """

    features: int
    time: bool
    matmul: Matmul = Matmul()

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, state: State) -> tuple[jax.Array, State]:
        x, new_state = x_BTHWC, ()
        if self.time:
            split = 1 if state is None else 0
            double = Conv(2 * x.shape[-1], time=3, space=1, matmul=self.matmul, name="time")
            more, new_state = causal(double, x[:, split:], state)
            more = rearrange(more, "B T H W (p C) -> B (T p) H W C", p=2)
            x = jnp.concatenate([x[:, :split], more], axis=1)
        x = x.repeat(2, axis=2).repeat(2, axis=3)
        return Conv(self.features, matmul=self.matmul, name="conv")(x), new_state


def averaged(
    x_BTHWC: jax.Array, features: int, factors: tuple[int, int, int], begins: bool
) -> jax.Array:
    """Parameter-free downsampling: space and time to channels, averaged in groups to `features`.

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
    """Parameter-free upsampling, the inverse of `averaged`: channels, repeated, to space and time.

    At the start of a clip the first frame becomes one frame.
    """
    p, q, r = factors
    x = x_BTHWC.repeat(features * p * q * r // x_BTHWC.shape[-1], axis=-1)
    x = rearrange(x, "B T H W (F p q r) -> B (T p) (H q) (W r) F", p=p, q=q, r=r)
    return x[:, p - 1 :] if begins else x
