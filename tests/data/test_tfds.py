"""Prepared TFDS sets: what was written comes back; what is damaged or hostile is one line."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from experiments import base
from experiments.tfds import get_config
from tools import tfds_export
from vdit import stages
from vdit.config import joined
from vdit.config.identity import stage_fields
from vdit.data import sources
from vdit.data.decode import Limits
from vdit.data.labels import by_caption
from vdit.data.stored import inflate
from vdit.data.tfds import VideoSet, find
from vdit.errors import UserError
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics
from vdit.runtime.preemption import Preemption
from vdit.train import Runtime

ROOT = Path(__file__).parents[2]
F = tfds.features
FORMAT = tfds.core.FileFormat.ARRAY_RECORD


def videos(count: int, frames: int = 6, size: tuple[int, int] = (8, 8)) -> list[np.ndarray]:
    return [
        np.random.default_rng(n).integers(0, 256, (frames, *size, 3)).astype(np.uint8)
        for n in range(count)
    ]


def write(
    root: Path,
    features: Mapping[str, Any],
    splits: Mapping[str, list[Mapping[str, Any]]],
    name: str = "some",
    raw: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    metadata: Any = None,
) -> Path:
    """A set, made by TFDS's own writer; `raw` changes what is stored after it was encoded."""
    there = F.FeaturesDict(features)
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    infos = []
    for split, rows in splits.items():
        file = f"{name}-{split}.array_record-00000-of-00001"
        encoded = [there.encode_example(dict(row)) for row in rows]
        encoded = [raw(row) if raw else row for row in encoded]
        serialize = there._example_serializer.serialize_example
        record_writer = tfds.core.file_adapters.ADAPTER_FOR_FORMAT[FORMAT]
        record_writer.write_examples(
            folder / file, ((n, serialize(row)) for n, row in enumerate(encoded))
        )
        infos.append({"name": split, "shardLengths": [str(len(rows))]})
    info = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    metadata = {"fps": 10.0} if metadata is None else metadata
    (folder / "metadata.json").write_text(json.dumps(metadata))
    there.save_config(os.fspath(folder))
    return folder


def rows(count: int = 6, **options: Any) -> list[dict[str, Any]]:
    return [{"video": v, "caption": f"clip {n}"} for n, v in enumerate(videos(count, **options))]


def plain(encoding: str = "zlib", shape: Any = (6, 8, 8, 3)) -> dict[str, Any]:
    return {
        "video": F.Tensor(shape=shape, dtype=np.uint8, encoding=encoding),
        "caption": F.Text(),
    }


def make(root: Path | str, **options: Any) -> VideoSet:
    return VideoSet(root, **({"frames": 6, "size": (8, 8), "fps": 10.0} | options))


def refused(root: Path, words: str, **options: Any) -> None:
    with pytest.raises(UserError, match=words) as raised:
        make(root, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("encoding", "shape"),
    [
        ("zlib", (6, 8, 8, 3)), ("bytes", (6, 8, 8, 3)), ("none", (6, 8, 8, 3)),
        ("zlib", (None, 8, 8, 3)), ("none", (None, 8, 8, 3)), ("zlib", (None, None, None, 3)),
        ("zlib", (6, None, 8, 3)),
    ],
)  # fmt: skip
def test_what_was_written_comes_back(tmp_path: Path, encoding: str, shape: Any) -> None:
    given = rows()
    write(tmp_path, plain(encoding, shape), {"train": given, "test": given[:2]})
    train, held = make(tmp_path), make(tmp_path, split="heldout")
    assert len(train) == 6 and len(held) == 2
    for n, row in enumerate(given):
        assert train[n]["caption"] == row["caption"]
        np.testing.assert_array_equal(train[n]["video"], row["video"])
    again = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(again[3]["video"], given[3]["video"])
    with pytest.raises(IndexError):
        train[6]


