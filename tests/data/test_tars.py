"""Tar shards, written by webdataset's own writer: the clips of a folder, and what is refused."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import folder as folder_experiment
from tests.data.test_folder import film, items, level
from vdit.config import joined
from vdit.data import shards, tars
from vdit.data.captioned import Captioned
from vdit.data.films import fitting
from vdit.data.folder import Folder
from vdit.data.loader import batches
from vdit.data.tars import Tars
from vdit.errors import UserError
from vdit.run import run
from vdit.runtime.video import write_gif, write_mp4

webdataset = pytest.importorskip("webdataset")
CAPTIONS = {"a.mp4": "a long film", "b.mp4": "a short film", "c.gif": "a tiny film"}
SPLITS = ("train", "heldout")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three films, each with a text beside it."""
    root = tmp_path_factory.mktemp("films")
    write_mp4(root / "a.mp4", film(40, 10), fps=10)
    write_mp4(root / "b.mp4", film(20, 133), fps=10)
    write_gif(root / "c.gif", film(12, 196), fps=10)
    for name, caption in CAPTIONS.items():
        (root / name).with_suffix(".txt").write_text(caption + "\n")
    return root


@pytest.fixture(scope="module")
def decoded(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the films, at the size that most tests want."""
    cache = tmp_path_factory.mktemp("decoded")
    Folder(films, cache=cache, frames=5, size=(8, 8), workers=1)
    return cache


def samples(films: Path) -> list[dict[str, Any]]:
    """As webdataset's writer takes them; the last has its caption in a JSON."""
    made = []
    for number, (name, caption) in enumerate(CAPTIONS.items()):
        data, ending = (films / name).read_bytes(), name.rpartition(".")[2]
        text = {"json": {"caption": caption, "n": 3}} if number == 2 else {"txt": caption}
        made.append({"__key__": f"{number:06d}", ending: data, **text})
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for row in rows:
            writer.write(row)
    return path


def by_hand(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of any members."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def root(tmp_path: Path, films: Path) -> Path:
    """Two shards of the films."""
    rows = samples(films)
    write(tmp_path / "shards" / "clips-000000.tar", rows[:2])
    write(tmp_path / "shards" / "clips-000001.tar", rows[2:])
    return tmp_path / "shards"


@pytest.fixture
def make(tmp_path: Path, root: Path, decoded: Path) -> Callable[..., Captioned]:
    shutil.copytree(decoded, tmp_path / "cache")

    def make(path: Any = None, video_field: str = "", caption_field: str = "", **options: Any):
        given = {"frames": 5, "size": (8, 8), "stride": 0.5, "heldout": 0.0, "workers": 1}
        store = Tars(str(path or root), tmp_path / "cache", video_field, caption_field)
        return Captioned(store, cache=tmp_path / "cache", **(given | options))

    return make


def test_the_clips_are_those_of_the_folder(
    films: Path, root: Path, make: Callable[..., Captioned], tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "cache")
    options: dict[str, Any] = {"frames": 5, "size": (8, 8), "stride": 0.5, "workers": 1}
    for split in SPLITS:
        for share in (0.0, 0.3) if split == "train" else (0.3,):
            given = options | {"split": split, "heldout": share, "seed": 2}
            theirs = Folder(films, cache=tmp_path / "theirs", **given)
            ours = make(**given)
            assert items(ours) == items(theirs) and ours.digest == theirs.digest
            assert ours.pictures == theirs.pictures and not ours.skipped
    whole = make()
    assert items(pickle.loads(pickle.dumps(whole))) == items(whole)
    assert {name for name, _ in map(whole.origin, range(len(whole)))} == {
        "clips-000000.tar/000000.mp4", "clips-000000.tar/000001.mp4",
        "clips-000001.tar/000002.gif",
    }  # fmt: skip
    left = [path.name for path in (tmp_path / "cache").iterdir() if ".tmp" in path.name]
    assert not left


def test_shards_are_named_by_a_file_a_folder_or_a_pattern(
    root: Path, make: Callable[..., Captioned]
) -> None:
    want = make().digest
    for pattern in ("*.tar", "clips-{000000..000001}.tar", "clips-00000{1,0}.tar", "**/c*-*.tar"):
        assert make(root / pattern).digest == want
    assert len(make(root / "clips-000001.tar").rows) == 1
    assert len(list(shards._expanded("{9..11}-{a,b}{x}"))) == 6
    assert list(shards._expanded("{09..11}{0..1}")) == ["090", "091", "100", "101", "110", "111"]
    for pattern, words in {
        "clips-{000000..000002}.tar": "no file .*clips-000002.tar",
        "none": "no file",
        "x{0..900000000000}.tar": "no file .*x0.tar",
        "": "no film|no shards",
    }.items():
        path = root / pattern if pattern else root.parent / "empty"
        path.mkdir() if not pattern else None
        with pytest.raises(UserError, match=words):
            make(path)
    for path in ("https://host/a.tar", "pipe:cat a.tar"):
        with pytest.raises(UserError, match="only files of this machine"):
            make(path)
    with pytest.raises(UserError, match="data.path is empty"):
        Tars("", root)


def test_the_index_is_kept_and_renewed(
    films: Path, root: Path, make: Callable[..., Captioned], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first = make()
    built: list[str] = []
    build = tars.build
    counted = lambda shard, *given: (built.append(shard.name), build(shard, *given))[1]  # noqa: E731
    monkeypatch.setattr(tars, "build", counted)
    with monkeypatch.context() as closed:
        closed.setattr(tars, "read", None)  # nor is a shard opened
        assert items(make()) == items(first) and not built
    # Another state of a shard, other fields and an index of another shard are noticed.
    write(root / "clips-000001.tar", samples(films)[2:] + [samples(films)[0]])
    changed = make()
    assert built == ["clips-000001.tar"] and len(changed.rows) == 4
    assert changed.digest != first.digest
    indices = sorted((tmp_path / "cache").glob("index-*.json"))
    assert len(indices) == 2
    texts = [path.read_text() for path in indices]
    for path, text in zip(indices, reversed(texts), strict=True):
        path.write_text(text)
    built.clear()
    assert make().digest == changed.digest and sorted(built) == sorted(os.listdir(root))
    for damage in ("{", '{"shard": 3}', texts[0].replace('"films"', '"film"')):
        indices[0].write_text(damage)
        assert make().digest == changed.digest
    # Moved shards are the same clips.
    moved = root.rename(tmp_path / "moved")
    assert make(moved).digest == changed.digest


def test_a_shard_that_changes_behind_its_index_is_refused(
    root: Path, films: Path, tmp_path: Path
) -> None:
    store = Tars(str(root), tmp_path / "cache")
    write(root / "clips-000000.tar", samples(films)[1:2])
    with pytest.raises(UserError, match="clips-000000.tar: it has changed"):
        Captioned(store, cache=tmp_path / "cache", frames=5, size=(8, 8))
    assert not list((tmp_path / "cache").glob(".*"))


def test_fields_choose_among_several(
    films: Path, tmp_path: Path, make: Callable[..., Captioned]
) -> None:
    rows = samples(films)[:2]
    data = (films / "c.gif").read_bytes()
    texts = {"en.txt": "english", "json": {"long": "a long text", "caption": "short"}}
    path = write(tmp_path / "several.tar", [row | {"left.gif": data} | texts for row in rows])
    with pytest.raises(UserError, match="several films .*data.video_field chooses"):
        make(path)
    assert sorted(make(path, "mp4").captions) == ["a long film", "a short film"]
    assert make(path, ".left.gif", "en.txt").captions == ["english"]
    assert make(path, "mp4", "long").captions == ["a long text"]
    with pytest.raises(UserError, match="has no field missing; data.caption_field names it"):
        make(path, "mp4", "missing")
    with pytest.raises(UserError, match=r"no film in its sample \(.webm\)"):
        make(path, "webm")


def test_pictures_are_clips_of_one_frame(
    tmp_path: Path, films: Path, make: Callable[..., Captioned]
) -> None:
    tones = (30, 90, 150)
    rows = [
        {"__key__": f"{n}", "png": film(1, tone)[0].astype(np.float32) / 255, "txt": f"gray {n}"}
        for n, tone in enumerate(tones)
    ]
    path = write(tmp_path / "pictures.tar", rows)
    clips = make(path, frames=1)
    assert sorted(level(clips[i]["video"])[0] // 10 for i in range(3)) == [3, 9, 15]
    thumb = {"jpg": b"a picture beside a film is no second one"}
    beside = write(tmp_path / "beside.tar", [row | thumb for row in samples(films)])
    assert make(beside).digest == make().digest
    with pytest.raises(UserError, match="1 frames at 10 fps: a clip has 5"):
        make(path)


def test_one_bad_sample_of_many_is_skipped_and_named(
    root: Path, films: Path, make: Callable[..., Captioned], tmp_path: Path
) -> None:
    want, data = items(make()), (films / "a.mp4").read_bytes()
    parts = {
        "cut.mp4": data[: len(data) // 2], "cut.txt": b"cut", "latin.mp4": data,
        "latin.txt": "\u00e9".encode("latin-1"), "alone.mp4": data, "text.txt": b"no film",
        "bad.mp4": data, "bad.json": b'{"caption": "a', "list.mp4": data, "list.json": b"[1]",
        "blank.mp4": data, "blank.txt": b" \n", "long.mp4": data, "long.txt": b"ab" * (1 << 20),
        "odd.pyd": pickle.dumps(1), "odd.mp4": b"no film", "odd.txt": b"odd", "odd.cls": b"3",
        "README": b"belongs to no sample", "cut2.seg.pyd": b"", "cut2.mp4": data, "cut2.txt": b"c",
    }  # fmt: skip
    by_hand(root / "bad.tar", list(parts.items()))
    source = make(skipped_path=tmp_path / "skipped.jsonl")
    skipped = {name.removeprefix("bad.tar/"): why for name, why in source.skipped}
    assert skipped.pop("odd.mp4").startswith("not a video that can be read")
    assert skipped == {
        "cut.mp4": f"cut short: {len(data) // 2} bytes of {len(data)}",
        "latin.mp4": "latin.txt is not UTF-8 (byte 0)",
        "alone.mp4": "no caption beside it (.txt, .json)",
        "text.txt": f"no film in its sample ({', '.join((*shards.SUFFIXES, *shards.PICTURES))})",
        "bad.mp4": skipped["bad.mp4"],
        "list.mp4": "list.json has no field caption or text; data.caption_field names it",
        "blank.mp4": "blank.txt: the caption is empty or no text",
        "long.mp4": "long.txt has over 1048576 bytes",
        "*.pyd": "a pickle, which is never read (1 members)",
        "*.seg.pyd": "a pickle, which is never read (1 members)",
        "*.cls": "neither film nor caption (1 members)",
    }
    assert skipped["bad.mp4"].startswith("bad.json is not JSON")
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == [name for name, _ in source.skipped]
    # A copy of the long film under an odd caption is the only clip that came in.
    assert len(source) == len(want) + 8 and set(want) < set(items(source))
    with pytest.raises(UserError, match="latin.mp4: latin.txt is not UTF-8"):
        make(strict=True)


def refusals(path: Path, films: Path) -> dict[str, Callable[[], object]]:
    """Ways to spoil a shard, by the words of the line that refuses it."""
    data, size = path.read_bytes(), path.stat().st_size
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512

    def put(content: bytes) -> Callable[[], object]:
        return lambda: path.write_bytes(content)

    def members(*names: str) -> Callable[[], object]:
        return lambda: by_hand(path, [(name, b"data") for name in names])

    return {
        "clips-000000.tar: cut short at 3000 bytes; copy it again": put(data[:3000]),
        f"cut short at {end} bytes": put(data[:end]),
        f"cut short at {end + 100} bytes": put(data[: end + 100]),
        "cut short at 200 bytes|not an uncompressed tar": put(data[:200]),
        "not an uncompressed tar": put(b"\x1f\x8b" + data[2:]),
        "the member '../a.mp4' lies outside of it": members("../a.mp4", "../a.txt"),
        "the member '/etc/a.mp4' lies outside of it": members("/etc/a.mp4"),
        "two members of one name, a.mp4": members("a.mp4", "a.txt", "b.mp4", "a.mp4"),
        "two members of one name, a.MP4": members("a.mp4", "a.MP4"),
        "goes on behind its end mark": put(data + data),
        "damaged at byte 0|not an uncompressed tar": put(b"x" * size),
    }


@pytest.mark.parametrize("number", range(11))
def test_damaged_and_unsafe_shards_are_one_line(
    number: int, root: Path, films: Path, make: Callable[..., Captioned]
) -> None:
    words, spoil = list(refusals(root / "clips-000000.tar", films).items())[number]
    spoil()
    with pytest.raises(UserError, match=words) as raised:
        make()
    assert "\n" not in str(raised.value) and "clips-000000.tar" in str(raised.value)


def test_links_are_left_out(root: Path, make: Callable[..., Captioned]) -> None:
    want = make().digest
    with tarfile.open(root / "links.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"x{kind.decode()}.mp4")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    source = make()
    assert source.digest == want
    assert [why for _, why in source.skipped] == ["a link or a special file"] * 3


def test_the_order_is_the_same_on_two_processes_and_after_a_resume(
    make: Callable[..., Captioned],
) -> None:
    source = make()

    def stream(index: int = 0, count: int = 1, start: int = 0) -> list[bytes]:
        made = batches(source, 4, 3, ("video",), process=(index, count))
        if start:
            made.set_state({"next_index": 4 * start})
        found = [next(made) for _ in range(6 - start)]
        made.close()
        return [video.tobytes() for batch in found for video in batch["video"]]

    whole = stream()
    assert stream(start=2) == whole[8:]
    halves = [stream(index, 2) for index in (0, 1)]
    assert [clip for pair in zip(*halves, strict=True) for clip in pair] == whole


def test_films_are_fitted_to_shapes(root: Path, tmp_path: Path) -> None:
    store = Tars(str(root), tmp_path / "cache")
    names = [row.file for row in store.rows(True, [])]
    found = fitting(store, names, [(8, 8), (12, 16)], tmp_path / "aspects.json")
    assert set(found) == set(names) and all(sizes == {1} for sizes in found.values())


def small(path: Path, source: str = "webdataset") -> Any:
    """The smallest run on a source."""
    config = folder_experiment.get_config("smoke")
    config.data.source, config.data.path = source, str(path)
    config.data.frames, config.data.size = 5, (16, 16)
    config.stages, config.vae.train.steps, config.vae.train.batch = ("vae",), 3, 8
    config.vae.train.optimizer = "adamw"  # compiles faster than Muon
    joined.check(config)
    return config


def test_a_stage_is_trained_and_other_shards_are_refused(root: Path, tmp_path: Path) -> None:
    config = small(root / "clips-{000000..000001}.tar")
    run(config, tmp_path / "run")
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("stage") == "vae" and "loss" in row][-1] == 3
    config.data.path, config.vae.train.steps = str(root / "clips-000000.tar"), 4
    with pytest.raises(UserError, match="stage vae was trained on another data set"):
        run(config, tmp_path / "run")
