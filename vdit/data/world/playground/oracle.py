"""The oracle of playgrounds: reads cameras, places, characters and events, and scores them.

It reads by drawing: the empty place is aligned with each frame, and each character, found by its
colour, is fitted by the renderer's own pictures of it. It knows the renderer, and nothing else.

Dimension key: T frames, M windows, K window side in pixels, H height, W width, N characters.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from vdit.data.world.playground import events as what
from vdit.data.world.playground.camera import SWAY, ZOOM, ZOOMS, ease
from vdit.data.world.playground.cast import (
    BLOCK,
    BLOCKS,
    CAMERAS,
    EVENTS,
    EXPRESSIONS,
    FLOOR_DEPTH,
    MATERIAL_NAMES,
    MATERIALS,
    MOTIONS,
    PIVOT,
    PLACE_NAMES,
    PLACES,
    PLATE,
    PLATFORM_TOP,
    ROOM,
    SETS,
    SHAPES,
    SIZES,
    SPRING_TOP,
    Look,
    block,
    form,
)
from vdit.data.world.playground.physics import Scene
from vdit.data.world.playground.render import (
    BUILT,
    Canvas,
    backdrop,
    built_parts,
    character,
    has_faces,
    home,
    lit,
    windows,
)
from vdit.data.world.render import PALETTE

FAR = 60.0  # RGB distance, the largest of the channels, that counts as wholly different
NEAR = 40.0  # RGB distance from a colour, at most, of a pixel that shows it
BACK = 30.0  # RGB distance from the empty place, at least, of a pixel that shows something else
CORE = 5  # pixels of its colour that a character shows, at least
SHOWN = 0.7  # of a character's pixels, at least, that look as they should
OFTEN = 0.3  # a character is what is there in this share of the frames
PROBES = 4  # frames in which the look is judged
TURNS = 8  # angles tried
LARGEST = 1.4  # metres: windows that hold any character reach this far
BUILT_CODE = len(PALETTE)  # the code of what is built
LOOKS = ("colour", "shape", "size", "material")
CAST_SCORES = ("count", *LOOKS, "expression", "motion")
PHYSICS = ("gravity", "restitution", "energy", "penetration", "permanence")
DRIFT = ("steady_colour", "steady_contrast", "steady_sharpness")
SCORES = ("place", "camera", "built", *CAST_SCORES, "events", "order", *PHYSICS, *DRIFT,
          "every_attribute")  # fmt: skip
EVERY = ("place", "camera", "built", *CAST_SCORES, "events")  # all 1: every attribute
DRIFTS = (0.03, 0.04, 0.06)  # shares of colour, contrast and sharpness a second, at most
WORSE = 0.0015  # mean difference from the empty place, in FAR, that one frame may add
SLACK = 0.12  # metres that a steady eye may be off
CALM = ("none", "ramp", "platform")  # built things that hold no energy
STRANGE = 0.02  # of the pixels, at most, that nothing explains
BOUNCE = 0.12  # of restitution, at most off


@dataclasses.dataclass(frozen=True)
class Body:
    """A character that was read; indices as in the truth."""

    look: Look
    motion: int
    track: np.ndarray  # (T, 2) metres, NaN where it is not seen
    angle: np.ndarray  # (T,)
    whole: np.ndarray  # (T,) bool: as it should look, wherever it is in the picture
    inside: np.ndarray  # (T,) bool: all of it is in the picture
    expression: np.ndarray  # (T,), -1 without faces


class Reading(NamedTuple):
    """What a clip shows."""

    place: int
    camera: np.ndarray  # (T, 3)
    camera_kind: int
    built: int
    side: int
    tower: np.ndarray  # (T,): its height, 0 without one
    poured: np.ndarray  # (T,)
    bodies: tuple[Body, ...]
    strange: np.ndarray  # (T,): share of the pixels that nothing explains
    drift: tuple[float, float, float]  # colour, contrast, sharpness: change a second
    events: list[what.Event]


# ---- camera and place -----------------------------------------------------------------------


def largest(x: np.ndarray) -> np.ndarray:
    """The largest size of the three channels; numpy is slow on a last axis of 3."""
    x = np.abs(x)
    return np.maximum(np.maximum(x[..., 0], x[..., 1]), x[..., 2])


def _starts(size: tuple[int, int]) -> np.ndarray:
    """Cameras (M, 3) as clips begin with them."""
    x, y = home(*size)
    made = [(x, y, ZOOM["static"]), (x, y, ZOOMS[0]), (x, y, ZOOM["pan"])]
    made += [(x + way * SWAY, y, ZOOM["pan"]) for way in (-1, 1)]
    made += [(x, y + way * SWAY, ZOOM["tilt"]) for way in (-1, 1)]
    for dx, dy in itertools.product((-0.08, 0.0, 0.08), repeat=2):
        made.append((x + dx, y + dy, ZOOM["shake"]))
    return np.array(made)


class _Eye:
    """A clip's frames, and how empty places look beside them."""

    def __init__(self, video: np.ndarray) -> None:
        self.video = video.astype(np.float32)
        self.size = (int(video.shape[1]), int(video.shape[2]))
        self.room = self.size[1] / (min(self.size) / ROOM)

        self.known: dict[tuple[str, int], np.ndarray] = {}

    def free(self, place: str, frame: int) -> np.ndarray:
        """Pixels (H * W,) that are not near one of a character, or of what is built."""
        key = place, frame
        if key not in self.known:
            codes = _codes(self.video[frame : frame + 1], place)[0]
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
            # What is far from the empty place is something in front of it.
            some = slope * np.repeat(free & (largest(off[0]) < FAR * 0.8), 3)
            normal = (some @ slope.T).astype(np.float64) + 1e-2 * np.eye(3)
            change = np.linalg.solve(normal, some @ off[0].reshape(-1))
            change = np.clip(change, (-0.3, -0.3, -0.05), (0.3, 0.3, 0.05))
            camera = np.clip(camera + change, (-50, -50, 0.3), (50, 50, 3.0))
            if np.abs(change).max() < 1e-3:
                break
        return camera


