"""Token layouts and conditions: positions, noise-level slots, shots, and packed segments.

A span is a clip that is encoded by itself (one image, or 1 + k·p frames). A token of its latents
has a position (t, h, w), a slot (its noise level), a shot (the text it attends to) and a segment
(its sample in a packed row). A task is a choice of which spans are given; nothing downstream knows
the task's name.

Dimension key: B batch rows, L tokens, S text tokens, K slots (distinct noise levels of a row),
A axes (t, h, w), n latent frames of a clip, p frames of a latent frame, M samples of a packed row,
J captions of a clip (its own, and its shots'), E text width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from vdit.errors import UserError
from vdit.nn.patch import patchify

RATE = 24.0  # temporal positions per second: 1 per frame at 24 frames a second
WANTED, GIVEN = 0, 1  # slots of a shot: the sample's noise level, and clean
EARLY = 1e-4  # seconds before a shot's start that still count as in it (rounding)


@struct.dataclass
class Layout:
    """Each token's position, noise-level slot, shot and segment."""

    position: jax.Array  # (B, L, 3) t in 1/24 s, h and w in patches
    slot: jax.Array  # (B, L) index into Condition.level: two for a shot, WANTED and GIVEN
    shot: jax.Array  # (B, L) id of the text that the token attends to; never 0
    segment: jax.Array | None = None  # (B, L) sample of a packed row, 0 is padding; None: dense
    grid: tuple[int, int, int] | None = struct.field(pytree_node=False, default=None)

    def given(self) -> jax.Array:
        """Which tokens (B, L) are given."""
        return self.slot % 2 == GIVEN

    def wanted(self) -> jax.Array:
        """Which tokens (B, L) are to be denoised: neither given nor padding."""
        wanted = ~self.given()
        return wanted if self.segment is None else wanted & (self.segment > 0)


@struct.dataclass
class Condition:
    """The denoiser's conditioning: text, noise levels, class."""

    text: jax.Array  # (B, S, E) features of the text tokens
    shot: jax.Array  # (B, S) the shot that a text token describes; 0: masked
    null: jax.Array  # (B, S) bool: its shot's null key, so that no softmax is empty
    pooled: jax.Array  # (B, K, E) the caption as one vector, zero where dropped
    level: jax.Array  # (B, K) noise level of each slot, as the process's `network_time`
    label: jax.Array | None = None  # (B,) class, -1 where dropped; None: no model of classes
    beside: jax.Array | None = None  # (B, L, ...) channels beside the noisy ones of a token
    image: jax.Array | None = None  # (B, S', E') features of an image's tokens


def one_level_grid(
    model: str, reason: str, layout: Layout, condition: Condition, most: int = 1
) -> tuple[int, int, int]:
    """The grid of a dense batch with one noise level a sample, or at most two, of one caption;
    `UserError` for any other, from a `model` that needs that for `reason`."""
    if layout.grid is None:
        raise UserError(f"dit.model={model} needs dense batches: {reason}")
    if condition.level.shape[1] > most:
        what = "time for all tokens: given frames" if most == 1 else "caption a clip: shots"
        raise UserError(
            f"dit.model={model} knows one {what} are not allowed"
            f" ({condition.level.shape[1]} levels)"
        )
    return layout.grid


def text_condition(
    features_BJSE: jax.Array, mask_BJS: jax.Array, pooled_BJE: jax.Array, level_BK: jax.Array,
    own: int | None = None,
) -> Condition:  # fmt: skip
    """The condition of a dense batch: caption 0 is the clip's, 1 .. J - 1 are its shots'.

    A shot's text is a null key, the clip's caption and the shot's (cut to `own` tokens, if given);
    where J is 1 the clip is one shot, without a caption of its own. Each shot has two slots, whose
    pooled vector is the mean over its captions that are not empty. `level_BK` are the levels of
    wanted and given tokens.
    """
    batch, captions, _, width = features_BJSE.shape
    shots = max(captions - 1, 1)

    def of_shots(x_BJS: jax.Array) -> jax.Array:
        """Each shot's (B, shots, S or more, ...): the clip's, then its own."""
        clip = jnp.broadcast_to(x_BJS[:, :1], (batch, shots, *x_BJS.shape[2:]))
        return clip if captions == 1 else jnp.concatenate([clip, x_BJS[:, 1:, :own]], axis=2)

    text = jnp.pad(of_shots(features_BJSE), ((0, 0), (0, 0), (1, 0), (0, 0)))
    real = jnp.pad(of_shots(mask_BJS), ((0, 0), (0, 0), (1, 0)), constant_values=True)
    shot = jnp.where(real, jnp.arange(1, shots + 1, dtype=jnp.int32)[:, None], 0)
    null = jnp.zeros(shot.shape, bool).at[:, :, 0].set(True)
    count = of_shots(mask_BJS.any(-1)[:, :, None, None]).sum(2)
    pooled = of_shots(pooled_BJE[:, :, None]).sum(2) / jnp.maximum(count, 1)
    return Condition(
        text=text.reshape(batch, -1, width),
        shot=shot.reshape(batch, -1),
        null=null.reshape(batch, -1),
        pooled=jnp.repeat(pooled, level_BK.shape[1], axis=1),
        level=jnp.tile(level_BK, (1, shots)),
    )


