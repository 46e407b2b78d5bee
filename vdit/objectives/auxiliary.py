"""Auxiliary losses of a denoiser: what its hidden tokens or its outputs must also predict.

A row of `AUXILIARY` is a function that gives an `Auxiliary`; `dit.auxiliary` chooses rows by name
and weighs them.

Dimension key: B batch rows, L tokens, C token channels, F features of a target.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from vdit.denoiser import Denoised, Denoiser, Network
from vdit.diffusion.bound import bound
from vdit.errors import UserError
from vdit.tokens import Condition, Layout


class Drawn(NamedTuple):
    """A batch as a denoiser learns from it: dense or packed rows, with all that is random."""

    x0: jax.Array  # (B, L, C)
    eps: jax.Array  # (B, L, C)
    t: jax.Array  # (B,), or (B, M) of the samples of packed rows
    layout: Layout
    condition: Condition
    targets: Mapping[str, jax.Array] = {}  # (B, L, F) for each token, by name of the batch's entry


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
    # as "latent" is stored, with h and w in tokens; for packed rows (B, L, F) as "tokens".
    targets: tuple[str, ...] = ()
    metric: bool = True


class Weighted(NamedTuple):
    """A row and the weight of its loss."""

    name: str
    row: Auxiliary
    weight: float


AUXILIARY: dict[str, Callable[[], Auxiliary]] = {}


def auxiliary(chosen: Sequence[tuple[str, float]], network: Network) -> list[Weighted]:
    """The rows of (name, weight) pairs; one with weight 0 is left out. Raises `UserError`."""
    rows: list[Weighted] = []
    for pair in chosen:
        if len(pair) != 2 or isinstance(pair[1], str) or not pair[1] >= 0:
            raise UserError(f"dit.auxiliary has {pair!r}: (NAME, WEIGHT of 0 or more) is allowed")
        name, weight = pair
        if name not in AUXILIARY or name in [row.name for row in rows]:
            known = ", ".join(AUXILIARY) or "none"
            raise UserError(f"dit.auxiliary={name!r}: known are {known}, each may be named once")
        row = AUXILIARY[name]()
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