def test_frames_kept_as_png_files_are_read_too(tmp_path: Path) -> None:
    """A Video field is stored as a Sequence(Image); both are read without TensorFlow."""
    given = videos(3)

    def png(picture: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        return file.getvalue()

    features = {"video": F.Sequence(F.Image(shape=(8, 8, 3)), length=6), "caption": F.Text()}
    lists = [{"video": [png(p) for p in v], "caption": "c"} for v in given]
    folder = write(tmp_path, features, {"train": lists})
    for declared in ("sequence", "video"):
        if declared == "video":  # as a Video field says it of the same records
            told = json.loads((folder / "features.json").read_text())
            shape = {"dimensions": ["6", "8", "8", "3"]}
            told["featuresDict"]["features"]["video"] = {
                "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
                "video": {"shape": shape, "dtype": "uint8", "encodingFormat": "png"},
            }
            (folder / "features.json").write_text(json.dumps(told))
        both = [make(tmp_path, split=split) for split in ("train", "heldout")]
        found = {source[n]["video"].tobytes() for source in both for n in range(len(source))}
        assert found == {v.tobytes() for v in given}
    lists[1]["video"][3] = lists[1]["video"][3][:60]
    shutil.rmtree(folder)
    write(tmp_path, features, {"train": lists})
    refused(tmp_path, "record 1: frame 3 is damaged")
    lists[1]["video"][3] = png(np.zeros((9, 8, 3), np.uint8))
    shutil.rmtree(folder)
    write(tmp_path, features, {"train": lists})
    refused(tmp_path, r"record 1: frame 3 .*\(6, 9, 8\), where \(6, 8, 8\) is wanted")


def test_clips_are_cut_by_time_and_fitted(tmp_path: Path) -> None:
    video = np.broadcast_to(
        np.arange(50, dtype=np.uint8)[:, None, None, None] * 4, (50, 8, 12, 3)
    ).copy()
    given = [{"video": video, "caption": "long"}, {"video": video[:4], "caption": "short"}]
    write(tmp_path, plain(shape=(None, 8, 12, 3)), {"train": given, "test": given}, metadata={})
    refused(tmp_path, "has no frame rate: give --config.data.native_fps")
    source = make(tmp_path, frames=3, fps=5.0, native_fps=25.0, stride=0.4, size=(4, 4))
    # 2 s at 5 frames/s are ten pictures, each fifth frame; a clip begins at every second one.
    level = [[int(x) for x in source[n]["video"][:, 0, 0, 0]] for n in range(len(source))]
    assert level == [[4 * 5 * k for k in (n, n + 1, n + 2)] for n in (0, 2, 4, 6)]
    assert source[0]["video"].shape == (3, 4, 4, 3)
    assert source.origin(1) == ("some-train.array_record-00000-of-00001 record 0", 0.4)
    assert [name for name, _ in source.skipped] == [
        "some-train.array_record-00000-of-00001 record 1"
    ]
    slow = make(tmp_path, frames=3, fps=50.0, native_fps=25.0)
    assert [int(x) for x in slow[0]["video"][:, 0, 0, 0]] == [0, 0, 4]
    refused(tmp_path, "none of the 2 videos .*the longest has 10", fps=5.0, frames=11,
            native_fps=25.0)  # fmt: skip


def test_a_class_becomes_a_caption(tmp_path: Path) -> None:
    features = plain() | {"caption": F.ClassLabel(names=["running", "a high jump"])}
    given = [{"video": v, "caption": n % 2} for n, v in enumerate(videos(4))]
    write(tmp_path, features, {"train": given, "validation": given[:1]})
    source = make(tmp_path, template="somebody does {label} {0}")
    assert [source[n]["caption"] for n in range(2)] == [
        "somebody does running {0}", "somebody does a high jump {0}"
    ]  # fmt: skip
    assert make(tmp_path)[0]["caption"] == "a video of running"
    assert source.classes == ("running", "a high jump")
    classed = by_caption(make(tmp_path, template="{label}"), source.classes)
    assert [(clip["label"], clip["caption"]) for clip in (classed[0], classed[1])] == [
        (0, "running"), (1, "a high jump")
    ]  # fmt: skip
    write(tmp_path / "no", features, {"train": [*given, {"video": videos(1)[0], "caption": -1}]})
    refused(tmp_path / "no", "record 4: its label is -1 of 2 classes")


def test_splits_share_nothing(tmp_path: Path) -> None:
    given = rows(12)
    write(tmp_path, plain(), {"train": given})

    def seen(**options: Any) -> set[str]:
        source = make(tmp_path, **options)
        return {source[n]["caption"] for n in range(len(source))}

    chosen = []
    for seed in range(4):
        train = seen(seed=seed)
        for shape in ({}, {"frames": 1, "size": (4, 6), "fps": 5.0}):  # as data.shapes has them
            held = seen(seed=seed, split="heldout", heldout=0.25, **shape)
            assert len(held) == 3
            assert held.isdisjoint(seen(seed=seed, heldout=0.25, **shape))
        assert len(train) == 11
        chosen.append(held)
    assert len({frozenset(c) for c in chosen}) > 1
    write(tmp_path / "one", plain(), {"train": given[:1]})
    refused(tmp_path / "one", "1 video; one to train and one to hold out")
    write(tmp_path / "none", plain(), {"validation": given[:2]})
    refused(tmp_path / "none", "no clips in a split train; its splits: validation")


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    for name, caption in (("a", "x"), ("b", "x"), ("c", "y")):
        given = rows()
        given[0]["caption"] = caption
        write(tmp_path / name, plain(), {"train": given})
    digests = [make(tmp_path / name).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert make(tmp_path / "a", split="heldout").digest != digests[0]
    assert make(tmp_path / "a", stride=0.1, frames=3).digest != digests[0]


def test_records_are_read_once_while_they_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, checked = write(tmp_path, plain(), {"train": rows()}), tmp_path / "tfds.json"
    first = make(tmp_path, checked=checked)
    measured: list[int] = []
    measure = VideoSet._measure
    monkeypatch.setattr(VideoSet, "_measure", lambda *given: measured.append(1) or measure(*given))
    again = make(tmp_path, checked=checked)
    assert again.digest == first.digest and not measured
    texts = list(again.texts())
    assert texts == list(first.texts()) and all("array_record" in where for where, _ in texts)
    captions = [again.caption(k) for k in range(len(again))]
    assert [text for _, text in texts] == list(dict.fromkeys(captions))
    assert captions == [again[k]["caption"] for k in range(len(again))]
    shutil.rmtree(folder)
    write(tmp_path, plain(), {"train": rows(7)})
    make(tmp_path, checked=checked)
    assert measured == [1]
    checked.write_text("{")
    make(tmp_path, checked=checked)
    assert measured == [1, 1]


def test_mock_data_of_tfds_is_read(tmp_path: Path) -> None:
    """TFDS's own fake of a set: what its `as_data_source` gives is what a clip is."""
    folder = write(tmp_path, plain("none"), {"train": rows(6)})
    with tfds.testing.mock_data(num_examples=6, data_dir=os.fspath(folder)):
        want = tfds.builder_from_directory(folder).as_data_source("train")
        source = make(tmp_path)
        for n in range(len(source)):
            number = int(source.origin(n)[0].rsplit(" ", 1)[1])
            np.testing.assert_array_equal(source[n]["video"], want[number]["video"])


def test_which_set_and_which_field(tmp_path: Path) -> None:
    write(tmp_path, plain(), {"train": rows()}, name="one")
    write(tmp_path / "two", plain(), {"train": rows()}, name="config")
    (tmp_path / "one" / "incomplete.AB12_2.0.0").mkdir()
    assert find(tmp_path, "one")[0] == find(tmp_path, "one:1.0.0")[0] == "one:1.0.0"
    assert find(tmp_path, "two")[0] == find(tmp_path, "two/config")[0] == "two/config:1.0.0"
    refused(tmp_path, r"several sets \(one:1.0.0, two/config:1.0.0\): choose one with data.name")
    for name in ("three", "../one", "one/../one", "/etc", "one:2.0.0", "one\n"):
        refused(tmp_path, "no prepared set .*there: one:1.0.0, two/config:1.0.0", name=name)
    refused(tmp_path / "one" / "1.0.0", "is a set itself")
    refused(tmp_path / "none", "not a folder")
    with pytest.raises(UserError, match="data.path is empty"):
        make("")
    features = plain() | {"left": plain()["video"], "id": F.Text()}
    features["label"] = F.ClassLabel(names=["a"])
    given = [
        {"video": a, "left": b, "caption": "c", "id": "i", "label": 0}
        for a, b in zip(videos(4), videos(4)[::-1], strict=True)
    ]
    write(tmp_path / "more", features, {"train": given, "test": given})
    more = tmp_path / "more"
    assert make(more)[0]["caption"] == "c"
    assert make(more, caption_field="label")[0]["caption"] == "a video of a"
    left = make(more, video_field="left", caption_field="id")[0]
    assert left["caption"] == "i"
    np.testing.assert_array_equal(left["video"], given[0]["left"])
    refused(more, "data.video_field=id is Text; Tensor", video_field="id")
    refused(more, "data.caption_field=what is not there; Text", caption_field="what")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"video": F.Tensor(shape=(6, 8, 8, 3), dtype=np.float32)}, "no video field: .*float32"),
        ({"video": F.Tensor(shape=(6, 8, 8, 1), dtype=np.uint8)}, r"no video field: .* 1\), uint8"),
        ({"video": F.Image(shape=(8, 8, 3))}, "no video field: .*Image"),
        ({"video": F.Sequence(F.Tensor(shape=(8, 8, 3), dtype=np.uint8))}, "Sequence.Tensor"),
        ({"caption": F.Tensor(shape=(), dtype=np.int64)}, "no caption field: Text or ClassLabel"),
    ],
)
def test_fields_that_cannot_be_read_are_named(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = write(tmp_path, plain(), {"train": rows()})
    F.FeaturesDict(plain() | change).save_config(os.fspath(folder))
    refused(tmp_path, words)


def changed(folder: Path, file: str, change: Callable[[Any], Any]) -> None:
    told = json.loads((folder / file).read_text())
    change(told)
    (folder / file).write_text(json.dumps(told))


def test_foreign_classes_are_never_imported(tmp_path: Path) -> None:
    spy = tmp_path / "spying.py"
    spy.write_text(f"open({os.fspath(tmp_path / 'ran')!r}, 'w')\n")
    folder = write(tmp_path / "set", plain(), {"train": rows()})
    kept = (folder / "features.json").read_text(), (folder / "dataset_info.json").read_text()
    evil = {"pythonClassName": "spying.Feature", "jsonFeature": {"json": "{}"}}
    inner = {"pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
             "sequence": {"feature": evil, "length": "-1"}}  # fmt: skip
    legacy = json.dumps({"x": {"type": "spying.Feature", "content": {}}})
    hidden = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
              "jsonFeature": {"json": legacy}}  # fmt: skip
    sys.path.insert(0, os.fspath(tmp_path))
    try:
        for feature in (evil, inner, hidden):

            def put(told: Any, feature: Any = feature) -> None:
                told["featuresDict"]["features"]["extra"] = feature

            changed(folder, "features.json", put)
            refused(tmp_path / "set", "extra in features.json is of the class")
            (folder / "features.json").write_text(kept[0])
        (folder / "features.json").write_text(json.dumps({"type": "spying.Feature", "content": {}}))
        refused(tmp_path / "set", "features.json: not as TFDS writes it")
        (folder / "features.json").write_text(kept[0])
        changed(folder, "dataset_info.json", lambda told: told.update(features=evil))
        assert len(make(tmp_path / "set")) == 5  # features are not taken from there
        assert "spying" not in sys.modules and not (tmp_path / "ran").exists()
    finally:
        sys.path.pop(0)


