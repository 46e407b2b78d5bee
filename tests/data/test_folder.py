"""`Folder`: the same clips every time, captions that fit, nothing shared between the splits."""

import json
import os
import pickle
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vdit.data.captions import SUFFIXES, checked_caption
from vdit.data.clips import tell_skipped
from vdit.data.decode import Decoder
from vdit.data.films import fitting
from vdit.data.folder import FilmFolder, Folder
from vdit.errors import UserError
from vdit.runtime.video import write_gif, write_mp4


def film(frames: int, tone: int) -> np.ndarray:
    """Frame k is gray of level `tone` + 3 k: a frame tells its film and its time."""
    levels = (tone + 3 * np.arange(frames)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, 24, 32, 3)).copy()


def level(video: np.ndarray) -> list[int]:
    """The gray of every frame, rounded to what `film` put there."""
    return [1 + 3 * round((x - 1) / 3) for x in video.mean((1, 2, 3))]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("films")
    write_mp4(root / "a.mp4", film(40, 10), fps=10)
    write_mp4(root / "b.mp4", film(20, 133), fps=10)
    (root / "more").mkdir()
    write_gif(root / "more" / "c.gif", film(12, 196), fps=10)
    return root


@pytest.fixture
def root(tmp_path: Path, films: Path) -> Path:
    """A folder of its own with the films in it."""
    root = tmp_path / "root"
    for path in films.rglob("*.*"):
        copy = root / path.relative_to(films)
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, copy)
    return root


SPLITS = ("train", "heldout")
CAPTIONS = {"a.mp4": "a long film", "b.mp4": "a short film", "more/c.gif": "a tiny film"}


def beside(root: Path) -> None:
    for name, caption in CAPTIONS.items():
        (root / name).with_suffix(".txt").write_text(caption + "\n")


def jsonl(root: Path, *extra: dict[str, Any]) -> None:
    rows = [{"file": name, "caption": caption} for name, caption in CAPTIONS.items()]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in [*rows, *extra]]
    (root / "captions.jsonl").write_text("".join(lines), encoding="utf-8")


def table(root: Path, text: str) -> None:
    (root / "captions.csv").write_text(text, encoding="utf-8")


@pytest.fixture
def make(tmp_path: Path, root: Path) -> Callable[..., Folder]:
    def make(**options: Any) -> Folder:
        given = {"frames": 5, "size": (8, 8), "stride": 0.5, "heldout": 0.0, "workers": 1}
        given |= options
        return Folder(root, cache=tmp_path / "cache", **given)

    return make


def items(source: Folder) -> list[tuple[str, bytes]]:
    return [(source[i]["caption"], source[i]["video"].tobytes()) for i in range(len(source))]


def test_captions_beside_in_jsonl_and_in_csv_are_the_same(
    root: Path, make: Callable[..., Folder]
) -> None:
    beside(root)
    first = make()
    for name in CAPTIONS:
        (root / name).with_suffix(".txt").unlink()
    jsonl(root)
    second = make()
    (root / "captions.jsonl").unlink()
    lines = [f'{name},"{caption}",,\r\n' for name, caption in CAPTIONS.items()]
    table(root, "\ufefffile,caption,start,end\r\n" + "".join(lines))
    third = make()
    assert items(first) == items(second) == items(third)
    assert first.digest == second.digest == third.digest
    assert sorted(first.captions) == sorted(CAPTIONS.values()) and not first.skipped


def test_clips_are_cut_at_even_times(root: Path, make: Callable[..., Folder]) -> None:
    beside(root)
    source = make()
    # 40, 20 and 12 frames: starts every 5 frames while 5 more follow.
    origins = [source.origin(i) for i in range(len(source))]
    assert sorted(origins) == [
        *(("a.mp4", k / 2) for k in range(8)),
        *(("b.mp4", k / 2) for k in range(4)),
        *(("more/c.gif", k / 2) for k in range(2)),
    ]
    item = source[origins.index(("b.mp4", 0.5))]
    assert item["caption"] == "a short film" and item["video"].shape == (5, 8, 8, 3)
    assert item["video"].dtype == np.uint8
    assert level(item["video"]) == [148, 151, 154, 157, 160]
    slow = make(fps=5.0)
    first = [slow.origin(i) for i in range(len(slow))].index(("a.mp4", 0.0))
    assert level(slow[first]["video"]) == [10, 16, 22, 28, 34]
    assert slow.origin(first + 1) == ("a.mp4", 0.4)
    with pytest.raises(IndexError):
        source[len(source)]
    with pytest.raises(IndexError):
        source[-1]


