"""Spans, positions, segments, given tokens and shots: what a token is, whatever its value.

A span is a clip that is encoded by itself (one image, or 1 + k·p frames). Its latents become
tokens: a value, a position (t, h, w), a slot (which noise level it carries), a shot (which text
it sees) and a segment (which sample of a packed row it belongs to). Every task is a choice of
which spans are given; nothing downstream knows the task's name.

Dimension key: B batch rows, L tokens, S text tokens, K slots (distinct noise levels of a row),
A axes (t, h, w), n latent frames of a clip, p frames of a latent frame.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from vdit.errors import UserError

RATE = 24.0  # positions in time a second: at 24 frames a second neighbours are 1 apart


@struct.dataclass
class Layout:
    """Where the tokens of a batch are, and what each of them belongs to."""

    position: jax.Array  # (B, L, 3) t in 1/24 s, h and w in patches
    slot: jax.Array  # (B, L) index into Condition.level
    shot: jax.Array  # (B, L) id of the text that the token sees; never 0
    segment: jax.Array | None = None  # (B, L) sample of a packed row, 0 is padding; None: dense
    grid: tuple[int, int, int] | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Condition:
    """Everything that the denoiser is told besides the tokens."""

    text: jax.Array  # (B, S, E) features of the text tokens
    shot: jax.Array  # (B, S) the shot that a text token speaks of; 0: nobody sees it
    null: jax.Array  # (B, S) bool: the null key of its shot, so that no softmax is empty
    pooled: jax.Array  # (B, K, E) the caption as one vector, zero where dropped
    level: jax.Array  # (B, K) noise level of each slot, as the process's `network_time`


def text_condition(
    features_BSE: jax.Array, mask_BS: jax.Array, pooled_BE: jax.Array, level_BK: jax.Array
) -> Condition:
    """The condition of a dense batch with one caption a row: shot 1, its null key in front."""
    batch, _, width = features_BSE.shape
    text = jnp.concatenate([jnp.zeros((batch, 1, width), features_BSE.dtype), features_BSE], 1)
    ones = jnp.ones((batch, 1), jnp.int32)
    shot = jnp.concatenate([ones, mask_BS.astype(jnp.int32)], 1)
    null = jnp.zeros(shot.shape, bool).at[:, 0].set(True)
    slots = (batch, level_BK.shape[1], width)
    return Condition(text, shot, null, jnp.broadcast_to(pooled_BE[:, None], slots), level_BK)


def drop_text(condition: Condition, drop_B: jax.Array) -> Condition:
    """Rows where `drop_B` is true see only their null key (for classifier-free guidance)."""
    drop = drop_B[:, None]
    return dataclasses.replace(
        condition,
        shot=jnp.where(drop & ~condition.null, 0, condition.shot),
        pooled=jnp.where(drop[..., None], 0.0, condition.pooled),
    )


def latent_times(count: int, p: int, fps: float, start: float = 0.0) -> np.ndarray:
    """Middle, in seconds, of the frames that each of a span's latent frames covers: (count,).

    Latent frame 0 is the span's first frame, latent frame i its frames i·p - p + 1 .. i·p.
    """
    middle = np.arange(count) * p - (p - 1) / 2
    middle[0] = 0
    return start + middle / fps


def grid_positions(times: np.ndarray, height: int, width: int) -> np.ndarray:
    """Positions (t·h·w, 3) of a grid of tokens: times in seconds, rows and columns in patches."""
    grid = np.stack(np.meshgrid(times * RATE, np.arange(height), np.arange(width), indexing="ij"))
    return grid.reshape(3, -1).T.astype(np.float32)


def clip_frames(seconds: float, fps: float, p: int) -> int:
    """The least clip length 1 + k·p that lasts `seconds`."""
    frames = max(int(np.ceil(seconds * fps - 1e-6)), 1)
    return 1 + -(-(frames - 1) // p) * p


class Patterns(NamedTuple):
    """Which stored latent frames make up a training sample, and which of them are given.

    The cache stores, for every clip, its own n latent frames, then one frame and one span of
    1 + p frames near its end, each encoded by itself (`extra_spans`). Every pattern picks n of
    those, so all tasks train in one dense shape and text to video pays nothing for the others.
    """

    names: tuple[str, ...]
    source: np.ndarray  # (patterns, n) index into the stored latent frames
    given: np.ndarray  # (patterns, n) bool
    times: np.ndarray  # (stored,) seconds of the stored latent frames


def extra_spans(n: int, p: int) -> list[tuple[int, int]]:
    """(first frame, frames) of the spans that are stored beside a clip of n latent frames."""
    if n < 4:
        return []
    return [((n - 2) * p, 1), ((n - 3) * p + 1, 1 + p)]


def patterns(n: int, p: int, fps: float) -> Patterns:
    """The table of training patterns for clips of n latent frames.

    text: nothing given. prefix k: the first k latent frames (1 is image to video, more is
    extension). last: the clip ends, one latent frame early, on a given image. first and last: and
    begins on one. suffix: a given span follows (backward extension). between: spans on both sides.
    """
    clip = list(range(n))
    rows: list[tuple[str, list[int], list[int]]] = [("text", clip, [])]
    rows += [(f"prefix{k}", clip, clip[:k]) for k in range(1, n)]
    if extra_spans(n, p):
        image, span = n, [n + 1, n + 2]
        last = n - 1  # where the extra tokens stand in the row
        rows.append(("last", [*clip[:-1], image], [last]))
        rows.append(("first_last", [*clip[:-1], image], [0, last]))
        rows.append(("suffix", [*clip[:-2], *span], [last - 1, last]))
        rows.append(("between", [*clip[:-2], *span], [0, last - 1, last]))
    given = np.zeros((len(rows), n), bool)
    for row, (_, _, known) in enumerate(rows):
        given[row, known] = True
    times = [latent_times(n, p, fps)]
    times += [
        latent_times(1 + (frames - 1) // p, p, fps, first / fps)
        for first, frames in extra_spans(n, p)
    ]
    return Patterns(
        tuple(name for name, _, _ in rows),
        np.array([source for _, source, _ in rows]),
        given,
        np.concatenate(times),
    )


def pattern_shares(table: Patterns, shares: Mapping[str, float]) -> np.ndarray:
    """Probability of each pattern; a share of a family ("prefix") is split over its members."""
    family = [name.rstrip("0123456789") for name in table.names]
    unknown = set(shares) - set(family) - {"last", "first_last", "suffix", "between", "prefix"}
    if unknown:
        raise UserError(f"given: no pattern {sorted(unknown)}; known: {sorted(set(family))}")
    weight = np.array([shares.get(name, 0.0) / family.count(name) for name in family])
    if weight.min() < 0 or weight.sum() <= 0:
        raise UserError(f"given: shares must be at least 0 and not all 0, got {dict(shares)}")
    return weight / weight.sum()
