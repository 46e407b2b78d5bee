"""Positions, clip lengths, training patterns, shots and dropped text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.errors import UserError
from vdit.tokens import (
    GIVEN,
    RATE,
    WANTED,
    clip_frames,
    drop_packed_text,
    drop_text,
    extra_spans,
    grid_positions,
    join_segments,
    latent_times,
    packed_condition,
    packed_layout,
    pattern_shares,
    patterns,
    segment_index,
    shot_list,
    shot_of,
    split_segments,
    text_condition,
)


def test_a_token_stands_in_the_middle_of_the_frames_it_covers() -> None:
    times = latent_times(3, 4, 10.0, start=1.0)
    covered = [[0], [1, 2, 3, 4], [5, 6, 7, 8]]
    np.testing.assert_allclose(times, [1.0 + np.mean(frames) / 10.0 for frames in covered])


def test_positions_run_over_time_rows_columns_in_that_order() -> None:
    grid = grid_positions(np.array([0.0, 0.5]), 2, 3).reshape(2, 2, 3, 3)
    np.testing.assert_allclose(grid[1, 0, 0], [0.5 * RATE, 0, 0])
    np.testing.assert_allclose(grid[0, 1, 2], [0, 1, 2])


@pytest.mark.parametrize(
    "seconds, fps, frames", [(0.05, 10, 1), (0.1, 10, 1), (0.2, 10, 5), (1.7, 10, 17), (2, 24, 49)]
)
def test_clip_lengths_are_one_and_whole_patches(seconds: float, fps: float, frames: int) -> None:
    assert clip_frames(seconds, fps, 4) == frames


def test_patterns_take_given_spans_that_do_not_leak() -> None:
    """Wanted tokens come from the causal encoding; a given span is a prefix, or encoded alone."""
    n, p, fps = 5, 4, 10.0
    table = patterns(n, p, fps)
    stored = n + sum(1 + (frames - 1) // p for _, frames in extra_spans(n, p))
    assert table.times.shape == (stored,) and table.source.max() == stored - 1
    for name, source, given in zip(table.names, table.source, table.given, strict=True):
        assert not given.all(), name
        wanted = source[~given]
        assert (wanted < n).all(), name
        known = source[given]
        prefix = known[known < n]
        assert prefix.tolist() == list(range(len(prefix))), name
        # A span of its own begins behind the last frame that a clip's tokens cover.
        for first, frames in extra_spans(n, p):
            own = n if frames == 1 else n + 1
            if own in known.tolist():
                covered = max(source[source < n]) * p
                assert first >= covered, name
        times = table.times[source]
        assert (np.diff(times) > 0).all(), name


def test_short_clips_have_fewer_patterns() -> None:
    assert patterns(1, 4, 10.0).names == ("text",)
    assert patterns(3, 4, 10.0).names == ("text", "prefix1", "prefix2")


def test_shares_split_a_family_and_refuse_unknown_ones() -> None:
    table = patterns(5, 4, 10.0)
    shares = pattern_shares(table, {"text": 0.5, "prefix": 0.4, "last": 0.1})
    np.testing.assert_allclose(shares.sum(), 1)
    np.testing.assert_allclose(shares[table.names.index("prefix2")], 0.1)
    with pytest.raises(UserError, match="known"):
        pattern_shares(table, {"middle": 1.0})
    with pytest.raises(UserError, match="not all 0"):
        pattern_shares(table, {"text": 0.0})


def test_dropping_text_leaves_the_null_key_only() -> None:
    told = text_condition(
        jnp.ones((2, 1, 3, 4)), jnp.ones((2, 1, 3), bool), jnp.ones((2, 1, 4)), jnp.zeros((2, 2))
    )
    dropped = drop_text(told, jnp.array([True, False]))
    assert dropped.shot.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert dropped.pooled[0].max() == 0 and dropped.pooled[1].min() == 1


SEGMENT = jnp.array([[1, 1, 2, 2, 2, 4, 0], [2, 2, 2, 3, 0, 0, 0]])  # some samples have no tokens


def test_samples_leave_a_row_and_come_back() -> None:
    assert segment_index(SEGMENT[:, :6], 4).tolist() == [
        [0, 1, 0, 1, 2, 0],
        [0, 1, 2, 0, 4, 5],  # padding counts as the first sample, which begins at 0
    ]
    x = 1.0 + jnp.arange(14.0).reshape(2, 7)
    own, mask = split_segments(x, SEGMENT, 4, 3)
    assert own.reshape(2, 4, 3)[0].tolist() == [[1, 2, 0], [3, 4, 5], [0, 0, 0], [6, 0, 0]]
    assert own.reshape(2, 4, 3)[1].tolist() == [[0, 0, 0], [8, 9, 10], [11, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(mask, own > 0)
    back = join_segments(own, SEGMENT, 4)
    np.testing.assert_array_equal(back, jnp.where(SEGMENT > 0, x, 0.0))
    # A caption of several chunks has gaps, which stay where they are.
    gaps = jnp.array([[1, 0, 1, 2, 2, 0, 2], [3, 3, 0, 3, 0, 0, 0]])
    own, mask = split_segments(x, gaps, 4, 4)
    assert own.reshape(2, 4, 4)[0, :2].tolist() == [[1, 0, 3, 0], [4, 5, 0, 7]]
    assert own.reshape(2, 4, 4)[1, 2].tolist() == [8, 9, 0, 11]
    np.testing.assert_array_equal(mask, own > 0)
    np.testing.assert_array_equal(join_segments(own, gaps, 4), jnp.where(gaps > 0, x, 0.0))


def test_every_token_of_a_packed_row_has_a_null_key_and_only_its_own_text() -> None:
    given = SEGMENT == 2
    layout = packed_layout(jnp.ones((2, 7, 3)), SEGMENT, given, 4)
    assert layout.slot[0].tolist() == [0, 0, 3, 3, 3, 6, 0]
    assert (layout.position.sum(-1) > 0).tolist() == (SEGMENT > 0).tolist()
    text = jnp.array([[1, 2, 2, 4], [2, 3, 0, 0]])
    told = packed_condition(jnp.ones((2, 4, 5)), text, jnp.ones((2, 4, 5)), jnp.zeros((2, 4, 2)))
    dropped = drop_packed_text(told, jnp.array([[False, True, False, False]] * 2))
    for condition, without in ((told, 0), (dropped, 2)):
        seen = layout.shot[:, :, None] == condition.shot[:, None]
        assert ((seen & condition.null[:, None]).sum(-1) == 1).all()
        words = SEGMENT[:, :, None] == jnp.where(text > 0, text, -1)[:, None]
        words = words & (text != without)[:, None]
        np.testing.assert_array_equal(seen[:, :, 5:], words)
    assert not told.text[:, :5].any() and not told.text[1, 7:].any()
    empty = ~dropped.pooled.any(-1)
    assert empty.tolist() == [[False] * 2 + [True] * 2 + [False] * 4] * 2


def clip_and_shots(rows: int = 2, shots: int = 3, words: int = 4) -> tuple[jax.Array, jax.Array]:
    """Features and mask of captions of clips with shots; some captions are short, one is empty."""
    shape = (rows, 1 + shots, words)
    features = jax.random.normal(jax.random.key(0), (*shape, 5))
    count = jnp.arange(rows * (1 + shots)).reshape(rows, -1, 1) % (words + 1)
    mask = jnp.arange(words)[None, None] < count
    return jnp.where(mask[..., None], features, 0), mask


def test_a_shot_is_told_the_clip_s_caption_and_its_own_and_no_other() -> None:
    features, mask = clip_and_shots()
    pooled = features.sum(2) / jnp.maximum(mask.sum(2), 1)[..., None]
    level = jnp.array([[500.0, 0.0], [300.0, 0.0]])
    told = text_condition(features, mask, pooled, level)
    for row in range(2):
        for shot in range(3):
            seen = np.flatnonzero(told.shot[row] == shot + 1)
            assert told.null[row, seen].tolist() == [True] + [False] * (len(seen) - 1)
            own = [features[row, j][mask[row, j]] for j in (0, shot + 1)]
            np.testing.assert_array_equal(told.text[row, seen[1:]], np.concatenate(own))
            there = [pooled[row, j] for j in (0, shot + 1) if mask[row, j].any()]
            mean = np.mean(there, axis=0) if there else np.zeros(5)
            for slot in (WANTED, GIVEN):
                np.testing.assert_allclose(told.pooled[row, 2 * shot + slot], mean, atol=1e-6)
    assert told.level.tolist() == [[500.0, 0.0] * 3, [300.0, 0.0] * 3]
    assert told.null.sum() == 2 * 3  # and nobody else has a null key


def test_a_time_is_in_the_shot_that_began_last() -> None:
    starts = jnp.array([[0.0, 0.5, 1.6], [0.0, 0.9, np.inf]])
    times = jnp.array([[-1.0, 0.0, 0.49, 0.5, 1.5, 16 / 10, 9.0]] * 2)
    assert shot_of(times, starts).tolist() == [[1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 2, 2, 2]]


def test_cuts_between_latent_frames_part_them() -> None:
    """A cut at the first frame of a latent frame gives that latent frame to the later shot."""
    p, fps = 4, 10.0
    for cut in range(1, 5):
        starts = jnp.array([[0.0, (1 + (cut - 1) * p) / fps]], jnp.float32)
        times = jnp.asarray(latent_times(6, p, fps)[None], jnp.float32)
        assert shot_of(times, starts).tolist() == [[1] * cut + [2] * (6 - cut)]


def test_shot_lists_are_filled_to_one_length() -> None:
    captions, starts = shot_list({"caption": "all", "shots": [(0.0, "a"), (1.5, "b")]}, 3)
    assert captions == ["all", "a", "b", ""] and starts.tolist() == [0.0, 1.5, np.inf]
    captions, starts = shot_list({"caption": "all"}, 2)
    assert captions == ["all", "", ""] and starts.tolist() == [0.0, np.inf]
    captions, starts = shot_list({"caption": "all", "shots": ()}, 0)
    assert captions == ["all"] and starts.shape == (0,)
