"""Packing: assigns clips to rows of tokens, and builds the arrays of a row.

A plan is global: it depends on the clips' numbers of tokens alone and is the same on every process.
A row has one static shape (`tokens.Budget`), whatever clips it holds.

Dimension key: N clips, n latent frames, h w rows and columns, Z latent channels, L tokens of a row,
C token channels, M samples of a row, S caption tokens of a row, s of one sample, E text width.
"""

from bisect import bisect_right, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vdit.errors import UserError
from vdit.nn.patch import patchify
from vdit.tokens import Budget, Patterns, grid_positions, pattern_shares

WINDOW = 256  # clips considered for a row; more pack tighter, fewer stay close to random order


class Sizes(NamedTuple):
    """Numbers of tokens of all clips."""

    tokens: np.ndarray  # (N,) of the latents
    text: np.ndarray  # (N,) of the caption, gaps between chunks included


class Plan(NamedTuple):
    """The rows of one epoch."""

    order: np.ndarray  # (N,) clips in the epoch's random order
    places: np.ndarray  # (N,) indices into `order`, row after row
    starts: np.ndarray  # (rows + 1,) bounds of the rows in `places`

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, row: int) -> np.ndarray:
        """Indices into `order` of the clips of a row."""
        return self.places[self.starts[row] : self.starts[row + 1]]


class Sample(NamedTuple):
    """One clip, ready to be packed."""

    latent: np.ndarray  # (n, h, w, Z)
    times: np.ndarray  # (n,) seconds, see tokens.latent_times
    text: np.ndarray  # (s,) ids of the caption's tokens, or (s, E) features; no padding
    mask: np.ndarray  # (s,) bool: false in the gaps between a caption's chunks
    ordinal: int  # number in the stream
    given: np.ndarray  # (n,) bool: latent frames that are conditions, without loss
    targets: Mapping[str, np.ndarray] = {}  # (n, ...) of each latent frame, for auxiliary losses


def draw_sample(
    element: Mapping[str, Any], text: np.ndarray, mask: np.ndarray, ordinal: int, table: Patterns,
    shares: Mapping[str, float], seed: int, targets: Sequence[str] = (),
) -> Sample:  # fmt: skip
    """A cached clip with a pattern of given frames from the table, drawn by seed and ordinal;
    `targets` are entries of its latent frames that auxiliary losses read.

    Raises `UserError` for a pattern whose spans are not in the cache.
    """
    latent = element["latent"]
    chance = np.ones(1) if len(table.names) == 1 else pattern_shares(table, shares)
    u = np.random.default_rng((seed, ordinal)).random()
    pattern = int(np.searchsorted(np.cumsum(chance)[:-1], u, side="right"))
    source = table.source[pattern]
    if source.max() >= len(latent):
        raise UserError(
            f"dit.given asks for {table.names[pattern]}, and the latents were encoded without the"
            " spans for it; delete their folder, or allow text and prefix alone"
        )
    given = table.given[pattern]
    more = {name: element[name][source] for name in targets}
    return Sample(latent[source], table.times[source], text, mask, ordinal, given, more)


def budget_of(sizes: Sizes, wanted: tuple[int, int, int], caption: int) -> Budget:
    """The shape of rows: (tokens, samples, caption tokens), where 0 is derived from the data.

    Derived are twice the longest clip's tokens, twice as many samples as fit on average, and 1.25
    times their mean number of caption tokens; `caption` is the limit of one caption.
    """
    tokens, samples, text = wanted
    tokens = tokens or 2 * int(sizes.tokens.max())
    mean = tokens / float(sizes.tokens.mean())  # samples a row
    samples = samples or max(int(np.ceil(2 * mean)), 2)
    text = text or max(int(np.ceil(1.25 * mean * float(sizes.text.mean()))), caption)
    return Budget(tokens, samples, text, caption)


def check_sizes(sizes: Sizes, budget: Budget) -> None:
    """Raises `UserError` for an empty data set, and for a clip that fits no row."""
    if len(sizes.tokens) == 0:
        raise UserError("packing: the data set has no clips; allowed: at least 1")
    if budget.samples < 1:
        raise UserError(f"packing: {budget.samples} samples a row; allowed: at least 1")
    limits = (
        ("tokens", sizes.tokens, budget.tokens),
        ("caption tokens", sizes.text, min(budget.text, budget.caption)),
    )
    for name, count, most in limits:
        worst = int(np.argmax(count))
        if count[worst] > most:
            raise UserError(f"packing: clip {worst} has {count[worst]} {name}; allowed: {most}")
    if sizes.tokens.min() < 1:
        raise UserError(f"packing: clip {int(np.argmin(sizes.tokens))} has no tokens")


