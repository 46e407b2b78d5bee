"""Packing: every clip once, little padding, the same rows anywhere, a row number to resume from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vdit.data.loader import PackedBatches
from vdit.data.packing import Plan, Sample, Sizes, fill_rows, pack, padding, plan_epoch
from vdit.errors import UserError
from vdit.runtime.checkpoint import Checkpoints
from vdit.tokens import Budget, grid_positions, latent_times

ASPECTS = ((6, 10), (7, 9), (8, 8), (9, 7), (10, 6))  # places of a latent frame, about 64


def mix(clips: int, seed: int = 0) -> Sizes:
    """Clips of 1 to 120 frames at 4 frames a latent frame, of five aspects."""
    rng = np.random.default_rng(seed)
    latent = 1 + -(-(rng.integers(1, 121, clips) - 1) // 4)
    places = np.array([height * width for height, width in ASPECTS])
    return Sizes(latent * places[rng.integers(0, 5, clips)], rng.integers(0, 41, clips))


def rows_of(plan: Plan) -> list[list[int]]:
    return [plan.order[plan.row(row)].tolist() for row in range(len(plan))]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("length", [2048, 4096])
def test_padding_is_under_5_percent(seed: int, length: int) -> None:
    """2048 tokens already do, the longest clip having 1,984."""
    sizes = mix(2000, seed)
    assert sizes.tokens.max() <= 1984
    budget = Budget(length, 16, 320, 40)
    plan = plan_epoch(sizes, budget, 3, 0)
    assert padding(plan, sizes, budget) < 0.05
    in_order = np.ceil(sizes.tokens.sum() / length)
    assert len(plan) >= in_order


def test_every_clip_once_an_epoch_and_within_the_budget() -> None:
    sizes, budget = mix(300), Budget(2048, 3, 60, 40)
    for epoch in range(2):
        rows = rows_of(plan_epoch(sizes, budget, 5, epoch))
        assert sorted(clip for row in rows for clip in row) == list(range(300))
        assert max(len(row) for row in rows) == 3
        assert max(sizes.text[row].sum() for row in rows) <= 60
        assert max(sizes.tokens[row].sum() for row in rows) <= 2048


def test_a_plan_depends_on_the_seed_and_the_epoch_alone() -> None:
    sizes, budget = mix(100), Budget(2048, 8, 320, 40)
    third = rows_of(plan_epoch(sizes, budget, 5, 3))
    plan_epoch(sizes, budget, 5, 0)
    assert third == rows_of(plan_epoch(sizes, budget, 5, 3))
    assert third != rows_of(plan_epoch(sizes, budget, 5, 2))
    assert third != rows_of(plan_epoch(sizes, budget, 6, 3))


def test_no_clip_waits_for_ever() -> None:
    """A row's first clip is the oldest that waits, so no row looks further than a window ahead."""
    sizes, window = mix(1000), 50
    behind = set(range(1000))
    for row in fill_rows(sizes, Budget(2048, 16, 640, 40), window):
        assert row[0] == min(behind)
        assert max(row) < 1000 - len(behind) + window
        behind -= set(row)
    assert not behind


def test_a_row_takes_the_largest_that_fits() -> None:
    sizes = Sizes(np.array([5, 1, 2, 6, 4, 3]), np.array([1, 1, 1, 1, 3, 1]))
    whole = list(fill_rows(sizes, Budget(10, 9, 9, 9)))
    assert whole == [[0, 4, 1], [2, 3], [5]]
    few_words = list(fill_rows(sizes, Budget(10, 9, 3, 3)))
    assert few_words == [[0, 5, 2], [1, 3], [4]]


def test_clips_that_no_row_can_hold_are_refused() -> None:
    sizes = Sizes(np.array([4, 9]), np.array([7, 2]))
    for budget, line in (
        (Budget(8, 2, 9, 9), "clip 1 has 9 tokens; allowed: 8"),
        (Budget(9, 2, 9, 6), "clip 0 has 7 caption tokens; allowed: 6"),
        (Budget(9, 2, 6, 9), "clip 0 has 7 caption tokens; allowed: 6"),
        (Budget(9, 0, 9, 9), "0 samples a row"),
    ):
        with pytest.raises(UserError, match=line):
            plan_epoch(sizes, budget, 0, 0)
    with pytest.raises(UserError, match="no clips"):
        plan_epoch(Sizes(np.zeros(0, int), np.zeros(0, int)), Budget(8, 2, 9, 9), 0, 0)


def sample(clip: int, ordinal: int) -> Sample:
    """A clip whose frame rate, size and length come from its number."""
    rng = np.random.default_rng(clip)
    frames, fps = 1 + clip % 3, (8.0, 24.0)[clip % 2]
    height, width = ((2, 4), (4, 2), (2, 2), (2, 6), (6, 2))[clip % 5]
    latent = rng.normal(size=(frames, height, width, 3)).astype(np.float16)
    words = np.full(clip % 4, clip + 1)
    told = np.arange(len(words)) != (1 if len(words) == 3 else -1)  # in two chunks, or in one
    given = np.arange(frames) < 1
    return Sample(latent, latent_times(frames, 4, fps), words, told, ordinal, given)


