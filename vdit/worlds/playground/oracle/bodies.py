"""Characters: detected by colour, fitted by rendering them.

Dimension key: T frames, M windows, K window side in pixels, H height, W width, N characters.
"""

import copy
import dataclasses
import itertools
import math

import numpy as np
from scipy import ndimage

from vdit.worlds.forms import PALETTE
from vdit.worlds.playground import cast
from vdit.worlds.playground.cast import Look, form
from vdit.worlds.playground.oracle.camera import BUILT_CODE, FAR, Eye, codes_of, largest
from vdit.worlds.playground.render import backdrop, character, has_faces, pixels, windows

BACK = 30.0  # RGB distance from the empty place, at least, of a pixel that shows something else
CORE = 5  # pixels of its colour that a character shows, at least
SOLID = 4  # pixels along each side of the largest square in what a small character shows, at least
SHOWN = 0.7  # of a character's pixels, at least, that look right
OFTEN = 0.3  # a character is what is there in this share of the frames
BRIEFLY = 0.12  # or in this one, if it looks as it should whenever all of it is in the picture,
CLEARLY = 4  # which it is in so many frames
PROBES = 4  # frames in which the look is judged
TURNS = 8  # angles tried
PERIODS = (0.0, math.pi / 2, 2 * math.pi / 3)  # of each shape: the turn after which it looks alike
LARGEST = 1.4  # metres: windows that hold any character reach this far

Pair = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Body:
    """A character that was read; indices as in the truth."""

    look: Look
    motion: int
    track: np.ndarray  # (T, 2) metres, NaN where it is not seen
    angle: np.ndarray  # (T,)
    whole: np.ndarray  # (T,) bool: as it should look, wherever it is in the picture
    inside: np.ndarray  # (T,) bool: all of it is in the picture, or ought to be (`_missed`)
    expression: np.ndarray  # (T,), -1 without faces


class Figures:
    """The frames, the scene without characters, and the colour that each pixel may belong to."""

    def __init__(self, eye: Eye, place: int, camera: np.ndarray) -> None:
        self.index, self.place, self.camera, self.eye = place, cast.PLACE_NAMES[place], camera, eye
        empty = backdrop(self.place, camera, *eye.size, eye.room)
        self.video, self.empty = eye.video, empty
        self.codes = codes_of(eye.video, self.place)
        # Structures become part of the empty place: they belong to no character.
        built = self.codes == BUILT_CODE
        self.empty[built] = self.video[built]
        self.scale = min(eye.size) / cast.ROOM * camera[:, 2]
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

    def part(self, at: slice) -> "Figures":
        """Some of the frames."""
        made = copy.copy(self)
        for name in ("camera", "video", "empty", "codes", "scale", "owner", "seen", "close"):
            setattr(made, name, getattr(self, name)[at])
        return made

    def colours(self) -> list[int]:
        """Of what may be characters: those that enough frames show enough of."""
        count = []
        for colour in range(len(PALETTE)):
            on = self.codes == colour
            # Edges between other things may mix to it, in lines one pixel wide.
            wide = on[:, 1:] & on[:, :-1]
            square = (wide[:, :, 1:] & wide[:, :, :-1]).any((1, 2)).mean() > OFTEN / 3
            if not square and np.mean(on.sum((1, 2)) >= CORE) >= OFTEN:
                # Or it is small and far away, and its face leaves no more of it.
                mine = self.seen & (self.owner == colour)
                block = ndimage.minimum_filter(mine, (1, SOLID, SOLID), mode="constant")
                square = block.any((1, 2)).mean() > 2 * OFTEN
            count.append(on.sum((1, 2)) * square)
        return [c for c, row in enumerate(count) if np.mean(row >= CORE) >= BRIEFLY]

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

    def inside(self, place: np.ndarray, frames: np.ndarray, outer: float) -> np.ndarray:
        """Whether (M,) what reaches `outer` metres from places (M, 2) is in some frames."""
        (height, width), reach = self.eye.size, outer * self.scale[frames]
        column, row = pixels(place, self.camera[frames], self.eye.size).T
        return ((column > reach) & (column < width - reach)
                & (row > reach) & (row < height - reach))  # fmt: skip


