"""data.mixture: several sources by shares, the same order everywhere; pictures beside films."""

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import folder as folder_experiment
from tests.data.test_folder import film
from tests.data.test_tars import films, samples, write
from vdit.config import joined
from vdit.data import mixture, sources
from vdit.data.loader import batches
from vdit.data.mixture import Shares
from vdit.errors import UserError

assert films  # a fixture


class Numbers:
    """Clips that are their number and that of their source."""

    skipped: tuple[Any, ...] = ()

    def __init__(self, source: int, count: int) -> None:
        self.source, self.count = source, count
        self.digest = self.pictures = f"{source} {count}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {"video": np.array([self.source, int(index)])}


@pytest.mark.parametrize("lengths, shares", [((5, 40, 7), (1, 2, 1)), ((3, 3), (0.9, 0.1))])
def test_any_run_has_the_shares_and_every_clip_occurs(
    lengths: tuple[int, ...], shares: tuple[float, ...]
) -> None:
    mixed = Shares([Numbers(k, n) for k, n in enumerate(lengths)], shares)
    places = [tuple(mixed[i]["video"]) for i in range(len(mixed))]
    assert set(places) == {(k, i) for k, n in enumerate(lengths) for i in range(n)}
    chosen = np.array([k for k, _ in places])
    for first in range(0, len(mixed) - 20, 7):
        counts = np.bincount(chosen[first : first + 20], minlength=len(lengths)) / 20
        np.testing.assert_allclose(counts, np.array(shares) / sum(shares), atol=0.11)
    # A source that is repeated shows none of its clips twice as often as another.
    for k, n in enumerate(lengths):
        times = collections.Counter(i for source, i in places if source == k)
        assert len(times) == n and max(times.values()) - min(times.values()) <= 1
    with pytest.raises(IndexError):
        mixed[len(mixed)]


def test_the_order_is_the_same_on_two_processes_and_after_a_resume() -> None:
    mixed = Shares([Numbers(0, 9), Numbers(1, 50)], (0.3, 0.7))

    def stream(index: int = 0, count: int = 1, start: int = 0) -> list[tuple[int, ...]]:
        read = batches(mixed, 4, 3, ("video",), process=(index, count))
        read.set_state({"next_index": 4 * start})
        found = [next(read)["video"] for _ in range(30 - start)]
        read.close()
        return [tuple(clip) for batch in found for clip in batch]

    whole = stream()
    assert stream(start=11) == whole[44:]
    halves = [stream(index, 2) for index in (0, 1)]
    assert [clip for pair in zip(*halves, strict=True) for clip in pair] == whole
    assert np.isclose(np.mean([source for source, _ in whole]), 0.7, atol=0.1)


def test_what_a_mixture_is_called_by(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Numbers(0, 9), Numbers(1, 50)]
    digests = {Shares(parts, shares).digest for shares in ((1, 1), (2, 2), (1, 2))}
    assert len(digests) == 2  # shares count by their ratio
    assert Shares(parts[::-1], (1, 1)).digest not in digests
    monkeypatch.setattr(mixture, "MOST", 100)
    with pytest.raises(UserError, match="at most 1e.02 are allowed"):
        Shares(parts, (1, 0.1))


@pytest.fixture
def config(films: Path, tmp_path: Path) -> Any:
    """The films of a folder, the same in a tar, and pictures in another."""
    write(tmp_path / "sets" / "films.tar", samples(films))
    pictures = [
        {"__key__": f"{n:03d}", "png": film(1, 10 * n)[0].astype(np.float32) / 255, "txt": f"g {n}"}
        for n in range(12)
    ]
    write(tmp_path / "sets" / "pictures.tar", pictures)
    config = folder_experiment.get_config("smoke")
    config.data.source, config.data.frames, config.data.size = "mixture", 5, (8, 8)
    config.data.stride = 0.5
    config.data.mixture = (
        ("folder", str(films), 2), ("webdataset", str(tmp_path / "sets" / "films.tar"), 1.0),
        ("webdataset", str(tmp_path / "sets" / "pictures.tar"), 1, 1),
    )  # fmt: skip
    config.data.shapes = ((5, 12, 16, 10.0), (1, 12, 16, 10.0), (1, 9, 12, 10.0))
    return config


def test_pictures_are_mixed_in_at_shapes_of_one_frame(
    config: Any, films: Path, tmp_path: Path
) -> None:
    sources.check(config, folder_experiment.get_config("smoke"))
    train = sources.source(config, "train", tmp_path / "run")
    held = sources.source(config, "heldout", tmp_path / "run")
    assert {train[i]["video"].shape for i in range(len(train))} == {(5, 8, 8, 3)}
    assert {held[i]["video"].shape for i in range(len(held))} == {(5, 8, 8, 3)}
    captions = [{clips[i]["caption"] for i in range(len(clips))} for clips in (train, held)]
    assert not captions[0] & captions[1] and len(captions[0] | captions[1]) == 3
    mixed = sources.training_clips(config, tmp_path / "run")
    found = collections.Counter(mixed.place(i)[0] for i in range(len(mixed)))
    assert abs(found[2] / len(mixed) - 0.25) < 0.05 and abs(found[0] / len(mixed) - 0.5) < 0.05
    for i in range(len(mixed)):
        frames, height, width, _ = config.data.shapes[mixed.kind(i)]
        assert mixed[i]["video"].shape == (frames, height, width, 3)
        assert mixed.place(i)[0] < 2 or (frames == 1 and mixed[i]["caption"].startswith("g "))
    assert {text for _, text in mixed.texts()} >= captions[0]
    shapes, config.data.shapes = config.data.shapes, (*config.data.shapes, (1, 16, 12, 10.0))
    with pytest.raises(UserError, match="every film of data.mixture has an aspect that another"):
        sources.training_clips(config, tmp_path / "run")
    config.data.shapes = shapes
    # The data set is the same wherever its parts are.
    was = sources.identity(config, train)
    moved = (tmp_path / "sets").rename(tmp_path / "moved")
    config.data.mixture = tuple(
        (source, path.replace(str(tmp_path / "sets"), str(moved)), *rest)
        for source, path, *rest in config.data.mixture
    )
    train = sources.source(config, "train", tmp_path / "run")
    assert sources.identity(config, train) == was and was["data.content"] == train.pictures


@pytest.mark.parametrize("fields, words", [
    ({"mixture": ()}, "data.mixture lists .source, path, share., data.path is empty"),
    ({"path": "films"}, "data.path is empty"),
    ({"mixture": (("folder", "a"),)}, "is allowed, with a source of folder, webdataset, parquet"),
    ({"mixture": (("world", "a", 1),)}, "data.mixture has .'world', 'a', 1.: "),
    ({"mixture": (("folder", "a", 0),)}, "a share over 0"),
    ({"mixture": (("folder", "a", 1, 3),)}, "3 frames; data.frames and data.shapes have 1, 5"),
    ({"mixture": (("folder", "a", 1, 1),)}, "no source of data.frames=5 frames"),
    ({"mixture": ("folder", "a", 1)}, "data.mixture has 'folder'"),
    ({"mixture": (3,)}, "data.mixture has 3"),
    ({"filter": "[('n', '>', 1)]"}, "only parquet and datasets take it"),
    ({"source": "folder"}, "data.mixture is given with data.source=folder: only mixture takes it"),
])  # fmt: skip
def test_wrong_mixtures_are_one_line(config: Any, fields: dict[str, Any], words: str) -> None:
    config.data.update(fields)
    config.dit.auxiliary = ()
    with pytest.raises(UserError, match=words) as raised:
        joined.check(config)
    assert "\n" not in str(raised.value)