def test_rows_with_times_cut_parts_of_a_film(root: Path, make: Callable[..., Folder]) -> None:
    rows = "a.mp4,begins,,1\na.mp4,goes on,1,2.2\na.mp4,ends,3.4,4\nb.mp4,b,,\nmore/c.gif,c,,\n"
    table(root, "file,caption,start,end\n" + rows)
    source = make(stride=0.1)
    said = [(source[i]["caption"], level(source[i]["video"])[0]) for i in range(len(source))]
    assert [k for caption, k in said if caption == "begins"] == [10 + 3 * k for k in range(6)]
    assert [k for caption, k in said if caption == "goes on"] == [40 + 3 * k for k in range(8)]
    assert [k for caption, k in said if caption == "ends"] == [10 + 3 * k for k in (34, 35)]


def test_the_same_every_time_from_any_thread_or_process(
    root: Path, make: Callable[..., Folder], tmp_path: Path
) -> None:
    beside(root)
    source = make()
    before = items(source)
    again = make()
    assert items(again) == before and repr(again) == repr(source)
    assert items(pickle.loads(pickle.dumps(source))) == before
    elsewhere = Folder(
        root, cache=tmp_path / "other", frames=5, size=(8, 8), stride=0.5, heldout=0, workers=3
    )
    assert items(elsewhere) == before and elsewhere.digest != ""
    found: dict[int, bool] = {}

    def work(k: int) -> None:
        found[k] = all(source[i]["video"].tobytes() == before[i][1] for i in range(len(source)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[k] for k in range(8))


def test_grain_reads_it(root: Path, make: Callable[..., Folder]) -> None:
    import grain

    beside(root)
    source = make()
    data = grain.MapDataset.source(source).seed(0).shuffle().repeat()
    assert {data[i]["video"].tobytes() for i in range(len(source))} == {
        video for _, video in items(source)
    }


def test_no_frame_is_in_both_splits(root: Path, make: Callable[..., Folder]) -> None:
    def seen(source: Folder) -> set[int]:
        return {k for i in range(len(source)) for k in level(source[i]["video"])}

    beside(root)
    chosen = set()
    for seed in range(6):
        train = make(split="train", heldout=0.3, seed=seed, stride=0.1)
        held = make(split="heldout", heldout=0.3, seed=seed, stride=0.1)
        assert not seen(train) & seen(held)
        assert len(held.captions) == 1 and len(train.captions) == 2
        assert len(train) + len(held) == len(make(stride=0.1))
        assert train.digest != held.digest
        chosen |= set(held.captions)
    assert len(chosen) > 1  # the seed matters
    for name in CAPTIONS:
        (root / name).with_suffix(".txt").unlink()
    # Overlapping rows stay together; of one row, or one such group, the end is held out.
    (root / "b.mp4").unlink()
    (root / "more" / "c.gif").unlink()
    table(root, "file,caption,start,end\na.mp4,all,,\na.mp4,early,0,2\na.mp4,late,2,4\n")
    train = make(split="train", heldout=0.25, stride=0.1)
    held = make(split="heldout", heldout=0.25, stride=0.1)
    assert max(seen(train)) < min(seen(held)) == 10 + 3 * 30
    assert train.captions == ["early", "all", "late"] and held.captions == ["all", "late"]
    with pytest.raises(UserError, match="too few"):
        make(split="train", heldout=0.5, frames=30)
    with pytest.raises(UserError, match="nothing is held out"):
        make(split="heldout", heldout=0)


def test_clips_of_another_shape_share_the_split(root: Path, make: Callable[..., Folder]) -> None:
    def seen(source: Folder) -> set[int]:
        return {k for i in range(len(source)) for k in level(source[i]["video"])}

    def check(**options: Any) -> None:
        train, held = (make(split=split, stride=0.1, **options) for split in ("train", "heldout"))
        for frames, fps in ((1, 10.0), (9, 20.0), (5, 10.0)):
            for own, other in ((train, held), (held, train)):
                shaped = make(frames=frames, fps=fps, stride=0.1, parts=own.rows)
                assert seen(shaped) == seen(own) and not seen(shaped) & seen(other)

    beside(root)
    for seed in range(3):
        check(heldout=0.3, seed=seed)
    for name in ("b", "more/c"):
        (root / f"{name}.txt").unlink()
    (root / "b.mp4").unlink()
    (root / "more" / "c.gif").unlink()
    check(heldout=0.25)  # of one film the end
    (root / "a.txt").unlink()
    table(root, "file,caption,start,end\na.mp4,early,0,2\na.mp4,late,1,3.1\n")
    check(heldout=0.25)


def test_copies_of_a_film_are_in_one_split(
    root: Path, make: Callable[..., Folder], capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)

    def moving(seed: int) -> np.ndarray:
        base = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.uint8)
        return np.stack([np.roll(base, k, 1).repeat(8, 0).repeat(8, 1) for k in range(15)])

    (root / "more" / "c.gif").unlink()
    for name in ("a", "b"):
        (root / f"{name}.mp4").unlink()
    for k in range(5):
        write_mp4(root / f"{k}.mp4", moving(k), fps=10)
    (root / "z copy.mp4").write_bytes((root / "0.mp4").read_bytes())
    noisy = np.clip(moving(0) + rng.normal(0, 3, (15, 48, 64, 3)), 0, 255).astype(np.uint8)
    write_mp4(root / "again.mov", noisy[:, ::2, ::2], fps=10)  # half as large
    write_mp4(root / "late.mp4", np.roll(moving(0), 5, 0), fps=10)  # the same at other times
    films = sorted(path.name for path in root.glob("*.m*"))
    table(root, "file,caption\n" + "".join(f"{name},{name}\n" for name in films))
    held = []
    for seed in range(8):
        train, kept = (make(split=split, heldout=0.3, seed=seed) for split in ("train", "heldout"))
        assert train.copies == {"again.mov": "0.mp4", "z copy.mp4": "0.mp4"}
        group = {"0.mp4", "again.mov", "z copy.mp4"}
        assert group <= set(train.captions) or group <= set(kept.captions)
        assert not set(train.captions) & set(kept.captions)
        held.append(group <= set(kept.captions))
    assert any(held) and not all(held)
    tell_skipped(train)
    assert "again.mov shows the same as 0.mp4, and 1 more are copies" in capsys.readouterr().out
    # Nothing but copies: the end of all is held out.
    table(root, "file,caption\n0.mp4,0\nagain.mov,again\n")
    for name in set(films) - {"0.mp4", "again.mov"}:
        (root / name).unlink()
    train, kept = (make(split=split, heldout=0.3, stride=0.1) for split in ("train", "heldout"))
    last = max(train.origin(k)[1] for k in range(len(train))) + 5 / 10
    assert last <= min(kept.origin(k)[1] for k in range(len(kept))) + 1e-6