class _Windows:
    """Windows of some frames around a colour's middles, and the background there."""

    def __init__(
        self, figures: Figures, colour: int, frames: np.ndarray, middle: np.ndarray, outer: float
    ) -> None:
        self.figures, self.scale = figures, figures.scale[frames]
        self.camera = figures.camera[frames]
        self.left, self.upper, x, y = windows(middle, self.camera, outer, figures.eye.size)
        self.rows, self.columns = y.shape[1], x.shape[1]
        corners = zip(frames.tolist(), self.left.tolist(), self.upper.tolist(), strict=True)
        cut = [(frame, slice(y, y + self.rows), slice(x, x + self.columns))
               for frame, x, y in corners]  # fmt: skip
        every = (figures.video, figures.empty, figures.owner, figures.codes, figures.close)
        self.picture, self.behind, owner, code, close = (
            np.stack([values[at] for at in cut]) for values in every
        )
        self.mine = (owner == colour) & close & ((code == colour) | (code < 0))

    def local(self, place: np.ndarray) -> Pair:
        """x and y (M, K) of the pixels from places (M, 2) in metres."""
        at = pixels(place, self.camera, self.figures.eye.size)
        x = np.arange(self.columns) + 0.5 + (self.left - at[:, 0])[:, None]
        y = (at[:, 1] - self.upper)[:, None] - (np.arange(self.rows) + 0.5)
        return x.astype(np.float32), y.astype(np.float32)

    def off(self, look: Look, expression: str, place: np.ndarray, angle: np.ndarray) -> Pair:
        """Differences (M, K, K, 3) from the renderer's picture, and the cover (M, K, K)."""
        x, y = self.local(place)
        cover, paint = character(look, expression, self.figures.place, x, y, angle, self.scale)
        made = self.behind + cover[..., None] * (paint - self.behind)
        return self.picture - made, cover

    def cost(
        self, look: Look, place: np.ndarray, angle: np.ndarray, expression: str = ""
    ) -> np.ndarray:
        """(M,): difference summed over the colour's pixels, in units of fully wrong pixels."""
        off, _ = self.off(look, expression, place, angle)
        return (np.minimum(largest(off), FAR) * self.mine).sum((1, 2)) / FAR

    def turned(self, look: Look, place: np.ndarray) -> np.ndarray:
        """The best (M,) of `TURNS` angles."""
        if not (period := PERIODS[look[0]]):
            return np.zeros(len(place))
        angles = np.arange(TURNS) * period / TURNS
        costs = [self.cost(look, place, np.full(len(place), angle)) for angle in angles]
        return angles[np.argmin(costs, axis=0)]

    def fit(
        self, look: Look, place: np.ndarray, angle: np.ndarray, steps: int, expression: str = ""
    ) -> Pair:
        """Places and angles by Gauss and Newton, each window for itself."""
        free = 3 if PERIODS[look[0]] else 2
        probe = np.array((0.02, 0.02, 0.04))[:free]
        for _ in range(steps):
            off, _ = self.off(look, expression, place, angle)
            weight = self.mine & (largest(off) < 2 * FAR)
            slopes = []
            for axis in range(free):
                move = np.zeros(3)
                move[axis] = probe[axis]
                there, _ = self.off(look, expression, place + move[:2], angle + move[2])
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


def _look(figures: Figures, colour: int, middle: np.ndarray) -> Look:
    """The look of a colour's character, by the frames in which it stands free."""
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
    for shape, size in itertools.product(range(len(cast.SHAPES)), range(len(cast.SIZES))):
        plain = (shape, colour, size, cast.MATERIAL_NAMES.index("soft"))
        angle = at.turned(plain, middle[frames])
        for material in range(len(cast.MATERIALS)):
            look = (shape, colour, size, material)
            cost = at.cost(look, middle[frames], angle)
            table[look] = float(np.median(cost)), angle
    best = sorted(table, key=lambda look: table[look][0])[:7]
    final = {}
    for look in best:
        place, angle = at.fit(look, middle[frames], table[look][1], 3)
        final[look] = float(np.median(at.cost(look, place, angle)))
    return min(final, key=lambda look: final[look])


