"""Ceilings and controls of the oracles, as Markdown: `python -m tools.oracle_table [CLIPS]`.

Held-out clips of world, shots and playground, each scored against its own ground truth and, as a
control, against that of the next clip; clips of the world also with blur and noise beyond what a
decoder leaves. (The playground's scores of steadiness and physics require the right cast first;
without that, the control would score as high.)
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from vdit.errors import UserError
from vdit.worlds.bodies import oracle
from vdit.worlds.bodies.source import World
from vdit.worlds.clips import MAX_SHOTS
from vdit.worlds.playground import oracle as playground_oracle
from vdit.worlds.playground.shots import PlaygroundShots
from vdit.worlds.playground.source import Playground
from vdit.worlds.shots import oracle as shots_oracle
from vdit.worlds.shots.source import Shots

from .table import markdown

SIZES = ((32, 32), (64, 64))
CLIPS = 256


def rows(
    name: str,
    clips: Sequence[dict[str, Any]],
    score: Callable[[Any, dict[str, Any]], dict[str, float]],
    aggregate: Callable[[list[dict[str, float]]], dict[str, float]],
) -> list[list[str]]:
    """A row per score of an oracle: its mean, and that of the control."""
    others = [*clips[1:], *clips[:1]]
    real = aggregate([score(clip["video"], clip) for clip in clips])
    control = aggregate(
        [score(clip["video"], other) for clip, other in zip(clips, others, strict=True)]
    )
    return [
        [name, str(len(clips)), key.replace("_", " "), f"{value:.3f}", f"{control[key]:.3f}"]
        for key, value in real.items()
        if not key.endswith("clips")
    ]


def softened(video_THWC: np.ndarray, blur: float = 0.7, grain: float = 15.0) -> np.ndarray:
    """A clip blurred by `blur` pixels, with noise of amplitude `grain` (of 255) at the same
    spatial scale."""
    sigma = (0, blur, blur, 0)
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=video_THWC.shape), sigma)
    made = ndimage.gaussian_filter(video_THWC.astype(np.float64), sigma)
    return np.clip(made + grain / noise.std() * noise + 0.5, 0, 255).astype(np.uint8)


def playgrounds(count: int) -> list[list[str]]:
    """The rows of `count` held-out playgrounds at 64x64 and of as many with one to four shots; each
    clip is read once and scored twice."""
    one, several = Playground(0, "heldout"), PlaygroundShots(0, "heldout", shots=(1, MAX_SHOTS))
    made = []
    for name, source, read, judge, aggregate in (
        ("playground 64x64", one, playground_oracle.read, playground_oracle.judge,
         playground_oracle.aggregate),
        ("playground shots 64x64", several, playground_oracle.read_shots,
         playground_oracle.judge_shots, playground_oracle.aggregate_shots),
    ):  # fmt: skip
        clips = (source[index] for index in range(count))
        seen = [{**clip, "video": read(clip["video"], source.fps)} for clip in clips]
        made += rows(name, seen, judge, aggregate)
    return made


def table(count: int) -> str:
    """The scores of all oracles on `count` held-out clips of each size."""
    lines = []
    for height, width in SIZES:
        world = World(0, "heldout", size=(height, width))
        shots = Shots(0, "heldout", size=(height, width))
        size = f"{height}x{width}"

        def one(video: Any, clip: dict[str, Any], fps: float = world.fps) -> dict[str, float]:
            return oracle.score(video, clip["truth"], fps)

        clips = [world[index] for index in range(count)]
        lines += rows(f"world {size}", clips, one, oracle.aggregate)
        soft = [{**clip, "video": softened(clip["video"])} for clip in clips]
        lines += rows(f"world {size}, softened", soft, one, oracle.aggregate)
        clips = [shots[index] for index in range(count)]
        lines += rows(
            f"shots {size}", clips, shots_oracle.score_shots, shots_oracle.aggregate_shots
        )
    lines += playgrounds(count)
    return markdown(["clips", "n", "score", "own truth", "another's"], lines)


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit status."""
    try:
        given = "".join(itertools.islice(argv, 1)) or str(CLIPS)
        if len(argv) > 1 or not given.isdigit() or int(given) < 2:
            raise UserError(
                f"usage: python -m tools.oracle_table [CLIPS], 2 or more; got {' '.join(argv)!r}"
            )
        print(table(int(given)))
        return 0
    except UserError as error:
        print(f"vdit: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
