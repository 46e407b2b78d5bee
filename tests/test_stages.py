"""What a workdir goes on with, and what it refuses."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base, folder
from vdit.config.identity import read_config
from vdit.data import sources
from vdit.data.captions import Row
from vdit.encode import check_captions
from vdit.errors import UserError
from vdit.run import run
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics, read
from vdit.runtime.preemption import Preemption
from vdit.runtime.video import write_mp4
from vdit.stages import CONTENT, refuse_other, stage_meta
from vdit.train import Runtime


def test_a_rate_may_change_before_the_last_step_and_is_recorded(tmp_path: Path) -> None:
    """The cure of a training that diverged; nothing else of it may, and then no more."""
    config = base.get_config("smoke")
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    place = Runtime(tmp_path, mesh, Metrics(tmp_path), Preemption(), config.run)
    checkpoints, one = place.checkpoints("vae"), {"vae": jnp.ones(1)}
    checkpoints.save(6, {"params": one}, one, None, stage_meta(config, "vae"))
    checkpoints.wait()
    config.vae.train.learning_rate = 1e-3
    config.vae.train.discriminator.adam_learning_rate = 1e-5
    refuse_other(config, "vae", place, begins=True)
    (row,) = read(tmp_path)
    assert (row["stage"], row["step"]) == ("vae", 6)
    assert "vae.train.learning_rate was 0.03, now 0.001" in row["changed"]
    config.dit.train.learning_rate = 1e-3  # of another stage, which has not begun
    refuse_other(config, "dit", place)
    config.vae.train.optimizer = "adamw"
    with pytest.raises(UserError, match="of another run: .*vae.train.optimizer was 'muon'"):
        refuse_other(config, "vae", place)
    config.vae.train.optimizer, config.vae.train.steps = "muon", 6
    with pytest.raises(UserError, match=r"vae.train.learning_rate was 0.03, now 0.001"):
        refuse_other(config, "vae", place)
    checkpoints.close()


@pytest.mark.parametrize("was, now, refused", [
    ("a", "a", ""), ("", "b", ""), ("a", "", ""), ("a", "b", "another data set than data.path=new"),
])  # fmt: skip
def test_another_data_set_is_one_of_other_content(
    was: str, now: str, refused: str, tmp_path: Path
) -> None:
    """Not of another place; that of an import is not known."""
    config = folder.get_config("smoke")
    config.data.path = "old"
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    content = [{CONTENT: x} if x else {} for x in (was, now)]
    place = Runtime(tmp_path, mesh, Metrics(tmp_path), Preemption(), config.run, content=content[1])
    checkpoints, one = place.checkpoints("vae"), {"vae": jnp.ones(1)}
    checkpoints.save(6, {"params": one}, one, None, stage_meta(config, "vae", content[0]))
    checkpoints.wait()
    config.data.path = "new"
    config.vae.train.learning_rate = 1e-3  # the cure of a divergence is none of other films
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        refuse_other(config, "vae", place, begins=True)
    config.data.fps = 5.0
    with pytest.raises(UserError, match="data.fps was 10.0, now 5.0"):
        refuse_other(config, "vae", place)
    checkpoints.close()


def test_a_moved_folder_goes_on_and_a_changed_one_does_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clips = tmp_path / "clips"
    for name in "abc":
        film = rng.integers(0, 255, (19, 2, 2, 3)).astype(np.uint8).repeat(16, 1).repeat(16, 2)
        write_mp4(clips / f"{name}.mp4", film, 10.0)
        (clips / f"{name}.txt").write_text(f"film {name}")
    config = folder.get_config("smoke")
    config.data.path, config.stages, config.latents.clips = str(clips), ("vae",), 4
    config.vae.train.steps = 3
    run(config, tmp_path / "run")
    moved = clips.rename(tmp_path / "moved")
    config.data.path, config.stages = str(moved), ("vae", "latents")
    run(config, tmp_path / "run")
    (tmp_path / "link").symlink_to(moved)
    (moved / "a.mp4").rename(moved / "d.mp4")
    (moved / "a.txt").rename(moved / "d.txt")
    made = sorted(path.stat().st_ino for path in (tmp_path / "run" / "latents").iterdir())
    config.data.path = str(tmp_path / "link")
    run(config, tmp_path / "run")
    assert made == sorted(path.stat().st_ino for path in (tmp_path / "run" / "latents").iterdir())
    assert read_config(tmp_path / "run").data.path == str(tmp_path / "link")
    (moved / "d.mp4").unlink()
    with pytest.raises(UserError, match="stage vae was trained on another data set"):
        run(config, tmp_path / "run")


class Captioned:
    """A folder's clips, without videos."""

    def __init__(self, *captions: str) -> None:
        self.rows = [Row(f"clips/{i}.txt", f"{i}.mp4", text) for i, text in enumerate(captions)]
        self.digest = repr(captions)

    def __len__(self) -> int:
        return len(self.rows)

    def caption(self, index: int) -> str:
        return self.rows[index].caption

    def texts(self) -> Iterator[tuple[str, str]]:
        return ((row.where, row.caption) for row in self.rows)


