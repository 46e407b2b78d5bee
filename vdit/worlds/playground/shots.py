"""`PlaygroundShots`: playgrounds of several shots, the same characters in each.

A cut begins another take (a new simulation of the same characters in another place, with other
things built) or goes on with the running one from another framing.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vdit.data.sources import most_shots
from vdit.worlds.clips import Draws, clip_options, versions
from vdit.worlds.cuts import GOES_ON, MAX_SHOTS, check_shots, draw_bounds
from vdit.worlds.playground import events as what
from vdit.worlds.playground.camera import draw_camera, framed, path
from vdit.worlds.playground.cast import CAMERAS, FRAMINGS, MAX_CHARACTERS, PLACE_NAMES
from vdit.worlds.playground.physics import Run, Scene, draw_scene, simulate
from vdit.worlds.playground.render import has_faces, render
from vdit.worlds.playground.shot_caption import Shot, clip_caption, shot_caption
from vdit.worlds.playground.source import (
    MAX_EVENTS,
    Playground,
    draw_faces,
    in_picture,
    room_of,
    seen_of,
    sight_of,
    truth_of,
)
from vdit.worlds.shots.caption import course

VERSION = 1  # of the clips: another one, other bytes
LEAST = 1.0  # seconds of a shot, at least, for its camera and motions to be visible
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

    A clip has `shots` = (least, most) shots; cuts stand at frames 1 + k·`align` only, so that
    no latent frame of an autoencoder with that temporal patch covers two shots. The same characters
    (shape, colour, size, material) are in all of them.

    The truth is that of `Playground`, but, with S = MAX_SHOTS and -1, 0 or false where there is no
    shot:

    - place, camera_kind, built, side int32 (S,); spot, gravity float32 (S,); tower bool (S,)
    - motion int32 (S, N): how a take that begins with the shot begins, -1 where it goes on
    - course int32 (S, N): index into COURSES, what a character does where a take goes on, or -1
    - framing int32 (S,): index into FRAMINGS; shown bool (S, N): fully in the picture throughout
    - event int32 (S, E, 3), frames being the clip's; seen bool (S, E)
    - shot, take int32 (T,): which shot and simulation a frame belongs to; cuts bool (T,): first
      frames of all shots but the first

    "heldout" clips each have a character whose look is `RESERVED`, "train" clips never do. Too few
    frames for the shots raise a `UserError`.
    """

    shots: tuple[int, int] = (1, 3)
    align: int = 4

    digest = versions("playground shots", VERSION)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shots = check_shots("Playground", self.shots, self.align, self.frames, self.fps, LEAST)
        self.align = int(self.align)

    def clip(self, index: int) -> dict[str, Any]:
        # World's streams are those below 2**63; shots' begin there, playgrounds' at the far end.
        draws = self.draws(3 * 2**62 ^ index)
        bounds = draw_bounds(draws, self.shots, self.align, self.frames, self.fps, LEAST)
        begun = [[0]]  # first frames of shots, take by take
        for bound in bounds[1:-1]:
            if draws.chance(GOES_ON):
                begun[-1].append(bound)
            else:
                begun.append([bound])
        takes: list[Take] = []
        scenes: list[Scene] = []
        count = self.objects[0] + draws.below(self.objects[1] - self.objects[0] + 1)
        for number, begins in enumerate(begun):
            end = begun[number + 1][0] if number + 1 < len(begun) else self.frames
            scenes.append(self._scene(draws, count, scenes))
            takes.append(self._take(draws, scenes[-1], [*begins, end], number))
        shots = [shot for take in takes for shot in take.shots]
        item: dict[str, Any] = {"video": np.concatenate([take.video for take in takes])}
        for unseen in (False, True)[: 1 + (self.split == "heldout")]:
            captions = [shot_caption(draws, shot, unseen, self.detail) for shot in shots]
            listed = [(s.begin / self.fps, text) for s, text in zip(shots, captions, strict=True)]
            item["paraphrase" if unseen else "caption"] = clip_caption(draws, shots, unseen)
            item["paraphrased_shots" if unseen else "shots"] = listed
        item["truth"] = _truth(takes, scenes, self.fps)
        return item

    def _scene(self, draws: Draws, count: int, before: Sequence[Scene]) -> Scene:
        """A scene; of the characters of those `before` it, in another place than the last."""
        where, built = room_of(self.size), self.built
        held_out = self.split == "heldout"
        if not before:
            return draw_scene(draws, count, *where, held_out, built)
        places = [name for name in PLACE_NAMES if name != before[-1].place]
        cast = [actor.look for actor in before[0].actors]
        return draw_scene(draws, count, *where, held_out, built, places, cast)

    def _take(self, draws: Draws, scene: Scene, bounds: Sequence[int], number: int) -> Take:
        """A take whose shots have these `bounds`."""
        size, frames, begin = self.size, bounds[-1] - bounds[0], bounds[0]
        run = simulate(scene, frames, self.fps)
        faces = draw_faces(draws, len(scene.actors), frames, has_faces(size))
        happened = what.find(sight_of(scene, run, faces, self.fps))[:MAX_EVENTS]
        shots: list[Shot] = []
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            at = slice(first - begin, last - begin)
            part = _part(run, at)
            zoom = float(shots[-1].camera[-1, 2]) if shots else None
            framing, kind, camera = self._film(draws, scene, part, zoom)
            described = [e._replace(frame=e.frame - at.start) for e in happened
                    if at.start <= e.frame < at.stop]  # fmt: skip
            shown = np.asarray(in_picture(scene, part, camera, size).all(axis=0))
            courses = [course(track, self.fps) for track in part.position.swapaxes(0, 1)]
            shots.append(
                Shot(first, last, number, bool(shots), framing, kind, camera, scene, part,
                     faces[at], described, shown, courses)
            )  # fmt: skip
        camera = np.concatenate([shot.camera for shot in shots])
        truth = truth_of(scene, run, camera, shots[0].kind, faces, happened, self.fps)
        truth["seen"] = seen_of(happened, in_picture(scene, run, camera, size))
        return Take(shots, render(scene, run, camera, faces, size), truth)

    def _film(
        self, draws: Draws, scene: Scene, run: Run, zoom: float | None
    ) -> tuple[str, str, np.ndarray]:
        """Framing, kind and path of a shot's camera; `zoom` is where the one before it ended, if
        the take goes on."""
        size, frames = self.size, len(run.angle)
        fit = []
        for name in FRAMINGS[1:]:
            camera = framed(name, frames, size)
            near = name.startswith("close")
            # What topples or pours is to be seen to its end; where a take begins, everyone.
            hidden = near and (zoom is None or scene.tower > 0 or scene.built == "pour")
            sees = in_picture(scene, run, camera, size).all(0).any() if near else True
            if not hidden and sees and _jumps(zoom, camera):
                fit += [name] * (2 if near else 1)
        if fit and draws.chance(WIDE if zoom is None else AGAIN):
            framing = draws.pick(fit)
            return framing, "static", framed(framing, frames, size)
        followed = run.position[:, 0, 0]
        while True:
            kind = draw_camera(draws, followed)
            camera = path(draws, kind, frames, self.fps, size, followed)
            if _sees(scene, run, camera, size) >= 0.5 and _jumps(zoom, camera):
                return "whole", kind, camera