def test_other_wrong_files(tmp_path: Path) -> None:
    folder = write(tmp_path, plain(), {"train": rows()})
    info = (folder / "dataset_info.json").read_text()
    shard = next(folder.glob("*.array_record*"))
    whole = shard.read_bytes()

    def told(change: Callable[[Any], Any], words: str) -> None:
        changed(folder, "dataset_info.json", change)
        refused(tmp_path, words)
        (folder / "dataset_info.json").write_text(info)

    told(lambda t: t.update(fileFormat="tfrecord"), "kept as tfrecord: prepare it with file_format")
    told(lambda t: t.update(name="../../x"), "dataset_info.json has the name '../../x'")
    told(lambda t: t["splits"][0].update(name="../t"), "has the name '../t'")
    told(lambda t: t["splits"][0].update(filepathTemplate="../{SPLIT}"), "has the file name '../")
    told(lambda t: t["splits"][0].update(shardLengths=["5"]), "6 records, where .* says 5")
    told(lambda t: t["splits"][0].update(shardLengths=["3", "3"]), "its shard .* is missing")
    told(lambda t: t.update(version="x"), "cannot be read")
    (folder / "dataset_info.json").write_text("{")
    refused(tmp_path, "dataset_info.json: not as TFDS writes it")
    (folder / "dataset_info.json").write_text(info)
    shard.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "array_record-00000-of-00001: damaged")
    flipped = bytearray(whole)
    flipped[whole.index(b"clip 3")] ^= 1
    shard.write_bytes(flipped)
    refused(tmp_path, "record 3: .*hash mismatch")
    shard.write_bytes(b"")
    refused(tmp_path, "damaged")
    shard.unlink()
    refused(tmp_path, "its shard some-train.array_record-00000-of-00001 is missing")


