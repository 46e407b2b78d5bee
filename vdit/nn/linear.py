"""Linear layers and norms.

Norms and activations save only what their gradients need; JAX's own derivatives save up to five
arrays each. A scanned stack saves them for all its layers, and moving them is a large part of a
training step.

Dimension key: ... any leading axes, D features in, F features out.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit.nn import lora
from vdit.nn.product import Matmul, product

Initializer = Callable[..., jax.Array]
xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


class Linear(nn.Module):
    """x_D @ kernel_DF + bias_F, over flattened leading axes where that is fast (`Matmul.rows`).

    Operands are cast to `matmul.dtype`; sums and the result are float32. A low-rank adapter beside
    the kernel, or the scale of an int8 kernel (`vdit.nn.lora`), is applied apart.
    `window`: the axes that D is stored as: (q, r, C), a convolution's kernel, for patches.
    """

    features: int
    use_bias: bool = True
    kernel_init: Initializer = xavier
    bias_init: Initializer = zeros
    matmul: Matmul = Matmul()
    window: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)

        def init(key: jax.Array) -> jax.Array:
            kernel = self.kernel_init(key, shape, jnp.float32)
            return kernel.reshape(*(self.window or shape[:1]), self.features)

        kernel, rows = self.param("kernel", init).reshape(shape), self.matmul.rows(x)
        scale: Any = self.get_variable("params", lora.SCALE)  # of an int8 kernel
        if scale is not None:
            kernel = kernel.astype(self.matmul.dtype)
        out = product(rows, kernel, self.matmul)
        if scale is not None:
            out = out * scale.reshape((1,) * (out.ndim - 1) + (-1,))
        if self.has_variable("params", lora.DOWN):
            down, up = lora.factors(self)
            low = product(rows, down.reshape(shape[0], -1), self.matmul)
            out = out + product(low, up, self.matmul)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
            out = out + bias.reshape((1,) * (out.ndim - 1) + (-1,))
        return out.reshape(*x.shape[:-1], self.features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _normalize(x: jax.Array, epsilon: float, centre: bool) -> jax.Array:
    """x / rms(x) over the last axis, in float32, with `centre` of x - mean(x)."""
    return _normalize_forward(x, epsilon, centre)[0]


def _normalize_forward(x: jax.Array, epsilon: float, centre: bool) -> tuple[jax.Array, Any]:
    wide = x.astype(jnp.float32)
    if centre:
        wide = wide - wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + epsilon)
    normed = wide * inverse
    return normed, (normed, inverse, jnp.zeros((), x.dtype))


def _normalize_backward(
    epsilon: float, centre: bool, saved: Any, gradient: jax.Array
) -> tuple[jax.Array]:
    """The gradient minus its projection onto the output, and with `centre` minus its mean."""
    normed, inverse, like = saved
    to_x = gradient - normed * (gradient * normed).mean(-1, keepdims=True)
    if centre:
        to_x = to_x - gradient.mean(-1, keepdims=True)
    return ((to_x * inverse).astype(like.dtype),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Layer norm over the last axis without scale and bias, in float32, as adaLN needs it."""
    return _normalize(x, epsilon, True)


class LayerNorm(nn.Module):
    """Layer norm over the last axis with scale and bias, in float32 (Ba et al. 2016)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, wide = x.shape[-1:], (1,) * (x.ndim - 1) + (-1,)
        scale = self.param("scale", nn.initializers.ones_init(), shape, jnp.float32)
        bias = self.param("bias", zeros, shape, jnp.float32)
        return layer_norm(x, self.epsilon) * scale.reshape(wide) + bias.reshape(wide)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich 2019)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        return _normalize(x, self.epsilon, False) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def relu_squared(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (So et al. 2021, Primer)."""
    return jnp.square(nn.relu(x))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: nn.gelu(x, approximate=False),  # the definition (arXiv:1606.08415)
    "silu": nn.silu,
    "relu2": relu_squared,
}


class MLP(nn.Module):
    """Two linear layers with an activation between: `up` (D, F), `down` (F, `features` or D).

    `gated`: `up` is (D, 2 F), and the activation of its second half scales the first (Shazeer 2020,
    arXiv:2002.05202; with gelu_erf its GEGLU).
    """

    hidden: int
    activation: str = "gelu"
    down_init: Initializer = xavier
    matmul: Matmul = Matmul()
    features: int = 0  # of the output; 0: as many as of the input
    gated: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = self.features or x.shape[-1]
        inner = 2 * self.hidden if self.gated else self.hidden
        activation = ACTIVATIONS[self.activation]

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def activated(hidden: jax.Array) -> jax.Array:
            if not self.gated:
                return activation(hidden)
            value, gate = jnp.split(hidden, 2, axis=-1)
            return value * activation(gate)

        hidden = activated(Linear(inner, matmul=self.matmul, name="up")(self.matmul.rows(x)))
        out = Linear(features, kernel_init=self.down_init, matmul=self.matmul, name="down")(hidden)
        return out.reshape(*x.shape[:-1], features)