def fill_rows(sizes: Sizes, budget: Budget, window: int = WINDOW) -> Iterator[list[int]]:
    """Rows of clips, each clip once: first fit decreasing over a sliding window.

    A row starts with the oldest of the `window` waiting clips, then repeatedly takes the largest
    that still fits. So no clip waits forever, and a row's clips come from one neighbourhood.
    """
    count = len(sizes.tokens)
    waiting: list[tuple[int, int]] = []  # (tokens, -clip) in order
    gone = np.zeros(count, bool)
    arrived = oldest = 0
    while True:
        while arrived < count and len(waiting) < window:
            insort(waiting, (int(sizes.tokens[arrived]), -arrived))
            arrived += 1
        while oldest < arrived and gone[oldest]:
            oldest += 1
        if oldest == arrived:
            return
        row: list[int] = []
        tokens, text = budget.tokens, budget.text
        at = bisect_right(waiting, (int(sizes.tokens[oldest]), -oldest)) - 1
        while at >= 0:
            size, clip = waiting.pop(at)
            clip = -clip
            gone[clip] = True
            row.append(clip)
            tokens, text = tokens - size, text - int(sizes.text[clip])
            # What did not fit before does not fit now. The first clip is the oldest, not the
            # largest: only after it the search covers the entire window.
            high = len(waiting) if len(row) == 1 else at
            at = bisect_right(waiting, (tokens, 1), 0, high) - 1
            while at >= 0 and sizes.text[-waiting[at][1]] > text:
                at -= 1
            if len(row) == budget.samples:
                break
        yield row


def plan_epoch(sizes: Sizes, budget: Budget, seed: int, epoch: int, window: int = WINDOW) -> Plan:
    """The rows of an epoch, a function of the sizes, the seed and the epoch's number."""
    check_sizes(sizes, budget)
    order = np.random.default_rng((seed, epoch)).permutation(len(sizes.tokens))
    rows = list(fill_rows(Sizes(sizes.tokens[order], sizes.text[order]), budget, window))
    starts = np.cumsum([0, *(len(row) for row in rows)])
    return Plan(order, np.concatenate([np.array(row) for row in rows]), starts)


def padding(plan: Plan, sizes: Sizes, budget: Budget) -> float:
    """The fraction of an epoch's tokens that are padding."""
    return 1.0 - float(sizes.tokens.sum()) / (len(plan) * budget.tokens)


def pack(
    samples: Sequence[Sample], budget: Budget, patch: tuple[int, int]
) -> dict[str, np.ndarray]:
    """One row of samples, the input of `objectives.packed`; `patch` is rows, columns of a token.

    "tokens" (L, C) of the latents' dtype, "position" (L, 3), "segment" (L,) 1 .. M and 0 for
    padding, "given" (L,) bool; "ordinal" (M,), 0 for no sample; the concatenated captions as "ids"
    (S,) or "features" (S, E), and "text" (S,), their tokens' segments, 0 for a gap between chunks;
    of targets (L, ...), each token's of its latent frame.
    Slots and null keys follow (`tokens.packed_layout`, `tokens.packed_condition`).

    Raises `UserError` if a latent does not divide into patches or the samples exceed the budget.
    """
    first = samples[0]
    name = "ids" if first.text.ndim == 1 else "features"
    channels = first.latent.shape[-1] * patch[0] * patch[1]
    row = {
        "tokens": np.zeros((budget.tokens, channels), first.latent.dtype),
        "position": np.zeros((budget.tokens, 3), np.float32),
        "segment": np.zeros(budget.tokens, np.int32),
        "given": np.zeros(budget.tokens, bool),
        "ordinal": np.zeros(budget.samples, np.uint32),
        name: np.zeros((budget.text, *first.text.shape[1:]), first.text.dtype),
        "text": np.zeros(budget.text, np.int32),
        **{key: np.zeros((budget.tokens, *value.shape[1:]), value.dtype)
           for key, value in first.targets.items()},
    }  # fmt: skip
    if len(samples) > budget.samples:
        raise UserError(f"packing: {len(samples)} samples in a row; allowed: {budget.samples}")
    token = word = 0
    for number, sample in enumerate(samples):
        frames, height, width, _ = sample.latent.shape
        if height % patch[0] or width % patch[1]:
            raise UserError(
                f"packing: latents of {height}x{width} places do not divide into patches of"
                f" {patch[0]}x{patch[1]}"
            )
        x = patchify(sample.latent[None], (1, *patch))[0]
        count = x.shape[0] * x.shape[1] * x.shape[2]
        span, words = slice(token, token + count), slice(word, word + len(sample.text))
        token, word = span.stop, words.stop
        if token > budget.tokens or word > budget.text or len(sample.text) > budget.caption:
            raise UserError(
                f"packing: {token} tokens and {word} caption tokens in a row, {len(sample.text)} of"
                f" them of one caption; allowed: {budget.tokens}, {budget.text}, {budget.caption}"
            )
        row["tokens"][span] = x.reshape(count, channels)
        row["position"][span] = grid_positions(sample.times, *x.shape[1:3])
        row["segment"][span] = number + 1
        row["given"][span] = np.repeat(sample.given, count // frames)
        for key, value in sample.targets.items():
            row[key][span] = np.repeat(value, count // frames, axis=0)
        row["ordinal"][number] = sample.ordinal % 2**32
        row[name][words] = sample.text
        row["text"][words] = np.where(sample.mask, number + 1, 0)
    return row