def shot_list(clip: Mapping[str, Any], shots: int) -> tuple[list[str], np.ndarray]:
    """The clip's caption and its shots', 1 + `shots` in all, and the shots' starts in seconds.

    clip["shots"] are (start, caption) each, padded to `shots` by empty captions that start at
    infinity; a clip without any is one shot with an empty caption.
    """
    known = list(clip.get("shots", ()))[:shots] or [(0.0, "")]
    missing = shots - len(known)
    captions = [clip["caption"], *(text for _, text in known), *[""] * missing]
    starts = [start for start, _ in known] + [np.inf] * missing
    return captions[: 1 + shots], np.array(starts[:shots], np.float32)


def shot_of(times_Bn: jax.Array, starts_BK: jax.Array) -> jax.Array:
    """The shot (B, n), 1 .. K, that each time falls in; the first one also before its start.

    `starts_BK` are the shots' starts in seconds, ascending; infinity is a shot that there is not.
    """
    begun = starts_BK[:, None] <= times_Bn[..., None] + EARLY
    return jnp.maximum(begun.sum(-1), 1).astype(jnp.int32)


def class_condition(label_B: jax.Array, level_B: jax.Array) -> Condition:
    """The condition of a dense batch by class (-1: none), one level a row, without text."""
    batch = label_B.shape[0]
    nothing = jnp.zeros((batch, 1, 1))
    ones = jnp.ones((batch, 1), jnp.int32)
    return Condition(nothing, ones, ones > 0, nothing, level_B[:, None], label_B)


def drop_label(condition: Condition, drop_B: jax.Array) -> Condition:
    """Drops the class of rows where `drop_B` is true (classifier-free guidance)."""
    assert condition.label is not None
    return dataclasses.replace(condition, label=jnp.where(drop_B, -1, condition.label))


def drop_text(condition: Condition, drop_B: jax.Array) -> Condition:
    """Drops the text of rows where `drop_B` is true, null keys stay (classifier-free guidance)."""
    return _drop(condition, drop_B[:, None], drop_B[:, None])


def _drop(condition: Condition, keys_BS: jax.Array, slots_BK: jax.Array) -> Condition:
    """Masks these text keys but null keys, and zeroes these slots' pooled captions."""
    return dataclasses.replace(
        condition,
        shot=jnp.where(keys_BS & ~condition.null, 0, condition.shot),
        pooled=jnp.where(slots_BK[..., None], 0.0, condition.pooled),
    )


class Budget(NamedTuple):
    """The static shape of packed rows, for which one step is compiled."""

    tokens: int  # L
    samples: int  # M, the most samples; each has two slots and a null key
    text: int  # S, caption tokens of all samples, without null keys
    caption: int  # the most caption tokens of a sample


def of_segment(values_BM: jax.Array, segment_BL: jax.Array) -> jax.Array:
    """Each token's value of its sample: (B, M, ...) to (B, L, ...); padding has the first's."""
    return jax.vmap(lambda values, at: values[at])(values_BM, jnp.maximum(segment_BL - 1, 0))


def segment_bounds(segment_BL: jax.Array, samples: int) -> tuple[jax.Array, jax.Array]:
    """First place and number of places (B, M) of each sample of packed rows, gaps of captions
    (`packing.pack`) included."""
    same = segment_BL[:, None] == jnp.arange(1, samples + 1)[None, :, None]
    start = same.argmax(-1)
    end = same.shape[-1] - same[..., ::-1].argmax(-1)
    return start, jnp.where(same.any(-1), end - start, 0)


