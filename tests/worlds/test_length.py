"""How long clips last: bodies that go, pictures that fade, and clips in chunks."""

from typing import Any

import numpy as np
import pytest

from experiments import minute
from vdit.config import joined
from vdit.errors import UserError
from vdit.sample import Result
from vdit.worlds.bodies.length import drifts, in_chunks, there
from vdit.worlds.bodies.oracle import room
from vdit.worlds.bodies.physics import View
from vdit.worlds.bodies.source import World


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