@pytest.mark.parametrize(
    ("shape", "stored", "words"),
    [
        ((6, 8, 8, 3), zlib.compress(bytes(6 * 192))[:-5], "cut short"),
        ((6, 8, 8, 3), b"no zlib", "damaged zlib data"),
        ((6, 8, 8, 3), zlib.compress(bytes(5 * 192)), "960 bytes are no video of the shape"),
        ((6, 8, 8, 3), zlib.compress(bytes(1 << 20)), "inflates to over 1152 bytes"),
        ((None, 8, 8, 3), zlib.compress(bytes(1 << 20)), "inflates to over 19200 bytes"),
        ((None, 8, 8, 3), zlib.compress(bytes(193)), "193 bytes are no video"),
        ((None, 8, 8, 3), zlib.compress(b""), "0 bytes are no video"),
        ((6, None, 8, 3), zlib.compress(bytes(1 << 20)), "inflates to over 18000 bytes"),
        ((None, None, 8, 3), {"shape": [200, 8, 8, 3]}, "200 frames: over the limit of 100"),
        ((None, None, 8, 3), {"shape": [6, 200, 8, 3]}, "over the limit of 1000 pixels"),
        ((None, None, 8, 3), {"shape": [6, 8, 9, 3]}, r"shape is \(6, 8, 9, 3\)"),
        ((None, None, 8, 3), {"shape": [-6, -8, 8, 3]}, r"shape is \(-6, -8, 8, 3\)"),
    ],
)  # fmt: skip
def test_records_that_are_wrong_are_named(
    tmp_path: Path, shape: Any, stored: Any, words: str
) -> None:
    def spoil(row: dict[str, Any]) -> dict[str, Any]:
        if row["caption"] != "clip 4":
            return row
        return row | {"video": row["video"] | stored if isinstance(stored, dict) else stored}

    write(tmp_path, plain(shape=shape), {"train": rows()}, raw=spoil)
    limits = Limits(frames=100, pixels=1000)
    refused(tmp_path, f"00000-of-00001 record 4: .*{words}", limits=limits)