def test_films_are_shown_at_the_sizes_that_suit_their_aspect(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mp4(root / "tall.mp4", np.zeros((2, 32, 24, 3), np.uint8), fps=10)
    sizes = [(8, 8), (12, 16), (16, 12), (13, 16)]
    want = {"a.mp4": {1}, "tall.mp4": {2}}
    memory, store = tmp_path / "aspects.json", FilmFolder(root, tmp_path / "cache")
    assert fitting(store, want, sizes[:3], memory) == want
    monkeypatch.setattr(Decoder, "probe", None)  # what was measured is remembered
    assert fitting(store, want, sizes[:3], memory) == want
    assert fitting(store, ["a.mp4"], [*sizes, (37, 48)], memory) == {"a.mp4": {1, 4}}
    assert fitting(store, ["a.mp4"], [(8, 8)], memory) == {"a.mp4": {0}}
    monkeypatch.undo()
    memory.write_text("[3]")
    assert fitting(store, want, sizes[:3], memory) == want


def test_bad_films_are_skipped_counted_and_named(
    root: Path, make: Callable[..., Folder], tmp_path: Path
) -> None:
    beside(root)
    want = items(make())
    data = (root / "a.mp4").read_bytes()
    broken = {
        "0.mp4": b"",
        "cut.mp4": data[: len(data) // 2],
        "text.webm": b"no film",
        "still.mov": (root / "more" / "c.gif").read_bytes(),
    }
    for name, content in broken.items():
        (root / name).write_bytes(content)
        (root / name).with_suffix(".txt").write_text("something")
    write_gif(root / "still.mov", film(2, 0), fps=10)
    (root / ".hidden.mp4").write_bytes(b"")
    source = make(skipped_path=tmp_path / "skipped.jsonl")
    assert items(source) == want
    assert dict(source.skipped) == {
        "0.mp4": "the file is empty",
        "cut.mp4": f"cut short: {len(data) // 2} bytes of {len(data)}",
        "text.webm": "not a video that can be read (Invalid data found when processing input)",
        "still.mov": "2 frames at 10 fps: a clip has 5",
    }
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == [name for name, _ in source.skipped]
    for name in CAPTIONS:
        (root / name).unlink()
    with pytest.raises(UserError, match="none of its clips can be used .0.mp4: the file is empty"):
        make()


def test_what_is_done_to_films_is_counted_and_said_once(
    root: Path, make: Callable[..., Folder], capsys: pytest.CaptureFixture[str]
) -> None:
    beside(root)
    for name in ("a.mp4", "b.mp4"):
        (root / name).unlink()
        with av.open(str(root / name), "w") as container:
            options = {"x264-params": "tff=1:transfer=smpte2084:colorprim=bt2020"}
            stream: Any = container.add_stream("libx264", rate=10, options=options)
            stream.height, stream.width, stream.pix_fmt = 24, 32, "yuv420p"
            for picture in film(8, 10 if name == "a.mp4" else 60):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
            container.mux(stream.encode(None))
    make()
    said = capsys.readouterr().out
    for words in ("HDR, tone-mapped", "interlaced, deinterlaced"):
        assert said.count(f"data: 2 of 3 new films are {words}") == 1
    assert "without" not in said
    make()
    assert "data: " not in capsys.readouterr().out


def test_films_are_decoded_once(
    root: Path, make: Callable[..., Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(root)
    make()
    count = 0
    stream = Decoder.stream

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return stream(*arguments, **options)

    monkeypatch.setattr(Decoder, "stream", counted)
    first = make()
    assert count == 0
    (root / "b.mp4").unlink()
    write_mp4(root / "b.mp4", film(20, 61), fps=10)
    second = make()
    assert count == 1 and second.digest != first.digest
    assert 61 in {level(second[k]["video"])[0] for k in range(len(second))}
    os.utime(root / "a.mp4", (0, 0))  # as on another disk
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    assert make().digest == second.digest and count == 1
    for path in (tmp_path / "cache").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="damaged cache"):
        second[len(second) - 1]
    assert items(make()) == items(second) and count == 4 + 0


def test_other_places_and_names_are_the_same_clips(
    root: Path, make: Callable[..., Folder], tmp_path: Path
) -> None:
    """Splits and order too: content decides."""
    beside(root)
    options = {"heldout": 0.3, "stride": 0.1}
    before = [(items(clips), repr(clips)) for clips in (make(split=s, **options) for s in SPLITS)]
    whole = make()
    (root / "a.mp4").rename(root / "more" / "z.mp4")
    (root / "a.txt").rename(root / "more" / "z.txt")
    (root / "b.mp4").rename(root / "0.mp4")
    (root / "b.txt").rename(root / "0.txt")
    moved = tmp_path / "moved [1]"
    root.rename(moved)
    root.symlink_to(moved)
    assert before == [(items(x), repr(x)) for x in (make(split=s, **options) for s in SPLITS)]
    (moved / "0.txt").write_text("another caption")
    other = make()
    assert other.pictures == whole.pictures and other.digest != whole.digest
    (moved / "0.mp4").unlink()
    assert make().pictures != whole.pictures


def test_names_of_the_same_bytes_are_decoded_once(
    root: Path, make: Callable[..., Folder], tmp_path: Path
) -> None:
    names = ["a.mp4", "hard.mp4", "soft.mp4", "copy.mp4"]
    os.link(root / "a.mp4", root / "hard.mp4")
    (root / "soft.mp4").symlink_to("a.mp4")
    (root / "copy.mp4").write_bytes((root / "a.mp4").read_bytes())
    table(root, "file,caption\n" + "".join(f"{name},{name}\n" for name in names))
    source = make()
    assert sorted(source.captions) == sorted(names) and len(source) == 4 * 8
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    for name in ("hard.mp4", "copy.mp4"):
        (root / name).unlink()
        (root / name).write_bytes(b"no film")
    bad = {name for name, why in make().skipped if "not a video" in why}
    assert bad == {"hard.mp4", "copy.mp4"}


def test_the_cache_has_a_limit(root: Path, make: Callable[..., Folder], tmp_path: Path) -> None:
    beside(root)
    with pytest.raises(UserError, match="over the limit of") as raised:
        make(max_bytes=70 * 8 * 8 * 3)
    assert "8x8 and 10 fps" in str(raised.value)
    assert not list((tmp_path / "cache").glob("*.npy"))
    assert len(make(max_bytes=73 * 8 * 8 * 3)) == 14  # 72 frames


def test_progress_rises_to_the_end(root: Path, make: Callable[..., Folder]) -> None:
    beside(root)
    told: list[tuple[float, float]] = []
    make(progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (pytest.approx(7.2), pytest.approx(7.2))


def test_folders_without_films(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "picture.png").write_bytes(b"")
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path / "empty", "no clips in this folder .*mp4"),
        (tmp_path / "none", "not a folder"),
        (tmp_path / "file", "not a folder"),
        ("", "path is empty"),
    ):
        with pytest.raises(UserError, match=words):
            Folder(path, cache=tmp_path / "cache")


def test_wrong_settings(root: Path, make: Callable[..., Folder]) -> None:
    for options, words in (
        ({"frames": 0}, "frames=0"),
        ({"size": (8, 0)}, "size"),
        ({"fps": 0.0}, "fps=0.0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"stride": 0.0}, "stride=0.0"),
        ({"split": "test"}, "train or heldout"),
        ({"heldout": 1.0}, "heldout=1.0"),
    ):
        with pytest.raises(UserError, match=words):
            make(**options)


def test_what_is_not_used_is_named(
    root: Path, make: Callable[..., Folder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside(root)
    want = items(make())
    (root / "a.txt").rename(root / "a.TXT")
    (root / "a.mp4").rename(root / "a.MP4")
    (tmp_path / "elsewhere").mkdir()
    (root / "more" / "c.gif").rename(tmp_path / "elsewhere" / "c.gif")
    (root / "more" / "c.txt").rename(tmp_path / "elsewhere" / "c.txt")
    (root / "more").rmdir()
    (root / "more").symlink_to(tmp_path / "elsewhere")
    for name in ("picture.png", "more/photo.jpg", "lone.txt", "none.mp4", "bad.mp4", "bad.txt"):
        (root / name).write_text(" ")
    (root / ".hidden").write_text(" ")
    source = make(skipped_path=tmp_path / "skipped.jsonl")
    assert [pixels for _, pixels in items(source)] == [pixels for _, pixels in want]
    no_film = f"not a film ({', '.join(SUFFIXES)})"
    assert dict(source.skipped) == {
        "bad.mp4": "bad.txt: the caption is empty or no text",
        "none.mp4": "no caption; write none.txt beside it, or a row in captions.jsonl or"
        " captions.csv",
        "lone.txt": "no film beside it",
        "picture.png": no_film,
        "more/photo.jpg": no_film,
    }
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 5
    tell_skipped(source)
    said = capsys.readouterr().out
    assert "5 skipped" in said and f"picture.png and 1 more ({no_film})" in said.replace("\n", " ")
    with pytest.raises(UserError, match="bad.txt: the caption is empty"):
        make(strict=True)


def test_one_wrong_row_of_many_is_skipped_and_named(
    root: Path, make: Callable[..., Folder]
) -> None:
    text = "file,caption,start,end\na.mp4,a,0,2\na.mp4,late,2,4.6\nb.mp4,b,,\nb.mp4,x,x,\n"
    text += "b.mp4,b,,\nmore\\c.gif,c,,\nd.mp4,d,,\na.mp4,short\n"
    table(root, text)
    source = make()
    assert sorted(source.captions) == ["a", "b", "c"]
    assert dict(source.skipped) == {
        "captions.csv line 3": "2 to 4.6 s is outside of a.mp4, which is 4 s long",
        "captions.csv line 5": "start 'x' is not a number",
        "captions.csv line 6": "b.mp4 again, as in line 4",
        "captions.csv line 8": f"no clip 'd.mp4' in the folder ({', '.join(SUFFIXES)})",
        "captions.csv line 9": "not 4 cells",
    }
    with pytest.raises(UserError, match="line 5: start 'x'"):
        make(strict=True)
    table(root, 'file,caption\na.mp4,"a ""red"" ball"\nb.mp4,"a "red" ball"\nmore/c.gif,"c\n')
    source = make()
    assert source.captions == ['a "red" ball']
    assert [name for name, why in source.skipped if "not CSV" in why] == [
        "captions.csv line 3", "captions.csv line 4",
    ]  # fmt: skip
    (root / "captions.csv").unlink()
    (root / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "a"}\n{nonsense\n[1]\n')
    source = make()
    assert [name for name, _ in source.skipped] == [
        "captions.jsonl line 2", "captions.jsonl line 3", "b.mp4", "more/c.gif",
    ]  # fmt: skip
    (root / "captions.jsonl").write_text("{nonsense\n")
    with pytest.raises(UserError, match="none of its captions can be used .*line 1: not JSON"):
        make()


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_names_are_the_same_in_every_form_of_unicode(
    root: Path, make: Callable[..., Folder], stored: Any
) -> None:
    name = "über ﬁlm é.mp4"
    (root / "a.mp4").rename(root / unicodedata.normalize(stored, name))
    for form in ("NFC", "NFD"):
        table(root, f"file,caption\n{unicodedata.normalize(form, name)},a\nb.mp4,b\n")
        assert sorted(make().captions) == ["a", "b"]
    table(root, f"file,caption\n{name.upper()},a\nB.MP4,b\nMORE\\c.GIF,c\n")
    assert sorted(make().captions) == ["a", "b", "c"]
    (root / "B.mp4").write_bytes((root / "more" / "c.gif").read_bytes())
    table(root, "file,caption\nB.MP4,neither\nb.mp4,b\nB.mp4,B\n")
    assert sorted(make().captions) == ["B", "b"]
    (root / "captions.csv").unlink()
    for form in ("NFC", "NFD"):
        text = root / unicodedata.normalize(form, name.replace("mp4", "txt"))
        text.write_text("beside")
        assert make().captions == ["beside"]
        text.unlink()


def test_a_table_may_be_written_by_hand_on_windows(root: Path, make: Callable[..., Folder]) -> None:
    text = 'file, caption\r\na.mp4, "a, then b"\r\nb.mp4, b\r\nmore\\c.gif, c\r\n'
    (root / "Captions.CSV").write_text(text, encoding="utf-8-sig", newline="")
    assert sorted(make().captions) == ["a, then b", "b", "c"]


HEAD = "file,caption,start,end\n"
GOOD = "b.mp4,b,,\nmore/c.gif,c,,\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + "a.mp4,a,,\nb.mp4,b,,\n", "captions.csv: no row for more/c.gif"),
        (HEAD, "no row for a.mp4 and 2 more"),
        (HEAD + GOOD + "a.mp4,a,,\nd.mp4,d,,\n", "line 5: no clip 'd.mp4'"),
        (HEAD + GOOD + "a.mp4,a,,\na.mp4,again,,\n", "line 5: a.mp4 again, as in line 4"),
        (HEAD + GOOD + "../a.mp4,a,,\n", "line 4: '../a.mp4' is outside"),
        (HEAD + GOOD + "/etc/a.mp4,a,,\n", "line 4: '/etc/a.mp4' is outside"),
        (HEAD + GOOD + '"a\nb.mp4",a,,\n', r"line 5: no clip 'a\\nb.mp4'"),
        (HEAD + GOOD + "a.mp4, ,,\n", "line 4: the caption is empty"),
        (HEAD + GOOD + "a.mp4,a,x,\n", "line 4: start 'x' is not a number"),
        (HEAD + GOOD + "a.mp4,a,nan,\n", "line 4: start nan is not a number"),
        (HEAD + GOOD + "a.mp4,a,2,1\n", "line 4: start 2, end 1.0"),
        (HEAD + GOOD + "a.mp4,a,-1,\n", "line 4: start -1"),
        (HEAD + GOOD + "a.mp4,a,0,9\n", "line 4: 0 to 9.0 s is outside of a.mp4, which is 4 s"),
        (HEAD + GOOD + "a.mp4,a,4,\n", "line 4: 4 to the end s is outside of a.mp4"),
        (HEAD + GOOD + "a.mp4,a\n", "line 4: not 4 cells"),
        (HEAD + GOOD + "a.mp4,a,,,5\n", "line 4: not 4 cells"),
        (HEAD + GOOD + 'a.mp4,"a,,\n', "not CSV"),
        ("file,caption,begin\na.mp4,a,1\n", "line 1: columns file,caption,begin"),
        ("a.mp4,a\n", "line 1: columns a.mp4,a"),
        ("", "line 1: columns"),
    ],
)
def test_wrong_csv(root: Path, make: Callable[..., Folder], text: str, words: str) -> None:
    table(root, text)
    with pytest.raises(UserError, match=words) as raised:
        make(strict=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ('{"file": "a.mp4"', "line 4: not JSON"),
        ("[1, 2]", "line 4: not an object"),
        ('{"file": "a.mp4", "caption": 3, "start": 1}', "line 4: the caption is empty or no text"),
        ('{"file": 3, "caption": "a"}', "line 4: the file is missing or no text"),
        ('{"caption": "a"}', "line 4: the file is missing"),
        ('{"file": "a.mp4", "caption": "a", "text": "b"}', "line 4: unknown 'text'"),
        ('{"file": "a.mp4", "caption": "a", "start": true}', "line 4: start True is not a number"),
        ('{"file": "a.mp4", "caption": "a", "end": "1"}', "line 4: end '1' is not a number"),
        ('{"file": "a.mp4", "caption": "a", "end": Infinity}', "line 4: end inf is not a number"),
        ('{"file": "a.mp4", "caption": "a", "end": 1e999}', "line 4: end inf is not a number"),
        (f'{{"file": "a.mp4", "caption": "a", "end": 1{"0" * 400}}}', "line 4: end 10.* is not"),
        ('{"file": "a.mp4", "caption": "\\ud800"}', "line 4: the caption is empty or no text"),
        ("[" * 100000, "line 4: not JSON"),
    ],
)
def test_wrong_jsonl(root: Path, make: Callable[..., Folder], extra: str, words: str) -> None:
    jsonl(root)
    path = root / "captions.jsonl"
    path.write_text(path.read_text() + extra + "\n")
    with pytest.raises(UserError, match=words) as raised:
        make(strict=True)
    assert "\n" not in str(raised.value)


def test_other_wrong_captions(root: Path, make: Callable[..., Folder]) -> None:
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as raised:
            make(strict=True)
        assert "\n" not in str(raised.value)

    beside(root)
    (root / "b.txt").unlink()
    refused("b.mp4: no caption; write b.txt beside it")
    (root / "b.txt").write_text("  \n")
    refused("b.txt: the caption is empty")
    (root / "b.txt").write_bytes("für".encode("latin-1"))
    refused("b.txt: not UTF-8 .byte 1")
    (root / "b.txt").write_text("b")
    jsonl(root)
    refused("captions in captions.jsonl and in a.txt")
    for name in CAPTIONS:
        (root / name).with_suffix(".txt").unlink()
    table(root, HEAD)
    refused("captions in captions.jsonl and captions.csv")
    (root / "captions.csv").write_bytes(b"file,caption\na.mp4,\xff\n")
    (root / "captions.jsonl").unlink()
    refused("captions.csv: not UTF-8 .byte 19")
    (root / "captions.csv").write_bytes(b"\xef\xbb\xbf" + HEAD.encode() + b"a.mp4,a\0b,,\n")
    refused("no row for b.mp4")
    os.rename(root / "a.mp4", root / "a\nb.mp4")
    refused(r"file name 'a\\nb.mp4' has a line break")
    os.rename(root / "a\nb.mp4", os.fsencode(root) + b"/\xff.mp4")
    refused("bytes that are not UTF-8")
    os.rename(os.fsencode(root) + b"/\xff.mp4", root / "a.mp4")
    for name, shown in (("\x1b[31m", r"\\x1b\[31m"), ("\x7f", r"\\x7f"), ("\u2028", r"\\u2028")):
        (root / f"{name}.mp4").write_bytes(b"")
        refused(f"file name '{shown}.mp4' has a line break, a control character or")
        (root / f"{name}.mp4").unlink()


def test_links_in_circles_end(root: Path, make: Callable[..., Folder]) -> None:
    beside(root)
    want = items(make())
    (root / "more" / "again").symlink_to(root)
    (root / "more" / "up.mp4").symlink_to("..")
    (root / "more" / "again.txt").symlink_to("again.txt")
    source = make()
    assert items(source) == want
    circles = [("more/again", "a link to a folder that is read already"),
               ("more/up.mp4", "a link to a folder that is read already"),
               ("more/again.txt", "no film beside it")]  # fmt: skip
    assert source.skipped == circles
    (root / "round.mp4").symlink_to("round.mp4")
    (root / "there.mp4").symlink_to("back.mp4")
    (root / "back.mp4").symlink_to("there.mp4")
    for name in ("round", "there", "back"):
        (root / f"{name}.txt").write_text(name)
    source = make()
    assert items(source) == want
    assert [name for name, _ in source.skipped[:3]] == ["back.mp4", "round.mp4", "there.mp4"]
    assert all("symbolic links" in why for _, why in source.skipped[:3])
    assert source.skipped[3:] == circles
    (root / "round.txt").unlink()
    (root / "round.txt").symlink_to("round.txt")
    with pytest.raises(UserError, match="round.mp4: no caption; write round.txt"):
        make(strict=True)


def test_markup_in_a_caption_is_text(root: Path, make: Callable[..., Folder]) -> None:
    odd = ["<b>red</b> &amp; </p><script>x</script>", "**a** _b_ [x](y) {z} %s", "=1+1 $HOME `id`"]
    rows = dict(zip(CAPTIONS, odd, strict=True))
    table(root, "file,caption\n" + "".join(f'{name},"{text}"\n' for name, text in rows.items()))
    assert sorted(make().captions) == sorted(odd)
    (root / "captions.csv").unlink()
    lines = [json.dumps({"file": name, "caption": text}) for name, text in rows.items()]
    (root / "captions.jsonl").write_text("\n".join(lines))
    assert sorted(make().captions) == sorted(odd)


def test_a_place_that_cannot_be_written_is_one_line(root: Path) -> None:
    beside(root)
    with pytest.raises(UserError, match="cannot write"):
        Folder(root, cache="/proc/none/cache", frames=5, size=(8, 8))


def test_captions_are_one_line() -> None:
    assert checked_caption("here", " a red\n\n ball\tfalls ") == "a red ball falls"
