"""`Playground`: captioned clips of characters with materials and faces, as a source for grain."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vdit.worlds.clips import Clips, Draws, padded, versions
from vdit.worlds.forms import LOOKS
from vdit.worlds.playground import cast
from vdit.worlds.playground import events as what
from vdit.worlds.playground.caption import DETAIL, caption
from vdit.worlds.playground.physics import CROWD, Run, Scene, draw_scene, simulate
from vdit.worlds.playground.render import draw_camera, has_faces, path, render, room_of
from vdit.worlds.truth import covered
from vdit.worlds.truth import in_picture as seen_in_picture

VERSION = 1  # of the clips: another one, other bytes
MAX_EVENTS = 24
MOVING = ("position", "velocity", "angle")
CHANGE = 0.4  # share of characters whose expression changes
SECONDS = 60  # of a clip, at most


@dataclasses.dataclass(eq=False)
class Playground(Clips):
    """Clips of characters with materials and faces: {"video": uint8 (T, H, W, 3), "caption": str,
    "truth": dict}, and of held-out clips "paraphrase": the same in held-out wordings.

    The truth's arrays, with N = MAX_CHARACTERS, padded with -1 (indices) or 0:

    - count int32 (); shape, colour, size, material, motion int32 (N,): indices into SHAPES, ...
    - place, camera_kind, built int32 (): indices into PLACE_NAMES, CAMERAS, SETS; side int32 ()
      1 or -1; spot float32 (): x of pivot, spring or spout; tower bool ()
    - position (metres), velocity (m/s) float32 (T, N, 2); angle float32 (T, N); contact bool
      (T, N): touched anything since the frame before; expression int32 (T, N), -1 in pictures of
      less than `cast.FACE_PIXELS`
    - blocks float32 (T, BLOCKS, 3): x, y, angle of the tower's; grains float32 (T, GRAINS, 2): NaN
      where they are not (yet) there; plate float32 (T,): the height of the spring's
    - camera float32 (T, 3): x and y of the picture's middle in metres, and zoom
    - event int32 (E, 3): frame, index into EVENTS, and character or -1, in order, padded with -1;
      seen bool (E,): all of that character is in the picture from the frame before to the one after
    - gravity, fps, room (metres from wall to wall) float32 (); energy float32 (T,) joules

    Captions go up to a level of `detail`: 0 a clause, 1 a sentence of all characters, 2 with camera
    and events, 3 a text of up to several hundred words.

    "heldout" clips each have a character whose look is `RESERVED`, "train" clips never do.
    """

    frames: int = 49
    size: tuple[int, int] = (64, 64)
    fps: float = 12.0
    objects: tuple[int, int] = (1, cast.MAX_CHARACTERS)
    built: tuple[str, ...] = cast.SETS
    detail: int = DETAIL

    digest = versions("playground", VERSION)
    where = "Playground"
    most = cast.MAX_CHARACTERS

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = f"1 to {SECONDS} seconds at {self.fps:g} fps, {int(SECONDS * self.fps)} frames"
        self.check(self.frames <= SECONDS * self.fps, "frames", allowed)
        good = bool(self.built) and all(name in cast.SETS for name in self.built)
        self.check(good, "built", f"some of {', '.join(cast.SETS)}")
        crowded = self.objects[1] > CROWD and "none" not in self.built
        self.check(not crowded, "built", f"with none, or objects of at most {CROWD}")
        self.check(0 <= self.detail <= DETAIL, "detail", f"0 to {DETAIL}")
        self.built, self.detail = tuple(self.built), int(self.detail)

    def clip(self, index: int) -> dict[str, Any]:
        # World's streams have indices below 2**63, those of shots from there on.
        draws = self.draws(2**64 - 1 - index)
        count, held_out = self.count(draws), self.split == "heldout"
        scene = draw_scene(draws, count, *room_of(self.size), held_out, self.built)
        run = simulate(scene, self.frames, self.fps)
        followed = run.position[:, 0, 0]
        kind = draw_camera(draws, followed)
        camera = path(draws, kind, self.frames, self.fps, self.size, followed)
        faces = draw_faces(draws, count, self.frames, has_faces(self.size))
        sight = sight_of(scene, run, faces, self.fps)
        happened = what.find(sight)[:MAX_EVENTS]
        described = (draws, scene, run, kind, faces, happened)
        item: dict[str, Any] = {
            "video": render(scene, run, camera, faces, self.size),
            "caption": caption(*described, detail=self.detail),
        }
        if held_out:
            item["paraphrase"] = caption(*described, unseen=True, detail=self.detail)
        item["truth"] = truth_of(scene, run, camera, kind, faces, happened, self.fps)
        inside = in_picture(scene, run, camera, self.size)
        item["truth"]["seen"] = seen_of(happened, inside)
        return item


def draw_faces(draws: Draws, count: int, frames: int, shown: bool) -> np.ndarray:
    """Expressions (T, N): of some characters it changes once."""
    faces = np.full((frames, count), -1, np.int32)
    for number in range(count if shown else 0):
        first, change = draws.below(len(cast.EXPRESSIONS)), draws.chance(CHANGE)
        faces[:, number] = first
        if change:
            then = (first + 1 + draws.below(len(cast.EXPRESSIONS) - 1)) % len(cast.EXPRESSIONS)
            faces[1 + int(draws.uniform(0.25, 0.75) * (frames - 1)) :, number] = then
    return faces


def sight_of(scene: Scene, run: Run, faces: np.ndarray, fps: float) -> what.Sight:
    """The simulated states as the input of `events.find`."""
    high = run.blocks[:, :, 1].max(1) + cast.BLOCK / 2 if scene.tower else np.zeros(len(run.angle))
    poured = (~np.isnan(run.grains[..., 0])).sum(1)
    return what.Sight(
        run.position, tuple(actor.form for actor in scene.actors), faces,
        tuple(actor.motion for actor in scene.actors), scene.built, scene.side, scene.spot,
        scene.width, scene.gravity, fps, high, poured,
    )  # fmt: skip


def in_picture(
    scene: Scene, run: Run, camera: np.ndarray, size: tuple[int, int],
    reach: np.ndarray | None = None
) -> np.ndarray:  # fmt: skip
    """(T, N): a character is fully in the picture, or what is within `reach` (N,) metres."""
    half = np.array(size[::-1]) / 2 / (min(size) / cast.ROOM * camera[:, 2:3])  # (T, 2) metres
    outer = np.array([actor.form.outer for actor in scene.actors]) if reach is None else reach
    off = np.abs(run.position - camera[:, None, :2])
    return (off < half[:, None] - outer[:, None]).all(2)


def seen_of(happened: Sequence[what.Event], inside: np.ndarray) -> np.ndarray:
    """Which events can be seen; towers and pouring always can."""
    seen = np.zeros(MAX_EVENTS, bool)
    for row, (frame, _, who) in enumerate(happened):
        seen[row] = who < 0 or inside[max(frame - 1, 0) : frame + 2, who].all()
    return seen


def truth_of(
    scene: Scene, run: Run, camera: np.ndarray, kind: str, faces: np.ndarray,
    happened: Sequence[what.Event], fps: float
) -> dict[str, np.ndarray]:  # fmt: skip
    """The truth's arrays."""
    count = len(scene.actors)

    def each(values: Any, fill: float, dtype: type) -> np.ndarray:
        return padded(values, count, cast.MAX_CHARACTERS, fill, dtype)

    looks = np.array([actor.look for actor in scene.actors]).T
    described = np.full((MAX_EVENTS, 3), -1, np.int32)
    for row, event in zip(described, happened, strict=False):
        row[:] = event.frame, cast.EVENTS.index(event.kind), event.who
    whole = {
        "count": count, "place": cast.PLACE_NAMES.index(scene.place),
        "camera_kind": cast.CAMERAS.index(kind), "built": cast.SETS.index(scene.built),
        "side": scene.side,
    }  # fmt: skip
    real = {
        "spot": scene.spot, "gravity": scene.gravity, "fps": fps, "room": scene.width,
        "energy": run.energy, "camera": camera, "plate": run.plate,
        "blocks": run.blocks if scene.tower else np.full((len(camera), cast.BLOCKS, 3), np.nan),
        "grains": run.grains if scene.grains else np.full((len(camera), cast.GRAINS, 2), np.nan),
    }  # fmt: skip
    names = ("shape", "colour", "size", "material")
    return {
        **{name: np.array(value, np.int32) for name, value in whole.items()},
        **{n: each(row, -1, np.int32) for n, row in zip(names, looks, strict=True)},
        "motion": each([cast.MOTIONS.index(a.motion) for a in scene.actors], -1, np.int32),
        "tower": np.array(scene.tower > 0),
        **{name: each(getattr(run, name), 0, np.float32) for name in MOVING},
        "contact": each(run.contact, 0, np.bool_),
        "expression": each(faces, -1, np.int32),
        "event": described,
        **{name: np.array(value, np.float32) for name, value in real.items()},
    }


def picture_truth(clip: Mapping[str, Any]) -> np.ndarray:
    """What a clip shows of its characters: see `DataSource.truth`."""
    more = {"material": len(cast.MATERIALS), "expression": len(cast.EXPRESSIONS)}
    return seen_in_picture(clip, cast.ROOM, cast.form, LOOKS | more)


def picture_bodies(clip: Mapping[str, Any]) -> np.ndarray:
    """Where a clip shows characters: see `DataSource.bodies`."""
    return covered(clip, cast.ROOM, cast.form)