def _cameras(eye: _Eye) -> tuple[int, np.ndarray]:
    """The place, and the cameras (T, 3)."""
    starts, best = _starts(eye.size), (np.inf, 0, np.zeros(3))
    for index, place in enumerate(PLACE_NAMES):
        start = starts[eye.cost(place, 0, starts).argmin()]
        camera = eye.align(place, 0, start)
        # Of pixels that are free in one place and not in another, none is left out.
        off = np.minimum(largest(eye.off(place, 0, camera[None])), FAR).mean()
        best = min(best, (float(off), index, camera), key=lambda one: one[0])
    _, index, camera = best
    place, cameras = PLACE_NAMES[index], [camera]
    cost = float(eye.cost(place, 0, camera[None])[0])
    around = np.array([(dx, dy, 0) for dx, dy in itertools.product((-0.14, 0, 0.14), repeat=2)])
    for frame in range(1, len(eye.video)):
        ahead = 2 * cameras[-1] - cameras[-2] if frame > 1 else cameras[-1]
        made = eye.align(place, frame, ahead)
        now = float(eye.cost(place, frame, made[None])[0])
        if now > cost + WORSE:  # it has jumped: look around
            tried = np.concatenate([made[None], cameras[-1][None], ahead + around])
            costs = eye.cost(place, frame, tried)
            for start in tried[np.argsort(costs)[:3]]:
                if now <= cost + WORSE:
                    break
                other = eye.align(place, frame, start)
                also = float(eye.cost(place, frame, other[None])[0])
                if also < now:
                    made, now = other, also
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
    elif np.abs(np.diff(camera[:, 1], 2)).mean() > 0.02:
        name = "shake"
    elif np.ptp(camera[:, 0]) > SWAY:
        away = camera[:, 0] - camera[0, 0] - 2 * SWAY * math.copysign(1, dx) * ease(len(camera))
        steady = [np.nanstd(track[:, 0] - camera[:, 0]) for track in tracks]
        follows = min(steady, default=np.inf) < np.sqrt(np.square(away).mean())
        name = "follow" if follows else ("pan_right" if dx > 0 else "pan_left")
    elif abs(dy) > SWAY:
        name = "tilt_up" if dy > 0 else "tilt_down"
    else:
        name = "static"
    return CAMERAS.index(name)


# ---- characters -----------------------------------------------------------------------------


def _codes(video: np.ndarray, place: str) -> np.ndarray:
    """(T, H, W): which colour of PALETTE a pixel shows, BUILT_CODE, or -1 for none."""
    paints = [lit(rgb, place) for rgb in (*PALETTE, BUILT)]
    off = np.stack([largest(video - paint) for paint in paints])
    return np.where(off.min(0) < NEAR, off.argmin(0), -1)


