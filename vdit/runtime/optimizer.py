"""Optimizers, and the exponential moving average (EMA) of parameters.

`adamw` and `muon`, each with clipping, warmup and a schedule. Muon orthogonalises the momentum of
weight matrices; a stacked kernel (layers, in, out) is one matrix a layer. All other parameters are
AdamW's.

Dimension key: I in, O out of a kernel; M <= N the sides of a matrix after transposition.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vdit.errors import UserError
from vdit.nn.product import Matmul, dot, transposed
from vdit.runtime.mesh import map_paths

# Muon's matrices: kernels of attention and MLP, stacked, and the autoencoder's maps of patches to
# tokens and back, unstacked (by Adam it lost half a decibel at equal time). Modulation (whose
# gradient has the rank of the few conditions in a batch), text embeddings, norms and biases are
# AdamW's.
MATRICES = {
    3: re.compile(r"(^|/)blocks/(.*/)?(q|k|v|o|up|down)/kernel$"),
    2: re.compile(
        r"(^|/)(embed_video|embed_latent|moments|pixels|detail_pixels/(up|down))/kernel$"
    ),
}

# Odd quintics a x + b x^3 + c x^5 whose composition takes singular values in [floor, 1] nearest
# to 1: minimax, one after the other (Polar Express, arXiv:2505.16932), for floors of 1e-2, 3e-3 and
# 1e-3. Iterations -> coefficients; the results lie within 1 +- 0.27, 0.20, 0.12.
Quintic = tuple[float, float, float]
NEWTON_SCHULZ: dict[int, tuple[Quintic, ...]] = {
    3: ((8.0934, -23.6205, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)),
    4: (
        (8.3837, -24.7659, 18.3571), (4.0434, -3.0114, 0.5695), (3.5056, -2.6267, 0.5257),
        (2.4901, -1.8343, 0.4368),
    ),
    5: (
        (8.4703, -25.1082, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074), (2.2737, -1.6447, 0.4162),
    ),
}  # fmt: skip
SAFETY = 1.01  # the quintics explode just above their interval: room for bfloat16's rounding


# --------------------------------------------------------------------------------------------------
# Schedules: a factor on the learning rate

SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": jnp.ones_like,
}


def make_schedule(name: str, steps: int, warmup: int) -> optax.Schedule:
    """step -> factor in (0, 1]: a linear rise over `warmup` steps, then `name` down to `steps`."""
    if name not in SCHEDULES:
        raise UserError(f"schedule {name!r} is unknown: known are {', '.join(SCHEDULES)}")
    if not 0 <= warmup < max(steps, 1):
        raise UserError(
            f"warmup of {warmup} steps: allowed are 0 to {steps - 1}, for {steps} steps"
        )

    def factor(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        return rise * SCHEDULES[name](jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1))

    return factor


# --------------------------------------------------------------------------------------------------
# Muon


def is_matrix(path: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the leaf at `path` ("a/b/c") is one of `MATRICES`."""
    return leaf.ndim in MATRICES and MATRICES[leaf.ndim].search(path) is not None


def orthogonalize(x: jax.Array, iterations: int = 3, matmul: Matmul = Matmul()) -> jax.Array:
    """The polar factor of each matrix of x (..., I, O), to the accuracy of `NEWTON_SCHULZ`.

    `matmul` has the dtype of the products' operands; sums and the result are float32. This is the
    Newton-Schulz iteration of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Its
    first products also bound the largest singular value, much closer than the Frobenius norm does,
    by the Schatten 8-norm ||(x x^T)^2||_F^(1/4); with the coefficients that saves two iterations of
    five.
    """
    if x.shape[-2] > x.shape[-1]:  # the smaller side on the left: products of M x M
        return orthogonalize(x.mT, iterations, matmul).mT

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return dot(a.astype(matmul.dtype), b.astype(matmul.dtype), matmul.on_cpu)

    norm = functools.partial(jnp.linalg.norm, axis=(-2, -1), keepdims=True)
    x = x / jnp.maximum(norm(x), 1e-12)
    coefficients = NEWTON_SCHULZ[iterations]
    for i, (a, b, c) in enumerate(coefficients):
        s = SAFETY if i < len(coefficients) - 1 else 1.0
        gram = product(x, transposed(x.astype(matmul.dtype), matmul.on_cpu))
        gram2 = product(gram, gram)
        if i == 0:
            bound = jnp.maximum(norm(gram2) ** 0.25, 1e-3)  # below that only for x = 0
            x, gram, gram2 = x / bound, gram / bound**2, gram2 / bound**4
        x = (a / s) * x + product((b / s**3) * gram + (c / s**5) * gram2, x)
    return x


