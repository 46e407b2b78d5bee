"""Draws a playground: flat colours, anti-aliased by the distance to each outline.

A camera is (x, y, zoom): the picture's middle in metres, and the zoom. A character shows its
material by its rim (white all round: bouncy; grey: heavy; white on the upper left: slippery; none:
soft), and in pictures of `FACE_PIXELS` and more a face that stays upright.

Dimension key: T frames, M pictures (frames, or candidates), K window side, H height, W width.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from vdit.worlds.clips import Draws
from vdit.worlds.forms import PALETTE, Form, block, cover, disc, outside, polygon
from vdit.worlds.playground import cast
from vdit.worlds.playground.cast import Look, form
from vdit.worlds.playground.physics import Run, Scene

BUILT = (0, 205, 190)  # RGB of structures, blocks and grains
MIDDLE = (0, 176, 163)  # of a block's middle
INK = (22, 20, 26)  # of faces
RIMS = {"bouncy": (252, 252, 252), "heavy": (100, 102, 110), "slippery": (252, 252, 252)}
RIM = 0.12  # metres
ROPE = 0.1  # metres

# Strokes of each expression: (x, y) to (x, y) and half their width, in radii of the inscribed
# circle.
_EYES = ((-0.36, 0.2, -0.36, 0.2, 0.16), (0.36, 0.2, 0.36, 0.2, 0.16))
FACES: dict[str, tuple[tuple[float, float, float, float, float], ...]] = {
    "happy": (*_EYES, (-0.42, -0.16, -0.2, -0.42, 0.1), (-0.2, -0.42, 0.2, -0.42, 0.1),
              (0.2, -0.42, 0.42, -0.16, 0.1)),
    "sad": (*_EYES, (-0.42, -0.56, -0.2, -0.3, 0.1), (-0.2, -0.3, 0.2, -0.3, 0.1),
            (0.2, -0.3, 0.42, -0.56, 0.1)),
    "surprised": ((-0.36, 0.24, -0.36, 0.28, 0.22), (0.36, 0.24, 0.36, 0.28, 0.22),
                  (0.0, -0.4, 0.0, -0.36, 0.24)),
    "angry": ((-0.62, 0.62, -0.14, 0.28, 0.12), (0.62, 0.62, 0.14, 0.28, 0.12),
              (-0.36, 0.1, -0.36, 0.1, 0.13), (0.36, 0.1, 0.36, 0.1, 0.13),
              (-0.4, -0.44, 0.4, -0.44, 0.1)),
    "asleep": ((-0.56, 0.14, -0.16, 0.14, 0.1), (0.16, 0.14, 0.56, 0.14, 0.1),
               (-0.06, -0.44, 0.06, -0.44, 0.1)),
}  # fmt: skip

# Skyline: widths of pieces and their tops in metres above the floor, repeated.
SKYLINE = {
    "day": ((1.1, 1.6), (0.7, 2.4), (1.5, 1.2), (0.9, 3.0), (0.6, 2.0), (1.3, 0.8), (0.8, 2.7)),
    "night": ((0.8, 3.6), (0.5, 1.0), (1.1, 2.6), (0.6, 4.2), (0.9, 1.6), (1.2, 3.1), (0.7, 0.7)),
    "indoors": ((0.7, 2.8), (1.2, 1.4), (0.7, 3.8), (0.8, 1.4), (1.1, 2.2), (0.6, 1.0), (1.4, 3.2)),
    "moon": ((1.4, 1.0), (0.8, 2.0), (1.0, 0.6), (0.6, 2.9), (1.5, 1.5), (0.9, 0.9), (0.7, 2.3)),
}
SAMPLES = 4  # columns for each pixel's column in which the skyline is looked up


def home(height: int, width: int) -> tuple[float, float]:
    """The middle (x, y) in metres of a picture at zoom 1 that shows the whole room."""
    scale = min(height, width) / cast.ROOM
    return width / scale / 2, height / scale / 2 - cast.FLOOR_DEPTH


ZOOM = {"pan": 0.85, "tilt": 0.85, "follow": 0.85, "shake": 0.9, "static": 1.0}
ZOOMS = (0.78, 1.0)  # the ends of a camera that zooms
SWAY = 0.55  # metres that a pan or tilt goes to either side of the middle
SHAKE = 0.11  # metres
HERTZ = (2.2, 3.4)  # of a camera that shakes
FRAMED = {"whole": 1.0, "wide": 0.78, "close_left": 1.4, "close": 1.4, "close_right": 1.4}  # zooms
BESIDE = 0.4  # metres beyond a wall that a close-up of that side sees
FOLLOWED = (1.0, 2.6)  # metres sideways that a character covers for a camera to follow it


def ease(frames: int) -> np.ndarray:
    """(T,) from 0 to 1: slow, fast, slow."""
    part = np.arange(frames) / max(frames - 1, 1)
    return part * part * (3 - 2 * part)


def path(
    draws: Draws, camera: str, frames: int, fps: float, size: tuple[int, int], x: np.ndarray
) -> np.ndarray:
    """Cameras (T, 3); `x` (T,) is the track of the character that `follow` keeps in its place."""
    kind, _, way = camera.partition("_")
    camera_T3 = np.tile((*home(*size), ZOOM.get(kind, 1.0)), (frames, 1))
    sway = SWAY * (2 * ease(frames) - 1) * (-1 if way in ("left", "down") else 1)
    if kind == "pan":
        camera_T3[:, 0] += sway
    if kind == "tilt":
        camera_T3[:, 1] += sway
    if kind == "zoom":
        low, high = ZOOMS if way == "in" else ZOOMS[::-1]
        camera_T3[:, 2] = low + (high - low) * ease(frames)
    if kind == "follow":
        camera_T3[:, 0] += x - x[0]
    if kind == "shake":
        for axis in (0, 1):
            for hertz in HERTZ:
                phase = draws.uniform(0, 2 * math.pi)
                wave = [math.sin(2 * math.pi * hertz * t / fps + phase) for t in range(frames)]
                camera_T3[:, axis] += SHAKE / 2 * np.array(wave)
    return camera_T3


def framed(framing: str, frames: int, size: tuple[int, int]) -> np.ndarray:
    """Static cameras (T, 3); close-ups have the floor at the same height as the whole scene."""
    (x, y), zoom, scale = home(*size), FRAMED[framing], min(size) / cast.ROOM
    up, across = size[0] / scale / zoom / 2, size[1] / scale / zoom / 2
    if framing.startswith("close"):
        y = up - cast.FLOOR_DEPTH
        x = {"close_left": across - BESIDE, "close": x}.get(framing, 2 * x + BESIDE - across)
    return np.tile((x, y, zoom), (frames, 1))


def draw_camera(draws: Draws, x: np.ndarray) -> str:
    """One of CAMERAS; `follow` only where the character on track `x` (T,) goes far enough."""
    names = [name for name in cast.CAMERAS if name != "follow"]
    reach = np.abs(x - x[0]).max()
    if FOLLOWED[0] <= reach <= FOLLOWED[1]:
        names += ["follow"] * 3
    return draws.pick(names)


def room_of(size: tuple[int, int]) -> tuple[float, float]:
    """Metres from wall to wall, and from floor to ceiling."""
    scale = min(size) / cast.ROOM
    return size[1] / scale, size[0] / scale - cast.FLOOR_DEPTH


@functools.cache
def _skyline(place: str) -> tuple[np.ndarray, np.ndarray]:
    """Right edges of the pieces over one period, and their tops."""
    widths, tops = zip(*SKYLINE[place], strict=True)
    return np.cumsum(widths), np.array(tops)


def backdrop(place: str, camera: np.ndarray, height: int, width: int, room: float) -> np.ndarray:
    """The empty place (M, H, W, 3) float32 as cameras (M, 3) see it; `room`: its metres across."""
    if len(camera) > 1 and (camera == camera[0]).all():
        still = backdrop(place, camera[:1], height, width, room)
        return np.repeat(still, len(camera), axis=0)
    look = cast.PLACES[place]
    scale = (min(height, width) / cast.ROOM * camera[:, 2])[:, None]
    column = np.arange(width * SAMPLES)[None] / SAMPLES + 0.5 / SAMPLES
    x_MX = (column - width / 2) / scale + camera[:, :1]
    edges, tops = _skyline(place)
    high = tops[np.searchsorted(edges, np.mod(x_MX, edges[-1])) % len(tops)]
    row = (height / 2 - np.arange(height)[None] - 0.5) / scale + camera[:, 1:2]  # y of middles
    y_MH1 = row.astype(np.float32)[..., None]
    pixel = scale.astype(np.float32)[..., None]
    # Of each pixel's columns, the mean of what the skyline covers.
    far = np.zeros((len(camera), height, width), np.float32)
    tops_MXS = high.astype(np.float32).reshape(len(camera), 1, width, SAMPLES) * pixel[..., None]
    rows_MH1 = y_MH1 * pixel - np.float32(0.5)
    for sample in range(SAMPLES):
        far += np.clip(tops_MXS[..., sample] - rows_MH1, 0, 1)
    far /= SAMPLES
    middle = x_MX.reshape(len(camera), width, SAMPLES).mean(2).astype(np.float32)
    outside = np.maximum(-middle, middle - np.float32(room))[:, None] * pixel
    ground = np.clip(np.maximum(outside, -y_MH1 * pixel) + 0.5, 0, 1)
    picture = np.empty((*far.shape, 3), np.float32)
    for channel in range(3):  # numpy is slow on a last axis of 3
        sky, behind, floor = (np.float32(rgb[channel]) for rgb in look[1:4])
        plane = sky + far * (behind - sky)
        picture[..., channel] = plane + ground * (floor - plane)
    return picture


def lit(rgb: Sequence[int], place: str) -> np.ndarray:
    """A colour as the place's light shows it, (3,) float32."""
    return np.array(rgb, np.float32) * np.array(cast.PLACES[place].light, np.float32)