def find_bodies(figures: Figures) -> list[Body]:
    """The characters."""
    made = []
    for colour in figures.colours():
        middle = figures.middles(colour)
        look = _look(figures, colour, middle)
        frames = np.flatnonzero(~np.isnan(middle[:, 0]))
        shape = form(look[0], look[2])
        at = _Windows(figures, colour, frames, middle[frames], shape.outer + 0.1)
        place, angle = at.fit(look, middle[frames], at.turned(look, middle[frames]), 4)
        inside = figures.inside(place, frames, shape.outer)
        faces, whole = _faces(at, look, place, angle)
        if len(read := sorted(set(faces.tolist()))) > 1:  # it may only lie a little off
            names = [cast.EXPRESSIONS[face] for face in read]
            tries = [(name, *at.fit(look, place, angle, 3, name)) for name in names]
            place, angle = _best(at, look, tries)
            faces, whole = _faces(at, look, place, angle)
        if (again := np.flatnonzero(inside & ~whole)).size:
            near = _Windows(figures, colour, frames[again], place[again], shape.outer + 0.2)
            place[again], angle[again] = _refit(near, look, place[again], angle[again])
            faces, whole = _faces(at, look, place, angle)
        if inside.any():  # a face that is cut off is not read
            told = np.flatnonzero(inside)
            after = np.searchsorted(told, np.arange(len(faces)), side="right") - 1
            faces = faces[told[np.maximum(after, 0)]]
        briefly = len(frames) < OFTEN * len(figures.video)
        if briefly and (inside.sum() < CLEARLY or not whole[inside].all()):
            continue
        every = np.arange(len(figures.video))
        track, turn = np.full((len(every), 2), np.nan), np.zeros(len(every))
        track[frames], turn[frames] = place, angle
        rows = np.zeros((2, len(every)), bool)
        rows[:, frames] = whole, inside
        rows[1, _missed(figures, track, frames, shape.outer)] = True
        last = np.searchsorted(frames, every, side="right") - 1
        made.append(Body(look, -1, track, turn, rows[0], rows[1], faces[np.maximum(last, 0)]))
    return made


def _missed(figures: Figures, track: np.ndarray, frames: np.ndarray, outer: float) -> np.ndarray:
    """The frames in which what is seen in `frames`, on its track (T, 2), ought to be seen too: just
    before or after, when neither where it was nor where it was going is out of the picture."""
    missed = []
    for way in (-1, 1):
        end = frames[(frames + way >= 0) & (frames + way < len(track))]
        end = end[np.isnan(track[end + way, 0])]
        back = np.clip(end - way, 0, len(track) - 1)
        step = np.nan_to_num(track[end] - track[back])
        there = figures.inside(track[end], end + way, outer)
        there &= figures.inside(track[end] + step, end + way, outer)
        missed.append((end + way)[there])
    return np.concatenate(missed)


def _refit(at: _Windows, look: Look, place: np.ndarray, angle: np.ndarray) -> Pair:
    """Places and angles (M,) from many starts around, each with the face that suits it best."""
    names = cast.EXPRESSIONS if has_faces(at.figures.eye.size) else ("",)
    around = [np.array(move) for move in itertools.product((-0.1, 0.0, 0.1), repeat=2)]
    period = PERIODS[look[0]]
    turns = np.arange(2 * TURNS if period else 1) * period / (2 * TURNS)
    starts = list(itertools.product(around, turns))
    costs = np.array([at.cost(look, place + move, angle + turn) for move, turn in starts])
    tries = [(names[0], place, angle)]
    for name, rank in itertools.product(names, range(2)):
        first = [starts[row] for row in np.argsort(costs, axis=0)[rank]]
        there = place + np.array([move for move, _ in first])
        turned = angle + np.array([turn for _, turn in first])
        tries.append((name, *at.fit(look, there, turned, 5, name)))
    return _best(at, look, tries)


def _best(at: _Windows, look: Look, tries: list[tuple[str, np.ndarray, np.ndarray]]) -> Pair:
    """Of (expression, places, angles), of each window the one that costs least."""
    least = np.argmin([at.cost(look, place, angle, name) for name, place, angle in tries], axis=0)
    rows = np.arange(len(least))
    _, places, angles = (np.array(values) for values in zip(*tries, strict=True))
    return places[least, rows], angles[least, rows]


def _faces(at: _Windows, look: Look, place: np.ndarray, angle: np.ndarray) -> Pair:
    """Expressions (M,), median-filtered over three frames, and where the body looks right (M,)."""
    names = cast.EXPRESSIONS if has_faces(at.figures.eye.size) else ("",)
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


def filled(track: np.ndarray) -> np.ndarray:
    """A track (T, 2) with straight lines where it is not seen."""
    seen = np.flatnonzero(~np.isnan(track[:, 0]))
    frames = np.arange(len(track))
    return np.stack([np.interp(frames, seen, track[seen, axis]) for axis in (0, 1)], axis=1)
