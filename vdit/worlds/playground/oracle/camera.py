"""Cameras and places: the empty place is aligned with each frame.

Dimension key: T frames, M cameras, H height, W width.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from vdit.worlds.forms import PALETTE
from vdit.worlds.playground.cast import CAMERAS, PLACE_NAMES
from vdit.worlds.playground.render import (
    BUILT,
    SWAY,
    ZOOM,
    ZOOMS,
    backdrop,
    ease,
    home,
    lit,
    room_of,
)

FAR = 60.0  # RGB distance, the largest of the channels, that counts as wholly different
NEAR = 40.0  # RGB distance from a colour, at most, of a pixel that shows it
BUILT_CODE = len(PALETTE)  # the code of structures
WORSE = 0.0015  # mean difference from the empty place, in FAR, that one frame may add
STARTS = 10  # tried where a camera has jumped, at most


def largest(x: np.ndarray) -> np.ndarray:
    """The largest absolute channel; numpy is slow on a last axis of 3."""
    x = np.abs(x)
    return np.maximum(np.maximum(x[..., 0], x[..., 1]), x[..., 2])


def starts(size: tuple[int, int]) -> np.ndarray:
    """Cameras (M, 3) as clips begin with them."""
    x, y = home(*size)
    made = [(x, y, ZOOM["static"]), (x, y, ZOOMS[0]), (x, y, ZOOM["pan"])]
    made += [(x + way * SWAY, y, ZOOM["pan"]) for way in (-1, 1)]
    made += [(x, y + way * SWAY, ZOOM["tilt"]) for way in (-1, 1)]
    for dx, dy in itertools.product((-0.08, 0.0, 0.08), repeat=2):
        made.append((x + dx, y + dy, ZOOM["shake"]))
    return np.array(made)


class Eye:
    """A clip's frames, and how empty places look beside them."""

    def __init__(self, video: np.ndarray) -> None:
        self.video = video.astype(np.float32)
        self.size = (int(video.shape[1]), int(video.shape[2]))
        self.room, self.top = room_of(self.size)
        self.known: dict[tuple[str, int], np.ndarray] = {}

    def free(self, place: str, frame: int) -> np.ndarray:
        """Pixels (H * W,) away from those of characters and structures."""
        key = place, frame
        if key not in self.known:
            codes = codes_of(self.video[frame : frame + 1], place)[0]
            self.known[key] = ~ndimage.binary_dilation(codes >= 0, iterations=2).reshape(-1)
        return self.known[key]

    def off(self, place: str, frame: int, camera: np.ndarray) -> np.ndarray:
        """Differences (M, H * W, 3) of a frame from cameras (M, 3)."""
        off = self.video[frame] - backdrop(place, camera, *self.size, self.room)
        return off.reshape(len(camera), -1, 3)

    def cost(self, place: str, frame: int, camera: np.ndarray) -> np.ndarray:
        """(M,): mean difference of the free pixels, in FAR."""
        free = self.free(place, frame)
        cost = np.minimum(largest(self.off(place, frame, camera)), FAR) * free
        return cost.sum(1) / max(free.sum(), 1) / FAR

    def align(self, place: str, frame: int, camera: np.ndarray, steps: int = 8) -> np.ndarray:
        """The camera (3,) by Gauss and Newton, from one that is near."""
        probe = np.diag((0.03, 0.03, 0.008))
        free = self.free(place, frame)
        for _ in range(steps):
            off = self.off(place, frame, np.concatenate([camera[None], camera[None] + probe]))
            slope = ((off[:1] - off[1:]) / np.diag(probe)[:, None, None]).reshape(3, -1)
            # Outliers are something in front of the empty place.
            some = slope * np.repeat(free & (largest(off[0]) < FAR * 0.8), 3)
            normal = (some @ slope.T).astype(np.float64) + 1e-2 * np.eye(3)
            change = np.linalg.solve(normal, some @ off[0].reshape(-1))
            change = np.clip(change, (-0.3, -0.3, -0.05), (0.3, 0.3, 0.05))
            camera = np.clip(camera + change, (-50, -50, 0.3), (50, 50, 3.0))
            if np.abs(change).max() < 1e-3:
                break
        return camera


