"""Requests from flags: names of files, given frames, numbers; nothing is written over."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vdit.config import default
from vdit.config.denoiser import build_dit
from vdit.errors import UserError
from vdit.model import settings_of
from vdit.sample import Clip, Model, Result
from vdit.show import (
    read_given,
    read_shots,
    reserved,
    sample_request,
    slug,
    unused,
    write_result,
)


class Drawn(Model):
    """A model whose videos are grey; what it says of them is the request's."""

    def __init__(self) -> None:
        self.config, self.classes = default(), ()
        self.dit = build_dit(self.config)

        class Tokens:
            def encode(self, texts: Any, name: str = "prompt") -> None:
                pass

        self.tokenizer = Tokens()  # type: ignore[assignment]

    def generate(self, prompts: Any, *rest: Any, **request: Any) -> list[Result]:
        num, seed = request["num"], request["seed"]
        asks = self.asks(prompts, Clip(5, 10.0, 8, 8), num, seed, (), ())
        video = np.full((5, 8, 8, 3), 128, np.uint8)
        told = [{"prompt": ask.captions[0], "seed": ask.seed, "fps": 10.0} for ask in asks]
        return [Result(settings, lambda: iter([video])) for settings in told]


def request(folder: Path, *prompts: str, **changes: Any) -> list[Path]:
    asked = {"seconds": None, "fps": None, "size": None, "num": 1, "seed": 0, "given": []}
    return sample_request(Drawn(), folder, prompts=prompts, **(asked | changes))


def test_samples_are_never_written_over(tmp_path: Path) -> None:
    """Two prompts of one name, the same request again, and a prompt named as the stage's tasks."""
    long = "a red ball falls " * 8
    prompts = ["A ball!", "a ball", long + "1", long + "2"]
    names = [request(tmp_path, prompt)[0].stem for prompt in prompts]
    assert names[:2] == ["a-ball-0", "a-ball-0-2"] and len(set(names)) == 4
    assert [path.stem for path in request(tmp_path, "a ball", "text", num=2)] == [
        "a-ball-0-3", "a-ball-1", "video-text-2", "video-text-3",
    ]  # fmt: skip
    told = [json.loads((tmp_path / f"{name}.json").read_text())["prompt"] for name in names]
    assert len(list(tmp_path.glob("*.mp4"))) == 8 and told == prompts
    (tmp_path / "mine-0.json").write_text("{}")
    assert unused(tmp_path, "mine-0").name == "mine-0-2.mp4"
    (tmp_path / "É-0.mp4").touch()
    (tmp_path / "u\u0308-0.mp4").touch()
    assert [unused(tmp_path, name).name for name in ("é-0", "ü-0")] == ["é-0-2.mp4", "ü-0-2.mp4"]
    assert len(request(tmp_path / "wide", "𠮷𠮷 " * 99)) == 1  # of four bytes each


def test_two_requests_at_a_time_take_two_names(tmp_path: Path) -> None:
    """Both have looked for a free name before one of them has written anything."""
    with (
        reserved(tmp_path / "out", "a-ball-0") as one,
        reserved(tmp_path / "out", "A-Ball-0") as two,
    ):
        assert (one.name, two.name) == ("a-ball-0.mp4", "A-Ball-0-2.mp4")
    with pytest.raises(KeyboardInterrupt), reserved(tmp_path, "a-ball-0") as one:
        raise KeyboardInterrupt
    assert not one.exists() and two.exists()


def test_several_videos_are_shown_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request(tmp_path, "one")
    assert not list(tmp_path.glob("*wall*"))
    request(tmp_path, "two", num=3)
    with Image.open(tmp_path / "two-0-wall.webp") as wall:
        wide, high = wall.size
        assert wide > 2 * 8 or high > 2 * 8
        assert np.asarray(wall.convert("RGB")).min() > 100  # the videos are grey, the rest white
    monkeypatch.setattr("vdit.show.WALL", 1000)
    request(tmp_path, "three", num=3)
    assert not list(tmp_path.glob("three*wall*"))


@pytest.mark.parametrize("prompt, name", [
    ("A red ball falls.", "a-red-ball-falls"), ("红球落下", "红球落下"),
    ("蓝方块, 滚动", "蓝方块-滚动"),
    ("Ein Übel", "ein-übel"), ("Ein U\u0308bel", "ein-übel"), ("हिन्दी गेंद", "हिन्दी-गेंद"),
    ("🎬 ../..", "video"), ("", "video"), ("snake_case/x", "snake-case-x"),
])  # fmt: skip
def test_names_keep_the_letters_of_any_script(prompt: str, name: str) -> None:
    assert slug(prompt) == name
    assert len(slug(prompt * 200).encode()) <= 120


def test_a_video_that_cannot_be_written_leaves_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage sample writes over its own files."""
    (result,) = Drawn().generate(["a ball"], num=1, seed=1)
    write_result(tmp_path / "text-00.mp4", result, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 3

    def full(path: Path, text: str) -> None:
        raise UserError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("vdit.show.write_text", full)
    with pytest.raises(UserError):
        write_result(tmp_path / "text-00.mp4", result, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_video_that_cannot_be_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vdit.show.write_webp", interrupted)
    with pytest.raises(KeyboardInterrupt):
        request(tmp_path, "a ball")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [
    {"seed": -1}, {"seed": 2**32}, {"seed": 2**32 - 1, "num": 2}, {"num": 0}, {"num": 10**9},
    {"fps": float("nan")}, {"fps": 0.0}, {"fps": 1e-9}, {"seconds": float("inf")},
    {"seconds": -1.0}, {"size": "0x8"}, {"size": "99999x8"}, {"size": "-8x8"},
    {"size": "8x8\u2028"},
], ids=str)  # fmt: skip
def test_numbers_have_bounds(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        request(tmp_path, "a ball", **changes)
    assert len(str(raised.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_the_last_seed_is_allowed(tmp_path: Path) -> None:
    assert request(tmp_path, "a", seed=2**32 - 1)[0].stem == "a-4294967295"


@pytest.mark.parametrize("name", ["guidance", "push", "shift", "eta"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_are_finite(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} {value}: a finite number"):
        settings_of(default(), sampler="ddim", **{name: value})


@pytest.mark.parametrize("name, at", [
    ("me@home.png", ""), ("me@home.png", "@0.2"), ("a@1.png", ""), ("x@y@z.png", "@0"), ("b@2", ""),
])  # fmt: skip
def test_given_files_may_have_an_at_in_their_name(
    name: str, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("")
    frame = np.zeros((1, 8, 8, 3), np.uint8)
    monkeypatch.setattr("vdit.show.read_clip", lambda path, *options: (frame, path))
    part, read = read_given(f"{tmp_path / name}{at}", 10.0, (8, 8), 5)
    assert (part.frame, read) == (2 if at == "@0.2" else 0, str(tmp_path / name))


def test_a_name_that_no_file_can_have_is_one_line() -> None:
    with pytest.raises(UserError, match="File name too long"):
        read_given("x" * 300 + "@0.5", 10.0, (8, 8), 9)


def test_a_shot_list_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    text = json.dumps([{"start": 0, "caption": "Übel"}], ensure_ascii=False)
    (tmp_path / "shots.json").write_text(text, encoding="utf-8-sig")
    assert read_shots(str(tmp_path / "shots.json")) == [(0.0, "Übel")]
    (tmp_path / "shots.json").write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match="not UTF-8"):
        read_shots(str(tmp_path / "shots.json"))
