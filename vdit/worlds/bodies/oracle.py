"""The oracle of the world: reads bodies from pixels and scores them against the truth.

`read` relies on the renderer alone. It unmixes every pixel into the room and the colours that the
clip shows, which gives each body a soft coverage: its first moments are the centre, its area the
size, and the shape is the most likely one, at any turn in each frame and with one blur for all
(`_shape`), so that soft edges and grain cost nothing and wrong outlines do. The motion comes from
the first frames of the track.

Dimension key: T frames, H height, W width, C colours in play, N bodies, P pixels (H * W), K side of
the window that shows one body.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import ndimage, special

from vdit.worlds.bodies.physics import FREE, MOTIONS, View, form
from vdit.worlds.bodies.render import BACKDROPS, outline, render
from vdit.worlds.forms import PALETTE, SHAPES, SIZES
from vdit.worlds.statistics import means, wilson

ATTRIBUTES = ("colour", "shape", "size", "motion")
FRACTIONS = (*ATTRIBUTES, "permanence", "objects", "every_attribute")
FLYING = tuple(MOTIONS.index(name) for name in ("falls", "thrown_left", "thrown_right"))
# Pieces of a picture hang together by their sides, and never through time.
CONNECTED = np.pad(ndimage.generate_binary_structure(2, 1)[None], ((1, 1), (0, 0), (0, 0)))
FLIGHT_FRAMES = 5  # fewer free frames say little about gravity

# Thresholds. Areas are relative to a body's median (or the smallest body's) area.
SEEN = 0.55  # coverage from which a pixel shows a colour
OFF_COLOUR = 45.0  # RGB distance from every mixture of the wall and a colour: not that colour
STRANGE = 60.0  # RGB distance from what the bodies explain: something else
SPECK = 0.2  # smaller pieces than this share of the smallest body are not a body
OFTEN = 0.3  # a body is what is there in this share of the frames; less is a stray
MOST = 4  # bodies of one colour that are told apart
AREA = (0.65, 1.4)  # how far a body's area may swing around its median
SOLID = 0.68  # mean coverage inside a body's outline, at least
SPREAD = 0.30  # second moment over squared area, at most: ball .16, box .17, triangle .19, + blur
OVERLAP = 0.8  # centres are at least this share of the two in-radii apart
TURNS = (1, 12, 16)  # of a ball, box and triangle that are tried, up to where it looks the same
SYMMETRY = (1, 4, 3)  # turns by which each shape comes back on itself
SOFT = (0.0, 0.08, 0.125, 0.17, 0.23)  # metres of blur that are tried; at 32 pixels up to 1.5
GRAIN = 0.01  # of coverage: the noise that rounding alone leaves
SIZE_FIT = 0.5  # log of a body's area to that of its size, at most
FASTEST = 15.0  # m/s; a body that is faster is another one
STILL, MOVING = 0.4, 0.8  # m/s sideways: below one it stands still, above the other it moves
LIFTED = 0.15  # metres above its place on the floor from which a body is in the air
KINK = 1.2  # m/s sideways or upward: a change from frame to frame that only a touch explains
ASIDE = 0.12  # metres from where the parabola so far leads
FALLING = 3.0  # m/s^2 downward, at least, of what falls


@dataclasses.dataclass(frozen=True)
class Body:
    """One body that was read; its kind as indices into COLOURS, SHAPES, SIZES and MOTIONS."""

    colour: int
    shape: int
    size: int  # -1: neither
    motion: int  # -1: none
    track: np.ndarray  # (T, 2) metres, NaN where it is not seen
    present: np.ndarray  # (T,) bool: there, intact, solid and at a plausible place
    flight: int  # frames from the first on before it touches anything


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a clip shows: its bodies, and the frames (T,) that show nothing else."""

    bodies: tuple[Body, ...]
    clean: np.ndarray


def _grow(mask: np.ndarray) -> np.ndarray:
    """Widens a mask (..., H, W) by one pixel along rows and columns."""
    wide = mask.copy()
    wide[..., 1:, :] |= mask[..., :-1, :]
    wide[..., :-1, :] |= mask[..., 1:, :]
    wide[..., 1:] |= mask[..., :-1]
    wide[..., :-1] |= mask[..., 1:]
    return wide


