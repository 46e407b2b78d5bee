"""Cuts: where the shots of a clip begin, and how detected cuts are scored."""

import math
from collections.abc import Sequence

from vdit.worlds.clips import Draws, check

MAX_SHOTS = 4
GOES_ON = 0.4  # share of cuts after which the take goes on, if another camera sees it


def shot_blocks(fps: float, align: int, seconds: float) -> tuple[int, int]:
    """The least length of a clip's first shot and of a later one, in `align` frames.

    The first has one frame more. Each shot lasts `seconds`, as long as a motion needs to be seen,
    and at least one latent frame beyond its first.
    """
    need = math.ceil(seconds * fps - 1e-9)
    return max(1, math.ceil((need - 1) / align)), max(2, math.ceil(need / align))


def check_shots(
    where: str, shots: tuple[int, int], align: int, frames: int, fps: float, seconds: float
) -> tuple[int, int]:
    """`shots` = (least, most); `UserError` if a clip cannot have them."""
    good = len(shots) == 2 and 1 <= shots[0] <= shots[1] <= MAX_SHOTS
    check(good, where, "shots", shots, f"(1, 1) to (1, {MAX_SHOTS})")
    check(align >= 1, where, "align", align, "1 or more")
    first, later = shot_blocks(fps, align, seconds)
    most = shots[1]
    least = 1 + align * (first + (most - 1) * later) if most > 1 else 1
    allowed = f"{least} or more for shots={shots} at {fps:g} fps, align={align}"
    check(frames >= least, where, "frames", frames, allowed)
    return int(shots[0]), int(most)


def draw_bounds(
    draws: Draws, shots: tuple[int, int], align: int, frames: int, fps: float, seconds: float
) -> list[int]:
    """First frames of a clip's shots, and its end."""
    count = shots[0] + draws.below(shots[1] - shots[0] + 1)
    if count == 1:
        return [0, frames]
    first, later = shot_blocks(fps, align, seconds)
    spare = (frames - 1) // align - first - (count - 1) * later
    more = sorted(draws.below(spare + 1) for _ in range(count - 1))
    blocks = [first + later * index + extra for index, extra in enumerate(more)]
    return [0, *(1 + align * block for block in blocks), frames]


def judge_cuts(found: Sequence[int], true: Sequence[int]) -> dict[str, float]:
    """Scores detected cuts, by the first frames of detected and of true shots, in order.

    `cut_precision` and `cut_recall` count exact frames (both 1 for a single shot without detected
    cuts, 0 if no shot is detected); `shots`: the right number of shots.
    """
    detected, cuts = set(found) - {0}, set(true) - {0}
    hits = len(detected & cuts)
    return {
        "cut_precision": hits / len(detected) if detected else float(bool(found) and not cuts),
        "cut_recall": hits / len(cuts) if cuts else float(bool(found) and not detected),
        "shots": float(len(found) == len(true)),
    }
