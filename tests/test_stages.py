"""What a workdir goes on with, and what it refuses."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments import base, folder
from vdit.data import sources
from vdit.data.captions import Row
from vdit.encode import check_captions
from vdit.errors import UserError
from vdit.run import run
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics, read
from vdit.runtime.preemption import Preemption
from vdit.stages import refuse_other, stage_meta
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


class Captioned:
    """A folder's clips, without videos."""

    def __init__(self, *captions: str) -> None:
        self.rows = [Row(f"clips/{i}.txt", f"{i}.mp4", text) for i, text in enumerate(captions)]

    def __len__(self) -> int:
        return len(self.rows)

    def caption(self, index: int) -> str:
        return self.rows[index].caption


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
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share, wanted", [(0.1, ["train", "heldout"]), (0.0, ["train", "train"])])
def test_nothing_held_out_scores_the_training_clips(
    share: float, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a single clip can be learned by heart."""
    made: list[Any] = []
    monkeypatch.setattr("vdit.data.folder.Folder", lambda path, **given: made.append(given))
    config = folder.get_config("smoke")
    config.data.heldout = share
    for split in ("train", "heldout"):
        sources.source(config, split, tmp_path)
    assert [given["split"] for given in made] == wanted
    assert {given["heldout"] for given in made} == {share}


@pytest.mark.parametrize("name, value", [
    ("vae.train.adam_learning_rate", float("inf")), ("dit.train.learning_rate", 11.0),
    ("classify.train.learning_rate", -1.0), ("vae.train.discriminator.adam_learning_rate", 1e9),
    ("vae.train.ema", 1.5), ("sample.guidance", float("nan")), ("seed", -1), ("seed", 2**32),
    ("dit.logit_normal", (float("nan"), 1.0)),
])  # fmt: skip
def test_numbers_out_of_range_are_refused_before_anything_is_written(
    name: str, value: float, tmp_path: Path
) -> None:
    config = base.get_config("smoke")
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=rf"{name} is .* allowed"):
        run(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())
