"""The cache and the loader: whole or absent, resumable, the same order however it is read."""

import gc
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vdit.data.latents import Latents, is_complete, read_manifest, write_cache
from vdit.data.loader import PackedBatches, batches
from vdit.data.packing import Sample, Sizes
from vdit.errors import UserError
from vdit.tokens import Budget


def encode(indices: range) -> Iterator[dict[str, np.ndarray]]:
    for i in indices:
        latent = np.random.default_rng(i).normal(3.0, 2.0, (2, 2, 2, 4)).astype(np.float16)
        yield {"latent": latent, "ids": np.full(3, i, np.int32)}


def test_elements_and_statistics_come_back(tmp_path: Path) -> None:
    assert write_cache(tmp_path, "d" * 64, 10, 4, encode)
    cache = Latents(tmp_path)
    assert len(cache) == 10 and [int(cache[i]["ids"][0]) for i in range(10)] == list(range(10))
    want = np.stack([e["latent"].astype(np.float64) for e in encode(range(10))])
    made = cache.statistics()
    np.testing.assert_allclose(made["mean"], want.mean((0, 1, 2, 3)), rtol=1e-5)
    # One deviation for all channels: of their mean variance.
    std = np.sqrt(want.var((0, 1, 2, 3)).mean())
    np.testing.assert_allclose(made["std"], np.full(want.shape[-1], std), rtol=1e-5)


def test_equal_errors_of_channels_cost_alike(tmp_path: Path) -> None:
    variance = np.array([0.01, 0.2, 0.5, 1.0])  # the posterior's; the last is switched off

    def noisy(indices: range) -> Iterator[dict[str, np.ndarray]]:
        for element in encode(indices):
            yield element | {"variance": variance.astype(np.float32)}

    assert write_cache(tmp_path, "d" * 64, 10, 4, noisy)
    cache = Latents(tmp_path)
    assert "variance" not in cache[0]
    want = np.stack([e["latent"].astype(np.float64) for e in encode(range(10))])
    std = cache.statistics()["std"].astype(np.float64)
    np.testing.assert_allclose((want.var((0, 1, 2, 3)) / std**2).mean(), 1.0, rtol=1e-5)
    # By the definition: a unit of each costs (1 / variance - 1) of its square.
    cost = std[:3] ** 2 * (1 / variance[:3] - 1)
    np.testing.assert_allclose(cost, cost[0], rtol=1e-5)
    assert std[3] > std[2]


def test_an_interrupted_encoding_goes_on_with_the_next_shard(tmp_path: Path) -> None:
    asked: list[int] = []

    def counted(indices: range) -> Iterator[dict[str, np.ndarray]]:
        asked.append(indices.start)
        yield from encode(indices)

    assert not write_cache(tmp_path / "cut", "d" * 64, 10, 4, counted, stop=lambda: len(asked) == 2)
    assert read_manifest(tmp_path / "cut") is None
    with pytest.raises(UserError, match="no finished latent cache"):
        Latents(tmp_path / "cut")
    assert write_cache(tmp_path / "cut", "d" * 64, 10, 4, counted)
    assert asked == [0, 4, 8]
    assert write_cache(tmp_path / "whole", "d" * 64, 10, 4, encode)
    assert read_manifest(tmp_path / "cut") == read_manifest(tmp_path / "whole")


def test_a_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    def failing(indices: range) -> Iterator[dict[str, np.ndarray]]:
        yield from encode(indices)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_cache(tmp_path, "d" * 64, 4, 4, failing)
    assert list(tmp_path.iterdir()) == []


def test_latents_that_are_not_finite_are_no_shard(tmp_path: Path) -> None:
    def overflown(indices: range) -> Iterator[dict[str, np.ndarray]]:
        for element in encode(indices):
            yield element | {"latent": element["latent"] * np.float16(np.inf)}

    with pytest.raises(UserError, match="not finite; train stage vae anew, with a smaller"):
        write_cache(tmp_path, "d" * 64, 4, 4, overflown)
    assert not list(tmp_path.iterdir())


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    assert write_cache(tmp_path, "d" * 64, 10, 4, encode)
    cache = Latents(tmp_path)
    cache.verify()
    shard = sorted(tmp_path.glob("*.array_record"))[1]
    good = shard.read_bytes()
    shard.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    with pytest.raises(UserError, match=f"{shard.name} is not what was written; delete it"):
        cache.verify()
    cache.verify(0, 2)  # the first and the third
    shard.write_bytes(good[:-1])
    with pytest.raises(UserError, match=f"{shard.name} has {len(good) - 1} bytes instead of"):
        Latents(tmp_path)
    shard.write_bytes(good)
    manifest = read_manifest(tmp_path)
    assert manifest is not None and is_complete(tmp_path, manifest)
    Path(f"{shard}.json").unlink()
    assert not is_complete(tmp_path, manifest)


class Numbers:
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {"x": np.int64(index), "caption": np.int64(-1)}


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_shuffle_repeat_and_number_the_stream(threads: int) -> None:
    stream = batches(Numbers(), 4, 7, ("x",), threads)
    first = [next(stream) for _ in range(5)]
    assert sorted(np.concatenate([b["x"] for b in first]).tolist()) == list(range(20))
    assert set(first[0]) == {"x", "ordinal"}
    assert np.concatenate([b["ordinal"] for b in first]).tolist() == list(range(20))
    one = batches(Numbers(), 4, 7, ("x",), 1)
    for made in first:
        np.testing.assert_array_equal(made["x"], next(one)["x"])


def test_a_stream_goes_on_from_its_state() -> None:
    stream = batches(Numbers(), 4, 7, ("x",))
    for _ in range(3):
        next(stream)
    state = stream.get_state()
    want = [next(stream) for _ in range(4)]
    again = batches(Numbers(), 4, 7, ("x",))
    again.set_state(state)
    for made in want:
        np.testing.assert_array_equal(made["x"], next(again)["x"])


def test_a_packed_stream_that_its_own_thread_forgets_ends_quietly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row that is being read is what keeps a dropped stream: then that thread closes it."""
    errors: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    began, go = threading.Event(), threading.Event()

    def read(clip: int, ordinal: int) -> Sample:
        if ordinal >= 2:  # the second batch, which is read ahead
            began.set()
            assert go.wait(60)
        latent = np.zeros((1, 2, 2, 4), np.float16)
        return Sample(latent, np.zeros(1), np.ones(3), np.ones(3, bool), ordinal, np.zeros(1, bool))

    sizes = Sizes(np.full(20, 4), np.full(20, 3))
    stream = PackedBatches(read, sizes, Budget(4, 1, 8, 8), 2, 0, (1, 1))
    alive = weakref.ref(stream)
    next(stream)
    assert began.wait(60)
    del stream
    assert alive() is not None
    go.set()
    for _ in range(3000):
        gc.collect()
        if alive() is None:
            break
        time.sleep(0.02)
    assert alive() is None and not errors