class Drawn:
    """Clips that are made to read their captions; counts them."""

    def __init__(self, words: Callable[[int], int], length: int = 10**6) -> None:
        self.words, self.length, self.made = words, length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.made += 1
        return {"caption": " ".join(["ball"] * self.words(index))}


WORDS = " ".join(Path(__file__).parents[1].joinpath("LICENSE").read_text().split())


def test_captions_are_counted_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both splits; the default budget of a folder holds 200 words."""
    config = folder.get_config("")
    texts = [" ".join(WORDS.split()[i : i + 200]) for i in range(0, 1200, 200)]
    clips, heldout = Captioned("a red ball", *texts), Captioned("红色的球从上面落下来，" * 20)
    monkeypatch.setattr("vdit.data.sources.source", lambda *given: clips)
    check_captions(config, tmp_path, clips)
    monkeypatch.setattr("vdit.data.sources.source", lambda *given: heldout)
    with pytest.raises(UserError, match=r"^clips/0.txt: its caption is 6\d\d tokens.*ws 512"):
        check_captions(config, tmp_path, clips)
    config.text.length = 40
    with pytest.raises(UserError, match=r"\d+ tokens long \(one of 7\); config.text.leng"):
        check_captions(config, tmp_path, clips)
    assert len(list(tmp_path.iterdir())) == 2  # of the first check, which passed


def test_captions_of_any_source_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them where one is near the limit; those that pass once are not read again."""
    monkeypatch.setattr("vdit.encode.TOKENIZER_CAPTIONS", 10)
    config = base.get_config("smoke")
    config.text.length, config.latents.clips, config.stages = 20, 30, ("vae", "dit", "sample")
    config.sample.clips = 4
    heldout = Drawn(lambda i: 5)
    monkeypatch.setattr("vdit.data.sources.source", lambda *given: heldout)
    for words, where in (
        (lambda i: 25 if i == 3 else 10, "clip 3 of data.source=world: its caption is 25 tokens"),
        (lambda i: 25 if i == 29 else 19, "clip 29 of data.source=world.*length allows 20"),
    ):
        with pytest.raises(UserError, match=where):
            check_captions(config, tmp_path, Drawn(words))
    heldout.words = lambda i: 21 + i
    with pytest.raises(UserError, match="held-out clip 3 .* 24 tokens long .one of 4."):
        check_captions(config, tmp_path, Drawn(lambda i: 5))
    assert not list(tmp_path.iterdir())
    heldout.words = lambda i: 5
    far, near = Drawn(lambda i: 25 if i >= 30 else 10), Drawn(lambda i: 19)
    check_captions(config, tmp_path, far)  # clips that are not encoded need not fit
    assert far.made == 10
    check_captions(config, tmp_path, far)
    assert far.made == 10
    tokenizer = (tmp_path / "tokenizer.json").read_text()
    config.data.fps = 5.0  # other captions: another tokenizer, while nothing is made from it
    check_captions(config, tmp_path, near)
    assert near.made == 30
    config.text.vocab, config.text.length = 257, 200
    check_captions(config, tmp_path, near)
    assert (tmp_path / "tokenizer.json").read_text() != tokenizer


@pytest.mark.parametrize("share, wanted", [(0.1, ["train", "heldout"]), (0.0, ["train", "train"])])
def test_nothing_held_out_scores_the_training_clips(
    share: float, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a single clip can be learned by heart."""
    made: list[Any] = []
    monkeypatch.setattr("vdit.data.captioned.Captioned", lambda store, **given: made.append(given))
    config = folder.get_config("smoke")
    config.data.path = str(tmp_path)
    config.data.heldout = share
    for split in ("train", "heldout"):
        sources.source(config, split, tmp_path)
    assert [given["split"] for given in made] == wanted
    assert {given["heldout"] for given in made} == {share}


@pytest.mark.parametrize("name, value", [
    ("vae.train.adam_learning_rate", float("inf")), ("dit.train.learning_rate", 11.0),
    ("classify.train.learning_rate", -1.0), ("vae.train.discriminator.adam_learning_rate", 1e9),
    ("vae.train.ema", 1.5), ("sample.guidance", float("nan")), ("seed", -1), ("seed", 2**32),
    ("dit.logit_normal", (float("nan"), 1.0)), ("vae.train.steps", 10**23), ("text.length", 2**31),
    ("latents.shard", 0), ("latents.batch", -1), ("sample.clips", 0), ("eval.captions", 0),
    ("text.heads", 0), ("text.depth", -1), ("vae.width", 0), ("vae.mlp_ratio", 0.0),
    ("vae.kl_weight", -1.0), ("dit.text_drop", 1.5), ("eval.given", -1), ("data.stride", -0.5),
    ("sample.steps", 10**6), ("dit.patch", (1, -1)),
])  # fmt: skip
def test_numbers_out_of_range_are_refused_before_anything_is_written(
    name: str, value: float, tmp_path: Path
) -> None:
    config = base.get_config("smoke")
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=rf"{name} is .* allowed"):
        run(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())