def test_a_bomb_is_not_inflated_past_its_limit() -> None:
    import tracemalloc

    data = zlib.compress(bytes(1 << 28))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="over 100000 bytes"):
            inflate(data, 100_000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert inflate(zlib.compress(b"abc"), 3) == b"abc"


def test_empty_captions_and_wrong_settings(tmp_path: Path) -> None:
    given = rows()
    given[2]["caption"] = " \n"
    write(tmp_path, plain(), {"train": given})
    refused(tmp_path, "record 2: its caption is empty")
    for options, words in (
        ({"fps": 0.0}, "fps=0.0"), ({"native_fps": -1.0}, "native_fps=-1"),
        ({"template": "a video"}, "with {label} in it"), ({"split": "test"}, "train or heldout"),
        ({"frames": 0}, "frames=0"), ({"heldout": 0.0}, "heldout=0.0"),
    ):  # fmt: skip
        refused(tmp_path, words, **options)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data.source": "world", "data.name": "x"}, "data.name is given with data.source=world"),
        ({"data.template": "a video"}, "has no {label}"),
        ({"data.native_fps": float("nan")}, "data.native_fps is nan"),
    ],
)
def test_wrong_fields_of_the_configuration(fields: dict[str, Any], words: str) -> None:
    config = get_config("smoke")
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=words):
        joined.check(config)


def test_older_workdirs_keep_their_digests() -> None:
    """The new fields are in no stage's digest at their first value, and in each at another."""
    config = base.get_config()
    new = {f"data.{name}" for name in sources.OF_TFDS}
    for stage in ("vae", "latents", "dit"):
        assert not new & set(stage_fields(config, stage))
    config.data.native_fps = 25.0
    assert stage_fields(config, "vae")["data.native_fps"] == 25.0


def small() -> ConfigDict:
    config = base.get_config("smoke")
    config.data.frames, config.data.size = 5, (16, 16)
    return config


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("exported")
    tfds_export.export(small(), out, 24, 4)
    yield out