def _jumps(zoom: float | None, camera: np.ndarray) -> bool:
    """Whether the cut to a camera (T, 3) shows as a jump of zoom."""
    return zoom is None or abs(float(camera[0, 2]) - zoom) >= JUMP


def _sees(scene: Scene, run: Run, camera: np.ndarray, size: tuple[int, int]) -> float:
    """The share of the frames in which the inner circle of each character is in the picture, of the
    one that is least."""
    inner = np.array([actor.form.inner - 0.1 for actor in scene.actors])
    return float(in_picture(scene, run, camera, size, inner).mean(0).min())


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
    first, count = takes[0].truth, len(colours)
    truth = {name: first[name] for name in ("count", "fps", "room", *LOOKS)}
    whole: dict[str, list[np.ndarray]] = {name: [] for name in (*OF_CHARACTERS, *OF_FRAMES)}
    made = {
        **{name: np.full(MAX_SHOTS, -1, np.int32) for name in ("camera_kind", "framing")},
        **{name: np.full((MAX_SHOTS, MAX_CHARACTERS), -1, np.int32)
           for name in ("motion", "course")},
        "shown": np.zeros((MAX_SHOTS, MAX_CHARACTERS), bool),
        "event": np.full((MAX_SHOTS, MAX_EVENTS, 3), -1, np.int32),
        "seen": np.zeros((MAX_SHOTS, MAX_EVENTS), bool),
        **{name: np.full(MAX_SHOTS, -1 if first[name].dtype == np.int32 else 0, first[name].dtype)
           for name in OF_TAKES},
    }  # fmt: skip
    shots = [shot for take in takes for shot in take.shots]
    for index, shot in enumerate(shots):
        described = takes[shot.take].truth
        order = [colours.index(actor.look[1]) for actor in shot.scene.actors]
        for name in OF_TAKES:
            made[name][index] = described[name]
        made["camera_kind"][index] = CAMERAS.index(shot.kind)
        made["framing"][index] = FRAMINGS.index(shot.framing)
        if shot.goes_on:
            made["course"][index, order] = shot.courses
        else:
            made["motion"][index, order] = described["motion"][:count]
        made["shown"][index, order] = shot.shown
        begin = next(s.begin for s in shots if s.take == shot.take)
        frames = described["event"][:, 0] + begin
        rows = (described["event"][:, 0] >= 0) & (shot.begin <= frames) & (frames < shot.end)
        for row, (frame, kind, who) in enumerate(described["event"][rows].tolist()):
            made["event"][index, row] = frame + begin, kind, order[who] if who >= 0 else -1
        made["seen"][index, : rows.sum()] = described["seen"][rows]
    for take, scene in zip(takes, scenes, strict=True):
        order = [colours.index(actor.look[1]) for actor in scene.actors]
        at = [*np.argsort(order).tolist(), *range(count, MAX_CHARACTERS)]
        for name in OF_CHARACTERS:
            whole[name].append(take.truth[name][:, at])
        for name in OF_FRAMES:
            whole[name].append(take.truth[name])
    length = [shot.end - shot.begin for shot in shots]
    number = np.repeat(np.arange(len(shots), dtype=np.int32), length)
    return {
        **truth,
        **{name: np.concatenate(parts) for name, parts in whole.items()},
        **made,
        "shot": number,
        "cuts": np.diff(number, prepend=0) > 0,
        "take": np.repeat(np.array([shot.take for shot in shots], np.int32), length),
    }


def make(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Playground:
    """The source `playground`."""
    del workdir
    options = clip_options(config, {"detail": config.data.detail, **options})
    if not most_shots(config):
        return Playground(config.seed, split, **options)
    shots, align = tuple(config.data.shots), config.vae.patch[0]
    return PlaygroundShots(config.seed, split, shots=shots, align=align, **options)