def _face(expression: str, x: np.ndarray, y: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Cover (M, K, K) by the ink of a face whose unit is (M,) pixels."""
    size = unit.astype(np.float32)[:, None]
    u, v = (x / size)[:, None, :], (y / size)[:, :, None]
    best = np.full((len(x), y.shape[1], x.shape[1]), np.inf, np.float32)
    for ax, ay, bx, by, half in FACES[expression]:
        dx, dy = np.float32(bx - ax), np.float32(by - ay)
        along = (u - np.float32(ax)) * dx + (v - np.float32(ay)) * dy
        along /= np.float32(max((bx - ax) ** 2 + (by - ay) ** 2, 1e-9))
        along = np.clip(along, 0, 1)
        off_x, off_y = u - np.float32(ax) - along * dx, v - np.float32(ay) - along * dy
        np.minimum(best, np.sqrt(off_x**2 + off_y**2) - np.float32(half), out=best)
    return cover(best * size[..., None])


def pixels(place: np.ndarray, camera: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Column and row (M, 2) of points (M, 2) in metres, as cameras (M, 3) see them."""
    scale = min(size) / cast.ROOM * camera[:, 2]
    off = (place - camera[:, :2]) * scale[:, None]
    return np.stack([off[:, 0] + size[1] / 2, size[0] / 2 - off[:, 1]], axis=1)


def windows(
    place: np.ndarray, camera: np.ndarray, outer: float, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Windows, inside the picture, that hold what reaches `outer` metres from places (M, 2): their
    left and upper edges (M,), and x and y (M, K) of their pixels from the places."""
    (height, width), middle = size, pixels(place, camera, size)
    reach = outer * float((min(size) / cast.ROOM * camera[:, 2]).max())
    side = 2 * math.ceil(reach + 1) + 1
    left = np.clip(np.floor(middle[:, 0] - side / 2 + 0.5), 0, width - min(side, width))
    upper = np.clip(np.floor(middle[:, 1] - side / 2 + 0.5), 0, height - min(side, height))
    across, down = np.arange(min(side, width)) + 0.5, np.arange(min(side, height)) + 0.5
    x = (across[None] + (left - middle[:, 0])[:, None]).astype(np.float32)
    y = ((middle[:, 1] - upper)[:, None] - down[None]).astype(np.float32)
    return left.astype(np.int64), upper.astype(np.int64), x, y


def character(
    look: Look, expression: str, place: str, x: np.ndarray, y: np.ndarray, angle: np.ndarray,
    scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Cover (M, K, K) and colour (M, K, K, 3) of one character; no face where expression is ""."""
    shape, material = form(look[0], look[2]), cast.MATERIAL_NAMES[look[3]]
    distance = outside(shape, x, y, angle, scale)
    paint = np.broadcast_to(lit(PALETTE[look[1]], place), (*distance.shape, 3))
    if material in RIMS:
        rim = np.clip(distance + (scale * RIM).astype(np.float32)[:, None, None] + 0.5, 0, 1)
        if material == "slippery":
            rim = rim * cover(x[:, None, :] - y[:, :, None])
        paint = paint + rim[..., None] * (np.array(RIMS[material], np.float32) - paint)
    if expression:
        ink = _face(expression, x, y, scale * shape.inner)
        paint = paint + ink[..., None] * (np.array(INK, np.float32) - paint)
    return cover(distance), paint


class Canvas:
    """Pictures (M, H, W, 3) float32 that things are painted on."""

    def __init__(self, pictures: np.ndarray, camera: np.ndarray) -> None:
        self.pictures, self.camera = pictures, camera
        self.size = (int(pictures.shape[1]), int(pictures.shape[2]))
        self.scale = min(self.size) / cast.ROOM * camera[:, 2]

    def stamp(
        self, covers: np.ndarray, paint: np.ndarray, left: np.ndarray, upper: np.ndarray,
        at: np.ndarray,
    ) -> None:  # fmt: skip
        """Lays windows of cover (M, K, K) and paint (3,) or (M, K, K, 3) on some pictures."""
        rows, columns = covers.shape[1:]
        corners = zip(at.tolist(), left.tolist(), upper.tolist(), strict=True)
        for number, (picture, x, y) in enumerate(corners):
            window = self.pictures[picture, y : y + rows, x : x + columns]
            rgb = paint[number] if paint.ndim == 4 else paint
            window += covers[number][..., None] * (rgb - window)

    def thing(
        self, shape: Form, rgb: np.ndarray, place: np.ndarray, angle: np.ndarray | None = None
    ) -> None:
        """Paints one thing at places (M, 2) in metres; none where they are NaN."""
        at = np.flatnonzero(~np.isnan(place[:, 0]))
        if not at.size:
            return
        turn = np.zeros(len(at)) if angle is None else angle[at]
        left, upper, x, y = windows(place[at], self.camera[at], shape.outer, self.size)
        self.stamp(cover(outside(shape, x, y, turn, self.scale[at])), rgb, left, upper, at)

    def character(
        self, look: Look, expressions: np.ndarray, where: str, place: np.ndarray, angle: np.ndarray
    ) -> None:
        """Paints one character; expressions (M,) are indices, -1 for no face. NaN as in `thing`."""
        at = np.flatnonzero(~np.isnan(place[:, 0]))
        if not at.size:
            return
        outer = form(look[0], look[2]).outer
        left, upper, x, y = windows(place[at], self.camera[at], outer, self.size)
        for one in sorted(set(expressions[at].tolist())):
            on = np.flatnonzero(expressions[at] == one)
            name, to = cast.EXPRESSIONS[one] if one >= 0 else "", at[on]
            covers, paint = character(look, name, where, x[on], y[on], angle[to], self.scale[to])
            self.stamp(covers, paint, left[on], upper[on], to)


def built_parts(scene: Scene) -> list[tuple[Form, tuple[float, float]]]:
    """The outlines of static structures, and their places."""
    side, wall = scene.side, 0.0 if scene.side > 0 else scene.width
    if scene.built == "ramp":
        third_x, third_y = cast.RAMP_LENGTH / 3, cast.RAMP_HEIGHT / 3
        corners = [(-third_x, -third_y), (2 * third_x, -third_y), (-third_x, 2 * third_y)]
        if side < 0:
            corners = [(-x, y) for x, y in reversed(corners)]
        return [(polygon(tuple(corners)), (wall + side * third_x, third_y))]
    if scene.built == "platform":
        shape = block(cast.PLATFORM_LENGTH, cast.PLATFORM_DEPTH)
        y = cast.PLATFORM_TOP - cast.PLATFORM_DEPTH / 2
        return [(shape, (wall + side * cast.PLATFORM_LENGTH / 2, y))]
    if scene.built == "pendulum":
        return [(disc(0.2), (scene.spot, cast.PIVOT))]
    if scene.built == "pour":
        return [(block(*cast.SPOUT), (scene.spot, scene.top - cast.SPOUT[1] / 2))]
    return []


def furnish(canvas: Canvas, scene: Scene) -> None:
    """Paints static structures."""
    for shape, place in built_parts(scene):
        canvas.thing(shape, lit(BUILT, scene.place), np.tile(place, (len(canvas.camera), 1)))


def render(
    scene: Scene, run: Run, camera: np.ndarray, expressions: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Pictures (T, H, W, 3) uint8 of a run, by cameras (T, 3) and expressions (T, N)."""
    frames = len(camera)
    canvas = Canvas(backdrop(scene.place, camera, *size, scene.width), camera)
    furnish(canvas, scene)
    built, light = lit(BUILT, scene.place), lit(MIDDLE, scene.place)
    if scene.built == "pendulum":
        ends = run.position[:, 0] - (scene.spot, cast.PIVOT)
        length = float(np.sqrt(np.square(ends[0]).sum()))
        angle = np.array([math.atan2(y, x) for x, y in ends.tolist()])
        middle = run.position[:, 0] - ends / 2
        canvas.thing(block(length, ROPE), built, middle, angle)
    if scene.built == "spring":
        for part, width in ((-0.4, 0.12), (0.4, 0.12), (0.0, 0.12)):
            _coil(canvas, scene.spot + part, width, run.plate - cast.PLATE[1], built)
        place = np.stack([np.full(frames, scene.spot), run.plate - cast.PLATE[1] / 2], axis=1)
        canvas.thing(block(*cast.PLATE), built, place)
    for number in range(run.blocks.shape[1]):
        at = run.blocks[:, number]
        canvas.thing(block(cast.BLOCK, cast.BLOCK), built, at[:, :2], at[:, 2])
        canvas.thing(block(cast.BLOCK / 2, cast.BLOCK / 2), light, at[:, :2], at[:, 2])
    for number in range(run.grains.shape[1]):
        canvas.thing(disc(cast.GRAIN), built, run.grains[:, number])
    for number, actor in enumerate(scene.actors):
        canvas.character(
            actor.look, expressions[:, number], scene.place, run.position[:, number],
            run.angle[:, number],
        )  # fmt: skip
    return (canvas.pictures + np.float32(0.5)).astype(np.uint8)


def _coil(canvas: Canvas, x: float, width: float, top: np.ndarray, rgb: np.ndarray) -> None:
    """A strut of the spring from the floor to `top` (M,)."""
    for height in sorted(set(np.round(top, 3).tolist())):
        place = np.where((np.round(top, 3) == height)[:, None], (x, height / 2), np.nan)
        canvas.thing(block(width, max(height, 0.05)), rgb, place)


def has_faces(size: tuple[int, int]) -> bool:
    """Whether pictures of this size show faces."""
    return min(size) >= cast.FACE_PIXELS
