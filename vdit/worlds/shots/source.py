"""`Shots`: clips of several shots of the same characters, with their captions and their truth.

A cut begins another take (a new simulation, another place) or another camera of the running one.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vdit.worlds.bodies import physics
from vdit.worlds.bodies.physics import FREE, MAX_OBJECTS, MOTIONS, Kind, Run, Start, View
from vdit.worlds.bodies.render import BACKDROPS, FRAMINGS, framed, render
from vdit.worlds.bodies.source import truth_of
from vdit.worlds.clips import (
    MAX_SHOTS,
    Clips,
    Draws,
    check_shots,
    clip_options,
    draw_takes,
    truth_of_cuts,
    versions,
)
from vdit.worlds.shots.caption import Shot, clip_caption, course, shot_caption

VERSION = 1  # of the clips: another one, other bytes
BACKGROUNDS, CAMERAS = tuple(BACKDROPS), tuple(FRAMINGS)
WIDE = 0.25  # share of shots that are wide although another camera would do
SCENES = 6  # scenes drawn for a take until cameras see all of it
FRESH = 16  # draws of motions that must all differ from the last


class Take(NamedTuple):
    """A simulation, and the cameras of the shots that it fills."""

    starts: list[Start]
    run: Run
    cameras: list[str]


@dataclasses.dataclass(eq=False)
class Shots(Clips):
    """Clips of several shots: {"video": uint8 (T, H, W, 3), "caption": str of the whole clip,
    "shots": [(start in seconds, caption), ...], "truth": dict}.

    A clip has `shots` = (least, most) shots; cuts stand at frames 1 + k·`align` (`check_shots`).
    The same characters (shape, colour, size) are in all shots, fully in the picture throughout.

    The truth is that of `World` (positions in metres in the room, whatever the camera), but
    `motion` is int32 (S, N), S = MAX_SHOTS: how a take that begins with the shot begins, -1 where
    it goes on or there is no shot. And:

    - course int32 (S, N): index into COURSES, what an object does where a take goes on, or -1
    - shot, take, background, framing int32 (T,): which shot and simulation a frame belongs to,
      indices into BACKGROUNDS and CAMERAS; cuts bool (T,): first frames of all shots but the first
    - camera float32 (T, 3): x and y of the picture's middle in metres, and zoom
    - fps float32 ()

    "heldout" clips each hold an object of a `RESERVED` kind in one of their takes, "train" clips
    never do.
    """

    frames: int = 33
    shots: tuple[int, int] = (1, MAX_SHOTS)
    align: int = 4

    digest = versions("shots", VERSION)
    where = "Shots"
    shortest = FREE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shots(self)
        self._view = View(*self.size)

    def clip(self, index: int) -> dict[str, Any]:
        draws = self.draws(2**63 + index)  # World's streams have indices below 2**63
        view = self._view
        shots = self._shots(draws)
        kinds = [start.kind for start in shots[0].starts]
        captions = [shot_caption(draws, shot, view) for shot in shots]
        video = [
            render(kinds, shot.run.position, shot.run.angle, framed(view, shot.framing),
                   shot.backdrop)
            for shot in shots
        ]  # fmt: skip
        return {
            "video": np.concatenate(video),
            "caption": clip_caption(draws, kinds, shots, captions),
            "shots": list(zip([shot.begin / self.fps for shot in shots], captions, strict=True)),
            "truth": _truth(shots, view, self.fps),
        }

    def _shots(self, draws: Draws) -> list[Shot]:
        """A clip's shots, take after take."""
        takes = draw_takes(draws, self)
        number, held_out = self.count(draws), self.split == "heldout"
        kinds = [start.kind for start in physics.draw_scene(draws, number, self._view, held_out)]
        # The take with the kinds just drawn: of a held-out clip one is reserved.
        chosen = draws.pick(takes)[0]
        shots: list[Shot] = []
        serial = 0
        while takes:
            bounds = takes.pop(0)
            last = [start.kind for start in shots[-1].starts] if shots else kinds
            take = self._take(draws, bounds, kinds, kinds if bounds[0] == chosen else [], last)
            backdrop = draws.pick([x for x in BACKGROUNDS if not shots or x != shots[-1].backdrop])
            for turn, camera in enumerate(take.cameras):
                begin, end = bounds[turn : turn + 2]
                run = _part(take.run, begin - bounds[0], end - bounds[0])
                shots.append(Shot(begin, end, serial, backdrop, camera, run, take.starts, turn > 0))
            if rest := bounds[len(take.cameras) : -1]:  # no other camera sees them: another take
                takes.insert(0, [*rest, bounds[-1]])
            serial += 1
        return shots

    def _take(
        self, draws: Draws, bounds: Sequence[int], looks: Sequence[Kind], kinds: Sequence[Kind],
        last: Sequence[Kind]
    ) -> Take:  # fmt: skip
        """A take of `kinds`, or of `looks` with new motions, for one or more of the shots."""
        best = None
        wanted = draws.pick(CAMERAS)
        for _ in range(SCENES):
            starts: list[Start] = []
            tries = 0
            while not starts:
                tries += 1
                these = kinds or self._moved(draws, looks, last, tries <= FRESH)
                starts = physics.draw_places(draws, these, self._view)
            run = physics.simulate(starts, bounds[-1] - bounds[0], self.fps, self._view)
            cameras: list[str] = []
            for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
                part = run.position[begin - bounds[0] : end - bounds[0]]
                fit = [name for name in CAMERAS if _sees(self._view, name, starts, part)]
                fit = [name for name in fit if name not in cameras[-1:]]
                if not fit:
                    break
                if not cameras and wanted in fit:
                    cameras.append(wanted)
                else:
                    near = [name for name in fit if name != "wide"]
                    wide = "wide" in fit and draws.chance(WIDE)
                    cameras.append("wide" if wide or not near else draws.pick(near))
            if best is None or len(cameras) > len(best.cameras):
                best = Take(starts, run, cameras)
            if len(cameras) == len(bounds) - 1 and cameras[0] == wanted:
                return Take(starts, run, cameras)
        assert best is not None
        return best

    def _moved(
        self, draws: Draws, looks: Sequence[Kind], last: Sequence[Kind], fresh: bool
    ) -> list[Kind]:
        """These looks with motions; `fresh`: none that one has in `looks` or `last`."""
        while True:
            kinds = [(*kind[:3], draws.below(len(MOTIONS))) for kind in looks]
            if self.split == "train" and any(kind in physics.RESERVED for kind in kinds):
                continue
            if len(kinds) > 1 and all(MOTIONS[kind[3]] == "rests" for kind in kinds):
                continue
            same = any(a in (b, c) for a, b, c in zip(kinds, looks, last, strict=True))
            if not (fresh and same):
                return kinds


