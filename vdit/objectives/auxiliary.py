"""Auxiliary losses of a denoiser: what its hidden tokens or its outputs must also predict.

A row of `AUXILIARY` is a function that gives an `Auxiliary`; `dit.auxiliary` chooses rows by name
and weighs them.

Dimension key: B batch rows, L tokens, C token channels, F features of a target, N bodies.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vdit.denoiser import Denoised, Denoiser, Network
from vdit.diffusion.bound import bound
from vdit.errors import UserError
from vdit.nn.linear import MLP, layer_norm
from vdit.tokens import Condition, Layout


class Drawn(NamedTuple):
    """A batch as a denoiser learns from it: dense or packed rows, with all that is random."""

    x0: jax.Array  # (B, L, C)
    eps: jax.Array  # (B, L, C)
    t: jax.Array  # (B,), or (B, M) of the samples of packed rows
    layout: Layout
    condition: Condition
    targets: Mapping[str, jax.Array] = {}  # (B, L, ...) of each token, by name of the batch's entry


class Auxiliary(NamedTuple):
    """loss(params, denoised, drawn) -> the error of each token (B, L, 1) or element (B, L, C).

    It is added, by its weight, to the error of the prediction, and its mean over wanted tokens is
    the metric of its name. `init(key, denoised, drawn)` makes the parameters that only it has: they
    train beside the denoiser in the group "auxiliary", and sampling leaves them out.
    """

    loss: Callable[[Any, Denoised, Drawn], jax.Array]
    init: Callable[[jax.Array, Denoised, Drawn], Any] | None = None
    hidden: tuple[int, ...] = ()  # layers whose output tokens it reads from denoised.hidden
    # Entries of the batch that it reads from drawn.targets: for dense batches (B, stored, h, w, F)
    # as "latent" is stored, with h and w in tokens, or (B, stored, N, F), the same for all tokens
    # of a latent frame; for packed rows (B, L, ...) as "tokens".
    targets: tuple[str, ...] = ()
    metric: bool = True


class Weighted(NamedTuple):
    """A row and the weight of its loss."""

    name: str
    row: Auxiliary
    weight: float


BLUR = 0.7  # tokens: deviation of the Gaussian round a body's centre
DENSITY = 0.1  # bodies a token, for which the target's channels have deviations of about 1
MOTION = 2.0  # further factor of offsets and velocities


def truth_target(truth_BLNF: jax.Array, layout: Layout, patch: tuple[int, int]) -> jax.Array:
    """What a simulator knows of the place of each token, (B, L, F).

    `truth_BLNF` is `data.sources.DataSource.truth` at the token's time, places in latents, of which
    a token has `patch` rows and columns. Each body has a Gaussian round its centre, times [1, its
    offset from the token's middle (2), its velocity (2), what else is known].
    """
    there, place, velocity, known = jnp.split(truth_BLNF, (1, 3, 5), axis=-1)
    middle = layout.position[:, :, None, 1:] + 0.5
    offset = place / jnp.array(patch, jnp.float32).reshape(1, 1, 1, 2) - middle
    near = there * jnp.exp(-jnp.square(offset / BLUR).sum(-1, keepdims=True) / 2)
    # Over the plane the mean square of near is density * pi * BLUR^2, and weighted with that, the
    # mean square of an offset is BLUR^2 / 2.
    moved = MOTION * jnp.concatenate([offset * (math.sqrt(2) / BLUR), velocity], axis=-1)
    values = jnp.concatenate([jnp.ones_like(near), moved, known], axis=-1)
    return (near * values).sum(2) / math.sqrt(DENSITY * math.pi * BLUR**2)


def truth(layer: int) -> Auxiliary:
    """What the simulator knows of a token's place, by a two-layer MLP from the tokens after a
    layer; for clips of a source with `truth`."""

    def target(denoised: Denoised, drawn: Drawn) -> jax.Array:
        return truth_target(drawn.targets["truth"], drawn.layout, denoised.denoiser.patch)

    def head(denoised: Denoised, drawn: Drawn) -> MLP:
        width, features = denoised.hidden[layer].shape[-1], drawn.targets["truth"].shape[-1]
        return MLP(2 * width, "gelu", features=features)

    def init(key: jax.Array, denoised: Denoised, drawn: Drawn) -> Any:
        return head(denoised, drawn).init(key, layer_norm(denoised.hidden[layer]))["params"]

    def loss(params: Any, denoised: Denoised, drawn: Drawn) -> jax.Array:
        tokens = layer_norm(denoised.hidden[layer])
        guess: Any = head(denoised, drawn).apply({"params": params}, tokens)
        error = jnp.square(guess - target(denoised, drawn))
        return error.mean(-1, keepdims=True)

    return Auxiliary(loss, init, hidden=(layer,), targets=("truth",))


# Each takes the number of a layer, from 1.
AUXILIARY: dict[str, Callable[[int], Auxiliary]] = {"truth": truth}


def auxiliary(chosen: Sequence[tuple[Any, ...]], network: Network) -> list[Weighted]:
    """The rows of (name, weight) or (name, weight, layer); without a layer, the one at half of the
    depth. One with weight 0 is left out. Raises `UserError`."""
    rows: list[Weighted] = []
    half = max(1, network.layers // 2)
    for each in chosen:
        name, weight, layer = (*each, half)[:3] if len(each) in (2, 3) else ("", -1, half)
        if isinstance(weight, str) or not weight >= 0 or type(layer) is not int:
            allowed = "(NAME, WEIGHT of 0 or more) or (NAME, WEIGHT, LAYER) is allowed"
            raise UserError(f"dit.auxiliary has {each!r}: {allowed}")
        if name not in AUXILIARY or name in [row.name for row in rows]:
            known = ", ".join(AUXILIARY) or "none"
            raise UserError(f"dit.auxiliary={name!r}: known are {known}, each may be named once")
        row = AUXILIARY[name](layer)
        if row.hidden and not 1 <= min(row.hidden) <= max(row.hidden) <= network.layers:
            raise UserError(
                f"dit.auxiliary={name!r} reads the tokens after layers {row.hidden}: the denoiser"
                f" gives those of {network.layers} layers"
            )
        rows.append(Weighted(name, row, float(weight)))
    return [row for row in rows if row.weight]


def hidden_layers(rows: Sequence[Weighted]) -> tuple[int, ...]:
    """The layers whose output tokens the losses read."""
    return tuple(sorted({layer for _, row, _ in rows for layer in row.hidden}))


def target_names(rows: Sequence[Weighted]) -> tuple[str, ...]:
    """The entries of a batch that the losses read."""
    return tuple(dict.fromkeys(name for _, row, _ in rows for name in row.targets))


def variance_bound(denoiser: Denoiser) -> list[Weighted]:
    """.001 L_vlb, estimated at the same times, of a network with learned variance (Nichol and
    Dhariwal 2021, Eq. 16)."""
    if not denoiser.network.learned_variance:
        return []

    def loss(params: Any, denoised: Denoised, drawn: Drawn) -> jax.Array:
        assert denoised.share is not None
        return bound(denoiser.process, denoised.t, drawn.x0, denoised.x0, denoised.share)

    weight = 1e-3 * (denoiser.process.points or 0)
    return [Weighted("bound", Auxiliary(loss, metric=False), weight)]
