"""Lines of the oracles, on clips of the simulators."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import base, playground, shots
from vdit.data import sources


def read(config: Any, index: int = 0) -> tuple[str, list[str]]:
    """A held-out clip's caption, and what is read from it."""
    clip = sources.source(config, "heldout", Path())[index]
    return clip["caption"], sources.chosen(config).part("reading")(clip["video"], config.data.fps)


def test_of_the_world() -> None:
    caption, lines = read(base.get_config())
    assert caption == "a small yellow triangle drops down and bounces"
    assert lines == ["a small yellow triangle falls; whole in every frame"]
    grey = np.full((17, 32, 32, 3), 128, np.uint8)
    assert sources.SOURCES["world"].part("reading")(grey, 10.0)


def test_of_shots() -> None:
    _, lines = read(shots.get_config(), 1)
    assert lines == [
        "0.0 to 1.3 s (indoors, wide):",
        "a large orange box falls; whole in every frame",
        "1.3 to 3.3 s (night, close right):",
        "a large orange box rests; whole in every frame",
    ]


@pytest.mark.parametrize("variant, begins", [("", "0.0 to 4.1 s (day; whole"), ("shots", "0.0 to")])
def test_of_playgrounds(variant: str, begins: str) -> None:
    caption, lines = read(playground.get_config(variant), 1)
    assert lines[0].startswith(begins)
    assert any("a large red b" in line for line in lines), (caption, lines)