@functools.lru_cache(maxsize=64)
def room(view: View, backdrop: str) -> np.ndarray:
    """The empty room (H, W, 3)."""
    empty = render((), np.zeros((1, 0, 2)), np.zeros((1, 0)), view, backdrop)
    return empty[0].astype(np.float32)


@functools.lru_cache(maxsize=8)
def _basis(view: View) -> np.ndarray:
    """(P, 4) float64: x, y, their squares' sum and 1, from the picture's middle, y up."""
    row, column = np.mgrid[: view.height, : view.width] + 0.5
    x, y = (column - view.width / 2).reshape(-1), (view.height / 2 - row).reshape(-1)
    return np.stack([x, y, x * x + y * y, np.ones_like(x)], axis=1)


def _moments(cover: np.ndarray, view: View) -> tuple[np.ndarray, ...]:
    """Of coverages (..., P): area, centre (complex, y up) and spread, in pixels."""
    sums = cover.astype(np.float64) @ _basis(view)
    area = np.maximum(sums[..., 3], 1e-6)
    centre = (sums[..., 0] + 1j * sums[..., 1]) / area
    return area, centre, (sums[..., 2] / area - np.abs(centre) ** 2) / area


@functools.lru_cache(maxsize=32)
def _areas(view: View) -> dict[tuple[int, int], float]:
    """The area in pixels of each (shape, size)."""
    kinds = list(itertools.product(range(len(SHAPES)), range(len(SIZES))))
    sides = 2 * math.ceil(max(form(*kind).outer for kind in kinds) * view.scale) + 3
    at = np.arange(sides, dtype=np.float32)[None] - sides // 2
    return {kind: float(outline(*kind, view, at, -at, np.zeros(1)).sum()) for kind in kinds}