def test_a_row_holds_its_samples_and_nothing_else() -> None:
    samples = [sample(clip, 70 + clip) for clip in (1, 2, 8)]  # 2, 3 and 3 latent frames
    budget = Budget(36, 4, 6, 3)
    row = pack(samples, budget, (1, 2))
    assert pack([sample(3, 0), sample(1, 0)], budget, (1, 2))["text"].tolist() == [1, 0, 1, 2, 0, 0]
    counts = [2 * 4 * 1, 3 * 2 * 1, 3 * 2 * 3]
    assert row["segment"].tolist() == np.repeat([1, 2, 3, 0], [*counts, 4]).tolist()
    assert (
        row["given"][: sum(counts)].tolist()
        == np.repeat([True, False, True, False, True, False], [4, 4, 2, 4, 6, 12]).tolist()
    )
    assert row["ordinal"].tolist() == [71, 72, 78, 0]
    assert row["ids"].tolist() == [2, 3, 3, 0, 0, 0]
    assert row["text"].tolist() == [1, 2, 2, 0, 0, 0]
    assert row["tokens"].dtype == np.float16
    first, last = slice(0, 8), slice(14, 32)
    np.testing.assert_array_equal(
        row["position"][first], grid_positions(latent_times(2, 4, 24.0), 4, 1)
    )
    np.testing.assert_array_equal(
        row["position"][last], grid_positions(latent_times(3, 4, 8.0), 2, 3)
    )
    # A token is two neighbouring places of a row, one after the other.
    np.testing.assert_array_equal(row["tokens"][last][4], samples[2].latent[0, 1, 2:4].reshape(-1))
    for part in ("tokens", "position", "segment", "given"):
        assert not row[part][32:].any(), part


def test_a_row_refuses_what_does_not_fit() -> None:
    samples = [sample(clip, clip) for clip in (1, 2, 8)]
    for budget, patch, line in (
        (Budget(31, 4, 6, 3), (1, 2), "32 tokens"),
        (Budget(36, 2, 6, 3), (1, 2), "3 samples in a row; allowed: 2"),
        (Budget(36, 4, 2, 3), (1, 2), "3 caption tokens"),
        (Budget(36, 4, 6, 1), (1, 2), "2 of them of one caption"),
        (Budget(99, 4, 6, 3), (1, 4), "4x2 places do not divide into patches of 1x4"),
    ):
        with pytest.raises(UserError, match=line):
            pack(samples, budget, patch)


CLIPS = 40
BUDGET = Budget(40, 4, 9, 3)
SIZES = Sizes(
    np.array([sample(clip, 0).latent[..., 0].size for clip in range(CLIPS)]),
    np.arange(CLIPS) % 4,
)


def stream(batch: int = 4, **options: Any) -> PackedBatches:
    return PackedBatches(sample, SIZES, BUDGET, batch, 7, (1, 1), **options)


def taken(batch: dict[str, np.ndarray]) -> list[list[int]]:
    """The ordinals of each row of a batch."""
    return [
        row[:count].tolist()
        for row, count in zip(batch["ordinal"], batch["segment"].max(1), strict=True)
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_stream_is_every_clip_once_an_epoch(threads: int) -> None:
    """Rows of two epochs, the border between them inside a batch."""
    made = stream(threads=threads)
    count = [len(made.plan(epoch)) for epoch in range(2)]
    assert count[0] % 4
    rows: list[list[int]] = []
    while len(rows) < sum(count):
        rows += taken(next(made))
    made.close()
    for epoch, part in enumerate((rows[: count[0]], rows[count[0] : sum(count)])):
        numbers = [ordinal for row in part for ordinal in row]
        assert sorted(numbers) == list(range(epoch * CLIPS, (epoch + 1) * CLIPS))
        clips = [[made.plan(epoch).order[ordinal % CLIPS] for ordinal in row] for row in part]
        assert clips == rows_of(made.plan(epoch))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_one_order(count: int) -> None:
    whole = stream()
    parts = [stream(process=(index, count)) for index in range(count)]
    for _ in range(7):
        want, got = next(whole), [next(part) for part in parts]
        for name, value in want.items():
            for index in range(count):
                np.testing.assert_array_equal(got[index][name], value[index::count])
        assert all(part.get_state() == whole.get_state() for part in parts)
    for made in (whole, *parts):
        made.close()
    with pytest.raises(UserError, match="a multiple of 3"):
        stream(process=(0, 3))


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_stream_goes_on_from_the_number_of_its_row(steps: int) -> None:
    """In the middle of an epoch, and on another number of processes."""
    made = stream()
    for _ in range(steps):
        next(made)
    state = json.loads(json.dumps(made.get_state()))
    want = [next(made) for _ in range(4)]
    again, half = stream(), stream(process=(1, 2))
    next(again)
    for other in (again, half):
        other.set_state(state)
    for batch in want:
        mine, second = next(again), next(half)
        for name, value in batch.items():
            np.testing.assert_array_equal(mine[name], value)
            np.testing.assert_array_equal(second[name], value[1::2])
    for other in (made, again, half):
        other.close()


def test_a_checkpoint_keeps_the_row(tmp_path: Path) -> None:
    made = stream()
    for _ in range(3):
        next(made)
    state = {"w": np.ones(2, np.float32)}
    with_row = Checkpoints(tmp_path, keep=1)
    with_row.save(3, state, state, made, {})
    with_row.close()
    want = next(made)
    again = stream()
    next(again)
    restored = Checkpoints(tmp_path, keep=1).restore(state, state, again)
    assert restored is not None and restored.step == 3
    assert taken(next(again)) == taken(want)
    for other in (made, again):
        other.close()
