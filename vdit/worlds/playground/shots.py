"""`PlaygroundShots`: playgrounds of several shots, the same characters in each.

A cut begins another take (a new simulation, another place) or another framing of the running one.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vdit.data.sources import most_shots
from vdit.worlds.clips import (
    MAX_SHOTS,
    Draws,
    check_shots,
    clip_options,
    draw_takes,
    truth_of_cuts,
    versions,
)
from vdit.worlds.playground import events as what
from vdit.worlds.playground import source
from vdit.worlds.playground.caption import Shot, clip_caption, shot_caption
from vdit.worlds.playground.cast import CAMERAS, FRAMINGS, MAX_CHARACTERS, PLACE_NAMES
from vdit.worlds.playground.physics import Run, Scene, draw_scene, simulate
from vdit.worlds.playground.render import draw_camera, framed, has_faces, path, render, room_of
from vdit.worlds.playground.source import MAX_EVENTS, Playground
from vdit.worlds.shots.caption import course

VERSION = 1  # of the clips: another one, other bytes
JUMP = 0.11  # of zoom, at least, where a take goes on
AGAIN = 0.7  # share of shots that go on in another framing than the whole scene, if one fits
WIDE = 0.3  # share of takes that begin with a wide shot
LOOKS = ("shape", "colour", "size", "material")
OF_CHARACTERS = ("position", "velocity", "angle", "contact", "expression")  # (T, N, ...)
OF_FRAMES = ("energy", "camera", "plate", "blocks", "grains")  # (T, ...)
OF_TAKES = ("place", "built", "side", "spot", "tower", "gravity")  # () of a take


class Take(NamedTuple):
    """A simulation with its shots."""

    shots: list[Shot]
    video: np.ndarray
    truth: dict[str, np.ndarray]  # as `Playground` has it


@dataclasses.dataclass(eq=False)
class PlaygroundShots(Playground):
    """Playgrounds of several shots: items as of `Playground`, with "shots": [(start in seconds,
    caption), ...], and of held-out clips "paraphrased_shots": the same in held-out wordings.

    A clip has `shots` = (least, most) shots; cuts stand at frames 1 + k·`align` (`check_shots`).
    The same characters (shape, colour, size, material) are in all shots.

    The truth is that of `Playground`, but, with S = MAX_SHOTS and -1, 0 or false where there is no
    shot:

    - place, camera_kind, built, side int32 (S,); spot, gravity float32 (S,); tower bool (S,)
    - motion int32 (S, N): how a take that begins with the shot begins, -1 where it goes on
    - course int32 (S, N): index into COURSES, what a character does where a take goes on, or -1
    - framing int32 (S,): index into FRAMINGS; shown bool (S, N): fully in the picture throughout
    - event int32 (S, E, 3), frames being the clip's; seen bool (S, E)
    - shot, take int32 (T,): which shot and simulation a frame belongs to; cuts bool (T,): first
      frames of all shots but the first

    "heldout" clips each have a character whose look is `RESERVED`, "train" clips never do.
    """

    shots: tuple[int, int] = (1, 3)
    align: int = 4

    digest = versions("playground shots", VERSION)
    shortest = 1.0  # seconds of a shot, at least, for its camera and motions to be visible

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shots(self)

    def clip(self, index: int) -> dict[str, Any]:
        # World's streams are those below 2**63; shots' begin there, playgrounds' at the far end.
        draws = self.draws(3 * 2**62 ^ index)
        takes: list[Take] = []
        scenes: list[Scene] = []
        cut, count = draw_takes(draws, self), self.count(draws)
        for number, bounds in enumerate(cut):
            scenes.append(self._scene(draws, count, scenes))
            takes.append(self._take(draws, scenes[-1], bounds, number))
        shots = [shot for take in takes for shot in take.shots]
        item: dict[str, Any] = {"video": np.concatenate([take.video for take in takes])}
        for unseen in (False, True)[: 1 + (self.split == "heldout")]:
            captions = [shot_caption(draws, shot, unseen, self.detail) for shot in shots]
            listed = list(zip([shot.begin / self.fps for shot in shots], captions, strict=True))
            item["paraphrase" if unseen else "caption"] = clip_caption(draws, shots, unseen)
            item["paraphrased_shots" if unseen else "shots"] = listed
        item["truth"] = _truth(takes, scenes, self.fps)
        return item

    def _scene(self, draws: Draws, count: int, before: Sequence[Scene]) -> Scene:
        """A scene; of the characters of those `before` it, in another place than the last."""
        last = before[-1].place if before else ""
        places = [name for name in PLACE_NAMES if name != last]
        looks = [actor.look for actor in before[0].actors] if before else []
        where, held_out = room_of(self.size), self.split == "heldout"
        return draw_scene(draws, count, *where, held_out, self.built, places, looks)

    def _take(self, draws: Draws, scene: Scene, bounds: Sequence[int], number: int) -> Take:
        """A take whose shots have these `bounds`."""
        size, frames, begin = self.size, bounds[-1] - bounds[0], bounds[0]
        run = simulate(scene, frames, self.fps)
        faces = source.draw_faces(draws, len(scene.actors), frames, has_faces(size))
        happened = what.find(source.sight_of(scene, run, faces, self.fps))[:MAX_EVENTS]
        shots: list[Shot] = []
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            at = slice(first - begin, last - begin)
            part = _part(run, at)
            zoom = float(shots[-1].camera[-1, 2]) if shots else None
            framing, kind, camera = self._film(draws, scene, part, zoom)
            described = [e._replace(frame=e.frame - at.start) for e in happened
                    if at.start <= e.frame < at.stop]  # fmt: skip
            shown = np.asarray(source.in_picture(scene, part, camera, size).all(axis=0))
            courses = [course(track, self.fps) for track in part.position.swapaxes(0, 1)]
            shots.append(
                Shot(first, last, number, bool(shots), framing, kind, camera, scene, part,
                     faces[at], described, shown, courses)
            )  # fmt: skip
        camera = np.concatenate([shot.camera for shot in shots])
        truth = source.truth_of(scene, run, camera, shots[0].kind, faces, happened, self.fps)
        truth["seen"] = source.seen_of(happened, source.in_picture(scene, run, camera, size))
        return Take(shots, render(scene, run, camera, faces, size), truth)

    def _film(
        self, draws: Draws, scene: Scene, run: Run, zoom: float | None
    ) -> tuple[str, str, np.ndarray]:
        """Framing, kind and path of a shot's camera; `zoom`: of the one before in the take."""
        size, frames = self.size, len(run.angle)
        fit = []
        for name in FRAMINGS[1:]:
            camera = framed(name, frames, size)
            near = name.startswith("close")
            # What topples or pours is to be seen to its end; where a take begins, everyone.
            hidden = near and (zoom is None or scene.tower > 0 or scene.built == "pour")
            sees = source.in_picture(scene, run, camera, size).all(0).any() if near else True
            if not hidden and sees and _jumps(zoom, camera):
                fit += [name] * (2 if near else 1)
        if fit and draws.chance(WIDE if zoom is None else AGAIN):
            framing = draws.pick(fit)
            return framing, "static", framed(framing, frames, size)
        followed = run.position[:, 0, 0]
        inner = np.array([actor.form.inner - 0.1 for actor in scene.actors])
        while True:
            kind = draw_camera(draws, followed)
            camera = path(draws, kind, frames, self.fps, size, followed)
            shown = source.in_picture(scene, run, camera, size, inner).mean(0)
            if shown.min() >= 0.5 and _jumps(zoom, camera):
                return "whole", kind, camera