class MuonState(NamedTuple):
    """The momentum, one array a parameter."""

    momentum: optax.Updates


def muon(
    *, momentum: float = 0.95, newton_schulz: int = 3, matmul: Matmul = Matmul()
) -> optax.GradientTransformation:
    """Muon's direction for a tree of (..., I, O) kernels: Nesterov momentum, orthogonalised.

    Scaled by sqrt(max(1, O / I)), so that one learning rate fits every shape. `newton_schulz` is
    the number of iterations, of products as `matmul` computes them.
    """
    if newton_schulz not in NEWTON_SCHULZ:
        known = ", ".join(map(str, NEWTON_SCHULZ))
        raise UserError(f"newton_schulz of {newton_schulz} iterations: allowed are {known}")

    def init(params: optax.Params) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        moved = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, updates)

        def direction(m: jax.Array, g: jax.Array) -> jax.Array:
            scale = math.sqrt(max(1.0, g.shape[-1] / g.shape[-2]))
            return scale * orthogonalize(momentum * m + g, newton_schulz, matmul)

        return jax.tree.map(direction, moved, updates), MuonState(moved)

    return optax.GradientTransformation(init, update)


# --------------------------------------------------------------------------------------------------
# The optimizers


def _decay(weight_decay: float) -> optax.GradientTransformation:
    """Decoupled weight decay (AdamW, arXiv:1711.05101) of kernels; none of norms and biases."""
    mask = functools.partial(map_paths, lambda path, leaf: path.endswith("kernel"))
    return optax.add_decayed_weights(weight_decay, mask)


# The transform of the gradients of matrices; its keyword arguments are the optimizer's options.
# None: AdamW's, as for all other parameters.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation] | None] = {
    "adamw": None,
    "muon": muon,
}


def make_optimizer(
    name: str, *, learning_rate: float, steps: int, adam_learning_rate: float | None = None,
    warmup: int = 0, schedule: str = "cosine", clip: float | None = 1.0, weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95), **options: Any,
) -> optax.GradientTransformation:  # fmt: skip
    """An optax transform that gives matrices to `name` of `OPTIMIZERS`, the rest to AdamW.

    `learning_rate` is the matrices' (see `is_matrix`), `adam_learning_rate` the rest's (None: with
    adamw the same, with muon a tenth). Both are peaks: after `warmup` the `schedule` brings them
    down over `steps` updates. `clip` bounds the gradients' global norm (None: not). `weight_decay`
    is per unit of learning rate, on kernels. `options` are the optimizer's own. Raises `UserError`
    for an unknown name, schedule or option.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer {name!r} is unknown: known are {', '.join(OPTIMIZERS)}")
    make = OPTIMIZERS[name]
    taken = inspect.signature(make).parameters if make else {}
    for option in options:
        if option not in taken:
            known = ", ".join(taken) or "no options of its own"
            raise UserError(f"optimizer {name} does not know {option!r}: it has {known}")
    factor = make_schedule(schedule, steps, warmup)
    if adam_learning_rate is None:
        adam_learning_rate = learning_rate / 10 if name == "muon" else learning_rate
    matrix = make(**options) if make else optax.scale_by_adam(*betas)

    def part(direction: optax.GradientTransformation, rate: float) -> Any:
        return optax.chain(direction, _decay(weight_decay), optax.scale(-rate))

    parts = {
        "matrix": part(matrix, learning_rate),
        "rest": part(optax.scale_by_adam(*betas), adam_learning_rate),
    }
    kinds = "rest", "matrix"
    label = functools.partial(map_paths, lambda path, leaf: kinds[is_matrix(path, leaf)])
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.partition(parts, label),
        optax.scale_by_schedule(factor),
    )


def ema_update(ema: Any, params: Any, decay: float, step: jax.typing.ArrayLike) -> Any:
    """The EMA after update number `step` (from 0): ema + (1 - d) (params - ema).

    d = min(decay, (1 + step) / (10 + step)), so that an early average is not the initial value.
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1 - d) * (p - e), ema, params)
