"""The truth as a picture shows it: where the camera sees each body, how it moves, and its look.

Dimension key: T frames, N bodies, K kinds of a look, F numbers of a body in a frame.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vdit.worlds.forms import Form

SPEED = 1.5  # m/s, the unit of velocities: about their deviation in every world


class View(NamedTuple):
    """Where a clip's camera sees its bodies."""

    off: np.ndarray  # (T, N, 2) metres from the picture's middle, x right, y up
    place: np.ndarray  # (T, N, 2) pixels, x right, y down
    reach: np.ndarray  # (N,) metres to a body's farthest point; -inf where there is none
    camera: np.ndarray  # (T, 3)
    scale: np.ndarray  # (T, 1, 1) pixels a metre


Camera = tuple[float, float, float]


def _view(
    clip: Mapping[str, Any], room: float, form: Callable[[int, int], Form], camera: Camera | None
) -> View:
    truth, (height, width) = clip["truth"], clip["video"].shape[1:3]
    position = truth["position"].astype(np.float64)
    camera_T3 = truth["camera"] if camera is None else np.tile(camera, (len(position), 1))
    off = position - camera_T3[:, None, :2]
    scale = min(height, width) / room * camera_T3[:, None, 2:]
    pairs = zip(truth["shape"].tolist(), truth["size"].tolist(), strict=True)
    reach = np.array([form(*pair).outer if pair[0] >= 0 else -np.inf for pair in pairs])
    place = np.array([width, height]) / 2 + off * scale * (1, -1)
    return View(off, place, reach, camera_T3, scale)


def covered(
    clip: Mapping[str, Any], room: float, form: Callable[[int, int], Form],
    camera: Camera | None = None,
) -> np.ndarray:  # fmt: skip
    """bool (T, H, W): the pixels in the circle round a body, as `DataSource.bodies` has it; the
    arguments are those of `in_picture`."""
    view, (height, width) = _view(clip, room, form, camera), clip["video"].shape[1:3]
    reach_TN = view.reach * view.scale[..., 0] + 0.5  # of a pixel, for its edge
    grid = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    inside = np.zeros((len(view.place), height, width), bool)
    for number in np.flatnonzero(view.reach > 0):
        x, y, reach = (
            part[:, None, None] for part in (*view.place[:, number].T, reach_TN[:, number])
        )
        inside |= (grid[1] - x) ** 2 + (grid[0] - y) ** 2 <= reach**2
    return inside


def in_picture(
    clip: Mapping[str, Any], room: float, form: Callable[[int, int], Form],
    looks: Mapping[str, int], camera: Camera | None = None,
) -> np.ndarray:  # fmt: skip
    """What a clip shows of its bodies, float32 (T, N, F), as `DataSource.truth` has it.

    `room`: metres along the picture's shorter side at zoom 1; `form(shape, size)`: a body's
    outline; `looks`: kinds of each index in the truth that is to be told; `camera`: that of all
    frames where the truth has none.
    """
    truth, (height, width) = clip["truth"], clip["video"].shape[1:3]
    off, place, reach, camera_T3, scale = _view(clip, room, form, camera)
    moves_T3 = _rates(camera_T3, truth) if camera is None else np.zeros(camera_T3.shape)
    zoom = camera_T3[:, None, 2:]
    there = (np.abs(off) < np.array([width, height]) / 2 / scale + reach[:, None]).all(2)
    moves = (truth["velocity"] - moves_T3[:, None, :2]) * zoom + off * moves_T3[:, None, 2:]
    moves = moves / SPEED * (1, -1)
    known = [_one_hot(truth[name], kinds, there.shape) for name, kinds in looks.items()]
    return np.concatenate(
        [there[..., None], place[..., ::-1], moves[..., ::-1], *known], axis=2, dtype=np.float32
    )


def _one_hot(index: np.ndarray, kinds: int, shape: tuple[int, ...]) -> np.ndarray:
    """(T, N, K) with a mean square of 1 over K, from an index (N,) or (T, N); -1 is none."""
    told = np.broadcast_to(index, shape)[..., None] == np.arange(kinds)
    return told * np.sqrt(kinds)


def _rates(camera_T3: np.ndarray, truth: Mapping[str, np.ndarray]) -> np.ndarray:
    """A camera's change in a second, shot by shot."""
    rates = np.zeros(camera_T3.shape)
    shot = truth.get("shot", np.zeros(len(camera_T3), np.int32))
    for number in np.unique(shot):
        at = shot == number
        if at.sum() > 1:
            rates[at] = np.gradient(camera_T3[at].astype(np.float64), axis=0) * float(truth["fps"])
    return rates