def _jumps(zoom: float | None, camera: np.ndarray) -> bool:
    """Whether the cut to a camera (T, 3) shows as a jump of zoom."""
    return zoom is None or abs(float(camera[0, 2]) - zoom) >= JUMP


def _part(run: Run, at: slice) -> Run:
    """Frames of a run, as a run; earlier touches have frames below 0."""
    touches = [(frame - at.start, n, m) for frame, n, m in run.touches]
    return Run(
        run.position[at], run.velocity[at], run.angle[at], run.contact[at], run.blocks[at],
        run.grains[at], run.plate[at], touches, run.energy[at], run.depth,
    )  # fmt: skip


def _truth(takes: Sequence[Take], scenes: Sequence[Scene], fps: float) -> dict[str, np.ndarray]:
    """The truth's arrays; characters in the order of the first take."""
    colours = [actor.look[1] for actor in scenes[0].actors]
    rows: list[dict[str, np.ndarray]] = []  # of each shot
    parts: list[dict[str, np.ndarray]] = []  # of each take
    for take, scene in zip(takes, scenes, strict=True):
        order = [colours.index(actor.look[1]) for actor in scene.actors]
        at = [*np.argsort(order).tolist(), *range(len(order), MAX_CHARACTERS)]
        by_character = {name: take.truth[name][:, at] for name in OF_CHARACTERS}
        parts.append(by_character | {name: take.truth[name] for name in OF_FRAMES})
        rows += [_of_shot(shot, take, order) for shot in take.shots]

    def by_shot(name: str) -> np.ndarray:
        made = np.stack([row[name] for row in rows])
        pads = [(0, MAX_SHOTS - len(rows)), *[(0, 0)] * (made.ndim - 1)]
        return np.pad(made, pads, constant_values=-1 if made.dtype == np.int32 else 0)

    return {
        **{name: takes[0].truth[name] for name in ("count", "fps", "room", *LOOKS)},
        **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        **{name: by_shot(name) for name in rows[0]},
        **truth_of_cuts([shot for take in takes for shot in take.shots]),
    }


def _of_shot(shot: Shot, take: Take, order: Sequence[int]) -> dict[str, np.ndarray]:
    """The truth of one shot; its characters have the places `order` in the first take."""
    begin, truth = take.shots[0].begin, take.truth
    motion, doing = np.full((2, MAX_CHARACTERS), -1, np.int32)
    if shot.goes_on:
        doing[order] = shot.courses
    else:
        motion[order] = truth["motion"][: len(order)]
    shown = np.zeros(MAX_CHARACTERS, bool)
    shown[order] = shot.shown
    event, seen = np.full((MAX_EVENTS, 3), -1, np.int32), np.zeros(MAX_EVENTS, bool)
    frames = truth["event"][:, 0] + begin
    mine = (truth["event"][:, 0] >= 0) & (shot.begin <= frames) & (frames < shot.end)
    for row, (frame, kind, who) in zip(event, truth["event"][mine].tolist(), strict=False):
        row[:] = frame + begin, kind, order[who] if who >= 0 else -1
    seen[: mine.sum()] = truth["seen"][mine]
    return {
        **{name: truth[name] for name in OF_TAKES},
        "camera_kind": np.array(CAMERAS.index(shot.kind), np.int32),
        "framing": np.array(FRAMINGS.index(shot.framing), np.int32),
        "motion": motion, "course": doing, "shown": shown, "event": event, "seen": seen,
    }  # fmt: skip


def make(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Playground:
    """The source `playground`."""
    del workdir
    options = clip_options(config, {"detail": config.data.detail, **options})
    if not most_shots(config):
        return Playground(config.seed, split, **options)
    shots, align = tuple(config.data.shots), config.vae.patch[0]
    return PlaygroundShots(config.seed, split, shots=shots, align=align, **options)