def test_the_world_is_exported_with_its_truth(exported: Path) -> None:
    folder = exported / "vdit_clips" / "1.0.0"
    assert sorted(path.name for path in exported.iterdir()) == ["vdit_clips"]
    public = tfds.builder_from_directory(folder)
    for split, name in (("train", "train"), ("heldout", "test")):
        world = sources.source(small(), split, Path())
        source = make(exported, frames=5, size=(16, 16), split=split)
        want = public.as_data_source(name)
        assert len(source) == len(want) == (24 if split == "train" else 4)
        for n in range(len(source)):
            clip, theirs = world[n], want[n]
            assert source[n]["caption"] == clip["caption"] == theirs["caption"].decode()
            np.testing.assert_array_equal(source[n]["video"], clip["video"])
            np.testing.assert_array_equal(theirs["video"], clip["video"])
            for key, value in clip["truth"].items():
                np.testing.assert_array_equal(theirs["truth"][key], value)
                assert np.asarray(theirs["truth"][key]).shape == value.shape


def test_an_export_is_whole_or_not_there(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is there already"):
        tfds_export.export(small(), exported, 4, 1)
    with pytest.raises(UserError, match="0 clips for the split test"):
        tfds_export.export(small(), tmp_path, 4, 0)

    class Failing:
        def __init__(self, source: Any) -> None:
            self.source = source

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise KeyboardInterrupt
            return self.source[index]

    whole = sources.source
    monkeypatch.setattr(sources, "source", lambda *given, **more: Failing(whole(*given, **more)))
    with pytest.raises(KeyboardInterrupt):
        tfds_export.export(small(), tmp_path, 8, 1)
    with pytest.raises(UserError, match="no prepared set"):
        find(tmp_path)
    monkeypatch.undo()
    tfds_export.export(small(), tmp_path, 8, 1)
    assert len(make(tmp_path, frames=5, size=(16, 16))) == 8


def test_the_stages_learn_from_a_set(exported: Path, tmp_path: Path) -> None:
    config = get_config("smoke")
    shutil.copytree(exported, tmp_path / "set")
    config.data.path = os.fspath(tmp_path / "set")
    config.data.frames, config.data.size = 5, (16, 16)
    config.vae.train.steps, config.vae.train.batch = 3, 2
    config.vae.train.optimizer = "adamw"
    config.latents.clips, config.latents.batch = 100, 8
    joined.check(config)
    with Metrics(tmp_path) as metrics, Preemption() as preemption:
        mesh = make_mesh({}, jax.devices()[:1])
        runtime = Runtime(tmp_path, mesh, metrics, preemption, config.run)
        cache = stages.cache_latents(config, runtime, stages.train_vae(config, runtime))
        assert len(cache) == 24 and cache[0]["latent"].shape[1:3] == (2, 2)
        assert stages.cache_latents(config, runtime, {}).manifest == cache.manifest
        folder = tmp_path / "set" / "vdit_clips" / "1.0.0"
        with (folder / "features.json").open("a") as file:
            file.write("\n")
        with pytest.raises(UserError, match="was made from another data set"):
            stages.cache_latents(config, runtime, {})


def test_no_tensorflow_is_imported(exported: Path, tmp_path: Path) -> None:
    """By the command, in a process of its own, call after call; by wrong arguments neither."""
    asked = [
        ["--clips=2", "--config.data.frames=5", f"--out={tmp_path}"],
        ["--clips=2"],
        ["--clips=2", f"--out={tmp_path}"],
        ["--clip=2"],
    ]
    code = (
        "import contextlib, io, json, sys\n"
        "from vdit.data.tfds import VideoSet; from tools import tfds_export\n"
        f"VideoSet({os.fspath(exported)!r}, frames=5)[0]\n"
        f"for flags in {asked!r}:\n"
        "    sys.argv[1:] = ['--config=experiments/base.py:smoke', *flags]\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said: status = tfds_export.main()\n"
        "    tfds_export.FLAGS.unparse_flags()\n"
        "    print(json.dumps([status, said.getvalue()]))\n"
        "assert not {'tensorflow', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [status for status, _ in rows] == [0, 2, 2, 2], rows
    words = ("give --out=DIR and --clips=N", "is there already", "Unknown command line flag")
    for (_, said), part in zip(rows[1:], words, strict=True):
        assert said.startswith("tfds_export: ") and said.count("\n") == 1 and part in said, said
    assert [len(make(tmp_path, frames=5, split=split)) for split in ("train", "heldout")] == [2, 1]
