"""Curation: cuts where they are, poor shots named, a table that the folder source reads."""

import json
from pathlib import Path

import numpy as np
from scipy import ndimage

from tools import shots
from tools.curate import main
from vdit.data.folder import Folder
from vdit.runtime.video import write_mp4


def texture(seed: int, frames: int, speed: int = 1) -> np.ndarray:
    """uint8 (frames, 64, 64, 3): a pan over a smooth random picture of a colour of its own."""
    random = np.random.default_rng(seed)
    wide = ndimage.gaussian_filter(random.standard_normal((64, 64 + speed * frames)), 2)
    tint = random.uniform(60, 190, 3)
    picture = np.clip(tint + 200 * wide[..., None], 30, 255).astype(np.uint8)
    return np.stack([picture[:, speed * k : speed * k + 64] for k in range(frames)])


def test_cuts_are_found_and_flashes_are_none() -> None:
    film = np.concatenate([texture(1, 20), texture(2, 25), texture(3, 30)])
    film[10:12] = 255
    found = shots.shots(shots.measure([film[:33], film[33:]]))
    assert found == [(0, 20), (20, 45), (45, 75)]


def test_more_blur_is_less_sharp() -> None:
    picture = shots.gray(texture(4, 1)[0])
    values = [shots.sharpness(ndimage.gaussian_filter(picture, s)) for s in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True) and values[0] > 2 * values[-1]


def test_from_the_tool_to_the_folder_source(tmp_path: Path) -> None:
    root = tmp_path / "films"
    root.mkdir()
    still = np.repeat(texture(5, 1), 20, 0)
    black = np.zeros((20, 64, 64, 3), np.uint8)
    films = {"a": np.concatenate([texture(1, 20), still, black, texture(2, 20)])}
    films["b"] = texture(1, 20)  # a duplicate
    for name, video in films.items():
        write_mp4(root / f"{name}.mp4", video, fps=10)
        (root / f"{name}.txt").write_text(name)
    (root / "c.mp4").write_bytes((root / "a.mp4").read_bytes()[:2000])
    (root / "c.txt").write_text("c")
    assert main([str(root)]) == 0
    report = json.loads((root / "captions.jsonl.report.json").read_text())
    gone = {name: n for name, n in report["dropped"].items() if n}
    assert report["kept"] == 2
    assert gone == {"static": 1, "black": 1, "duplicate": 1, "unreadable": 1}
    source = Folder(root, cache=tmp_path / "cache", frames=5, size=(8, 8), heldout=0.0)
    assert {source.origin(i)[1] for i in range(len(source))} == {0.0, 1.0, 6.0, 7.0}
    assert main([str(root)]) == 2  # would overwrite
    names = ("captions.jsonl", "captions.jsonl.report.json", "dropped.jsonl")
    before = [(root / name).read_bytes() for name in names]
    assert main([str(root), "--force"]) == 0
    assert [(root / name).read_bytes() for name in names] == before
    assert main([str(root), "--min-seconds=-1"]) == 2


def test_where_nothing_is_left_there_is_no_table(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", np.zeros((20, 64, 64, 3), np.uint8), fps=10)
    (tmp_path / "a.txt").write_text("a")
    assert main([str(tmp_path)]) == 2
    assert not (tmp_path / "captions.jsonl").exists()
    assert json.loads((tmp_path / "dropped.jsonl").read_text())["reason"] == "black"


def test_captions_of_ones_own_are_not_overwritten(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", texture(1, 20), fps=10)
    table = tmp_path / "captions.jsonl"
    table.write_text('{"file": "a.mp4", "caption": "a"}\n')
    before = table.read_bytes()
    assert main([str(tmp_path), "--force"]) == 2 and table.read_bytes() == before
    assert main([str(tmp_path), f"--out={tmp_path / 'new' / 'captions.jsonl'}"]) == 0