def _sees(view: View, camera: str, starts: Sequence[Start], position: np.ndarray) -> bool:
    """Whether the camera sees all of each object at every `position` (T, N, 2)."""
    if camera == "wide":
        return True
    seen = framed(view, camera)
    reach = np.array([start.form.outer for start in starts])
    x, y = np.moveaxis(position, -1, 0)
    return bool(
        ((x - reach >= seen.left) & (x + reach <= seen.right) & (y + reach <= seen.top)).all()
    )


def _part(run: Run, begin: int, end: int) -> Run:
    """Frames `begin` to `end` of a run, as a run."""
    met = [m._replace(frame=m.frame - begin) for m in run.meetings if begin <= m.frame < end]
    position, velocity, angle, contact = (states[begin:end] for states in run[:4])
    return Run(position, velocity, angle, contact, run.step, met)


def _truth(shots: Sequence[Shot], view: View, fps: float) -> dict[str, np.ndarray]:
    """The truth's arrays, padded to MAX_OBJECTS and MAX_SHOTS."""
    kinds = [start.kind for start in shots[0].starts]
    states = zip(*(shot.run[:4] for shot in shots), strict=True)
    position, velocity, angle, contact = map(np.concatenate, states)
    whole = Run(position, velocity, angle, contact, 1 / fps, [])
    motion, doing = np.full((2, MAX_SHOTS, MAX_OBJECTS), -1, np.int32)
    for index, shot in enumerate(shots):
        for n, start in enumerate(shot.starts):
            if shot.goes_on:
                doing[index, n] = course(shot.run.position[:, n], fps)
            else:
                motion[index, n] = start.kind[3]

    cuts, seen = truth_of_cuts(shots), [framed(view, shot.framing) for shot in shots]
    of_shots = {
        "background": np.array([BACKGROUNDS.index(shot.backdrop) for shot in shots], np.int32),
        "framing": np.array([CAMERAS.index(shot.framing) for shot in shots], np.int32),
        "camera": np.array([room.camera for room in seen], np.float32),
    }
    return {
        **truth_of(kinds, whole),
        "motion": motion,
        "course": doing,
        **cuts,
        **{name: values[cuts["shot"]] for name, values in of_shots.items()},
        "fps": np.array(fps, np.float32),
    }


def make(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Shots:
    """The source `shots`."""
    del workdir
    options = {"shots": tuple(config.data.shots), "align": config.vae.patch[0], **options}
    return Shots(config.seed, split, **clip_options(config, options))