def segment_index(segment_BL: jax.Array, samples: int) -> jax.Array:
    """The index (B, L) of each token in its sample."""
    start, _ = segment_bounds(segment_BL, samples)
    return jnp.arange(segment_BL.shape[1])[None] - of_segment(start, segment_BL)


def split_segments(
    x_BL: jax.Array, segment_BL: jax.Array, samples: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Unpacks rows (B, L, ...) to one sample a row (B·M, size, ...), and a mask.

    Zero after a sample's end and in its gaps; no sample may be longer than `size`.
    """
    start, count = segment_bounds(segment_BL, samples)
    at = start[..., None] + jnp.arange(size)[None, None]
    at = jnp.minimum(at, x_BL.shape[1] - 1)
    take = jax.vmap(lambda row, at: row[at])
    real = (jnp.arange(size)[None, None] < count[..., None]) & (take(segment_BL, at) > 0)
    mask = real.reshape(-1, size)
    x = take(x_BL, at).reshape(*mask.shape, *x_BL.shape[2:])
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0), mask


def join_segments(x_NS: jax.Array, segment_BL: jax.Array, samples: int) -> jax.Array:
    """The inverse of `split_segments`: (B·M, size, ...) to (B, L, ...), zero in padding."""
    size = x_NS.shape[1]
    flat = x_NS.reshape(-1, samples * size, *x_NS.shape[2:])
    at = jnp.maximum(segment_BL - 1, 0) * size + segment_index(segment_BL, samples)
    at = jnp.clip(at, 0, samples * size - 1)
    x = jax.vmap(lambda row, at: row[at])(flat, at)
    real = segment_BL > 0
    return jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, 0)


def packed_layout(
    position_BL3: jax.Array, segment_BL: jax.Array, given_BL: jax.Array, samples: int
) -> Layout:
    """The layout of packed rows: sample m has slots 2m - 2 (wanted) and 2m - 1 (given), and shot m.

    Padding (segment 0) attends to padding, and sees the text of shot M + 1, which is a null key.
    """
    real = segment_BL > 0
    return Layout(
        position=jnp.where(real[..., None], position_BL3, 0.0),
        slot=jnp.where(real, 2 * (segment_BL - 1) + given_BL, 0),
        shot=jnp.where(real, segment_BL, samples + 1),
        segment=segment_BL,
    )


def packed_condition(
    features_BSE: jax.Array, segment_BS: jax.Array, pooled_BME: jax.Array, level_BM2: jax.Array
) -> Condition:
    """The condition of packed rows: M + 1 null keys, then the samples' captions in turn.

    `segment_BS` is each text token's sample (0: padding, masked), `level_BM2` each sample's levels
    by slot.
    """
    batch, samples, width = pooled_BME.shape
    nulls = jnp.broadcast_to(jnp.arange(1, samples + 2, dtype=jnp.int32), (batch, samples + 1))
    features = jnp.where(segment_BS[..., None] > 0, features_BSE, 0.0)
    return Condition(
        text=jnp.concatenate([jnp.zeros((batch, samples + 1, width), features.dtype), features], 1),
        shot=jnp.concatenate([nulls, segment_BS], 1),
        null=jnp.concatenate([nulls > 0, jnp.zeros(segment_BS.shape, bool)], 1),
        pooled=jnp.repeat(pooled_BME, 2, axis=1),
        level=level_BM2.reshape(batch, 2 * samples),
    )


def drop_packed_text(condition: Condition, drop_BM: jax.Array) -> Condition:
    """`drop_text` of samples of packed rows."""
    # Shot M + 1 is padding's, and only ever a null key.
    keys = jnp.pad(drop_BM, ((0, 0), (0, 1)))
    return _drop(condition, of_segment(keys, condition.shot), jnp.repeat(drop_BM, 2, axis=1))


def dense_tokens(
    latent_BnhwZ: jax.Array, patch: tuple[int, int], times_Bn: jax.Array, given_Bn: jax.Array,
    starts_BK: jax.Array | None = None,
) -> tuple[jax.Array, Layout]:  # fmt: skip
    """Token values (B, L, C) and layout of latent frames at `times_Bn` seconds, given or not.

    `starts_BK` are the starts of the clip's shots, in seconds; without them it is one shot.
    """
    batch, count = latent_BnhwZ.shape[:2]
    x = patchify(latent_BnhwZ, (1, *patch))
    _, _, height, width, channels = x.shape

    def each(x: jax.Array, *axes: int) -> jax.Array:
        """Values (B, L) of all tokens, of x without these axes of (B, n, h, w)."""
        full = jnp.broadcast_to(jnp.expand_dims(x, axes), (batch, count, height, width))
        return full.reshape(batch, -1)

    rows, columns = each(jnp.arange(height), 0, 1, 3), each(jnp.arange(width), 0, 1, 2)
    position = jnp.stack([each(times_Bn * RATE, 2, 3), rows, columns], axis=-1)
    shot_Bn = jnp.ones(times_Bn.shape, jnp.int32)
    if starts_BK is not None:
        shot_Bn = shot_of(times_Bn, starts_BK)
    layout = Layout(
        position=position.astype(jnp.float32),
        slot=each(2 * (shot_Bn - 1) + given_Bn, 2, 3),
        shot=each(shot_Bn, 2, 3),
        grid=(count, height, width),
    )
    return x.reshape(batch, -1, channels), layout


def filled(layout: Layout, multiple: int) -> Layout:
    """The layout of as many tokens as `multiple` divides: behind the clip's own is padding, a
    segment by itself, which counts as given."""
    length = layout.slot.shape[1]
    if length % multiple == 0:
        return layout
    parts = (layout.position, layout.slot, layout.shot, jnp.ones_like(layout.slot))
    position, slot, shot, segment = (fill(x, multiple) for x in parts)
    clip = segment > 0
    return Layout(position, jnp.where(clip, slot, GIVEN), jnp.where(clip, shot, 1), segment)


def fill(x_BL: jax.Array, multiple: int) -> jax.Array:
    """x (B, L, ...) with zeros behind, up to the next multiple of tokens."""
    more = -x_BL.shape[1] % multiple
    return jnp.pad(x_BL, ((0, 0), (0, more), *((0, 0),) * (x_BL.ndim - 2))) if more else x_BL


def latent_times(count: int, p: int, fps: float, start: float = 0.0) -> np.ndarray:
    """Midpoint in seconds (count,) of the frames that each latent frame of a span covers.

    Latent frame 0 covers the span's first frame, latent frame i its frames i·p - p + 1 .. i·p.
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
    """The training tasks: which stored latent frames make up a sample, and which are given.

    The cache stores for every clip its n latent frames, then one frame and one span of 1 + p frames
    near its end, each encoded by itself (`extra_spans`). Every pattern picks n of those, so all
    tasks train in one dense shape, and text to video pays nothing for the others.
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
        last = n - 1  # the last place of the row
        rows.append(("last", [*clip[:-1], image], [last]))
        rows.append(("first_last", [*clip[:-1], image], [0, last]))
        rows.append(("suffix", [*clip[:-2], *span], [last - 1, last]))
        rows.append(("between", [*clip[:-2], *span], [0, last - 1, last]))
    names, source, known = zip(*rows, strict=True)
    given = np.array([np.isin(clip, places) for places in known])
    spans = [(0, 1 + (n - 1) * p), *extra_spans(n, p)]
    times = [latent_times(1 + (frames - 1) // p, p, fps, first / fps) for first, frames in spans]
    return Patterns(names, np.array(source), given, np.concatenate(times))


def pattern_shares(table: Patterns, shares: Mapping[str, float]) -> np.ndarray:
    """Probability of each pattern; a share of a family ("prefix") is split over its members, that
    of "image" is the first member's of "prefix"."""
    family = [name.rstrip("0123456789") for name in table.names]
    known = {"last", "first_last", "suffix", "between", "prefix", "image"}
    unknown = set(shares) - set(family) - known
    if unknown:
        raise UserError(f"given: no pattern {sorted(unknown)}; known: {sorted(set(family))}")
    weight = np.array([shares.get(name, 0.0) / family.count(name) for name in family])
    weight += [shares.get("image", 0.0) * (name == "prefix1") for name in table.names]
    if weight.min() < 0 or weight.sum() <= 0:
        raise UserError(f"given: shares must be at least 0 and not all 0, got {dict(shares)}")
    return weight / weight.sum()