@functools.lru_cache(maxsize=12)
def _pictures(view: View, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """What each shape of a size looks like in a window of K x K pixels around its centre.

    Coverages (S * S, M, K * K) of norm 1, for centres that lie at (i + .5) / S of the middle pixel,
    rows first; their kinds (M, 2), shape and index into `SOFT`; and S.
    """
    reach = max(form(shape, size).outer for shape in range(len(SHAPES)))
    half, margin = math.ceil(reach * view.scale + 2.5), math.ceil(4 * SOFT[-1] * view.scale)
    parts = max(1, math.ceil(25 / view.scale))  # .04 metres
    at = np.arange(-half - margin, half + margin + 1, dtype=np.float32)
    off = ((np.arange(parts) + 0.5) / parts - 0.5).astype(np.float32)
    x, y = at[None] - off[:, None], off[:, None] - at[None]
    down, right = np.divmod(np.arange(parts * parts), parts)
    made, kinds = [], []
    for shape, (turns, fold) in enumerate(zip(TURNS, SYMMETRY, strict=True)):
        for turn in range(turns):
            angle = np.full(parts * parts, 2 * math.pi * turn / (turns * fold))
            sharp = outline(shape, size, view, x[right], y[down], angle)
            for index, soft in enumerate(SOFT):
                sigma = (0, soft * view.scale, soft * view.scale)
                inner = slice(margin, margin + 2 * half + 1)
                picture = ndimage.gaussian_filter(sharp, sigma)[:, inner, inner]
                made.append(picture.reshape(parts * parts, -1))
                kinds.append((shape, index))
    pictures = np.stack(made, axis=1)
    return pictures / np.linalg.norm(pictures, axis=2, keepdims=True), np.array(kinds), parts


def _shape(cover: np.ndarray, centre: np.ndarray, size: int, view: View) -> int:
    """The shape under which coverages (T, P) around centres (T,) of a body are most likely.

    Each is a picture of the shape at its own turn and brightness, all as soft, and white noise as
    large as the best leaves. Likelihoods are averaged over turns: more of them fit noise better.
    """
    pictures, kinds, parts = _pictures(view, size)
    side = math.isqrt(pictures.shape[2])
    half = side // 2
    wide = np.pad(cover.reshape(-1, view.height, view.width), ((0, 0), (half, half), (half, half)))
    place = np.stack([view.height / 2 - centre.imag, centre.real + view.width / 2], axis=1)
    place = np.clip(place, 0, [view.height - 1e-6, view.width - 1e-6])
    pixel = place.astype(int)
    part = ((place - pixel) * parts).astype(int) @ [parts, 1]
    left = np.empty((len(cover), len(kinds)))  # squared error of each picture at its best scale
    for t, (row, column) in enumerate(pixel):
        window = wide[t, row : row + side, column : column + side].reshape(-1)
        left[t] = window @ window - np.maximum(pictures[part[t]] @ window, 0) ** 2
    found = [left[:, (kinds == kind).all(1)] for kind in np.unique(kinds, axis=0)]
    least = min(one.min(1).sum() for one in found)
    noise = max(least / (len(cover) * side * side), GRAIN**2)
    likely = [special.logsumexp(one / (-2 * noise), axis=1, b=1 / one.shape[1]) for one in found]
    return int(np.argmax([one.sum() for one in likely])) // len(SOFT)


def _change(video: np.ndarray, empty_room: np.ndarray) -> np.ndarray:
    """(3, T, H, W): the difference from the empty room."""
    picture = video.transpose(3, 0, 1, 2).astype(np.float32, order="C")
    return picture - empty_room.transpose(2, 0, 1)[:, None]


def _axes(colours: Sequence[int], backdrop: str) -> np.ndarray:
    """(C, 3): from the wall's colour to each body's; bodies hide the wall, never the floor."""
    wall, _ = np.array(BACKDROPS[backdrop], np.float32)
    return np.array(PALETTE, np.float32)[list(colours)] - wall


def _unmix(change: np.ndarray, colours: Sequence[int], backdrop: str) -> np.ndarray:
    """Coverage (C, T, H, W) by each colour; a pixel mixes the room and the two that fit best."""
    flat = change.reshape(3, -1)
    cover = np.zeros((len(colours), flat.shape[1]), np.float32)
    best = np.full(flat.shape[1], np.inf, np.float32)
    for pair in itertools.combinations(range(len(colours)), min(2, len(colours))):
        axes = _axes([colours[one] for one in pair], backdrop)
        share = np.clip(np.linalg.solve(axes @ axes.T, axes) @ flat, -0.2, 1.2)
        if len(colours) <= 2:
            return share.reshape(-1, *change.shape[1:])
        error = np.square(flat - axes.T @ share).sum(0) + 1e4 * (share.min(0) < -0.1)
        better = error < best
        best[better] = error[better]
        cover[:, better] = 0
        cover[np.ix_(pair, better)] = share[:, better]
    return cover.reshape(len(colours), *change.shape[1:])


def _colours(change: np.ndarray, backdrop: str) -> list[int]:
    """Colours that enough frames show in some pixel and all its four neighbours (no mere edge)."""
    at = np.nonzero(np.square(change).sum(0) > STRANGE**2)
    pixels = change[:, at[0], at[1], at[2]]
    axes = _axes(range(len(PALETTE)), backdrop)
    length = np.linalg.norm(axes, axis=1, keepdims=True)
    along = axes / length @ pixels
    off = np.where(along > SEEN * length, np.square(pixels).sum(0) - along**2, np.inf)
    code = np.full(change.shape[1:], -1, np.int8)
    code[at] = np.where(off.min(0) < OFF_COLOUR**2, off.argmin(0), -1)
    cores = {int(c): ~_grow(code != c) for c in np.unique(code[at]) if c >= 0}
    return [c for c, core in cores.items() if np.mean(core.any((1, 2))) >= OFTEN]


def _pieces(seen: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels (T, H, W) of the pieces of at least `least` pixels, and their number (T,)."""
    labels, _ = ndimage.label(seen, CONNECTED)
    big = np.bincount(labels.reshape(-1)) >= least
    big[0] = False
    labels *= big[labels]
    at = np.flatnonzero(labels)
    home = np.full(len(big), -1)
    home[labels.reshape(-1)[at]] = at // labels[0].size
    return labels, np.bincount(home[big], minlength=len(seen))


def _part(
    cover: np.ndarray, labels: np.ndarray, number: np.ndarray, count: int, view: View
) -> list[np.ndarray]:
    """Parts one colour's coverage (T, P) into that of `count` bodies, each the same all along.

    Pieces that lie apart show the bodies. Where these touch, a pixel goes to the nearest by a power
    diagram (squared distance less squared radius), iterated from extrapolated places.
    """
    z = _basis(view)[:, 0] + 1j * _basis(view)[:, 1]
    turns = np.array(list(itertools.permutations(range(count))))
    parts = np.zeros((count, *cover.shape), cover.dtype)

    def largest(t: int) -> tuple[np.ndarray, np.ndarray]:
        flat = labels[t].reshape(-1)
        names, sizes = np.unique(flat[flat > 0], return_counts=True)
        pieces = cover[t] * (flat == names[np.argsort(-sizes, kind="stable")[:count], None])
        return pieces.sum(1), pieces @ z / pieces.sum(1)

    first = int(np.argmax(number >= count))
    areas, start = largest(first)
    for way in (range(first, len(cover)), range(first, -1, -1)):
        here, speed = start, np.zeros(count)
        for t in way:
            centre = here + speed
            if number[t] >= count:
                area, found = largest(t)
                off = np.abs(found[turns] - centre) ** 2 + 40 * np.log(area[turns] / areas) ** 2
                centre = found[turns[np.argmin(off.sum(1))]]
            for _ in range(1 if number[t] >= count else 8):
                power = np.abs(z - centre[:, None]) ** 2 - areas[:, None] / math.pi
                parts[:, t] = cover[t] * (power.argmin(0) == np.arange(count)[:, None])
                mass = parts[:, t].sum(1)
                centre = np.where(mass > 1, parts[:, t] @ z / np.maximum(mass, 1), centre)
            here, speed = centre, centre - here
    return list(parts)


@functools.lru_cache(maxsize=128)
def _fit(frames: int, degree: int) -> np.ndarray:
    """(degree + 1, frames): least-squares polynomial of the frame index, highest power first."""
    return np.linalg.pinv(np.vander(np.arange(frames, dtype=float), degree + 1))


@functools.lru_cache(maxsize=8)
def _ahead(frames: int) -> np.ndarray:
    """(T, T): where the parabola through all frames before leads, from FLIGHT_FRAMES frames on."""
    rows = [[t * t, t, 1] @ _fit(t, 2) for t in range(FLIGHT_FRAMES, frames)]
    return np.stack([np.pad(row, (0, frames - len(row))) for row in rows])


def _parabola(track: np.ndarray, fps: float) -> tuple[float, float]:
    """(mean sideways velocity, downward acceleration) by least squares over a track."""
    sideways, bend = _fit(len(track), 1)[0] @ track[:, 0], _fit(len(track), 2)[0] @ track[:, 1]
    return float(sideways * fps), float(-2 * bend * fps**2)


def _flight(track: np.ndarray, reach: float, gaps: np.ndarray, fps: float) -> int:
    """Frames of a track (T, 2) before the first touch: near the floor, a wall or a body, or off its
    path. `gaps` (T,): metres to the nearest wall and other body's circle."""
    free = (track[:, 1] > reach) & ~(gaps < 0)  # a NaN, not seen, is not free
    turn = np.diff(track, 2, axis=0) * fps  # m/s
    free[2:] &= (np.abs(turn[:, 0]) < KINK) & (turn[:, 1] < KINK)
    if len(track) > FLIGHT_FRAMES:
        aside = track[FLIGHT_FRAMES:] - _ahead(len(track)) @ np.nan_to_num(track)
        free[FLIGHT_FRAMES:] &= np.abs(aside).max(1) < ASIDE
    return len(free) if free.all() else int(np.argmin(free))


def _motion(track: np.ndarray, rest: float, flight: int, fps: float) -> int:
    """The motion that the first `FREE` seconds show, -1 if none of MOTIONS."""
    start = track[: math.ceil(FREE * fps - 1e-9)]
    if np.isnan(start).any() or len(start) < 3:
        return -1
    lifted = float(np.max(start[:, 1])) - rest > LIFTED
    speed, fall = _parabola(start[: max(flight, 3)] if lifted else start, fps)
    if STILL <= abs(speed) < MOVING or (lifted and fall < FALLING):
        return -1
    if abs(speed) < STILL:
        return MOTIONS.index("falls" if lifted else "rests")
    return MOTIONS.index(("thrown_" if lifted else "rolls_") + ("left" if speed < 0 else "right"))


def read(
    video: np.ndarray, fps: float, view: View | None = None, backdrop: str = "studio"
) -> Reading:
    """Reads a clip (T, H, W, 3) uint8; `view`: how the camera sees the room, by default all."""
    frames, view = len(video), view or View(*video.shape[1:3])
    empty_room = room(view, backdrop)
    least = SPECK * min(_areas(view).values())
    change = _change(video, empty_room)
    # The room's rows as this clip paints them: a decoder's blurred floor is not a body.
    empty = np.abs(change).max(0) < 40
    known = empty.sum((0, 2))
    shift = np.where(known > view.width, (change * empty).sum((1, 3)) / np.maximum(known, 1), 0)
    change -= shift[:, None, :, None]
    colours = _colours(change, backdrop)
    cover = _unmix(change, colours, backdrop)
    clean = np.ones(frames, bool)
    around = np.zeros(video.shape[:3], bool)
    parts: list[tuple[int, np.ndarray]] = []
    for colour, share in zip(colours, cover, strict=True):
        labels, number = _pieces(share > SEEN, least)
        near = _grow(_grow(_grow(labels > 0)))
        around |= near
        share = (share * near).reshape(frames, -1)
        count = max(k for k in range(MOST + 1) if np.mean(number >= k) >= OFTEN)
        clean &= number <= count
        shares = _part(share, labels, number, count, view) if count > 1 else [share] * count
        parts += [(colour, part) for part in shares if part.sum(1).max() > 2]
    rest = change - np.tensordot(_axes(colours, backdrop), cover, (0, 0))
    # Bodies that sink into the floor count above it only.
    wall = (empty_room == BACKDROPS[backdrop][0]).all(2)
    odd = (np.square(rest).sum(0) > STRANGE**2) & around & wall
    ghost = (np.square(change).sum(0) > STRANGE**2) & ~around
    clean &= (odd.sum((1, 2)) < least) & (ghost.sum((1, 2)) < least)
    return Reading(_bodies(parts, view, fps), clean)


def _bodies(parts: Sequence[tuple[int, np.ndarray]], view: View, fps: float) -> tuple[Body, ...]:
    """Bodies from their coverages (T, P)."""
    if not parts:
        return ()
    cover = np.stack([share for _, share in parts])
    area, centre, spread = _moments(cover, view)
    there = area > 1
    typical = np.array([np.median(row[on]) for row, on in zip(area, there, strict=True)])
    swing = area / typical[:, None]
    solid = (cover * (cover > SEEN)).sum(2) / np.maximum((cover > SEEN).sum(2), 1)
    whole = there & (swing > AREA[0]) & (swing < AREA[1]) & (spread < SPREAD) & (solid > SOLID)
    place = np.stack([centre.real + view.width / 2, centre.imag - view.height / 2], axis=2)
    tracks = np.where(there[..., None], place / view.scale + [view.left, view.top], np.nan)
    table, kinds = _areas(view), []
    for index, on in enumerate(there):
        good = whole[index] if whole[index].any() else on
        fits = [abs(math.log(typical[index] / table[0, size])) for size in range(len(SIZES))]
        shape = _shape(cover[index, good], centre[index, good], int(np.argmin(fits)), view)
        off = np.abs([math.log(typical[index] / table[shape, i]) for i in range(len(SIZES))])
        size = int(np.argmin(off))
        kinds.append((shape, size, size if off[size] < SIZE_FIT else -1))
    forms = [form(shape, size) for shape, size, _ in kinds]
    circle, inner = np.array([(one.outer, one.floor) for one in forms]).T
    apart = np.linalg.norm(tracks[:, None] - tracks[None], axis=3)
    apart[np.arange(len(parts)), np.arange(len(parts))] = np.inf
    whole &= ~(apart < OVERLAP * (inner[:, None] + inner)[..., None]).any(1)
    whole[:, 1:] &= ~(np.linalg.norm(np.diff(tracks, axis=1), axis=2) * fps > FASTEST)
    gaps = np.nanmin(apart - (circle[:, None] + circle)[..., None], axis=1)
    aside = tracks[..., 0]
    gaps = np.fmin(gaps, np.minimum(aside, view.room_width - aside) - circle[:, None])
    bodies = []
    for index, ((colour, _), (shape, _, size)) in enumerate(zip(parts, kinds, strict=True)):
        flight = _flight(tracks[index], circle[index], gaps[index], fps)
        motion = _motion(tracks[index], inner[index], flight, fps)
        bodies.append(Body(colour, shape, size, motion, tracks[index], whole[index], flight))
    return tuple(bodies)


def match(
    bodies: Sequence[Body], count: int, right: Callable[[Body, int], list[bool]]
) -> tuple[list[int], np.ndarray]:
    """Of each of `count` objects the body that fits it best, and what is right of it (N, A).

    `right(body, n)`: what is right of a body as object n, its colour first. Bodies are matched by
    that, then by all; an object without one has an index beyond them and nothing right.
    """
    hit: np.ndarray = np.zeros((max(len(bodies), count), count, len(ATTRIBUTES)), bool)
    for row, body in zip(hit, bodies, strict=False):
        row[:] = [right(body, n) for n in range(count)]

    def rank(order: list[int]) -> tuple[int, int]:
        return hit[order, range(count), 0].sum(), hit[order, range(count)].sum()

    order = max(map(list, itertools.permutations(range(len(hit)), count)), key=rank)
    return order, hit[order, range(count)]


def score(video: np.ndarray, truth: Mapping[str, np.ndarray], fps: float) -> dict[str, float]:
    """Scores a clip (T, H, W, 3) uint8 against the `truth` of its caption.

    Of the truth only what a caption says is read, and gravity. Bodies are matched by colour, then
    by the other attributes. Returns 1.0 or 0.0 for `colour` (the same colours, each as often),
    `shape`, `size`, `motion` (right for every object), `every_attribute` (these four), `objects`
    (as many) and `permanence` (that many whole bodies and nothing else in every frame); and
    `gravity_error`: the relative error of g, the mean of the objects that fall or are thrown and
    are free for at least `FLIGHT_FRAMES` frames, NaN without any.
    """
    reading = read(video, fps)
    bodies, objects = reading.bodies, range(int(truth["count"]))

    def compare(body: Body, n: int) -> list[bool]:
        return [getattr(body, name) == truth[name][n] for name in ATTRIBUTES]

    order, hit = match(bodies, len(objects), compare)
    same = len(bodies) == len(objects)
    right: np.ndarray = np.all(hit, axis=0)
    right[0] &= same
    whole = reading.clean.all() and all(body.present.all() for body in bodies)
    errors = []
    for index, wanted in zip(order, objects, strict=True):
        flies = index < len(bodies) and int(truth["motion"][wanted]) in FLYING
        if flies and (body := bodies[index]).flight >= FLIGHT_FRAMES:
            errors.append(abs(_parabola(body.track[: body.flight], fps)[1] / truth["gravity"] - 1))
    return {
        **{name: float(value) for name, value in zip(ATTRIBUTES, right, strict=True)},
        "permanence": float(same and whole),
        "objects": float(same),
        "every_attribute": float(right.all()),
        "gravity_error": float(np.mean(errors)) if errors else math.nan,
    }


def aggregate(scores: Sequence[Mapping[str, float]], intervals: bool = False) -> dict[str, float]:
    """Means of `score`'s fractions over clips, the median gravity error, and both numbers of clips;
    with `intervals` 95% ones, Wilson's and by order statistics. NaN where there is nothing."""
    errors = sorted(one["gravity_error"] for one in scores if not math.isnan(one["gravity_error"]))
    many = len(errors)
    result = {"clips": len(scores), "gravity_clips": many} | means(scores, FRACTIONS)
    result["gravity_error_median"] = float(np.median(errors)) if many else math.nan
    if intervals:
        for name in FRACTIONS:
            result[f"{name}_low"], result[f"{name}_high"] = wilson(result[name], len(scores))
        ends = (math.floor(many / 2 - 0.98 * many**0.5), math.ceil(many / 2 + 0.98 * many**0.5))
        for end, rank in zip(("low", "high"), np.clip(ends, 0, max(many - 1, 0)), strict=True):
            result[f"gravity_error_median_{end}"] = errors[rank] if many else math.nan
    return result
