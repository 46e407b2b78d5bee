"""Scores of a model that knows every clip: what it is asked, and in which wordings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments import base, playground, shots
from vdit.data import sources
from vdit.models.text import Tokenizer, learned_tokenizer
from vdit.worlds.reword import paraphrase
from vdit.worlds.scores import OBJECTS, score_bodies, score_playground, score_shots


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
    score = score_bodies if source == "world" else score_shots
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

    monkeypatch.setattr(
        "vdit.worlds.scores.score_rows", lambda *given: [{"aggregate": given[1].aggregate}]
    )
    clips = [held[i] for i in range(3)]
    (row,) = score_playground(Asked(config, clips), tmp_path, 1)
    told = [(clip["caption"], clip.get("shots", ())) for clip in clips]
    told += [(clip["paraphrase"], clip.get("paraphrased_shots", ())) for clip in clips[:2]]
    assert asked == told
    assert row["aggregate"]([]).keys() >= ({"cut_recall"} if "shots" in variant else {"gravity"})