def first_look(eye: Eye, frame: int, begins: np.ndarray) -> tuple[int, np.ndarray]:
    """The place that a frame shows, and its camera (3,), near one of `begins` (M, 3)."""
    best = (np.inf, 0, np.zeros(3))
    for index, place in enumerate(PLACE_NAMES):
        start = begins[eye.cost(place, frame, begins).argmin()]
        camera = eye.align(place, frame, start)
        # Of pixels that are free in one place and not in another, none is left out.
        off = np.minimum(largest(eye.off(place, frame, camera[None])), FAR).mean()
        best = min(best, (float(off), index, camera), key=lambda one: one[0])
    return best[1], best[2]


def follow(
    eye: Eye, place: str, frame: int, cameras: Sequence[np.ndarray], cost: float
) -> tuple[np.ndarray, float]:
    """The camera (3,) of a frame and its cost, after a take's `cameras`, of least cost `cost`."""
    steps = (-0.14, -0.07, 0, 0.07, 0.14)
    ahead = 2 * cameras[-1] - cameras[-2] if len(cameras) > 1 else cameras[-1]
    made = eye.align(place, frame, ahead)
    now = float(eye.cost(place, frame, made[None])[0])
    if now > cost + WORSE:  # it has jumped: look around
        around = np.array([(dx, dy, 0) for dx, dy in itertools.product(steps, repeat=2)])
        tried = np.concatenate([made[None], cameras[-1][None], ahead + around])
        costs = eye.cost(place, frame, tried)
        for start in tried[np.argsort(costs)[:STARTS]]:
            if now <= cost + WORSE:
                break
            other = eye.align(place, frame, start)
            also = float(eye.cost(place, frame, other[None])[0])
            if also < now:
                made, now = other, also
    return made, now


def find_cameras(eye: Eye) -> tuple[int, np.ndarray]:
    """The place, and the cameras (T, 3)."""
    index, camera = first_look(eye, 0, starts(eye.size))
    place, cameras = PLACE_NAMES[index], [camera]
    cost = float(eye.cost(place, 0, camera[None])[0])
    for frame in range(1, len(eye.video)):
        made, now = follow(eye, place, frame, cameras, cost)
        cameras.append(made)
        cost = min(now, cost)
    return index, np.array(cameras)


def camera_kind(camera: np.ndarray, tracks: Sequence[np.ndarray]) -> int:
    """Index into CAMERAS of a path (T, 3), among characters on tracks (T, 2)."""
    few = max(1, len(camera) // 16)
    first, last = camera[:few].mean(0), camera[-few:].mean(0)
    dx, dy, zoom = last - first
    if len(camera) < 3:
        name = "static"
    elif abs(zoom) > (ZOOMS[1] - ZOOMS[0]) / 2:
        name = "zoom_in" if zoom > 0 else "zoom_out"
    elif abs(dy) > SWAY:  # before what shakes: a short tilt is uneven too
        name = "tilt_up" if dy > 0 else "tilt_down"
    elif np.abs(np.diff(camera[:, 1], 2)).mean() > 0.02:
        name = "shake"
    elif np.ptp(camera[:, 0]) > SWAY:
        away = camera[:, 0] - camera[0, 0] - 2 * SWAY * math.copysign(1, dx) * ease(len(camera))
        steady = [np.nanstd(track[:, 0] - camera[:, 0]) for track in tracks]
        follows = min(steady, default=np.inf) < np.sqrt(np.square(away).mean())
        name = "follow" if follows else ("pan_right" if dx > 0 else "pan_left")
    else:
        name = "static"
    return CAMERAS.index(name)


def codes_of(video: np.ndarray, place: str) -> np.ndarray:
    """(T, H, W): which colour of PALETTE a pixel shows, BUILT_CODE, or -1 for none."""
    paints = [lit(rgb, place) for rgb in (*PALETTE, BUILT)]
    off = np.stack([largest(video - paint) for paint in paints])
    return np.where(off.min(0) < NEAR, off.argmin(0), -1)
