"""Where the shots of a clip begin, and how found cuts are judged: for all sources of shots."""

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
    """`shots` = (least, most), if a clip can have them; raises `UserError` if not."""
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
    """Of the first frames of found and true shots, in order, the clip's own included.

    `cut_precision` and `cut_recall`: shares of the found and of the true cuts that are at the same
    frame (both 1 if rightly there are none, 0 if no shot is found); `shots`: as many as told.
    """
    mine, told = set(found) - {0}, set(true) - {0}
    hits = len(mine & told)
    return {
        "cut_precision": hits / len(mine) if mine else float(bool(found) and not told),
        "cut_recall": hits / len(told) if told else float(bool(found) and not mine),
        "shots": float(len(found) == len(true)),
    }