class _Figures:
    """The frames, the scene without characters, and whose every pixel may be."""

    def __init__(self, eye: _Eye, place: int, camera: np.ndarray) -> None:
        self.place, self.camera, self.eye = PLACE_NAMES[place], camera, eye
        empty = backdrop(self.place, camera, *eye.size, eye.room)
        self.video, self.empty = eye.video, empty
        self.codes = _codes(eye.video, self.place)
        # What is built takes the place of the empty room: it is no part of a character.
        built = self.codes == BUILT_CODE
        self.empty[built] = self.video[built]
        self.scale = min(eye.size) / ROOM * camera[:, 2]
        other = largest(eye.video - empty) > BACK
        # Every pixel belongs to the nearest one that shows a character's colour.
        self.owner = np.empty_like(self.codes)
        self.seen, self.close = np.zeros((2, *self.codes.shape), bool)
        for frame, code in enumerate(self.codes):
            someone = (code >= 0) & (code != BUILT_CODE)
            if not someone.any():
                self.owner[frame] = -1
                continue
            far, at = ndimage.distance_transform_edt(
                ~someone, return_distances=True, return_indices=True
            )
            self.owner[frame] = code[at[0], at[1]]
            self.close[frame] = far <= 0.4 * self.scale[frame] + 1
            near = far <= 0.32 * self.scale[frame] + 1
            self.seen[frame] = other[frame] & (code != BUILT_CODE) & near

    def colours(self) -> list[int]:
        """Of the characters: those that enough frames show enough of."""
        count = []
        for colour in range(len(PALETTE)):
            on = self.codes == colour
            # Edges between other things may mix to it, in lines one pixel wide.
            wide = on[:, 1:] & on[:, :-1]
            square = (wide[:, :, 1:] & wide[:, :, :-1]).any((1, 2))
            count.append(on.sum((1, 2)) * (square.mean() > OFTEN / 3))
        return [c for c, row in enumerate(count) if np.mean(row >= CORE) >= OFTEN]

    def middles(self, colour: int) -> np.ndarray:
        """(T, 2) metres: the middle of what belongs to a colour, NaN without."""
        mask = self.seen & (self.owner == colour)
        core = (self.codes == colour).sum((1, 2))
        rows, columns = np.arange(self.eye.size[0]) + 0.5, np.arange(self.eye.size[1]) + 0.5
        area = np.maximum(mask.sum((1, 2)), 1)
        column, row = mask.sum(1) @ columns / area, mask.sum(2) @ rows / area
        x = (column - self.eye.size[1] / 2) / self.scale + self.camera[:, 0]
        y = (self.eye.size[0] / 2 - row) / self.scale + self.camera[:, 1]
        return np.where((core >= CORE)[:, None], np.stack([x, y], axis=1), np.nan)

    def pixels(self, place: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Column and row (M, 2) of points in the pictures of some frames."""
        off = (place - self.camera[frames, :2]) * self.scale[frames][:, None]
        height, width = self.eye.size
        return np.stack([off[:, 0] + width / 2, height / 2 - off[:, 1]], axis=1)


class _Windows:
    """Windows of some frames about a colour's middles, and what is behind it there."""

    def __init__(
        self,
        figures: _Figures,
        colour: int,
        frames: np.ndarray,
        middle: np.ndarray,
        outer: float,
    ) -> None:
        height, width = figures.eye.size
        self.figures, self.colour, self.frames = figures, colour, frames
        self.scale = figures.scale[frames]
        side = 2 * math.ceil(outer * float(self.scale.max()) + 1) + 1
        self.base = figures.pixels(middle, frames)
        self.left, self.upper, _, _ = windows(self.base, side, height, width)
        self.rows, self.columns = min(side, height), min(side, width)
        cut = [
            (frame, slice(y, y + self.rows), slice(x, x + self.columns))
            for frame, x, y in zip(
                frames.tolist(), self.left.tolist(), self.upper.tolist(), strict=True
            )
        ]
        self.picture = np.stack([figures.video[at] for at in cut])
        self.behind = np.stack([figures.empty[at] for at in cut])
        owner = np.stack([figures.owner[at] for at in cut])
        code = np.stack([figures.codes[at] for at in cut])
        close = np.stack([figures.close[at] for at in cut])
        self.mine = (owner == colour) & close & ((code == colour) | (code < 0))

    def local(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x and y (M, K) of the pixels from places (M, 2) in metres."""
        at = self.figures.pixels(place, self.frames)
        x = np.arange(self.columns) + 0.5 + (self.left - at[:, 0])[:, None]
        y = (at[:, 1] - self.upper)[:, None] - (np.arange(self.rows) + 0.5)
        return x.astype(np.float32), y.astype(np.float32)

    def off(
        self, look: Look, expression: str, place: np.ndarray, angle: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Differences (M, K, K, 3) from the renderer's picture, and the cover (M, K, K)."""
        x, y = self.local(place)
        cover, paint = character(look, expression, self.figures.place, x, y, angle, self.scale)
        made = self.behind + cover[..., None] * (paint - self.behind)
        return self.picture - made, cover

    def cost(
        self, look: Look, place: np.ndarray, angle: np.ndarray, expression: str = ""
    ) -> np.ndarray:
        """(M,) pixels' worth of difference where the colour's own pixels are."""
        off, _ = self.off(look, expression, place, angle)
        return (np.minimum(largest(off), FAR) * self.mine).sum((1, 2)) / FAR

    def turned(self, look: Look, place: np.ndarray) -> np.ndarray:
        """The best (M,) of `TURNS` angles."""
        if SHAPES[look[0]] == "ball":
            return np.zeros(len(place))
        period = math.pi / 2 if SHAPES[look[0]] == "box" else 2 * math.pi / 3
        angles = np.arange(TURNS) * period / TURNS
        costs = [self.cost(look, place, np.full(len(place), angle)) for angle in angles]
        return angles[np.argmin(costs, axis=0)]

    def fit(
        self, look: Look, place: np.ndarray, angle: np.ndarray, steps: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places and angles by Gauss and Newton, each window for itself."""
        free = 2 if SHAPES[look[0]] == "ball" else 3
        probe = np.array((0.02, 0.02, 0.04))[:free]
        for _ in range(steps):
            off, _ = self.off(look, "", place, angle)
            weight = self.mine & (largest(off) < 2 * FAR)
            slopes = []
            for axis in range(free):
                move = np.zeros(3)
                move[axis] = probe[axis]
                there, _ = self.off(look, "", place + move[:2], angle + move[2])
                slopes.append((off - there) / probe[axis])
            slope = np.stack(slopes, axis=1).reshape(len(place), free, -1).astype(np.float64)
            flat = (off * weight[..., None]).reshape(len(place), -1).astype(np.float64)
            some = slope * np.repeat(weight.reshape(len(place), -1), 3, axis=1)[:, None]
            normal = some @ slope.transpose(0, 2, 1) + 1e2 * np.eye(free)
            change = np.linalg.solve(normal, (slope @ flat[..., None]))[..., 0]
            change = np.clip(change, -0.15, 0.15)
            place = place + change[:, :2]
            if free == 3:
                angle = angle + change[:, 2]
        return place, angle


def _look(figures: _Figures, colour: int, middle: np.ndarray) -> Look:
    """The look of what has a colour, judged in frames in which it stands free."""
    there = np.flatnonzero(~np.isnan(middle[:, 0]))
    mask = figures.seen & (figures.owner == colour)
    others = ((figures.codes >= 0) & (figures.codes != colour))[there]
    crowd = np.array([
        (ndimage.binary_dilation(mask[frame], iterations=2) & other).sum()
        for frame, other in zip(there.tolist(), others, strict=True)
    ])  # fmt: skip
    border = mask[there]
    border[:, 1:-1, 1:-1] = False
    edge = border.sum((1, 2))
    # The freest, and among these some that lie apart in time.
    order = np.lexsort((np.arange(len(there)) % 7, crowd + 10 * edge))
    frames = np.sort(there[order[:PROBES]])
    at = _Windows(figures, colour, frames, middle[frames], LARGEST)
    table = {}
    for shape, size in itertools.product(range(len(SHAPES)), range(len(SIZES))):
        plain = (shape, colour, size, MATERIAL_NAMES.index("soft"))
        angle = at.turned(plain, middle[frames])
        for material in range(len(MATERIALS)):
            look = (shape, colour, size, material)
            cost = at.cost(look, middle[frames], angle)
            table[look] = float(np.median(cost)), angle
    best = sorted(table, key=lambda look: table[look][0])[:7]
    final = {}
    for look in best:
        place, angle = at.fit(look, middle[frames], table[look][1], 3)
        final[look] = float(np.median(at.cost(look, place, angle)))
    return min(final, key=lambda look: final[look])


def _bodies(figures: _Figures) -> list[Body]:
    """The characters."""
    made = []
    for colour in figures.colours():
        middle = figures.middles(colour)
        look = _look(figures, colour, middle)
        frames = np.flatnonzero(~np.isnan(middle[:, 0]))
        shape = form(look[0], look[2])
        at = _Windows(figures, colour, frames, middle[frames], shape.outer + 0.1)
        place, angle = at.fit(look, middle[frames], at.turned(look, middle[frames]), 4)
        where = at.figures.pixels(place, frames)
        reach = shape.outer * at.scale
        height, width = figures.eye.size
        inside = ((where[:, 0] > reach) & (where[:, 0] < width - reach)
                  & (where[:, 1] > reach) & (where[:, 1] < height - reach))  # fmt: skip
        faces, whole = _faces(at, look, place, angle)
        frames_all = len(figures.video)
        track, turn = np.full((frames_all, 2), np.nan), np.zeros(frames_all)
        track[frames], turn[frames] = place, angle
        rows = [np.full(frames_all, fill) for fill in (False, False, -1)]
        for row, values in zip(rows, (whole, inside, faces), strict=True):
            row[frames] = values
        made.append(Body(look, -1, track, turn, rows[0], rows[1], rows[2]))
    return made


def _faces(
    at: _Windows, look: Look, place: np.ndarray, angle: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Expressions (M,), steadied over three frames, and where the body looks as it should (M,)."""
    names = EXPRESSIONS if has_faces(at.figures.eye.size) else ("",)
    costs = np.array([at.cost(look, place, angle, name) for name in names])
    faces = costs.argmin(0)
    if len(faces) > 2:
        same = faces[:-2] == faces[2:]
        faces[1:-1] = np.where(same, faces[:-2], faces[1:-1])
    whole = np.zeros(len(faces), bool)
    for index, name in enumerate(names):
        off, cover = at.off(look, name, place, angle)
        inside = cover > 0.5
        good = inside & at.mine & (largest(off) < FAR)
        whole |= (good.sum((1, 2)) > SHOWN * inside.sum((1, 2))) & (faces == index)
    return (faces if len(names) > 1 else np.full(len(faces), -1)), whole


# ---- what is built, and what happens --------------------------------------------------------


def _built(figures: _Figures) -> tuple[str, int, float]:
    """What is built, its side, and where, by the first frame."""
    height, width = figures.eye.size
    room, top = figures.eye.room, height / (min(height, width) / ROOM) - FLOOR_DEPTH
    shown = figures.codes[0] == BUILT_CODE
    best = (0.6, "none", 1, room / 2)
    for name, side, part in itertools.product(SETS[1:], (1, -1), (0.35, 0.5, 0.65)):
        turned = name in ("ramp", "platform")
        if (turned and part != 0.5) or (not turned and side < 0):
            continue
        if name == "pendulum" and part != 0.5:
            continue
        scene = Scene(figures.place, name, side, part * room, 0.0, (), room, top)
        parts = built_parts(scene)
        if name == "spring":
            parts = [(block(*PLATE), (scene.spot, SPRING_TOP - PLATE[1] / 2))]
        canvas = Canvas(np.zeros((1, height, width, 3), np.float32), figures.camera[:1])
        for shape, place in parts:
            canvas.thing(shape, np.ones(3, np.float32), np.array([place]))
        there = canvas.pictures[0, ..., 0] > 0.85  # less is not of its colour
        if there.any():
            best = max(best, (float(shown[there].mean()), name, side, scene.spot))
    return best[1:]


def _loose(figures: _Figures, built: str, side: int, spot: float, actor: Body | None) -> np.ndarray:
    """(T, H, W): pixels of what is built that no standing part of it explains."""
    height, width = figures.eye.size
    frames, room = len(figures.video), figures.eye.room
    top = height / (min(height, width) / ROOM) - FLOOR_DEPTH
    canvas = Canvas(np.zeros((frames, height, width, 3), np.float32), figures.camera)
    still = Scene(figures.place, built, side, spot, 0.0, (), room, top)
    ones = np.ones(3, np.float32)
    for shape, place in built_parts(still):
        canvas.thing(shape, ones, np.tile(place, (frames, 1)))
    if built == "pendulum" and actor is not None:
        ends = np.nan_to_num(actor.track, nan=0.0) - (spot, PIVOT)
        length = float(np.median(np.sqrt(np.square(ends).sum(1))))
        angle = np.arctan2(ends[:, 1], ends[:, 0])
        canvas.thing(block(length, 0.2), ones, ends / 2 + (spot, PIVOT), angle)
    known = ndimage.binary_dilation(canvas.pictures[..., 0] > 0.05, np.ones((1, 3, 3)))
    return (figures.codes == BUILT_CODE) & ~known


def _tower(figures: _Figures, loose: np.ndarray, built: str) -> np.ndarray:
    """Its height (T,) in metres, 0 throughout where none stands at the start."""
    frames = len(loose)
    area = loose[0].sum() / figures.scale[0] ** 2
    if built not in ("none", "ramp", "pendulum") or area < 0.45 * BLOCKS * BLOCK**2:
        return np.zeros(frames)
    rows = (figures.eye.size[0] / 2 - np.arange(figures.eye.size[0])[None]) / figures.scale[:, None]
    high = np.where(loose.sum(2) >= 2, rows + figures.camera[:, 1:2], -np.inf).max(1)
    return np.where(np.isfinite(high), high, 0.0)


def _motion(track: np.ndarray, shape: Any, fps: float, place: int, built: str, first: bool) -> int:
    """Index into MOTIONS of how a character begins, by its track (T, 2); -1 for none of them."""
    if first and built == "pendulum":
        way = np.nanmean(track[1 : 1 + max(1, int(fps * 0.8)), 0]) - track[0, 0]
        return MOTIONS.index("swings_right" if way > 0 else "swings_left")
    gravity = PLACES[PLACE_NAMES[place]].gravity
    flight = what.landing(track, fps, gravity)
    # What flies falls by g t^2 / 2; on the floor, a ramp or a platform it cannot.
    span = min(flight, len(track), 2 + int(fps * 0.5 * math.sqrt(9.81 / gravity)))
    time = np.arange(span) / fps
    x, y = track[:span].T
    speed = (x[-1] - x[0]) / max(time[-1], 1e-9) if span > 1 else 0.0
    stands = bool(y[0] < shape.inner + SLACK)
    if first and built == "platform":
        stands = stands or abs(y[0] - PLATFORM_TOP - shape.inner) < SLACK
    if first and built == "ramp":
        stands = True
        few = track[: 2 + int(fps * 0.5)]
        speed = 1.2 * math.copysign(1.0, few[-1, 0] - few[0, 0])
    sideways = "left" if speed < 0 else "right"
    if stands:
        # Friction may stop it within a few frames.
        if not (first and built == "ramp"):
            spans = (2 + int(fps * 0.1), 2 + int(fps * 0.4))
            speed = max((_speed(track[:span, 0], fps) for span in spans), key=abs)
        sideways = "left" if speed < 0 else "right"
        return MOTIONS.index("rests" if abs(speed) < 0.6 else f"rolls_{sideways}")
    if span >= 4 and -2 * np.polyfit(time, y, 2)[0] < 0.4 * gravity:
        return -1  # it hangs in the air
    return MOTIONS.index("falls" if abs(speed) < 0.7 else f"thrown_{sideways}")


def _speed(x: np.ndarray, fps: float) -> float:
    """Of the first steps, m/s; 0 of one frame."""
    return float((x[-1] - x[0]) / (len(x) - 1) * fps) if len(x) > 1 else 0.0


def _filled(track: np.ndarray) -> np.ndarray:
    """A track (T, 2) with straight lines where it is not seen."""
    seen = np.flatnonzero(~np.isnan(track[:, 0]))
    frames = np.arange(len(track))
    return np.stack([np.interp(frames, seen, track[seen, axis]) for axis in (0, 1)], axis=1)


def read(video: np.ndarray, fps: float) -> Reading:
    """Reads a clip `video` (T, H, W, 3) uint8 of a playground at `fps` frames a second."""
    eye = _Eye(video)
    place, camera = _cameras(eye)
    figures = _Figures(eye, place, camera)
    bodies = _bodies(figures)
    built, side, spot = _built(figures)
    bodies = _actor_first(bodies, built, side, spot, eye.room)
    loose = _loose(figures, built, side, spot, bodies[0] if bodies else None)
    tower = _tower(figures, loose, built)
    moved = []
    for number, body in enumerate(bodies):
        track = _filled(body.track)
        motion = _motion(track, form(body.look[0], body.look[2]), fps, place, built, number == 0)
        moved.append(dataclasses.replace(body, motion=motion))
    poured = loose.sum((1, 2)) if built == "pour" else np.zeros(len(video))
    gravity = PLACES[PLACE_NAMES[place]].gravity
    count, frames = len(moved), len(video)
    places, faces = np.zeros((frames, count, 2)), np.full((frames, count), -1)
    for number, body in enumerate(moved):
        places[:, number], faces[:, number] = _filled(body.track), body.expression
    sight = what.Sight(
        places, tuple(form(body.look[0], body.look[2]) for body in moved), faces,
        tuple(MOTIONS[body.motion] if body.motion >= 0 else "" for body in moved), built, side,
        spot, eye.room, gravity, fps, tower, poured / figures.scale**2,
    )  # fmt: skip
    strange, drift = _picture(figures, moved, loose, fps)
    kind = camera_kind(camera, [body.track for body in moved])
    return Reading(
        place, camera, kind, SETS.index(built), side, tower, poured, tuple(moved), strange, drift,
        what.find(sight),
    )  # fmt: skip


def _actor_first(
    bodies: list[Body], built: str, side: int, spot: float, room: float
) -> list[Body]:
    """The characters, the one that the thing built is for before the others."""

    def far(body: Body) -> float:
        x, y = _filled(body.track)[0]
        along = x if side > 0 else room - x
        if built == "pendulum":
            return -float(np.ptp(_filled(body.track)[: max(2, len(body.track) // 3), 0]))
        if built == "spring":
            return abs(x - spot)
        if built in ("ramp", "platform"):
            return along + 2 * (y < 1.6)
        return 0.0

    return sorted(bodies, key=far)


def _picture(
    figures: _Figures, bodies: Sequence[Body], loose: np.ndarray, fps: float
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """The share (T,) of pixels that nothing explains, and the drift of those that are explained."""
    frames = len(figures.video)
    canvas = Canvas(figures.empty.copy(), figures.camera)
    for body in bodies:
        canvas.character(body.look, body.expression, figures.place, body.track, body.angle)
    off = figures.video - canvas.pictures
    around = ndimage.binary_dilation(figures.codes == BUILT_CODE, np.ones((1, 5, 5)))
    plain = (largest(off) < 2 * FAR) & ~around  # what fades is still what it was
    strange = ((largest(off) >= FAR) & ~around).mean((1, 2))
    if frames < 2:
        return strange, (0.0, 0.0, 0.0)
    time = (np.arange(frames) - (frames - 1) / 2) / fps

    def slope(values: np.ndarray) -> float:
        return float((values * time).sum() / np.square(time).sum())

    tint = []
    for channel in range(3):
        drawn = (canvas.pictures[..., channel] * plain).sum((1, 2))
        tint.append(slope((off[..., channel] * plain).sum((1, 2)) / np.maximum(drawn, 1.0)))
    ratios = []
    for measure in (_contrast, _sharpness):
        seen, drawn = (measure(x, plain) for x in (figures.video, canvas.pictures))
        ratios.append(slope(seen / np.maximum(drawn, 1e-3)))
    return strange, (max(tint, key=abs), *ratios)  # type: ignore[return-value]


def _contrast(picture: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Deviation (T,) of the pixels' brightness."""
    grey, count = picture.mean(3), np.maximum(plain.sum((1, 2)), 1)
    mean = (grey * plain).sum((1, 2)) / count
    return np.sqrt((np.square(grey - mean[:, None, None]) * plain).sum((1, 2)) / count)


def _sharpness(picture: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Deviation (T,) of the steps from pixel to pixel."""
    grey = picture.mean(3)
    step, both = np.diff(grey, axis=2), plain[..., 1:] & plain[..., :-1]
    return np.sqrt((np.square(step) * both).sum((1, 2)) / np.maximum(both.sum((1, 2)), 1))


# ---- scores ---------------------------------------------------------------------------------


def score(video: np.ndarray, item: Mapping[str, Any]) -> dict[str, float]:
    """`judge` of what a clip (T, H, W, 3) uint8 shows."""
    return judge(read(video, float(item["truth"]["fps"])), item)


def judge(reading: Reading, item: Mapping[str, Any]) -> dict[str, float]:
    """Scores a reading by the truth of `item`.

    Of the truth no positions and no camera path are read, only what can be told: fps, count, looks,
    motions, place, the camera's kind, what is built, expressions, events.

    Returns 1.0 or 0.0, or a share, or NaN where a clip has nothing of the kind:

    - place, camera, built (with the tower); count; colour, shape, size, material, motion (right for
      every character); expression (share of frames and characters)
    - events: twice the shares of the found and of the true ones that agree, harmonic mean (F1); one
      agrees that is of the same kind and character and within a sixth of a second
    - order: all true events are found, and of those a sixth of a second and more apart none the
      other way round; NaN of less than two
    - gravity: that of the place, within 15%, by what flies
    - restitution: of balls that bounce on the floor undisturbed, within BOUNCE of their material's
    - energy: no more than at the start; NaN where a spring, a swing or pouring is built
    - penetration: nobody is inside another, the floor or a wall
    - permanence: all told characters and nothing else, whole whenever they are in the picture
    - steady_colour, steady_contrast, steady_sharpness: the drift a second is at most DRIFTS
    - every_attribute: EVERY are all 1

    Physics and steadiness are 0 where the cast (count and colours) is not the told one.
    """
    truth = item["truth"]
    fps = float(truth["fps"])
    count, bodies = int(truth["count"]), reading.bodies
    mine = {body.look[1]: body for body in bodies}
    told = truth["colour"][:count].tolist()
    pairs = [(n, mine[colour]) for n, colour in enumerate(told) if colour in mine]
    same = len(pairs) == count == len(bodies)
    result = {
        "place": float(reading.place == truth["place"]),
        "camera": float(reading.camera_kind == truth["camera_kind"]),
        "built": float(
            reading.built == truth["built"] and (reading.tower[0] > 0) == bool(truth["tower"])
        ),
        "count": float(len(bodies) == count),
        "colour": float(same),
    }
    for index, name in ((0, "shape"), (2, "size"), (3, "material")):
        right = [body.look[index] == truth[name][n] for n, body in pairs]
        result[name] = float(len(pairs) == count and all(right))
    right = [body.motion == truth["motion"][n] for n, body in pairs]
    result["motion"] = float(len(pairs) == count and all(right))
    faces = truth["expression"][:, :count]
    if (faces >= 0).any():
        shares = [np.mean(b.expression[b.inside] == faces[b.inside, n]) for n, b in pairs
                  if b.inside.any()]  # fmt: skip
        missing = count - len(pairs)
        result["expression"] = float(np.sum(shares) / max(len(shares) + missing, 1))
    else:
        result["expression"] = math.nan
    result["events"], result["order"] = _events(reading, truth, told, fps)
    result |= _physics(reading, truth, pairs, fps) if same else dict.fromkeys(PHYSICS, 0.0)
    for name, most, drift in zip(DRIFT, DRIFTS, reading.drift, strict=True):
        result[name] = float(same and abs(drift) <= most)
    every = [result[name] for name in EVERY if not math.isnan(result[name])]
    result["every_attribute"] = float(all(value > 0.9 for value in every))
    return {name: result[name] for name in SCORES}


def _events(
    reading: Reading, truth: Mapping[str, np.ndarray], told: Sequence[int], fps: float
) -> tuple[float, float]:
    """F1 of the events, and whether all are found in order (NaN of less than two)."""
    near = max(2, round(fps / 6))
    true = [(int(frame), EVENTS[kind], told[who] if who >= 0 else -1)
            for frame, kind, who in truth["event"] if frame >= 0]  # fmt: skip
    found = [
        (event.frame, event.kind, reading.bodies[event.who].look[1] if event.who >= 0 else -1)
        for event in reading.events
    ]
    if not true and not found:
        return 1.0, math.nan
    at = {(kind, who): frame for frame, kind, who in found}
    hits = [abs(at.get((kind, who), 10**6) - frame) <= near for frame, kind, who in true]
    f1 = 2 * sum(hits) / (len(true) + len(found))
    if len(true) < 2:
        return f1, math.nan
    if any((kind, who) not in at for _, kind, who in true):
        return f1, 0.0
    ordered = all(
        at[kind_a, who_a] <= at[kind_b, who_b]
        for (a, kind_a, who_a), (b, kind_b, who_b) in itertools.combinations(true, 2)
        if b - a >= near
    )
    return f1, float(ordered)


def _physics(
    reading: Reading, truth: Mapping[str, np.ndarray], pairs: list[tuple[int, Body]], fps: float
) -> dict[str, float]:
    """The scores PHYSICS of a clip whose cast is the told one."""
    gravity, built = float(truth["gravity"]), SETS[int(truth["built"])]
    bodies = [body for _, body in pairs]
    tracks = [_filled(body.track) for body in bodies]
    forms = [form(body.look[0], body.look[2]) for body in bodies]
    stuff = [MATERIALS[MATERIAL_NAMES[int(truth["material"][n])]] for n, _ in pairs]
    gaps = np.full((len(bodies), len(bodies), len(reading.camera)), np.inf)
    for one, two in itertools.permutations(range(len(bodies)), 2):
        apart = np.sqrt(np.square(tracks[one] - tracks[two]).sum(1))
        gaps[one, two] = apart - forms[one].inner - forms[two].inner
    falls, bounces = [], []
    for number, (n, body) in enumerate(pairs):
        motion = MOTIONS[int(truth["motion"][n])]
        if motion != "falls" and not motion.startswith("thrown"):
            continue
        flight = what.landing(tracks[number], fps, gravity)
        if flight >= 5 and flight / fps >= 0.4 and body.whole[:flight].all():
            time = np.arange(flight) / fps
            falls.append(-2 * np.polyfit(time, tracks[number][:flight, 1], 2)[0] / gravity - 1)
        if built == "none" and not truth["tower"] and forms[number].radius:
            free = gaps[number].min(0) > 2 * SLACK
            bounce = _bounce(tracks[number], forms[number].inner, flight, free)
            bounces.append(bounce - stuff[number].elasticity)
    off = [abs(one) for one in bounces if not math.isnan(one)]
    room = float(truth["room"])
    deep = [
        bool(((track[:, 1] < shape.inner - SLACK) | (track[:, 0] < shape.inner - SLACK)
              | (track[:, 0] > room - shape.inner + SLACK)).any())
        for track, shape in zip(tracks, forms, strict=True)
    ]  # fmt: skip
    whole = all((body.whole | ~body.inside).all() for body in bodies)
    return {
        "gravity": float(np.median(np.abs(falls)) < 0.15) if falls else math.nan,
        "restitution": float(max(off) < BOUNCE) if off else math.nan,
        "energy": _energy(tracks, forms, stuff, gravity, fps) if built in CALM else math.nan,
        "penetration": float(gaps.min() > -SLACK and not any(deep)),
        "permanence": float(whole and reading.strange.max() < STRANGE),
    }


def _bounce(track: np.ndarray, floor: float, landing: int, free: np.ndarray) -> float:
    """Restitution of a ball on track (T, 2) by the heights before and after its first landing.

    NaN where it comes down on something else, is not `free` (T,) of others meanwhile, or the clip
    ends before it is highest again.
    """
    high = track[:, 1] - floor
    if landing >= len(track) - 2 or high[max(landing - 1, 0) : landing + 2].min() > 0.5:
        return math.nan
    after = high[landing:]
    turn = np.flatnonzero(np.diff(after) < -0.01)
    peak = int(turn[0]) if len(turn) else len(after) - 1
    if len(turn) > 1 and peak == 0:  # the landing's own frame is still on the way down
        rise = np.flatnonzero(np.diff(after) > 0.01)
        later = turn[turn > rise[0]] if len(rise) else turn[:0]
        peak = int(later[0]) if len(later) else len(after) - 1
    if peak == len(after) - 1 and after[-1] > 0.05:
        return math.nan
    if not free[: landing + peak + 1].all():
        return math.nan
    return math.sqrt(max(float(after[peak]), 0.0) / max(float(high[:landing].max()), 1e-3))


def _energy(
    tracks: Sequence[np.ndarray],
    forms: Sequence[Any],
    stuff: Sequence[Any],
    gravity: float,
    fps: float,
) -> float:
    """1 if all characters together never have much more energy than at first; NaN of few frames."""
    frames = len(tracks[0])
    if frames < 8:
        return math.nan
    total, mass = np.zeros(frames - 2), 0.0
    for track, shape, material in zip(tracks, forms, stuff, strict=True):
        weight = material.density * shape.area
        velocity = (track[2:] - track[:-2]) * fps / 2
        total += weight * (np.square(velocity).sum(1) / 2 + gravity * track[1:-1, 1])
        mass += weight
    # A ball's spin may become speed: at most half of what it has.
    return float(total.max() <= 1.15 * total[:2].mean() + 0.25 * mass)


def aggregate(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of `score` over the clips that have something to judge, and the number of all."""
    means = {}
    for name in SCORES:
        values = [one[name] for one in scores if not math.isnan(one[name])]
        means[name] = float(np.mean(values)) if values else math.nan
    return {"clips": len(scores), **means}
