"""Scores of pixels against their definitions; what is asked in other words."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments import base, minute, playground, shots
from vdit import evaluate
from vdit.config import data as sources
from vdit.config import joined
from vdit.data.world.oracle import room
from vdit.data.world.reword import paraphrase
from vdit.data.world.simulate import View
from vdit.data.world.source import World
from vdit.errors import UserError
from vdit.evaluate import (
    OBJECTS,
    drifts,
    gain,
    in_chunks,
    psnr,
    score_playground,
    score_shots,
    score_world,
    ssim,
    there,
)
from vdit.models.text import Tokenizer, learned_tokenizer
from vdit.sample import Result


def clips(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (2, 3, 16, 16, 3), dtype=np.uint8)


def test_psnr_of_a_known_error() -> None:
    x = np.full((1, 2, 4, 4, 3), 100, np.uint8)
    np.testing.assert_allclose(psnr(x + np.uint8(10), x), 20 * np.log10(255 / 10))


def test_ssim_is_one_for_the_same_and_falls_with_noise() -> None:
    x = clips()
    np.testing.assert_allclose(ssim(x, x), 1.0)
    near = np.clip(x.astype(int) + clips(1) % 20 - 10, 0, 255).astype(np.uint8)
    assert (ssim(clips(2), x) < ssim(near, x)).all() and (ssim(near, x) < 1).all()


def test_ssim_of_a_constant_shift_has_its_closed_form() -> None:
    """Without variance SSIM is its luminance term (Wang et al. 2004, Eq. 6)."""
    x, y = np.full((1, 1, 12, 12, 3), 50, np.uint8), np.full((1, 1, 12, 12, 3), 80, np.uint8)
    c1 = (0.01 * 255) ** 2
    want = (2 * 50 * 80 + c1) / (50**2 + 80**2 + c1)
    np.testing.assert_allclose(ssim(x, y), want, rtol=1e-6)


def test_gain_is_of_all_clips_together_whatever_stands_still() -> None:
    """A clip that a frozen frame gets exactly right counts as little error, not as many dB."""
    near, still = np.full(50, 10.0), np.full(50, 40.0)
    assert abs(gain(near, still)["gain_db"] - 10 * np.log10(4)) < 1e-9
    near[0] = still[0] = 0.0
    made = gain(near, still)
    assert abs(made["gain_db"] - 10 * np.log10(4)) < 1e-9
    assert made["gain_db_low"] <= made["gain_db"] <= made["gain_db_high"]
    some = gain(np.random.default_rng(1).uniform(1, 20, 50), still)
    assert some["gain_db_low"] < some["gain_db"] < some["gain_db_high"]


def test_a_body_that_goes_is_not_there() -> None:
    clip = World(0, frames=40, fps=10.0, objects=(1, 1))[3]
    video = clip["video"].copy()
    assert there(video, 1, 10.0).all() and not there(video, 2, 10.0).any()
    video[30:] = room(View(32, 32), "studio")
    seen = there(video, 1, 10.0)
    assert seen[:30].mean() > 0.9 and not seen[30:].any()


def test_drifts_of_a_known_fade() -> None:
    """A picture that loses 1% of its first contrast a second, and one that does not change."""
    frame = np.random.default_rng(0).uniform(60, 180, (1, 16, 16, 3))
    time = np.arange(100)[:, None, None, None] / 5.0
    still = np.broadcast_to(frame, (100, 16, 16, 3)).astype(np.uint8)
    assert max(drifts(still, 5.0).values()) < 1e-12
    mean = frame.mean((1, 2), keepdims=True)
    fading = np.round(mean + (frame - mean) * (1 - 0.01 * time)).astype(np.uint8)
    made = drifts(fading, 5.0)
    for name in ("contrast", "sharpness"):  # of the mean, which is 0.9 of the first
        assert made[name] == pytest.approx(0.01 / 0.9, rel=0.03)
    assert made["colour"] < 1e-4
    darker = np.clip(still.astype(float) - 2.55 * time, 0, 255).astype(np.uint8)
    assert drifts(darker, 5.0)["colour"] == pytest.approx(0.01 * 3**0.5, rel=0.03)


def test_a_chunk_is_given_the_later_half_of_the_one_before() -> None:
    """A model that counts on from what it is given makes one count of all chunks."""

    class Counts:
        config = minute.get_config("smoke")

        def generate(self, prompts: list[str], seconds: float, seed: int, given: Any = ()) -> Any:
            made = []
            for i in range(len(prompts)):
                first = int(given[i][0].video[0, 0, 0, 0]) if given else 0
                count = np.arange(first, first + 11, dtype=np.uint8)
                video = np.broadcast_to(count[:, None, None, None], (11, 2, 2, 3))
                made.append(Result({}, lambda video=video: iter([video])))
            return made

    model: Any = Counts()
    video = in_chunks(model, ["a", "b"], 31, 2.0, 0)
    assert video.shape == (2, 31, 2, 2, 3)
    assert (video[..., 0, 0, 0] == np.arange(31)).all()


@pytest.mark.parametrize(
    ("field", "value"), [("chunk", 0.5), ("chunk", 6.3)], ids=["short", "long"]
)
def test_a_chunk_that_is_none_is_refused(field: str, value: float) -> None:
    config = minute.get_config("smoke")
    joined.check(config)
    config.eval[field] = value
    with pytest.raises(UserError, match="eval.chunk is"):
        joined.check(config)


class Perfect:
    """Stands in for a model: it knows every held-out clip by its caption, in any wording."""

    def __init__(self, config: Any, clips: Sequence[Mapping[str, Any]]) -> None:
        self.config, self.asked = config, Counter[str]()
        json = learned_tokenizer([clip["caption"] for clip in clips], 320)
        self.tokenizer, self.encoder = Tokenizer(json, 160), SimpleNamespace(frozen=False)
        self.known = {paraphrase(clip["caption"]): clip for clip in clips}
        self.lengths = set[int]()

    def encode(self, videos: np.ndarray) -> np.ndarray:
        return videos

    def decode(self, videos: np.ndarray, height: int, width: int) -> np.ndarray:
        return videos

    def generate(self, prompts: Sequence[str], seed: int, shots: Any = ()) -> list[Any]:
        self.lengths.add(self.tokenizer.length)
        made = []
        for number, prompt in enumerate(prompts):
            clip = self.known[paraphrase(prompt)]
            told = [(at, paraphrase(text)) for at, text in shots[number]] if shots else []
            assert told == [(at, paraphrase(text)) for at, text in clip.get("shots", ())]
            self.asked["seen" if prompt == clip["caption"] else "unseen"] += 1
            made.append(SimpleNamespace(video=clip["video"]))
        return made


@pytest.mark.parametrize("source", ["world", "shots"])
def test_paraphrases_are_scored_beside_the_seen_wording(source: str, tmp_path: Path) -> None:
    config = (base if source == "world" else shots).get_config("smoke")
    config.eval.captions, config.eval.paraphrases = 8, 4
    counts = OBJECTS.values() if source == "world" else [tuple(config.data.objects)]
    clips = []
    for count in counts:
        held = sources.source(config, "heldout", tmp_path, objects=count)
        clips += [held[i] for i in range(8)]
    model: Any = Perfect(config, clips)
    score = score_world if source == "world" else score_shots
    rows = {row["split"]: row for row in score(model, tmp_path, 1) if row["objects"] == "all"}
    assert [row["clips"] for row in rows.values()] == [8, 8, 8, 4]
    assert model.asked == {"seen": 8, "unseen": 4} and model.lengths <= {160, 320}
    assert model.tokenizer.length == 160
    for split in ("reconstructed", "generated"):
        assert rows[split]["colour"] == rows["real"]["colour"] == 1.0
    assert rows["paraphrased"]["colour"] == 1.0 and rows["paraphrased"]["captions"] <= 4
    config.eval.paraphrases = 0
    assert "paraphrased" not in {row["split"] for row in score(model, tmp_path, 1)}


@pytest.mark.parametrize("variant", ["smoke", "shots_smoke"])
def test_playgrounds_are_asked_for_with_their_shots(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = playground.get_config(variant)
    config.eval.captions, config.eval.paraphrases, config.data.size = 3, 2, (32, 32)
    held = sources.source(config, "heldout", tmp_path)
    asked: list[tuple[str, Any]] = []

    class Asked(Perfect):
        def generate(self, prompts: Sequence[str], seed: int, shots: Any = ()) -> list[Any]:
            asked.extend((prompt, shots[n] if shots else ()) for n, prompt in enumerate(prompts))
            return [SimpleNamespace(video=np.zeros((1, 32, 32, 3), np.uint8)) for _ in prompts]

    monkeypatch.setattr(evaluate, "_scored", lambda *given: [{"aggregate": given[5]}])
    clips = [held[i] for i in range(3)]
    (row,) = score_playground(Asked(config, clips), tmp_path, 1)
    told = [(clip["caption"], clip.get("shots", ())) for clip in clips]
    told += [(clip["paraphrase"], clip.get("paraphrased_shots", ())) for clip in clips[:2]]
    assert asked == told
    assert row["aggregate"]([]).keys() >= ({"cut_recall"} if "shots" in variant else {"gravity"})
