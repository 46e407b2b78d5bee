"""Tables of films, by pyarrow and by datasets: the clips of a folder, and what is refused."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_folder import items
from tests.data.test_tars import CAPTIONS, SPLITS, decoded, films, small
from vdit.config import joined
from vdit.data import tables
from vdit.data.captioned import Captioned
from vdit.data.folder import Folder
from vdit.data.loader import batches
from vdit.data.tables import Parquet, Saved
from vdit.errors import UserError
from vdit.run import run

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
assert films and decoded  # fixtures


def columns(films: Path, kind: str = "bytes") -> dict[str, list[Any]]:
    paths = [films / name for name in CAPTIONS]
    made = {"bytes": [path.read_bytes() for path in paths], "paths": [str(path) for path in paths]}
    made["structs"] = [{"bytes": data, "path": None} for data in made["bytes"]]
    return {"video": made[kind], "caption": list(CAPTIONS.values()), "n": [1, 2, 3]}


def write(path: Path, content: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(content), path, **options)
    return path


@pytest.fixture
def made(tmp_path: Path, decoded: Path) -> Callable[..., Captioned]:
    shutil.copytree(decoded, tmp_path / "cache")

    def made(path: Any, kind: Any = Parquet, fields: Any = None, **options: Any) -> Captioned:
        given = {"frames": 5, "size": (8, 8), "stride": 0.5, "heldout": 0.0, "workers": 2}
        store = kind(str(path), tmp_path / "cache", **(fields or {}))
        return Captioned(store, cache=tmp_path / "cache", **(given | options))

    return made


@pytest.fixture
def theirs(films: Path, decoded: Path) -> Folder:
    options: dict[str, Any] = {"frames": 5, "size": (8, 8), "stride": 0.5, "heldout": 0.0}
    return Folder(films, cache=decoded, **options)


@pytest.mark.parametrize("kind", ["bytes", "paths", "structs"])
def test_the_clips_are_those_of_the_folder(
    kind: str, films: Path, made: Callable[..., Captioned], theirs: Folder, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "cache")  # the films are read from the table
    content = columns(films, kind)
    path = write(tmp_path / "one.parquet", content, row_group_size=2)
    whole = made(path)
    assert items(whole) == items(theirs) and whole.digest == theirs.digest and not whole.skipped
    assert items(pickle.loads(pickle.dumps(whole))) == items(whole)
    for split in SPLITS:
        options: dict[str, Any] = {"split": split, "heldout": 0.3, "seed": 2}
        folder = Folder(
            films, cache=tmp_path / "cache", frames=5, size=(8, 8), stride=0.5, **options
        )
        assert made(path, **options).digest == folder.digest
    names = {whole.origin(i)[0] for i in range(len(whole))}
    inside = {f"one.parquet/row {n:07d}" for n in range(3)}
    assert names == ({str(films / name) for name in CAPTIONS} if kind == "paths" else inside)
    for number in range(3):
        part = {name: values[number : number + 1] for name, values in content.items()}
        write(tmp_path / "several" / f"{number}.parquet", part)
    for several in ("several", "several/*.parquet", "several/{0..2}.parquet"):
        assert made(tmp_path / several).digest == theirs.digest


def test_paths_are_beside_the_table(
    films: Path, made: Callable[..., Captioned], theirs: Folder, tmp_path: Path
) -> None:
    shutil.copytree(films, tmp_path / "set" / "films")
    content = {"path": [f"films/{name}" for name in CAPTIONS], "text": list(CAPTIONS.values())}
    write(tmp_path / "set" / "rows.parquet", content)
    assert made(tmp_path / "set").digest == theirs.digest
    content["path"] += ["films/none.mp4", "https://host/a.mp4", "a\0b.mp4", "", None]
    content["text"] += ["a", "b", "c", "d", "e"]
    write(tmp_path / "set" / "rows.parquet", content)
    source = made(tmp_path / "set")
    assert source.digest == theirs.digest
    assert [why for _, why in source.skipped] == [
        "No such file or directory", *["path is no path of this machine"] * 2,
        *["path is empty"] * 2,
    ]  # fmt: skip
    assert source.skipped[1][0] == "rows.parquet/row 0000004"


def test_a_filter_keeps_rows(
    films: Path, made: Callable[..., Captioned], theirs: Folder, tmp_path: Path
) -> None:
    path = write(tmp_path / "one.parquet", columns(films))

    def kept(filter: str) -> list[str]:
        return sorted(made(path, fields={"filter": filter}).captions)

    assert kept("[('n', '>', 1)]") == ["a short film", "a tiny film"]
    assert kept("[[('n', '==', 1)], [('caption', 'in', ['a tiny film'])]]") == [
        "a long film", "a tiny film",
    ]  # fmt: skip
    assert kept("[('n', '>', 0), ('n', '<', 3)]") == ["a long film", "a short film"]
    for filter, words in {
        "n > 1": "no list of conditions that pyarrow reads, such as",
        "[('n', '~', 1)]": "no list of conditions",
        "[": "no list of conditions",
        "__import__('os')": "no list of conditions",
        "3": "no list of conditions",
        "[('m', '>', 1)]": "names the column m; .* has video .binary., caption .string., n .int64.",
        "[('n', '>', 'a')]": "does not fit the columns of .*one.parquet",
        "[('n', '>', 9)]": "leaves no row",
    }.items():
        with pytest.raises(UserError, match=words) as raised:
            kept(filter)
        assert "\n" not in str(raised.value) and "data.filter" in str(raised.value)


def test_columns_are_found_or_named(
    films: Path, made: Callable[..., Captioned], theirs: Folder, tmp_path: Path
) -> None:
    content = columns(films)
    content = {"left": content["video"], "right": content["video"], "long": content["caption"]}
    path = write(tmp_path / "one.parquet", content)
    fields = {"video_field": "right", "caption_field": "long"}
    assert made(path, fields=fields).digest == theirs.digest
    for fields, words in (
        ({"caption_field": "long"}, "no column that is known to be films, .*names one of left"),
        ({"video_field": "long2"}, "no column long2 of films"),
        ({"video_field": "left"}, "no column caption or text or prompt or txt of text"),
        ({"video_field": "left", "caption_field": "right"}, "no column right of text"),
    ):
        with pytest.raises(UserError, match=words):
            made(path, fields=fields)


def not_utf8(text: list[bytes]) -> Any:
    """A column of text whose bytes are not checked."""
    array = pa.array(text, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(text), array.buffers())


def test_one_bad_row_of_many_is_skipped_and_named(
    films: Path, made: Callable[..., Captioned], theirs: Folder, tmp_path: Path
) -> None:
    content = columns(films)
    data = content["video"] + [content["video"][0]] * 3 + [b"no film", None]
    texts = [x.encode() for x in content["caption"]] + [b"\xe9", b" ", b"", b"odd", b"none"]
    whole = {"video": pa.array(data), "caption": not_utf8(texts)}
    path = write(tmp_path / "one.parquet", whole)
    source = made(path, skipped_path=tmp_path / "skipped.jsonl")
    assert source.digest == theirs.digest
    said = {name.removeprefix("one.parquet/row 000000"): why for name, why in source.skipped}
    assert said.pop("6").startswith("not a video that can be read")
    assert said == {
        "3": "caption is not UTF-8 (byte 0)",
        "4": "the column caption: the caption is empty or no text",
        "5": "the column caption: the caption is empty or no text",
        "7": "video is empty",
    }
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 5
    with pytest.raises(UserError, match="row 0000003: caption is not UTF-8"):
        made(path, strict=True)


def test_wrong_files_are_one_line(
    films: Path, made: Callable[..., Captioned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, root = columns(films), tmp_path / "set"
    good = write(root / "0.parquet", content)
    nulls = pa.array([None] * 3, pa.string())

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as raised:
            made(root)
        assert "\n" not in str(raised.value) and "1.parquet" in str(raised.value)

    write(root / "1.parquet", content | {"caption": nulls})
    refused("the column caption holds nulls alone; data.caption_field names another of video")
    write(root / "1.parquet", content | {"video": pa.array([None] * 3, pa.binary())})
    refused("the column video holds nulls alone")
    write(root / "1.parquet", content | {"video": columns(films, "paths")["video"]})
    refused("has the columns video: string, caption: string, and .*0.parquet .*video: binary")
    write(root / "1.parquet", {"n": [1], "m": [2]})
    refused("no column that is known to be films, bytes or paths; .* names one of n .int64.")
    data = good.read_bytes()
    for bad in (b"", b"PAR1", data[: len(data) // 2], data[:-8] + b"\xff" * 4 + b"PAR1"):
        (root / "1.parquet").write_bytes(bad)
        refused("1.parquet: not a table that can be read .*; copy it again, or leave it out")
    pq.write_table(pa.table(content).slice(0, 0), root / "1.parquet")
    assert len(made(root).rows) == 3  # a table may be empty
    new = write(tmp_path / "new.parquet", content)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        assert len(made(root).rows) == 3  # what is indexed and decoded needs none
        with pytest.raises(UserError, match=r"need pyarrow: pip install 'vdit\[parquet\]'"):
            made(new)


def test_the_index_is_kept_and_renewed(
    films: Path, made: Callable[..., Captioned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "one.parquet", columns(films))
    first = made(path)
    with monkeypatch.context() as closed:
        closed.setattr(tables, "_build", None)
        assert made(path).digest == first.digest
    write(path, {name: values[1:] for name, values in columns(films).items()})
    assert sorted(made(path).captions) == ["a short film", "a tiny film"]
    store = Parquet(str(path), tmp_path / "cache")
    write(path, columns(films))
    with pytest.raises(UserError, match="one.parquet: it has changed"):
        Captioned(store, cache=tmp_path / "other", frames=5, size=(8, 8))


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    values = [f"{n}".encode() for n in range(100)]
    path = write(tmp_path / "one.parquet", {"video": values, "n": values}, row_group_size=40)
    passes: list[int] = []

    def batches(*given: Any) -> Any:
        passes.append(given[2])
        return tables._parquet(*given)

    read = tables._Cells(tables.Table(tables._parquet_schema, batches), "video")
    assert [b"".join(read(path, n)) for n in range(100)] == values and passes == [0]
    order = np.random.default_rng(0).permutation(100)
    assert [b"".join(read(path, int(n))) for n in order] == [values[n] for n in order]
    assert list(read(path, 100)) == []


def saved(films: Path, root: Path, kind: str = "bytes", **options: Any) -> Any:
    """A data set of datasets."""
    datasets = pytest.importorskip("datasets")
    content = columns(films, "structs" if kind == "video" else kind)
    features = {"caption": datasets.Value("string"), "n": datasets.Value("int64")}
    types = {"bytes": "binary", "paths": "string"}
    video = datasets.Video() if kind == "video" else datasets.Value(types[kind])
    features = datasets.Features({"video": video} | features)
    made = datasets.Dataset.from_dict(content, features=features)
    made.save_to_disk(str(root), **options)
    return made


@pytest.mark.parametrize("kind", ["bytes", "paths", "video"])
def test_saved_data_sets_are_read(
    kind: str, films: Path, made: Callable[..., Captioned], theirs: Folder, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "cache")
    saved(films, tmp_path / "set", kind, num_shards=2)
    assert len(list((tmp_path / "set").glob("*.arrow"))) == 2
    assert made(tmp_path / "set", Saved).digest == theirs.digest
    filtered = made(tmp_path / "set", Saved, {"filter": "[('n', '>', 2)]"})
    assert filtered.captions == ["a tiny film"]


def test_splits_of_saved_data_sets(
    films: Path, made: Callable[..., Captioned], theirs: Folder, tmp_path: Path
) -> None:
    datasets, root = pytest.importorskip("datasets"), tmp_path / "sets"
    whole = saved(films, tmp_path / "set")
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(str(root))
    assert made(root, Saved).digest == theirs.digest
    assert made(root, Saved, {"name": "test"}).captions == ["a short film"]
    assert made(root / "test", Saved).captions == ["a short film"]

    def refused(path: Path, words: str, **fields: str) -> None:
        with pytest.raises(UserError, match=words) as raised:
            made(path, Saved, fields)
        assert "\n" not in str(raised.value)

    refused(root, "no split dev; data.name chooses one of train, test", name="dev")
    refused(root / "test", "has no splits; leave data.name empty", name="test")
    refused(tmp_path, "no state.json in it")
    refused(tmp_path / "none", "a folder that datasets' save_to_disk wrote is allowed")
    state = root / "test" / "state.json"
    known = state.read_text()
    for bad, words in (
        ("{", "state.json: not JSON"), ("[]", "not a JSON object"), ("{}", "lists no files"),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', "lists no files"),
        ('{"_data_files": [{"filename": "a.arrow"}]}', "a.arrow is missing; copy the folder again"),
    ):  # fmt: skip
        state.write_text(bad)
        refused(root / "test", words)
    state.write_text(known)
    (file,) = (root / "test").glob("*.arrow")
    data = file.read_bytes()
    for bad in (b"", data[:-200][: len(data) // 2], b"x" * 100):
        file.write_bytes(bad)
        refused(root / "test", "not a table that can be read")


def test_the_order_is_the_same_on_two_processes_and_after_a_resume(
    films: Path, made: Callable[..., Captioned], tmp_path: Path
) -> None:
    source = made(write(tmp_path / "one.parquet", columns(films)))

    def stream(index: int = 0, count: int = 1, start: int = 0) -> list[bytes]:
        read = batches(source, 4, 3, ("video",), process=(index, count))
        read.set_state({"next_index": 4 * start})
        found = [next(read) for _ in range(6 - start)]
        read.close()
        return [video.tobytes() for batch in found for video in batch["video"]]

    whole = stream()
    assert stream(start=2) == whole[8:]
    halves = [stream(index, 2) for index in (0, 1)]
    assert [clip for pair in zip(*halves, strict=True) for clip in pair] == whole


@pytest.mark.parametrize("source", ["parquet", "datasets"])
def test_a_stage_is_trained(source: str, films: Path, tmp_path: Path) -> None:
    if source == "parquet":
        write(tmp_path / "set" / "one.parquet", columns(films))
    else:
        saved(films, tmp_path / "set")
    config = small(tmp_path / "set", source)
    run(config, tmp_path / "run")
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("stage") == "vae" and "loss" in row][-1] == 3
    assert os.listdir(tmp_path / "run" / "clips")
    config.data.filter = "[('n', '>', 1)]"
    config.data.source = "folder"
    with pytest.raises(UserError, match="only parquet and datasets take it"):
        joined.check(config)
