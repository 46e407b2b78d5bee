"""What the oracles read from clips, in lines for people: `DataSource.reading`.

Dimension key: T frames, H height, W width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vdit.worlds.bodies.oracle import Body, read
from vdit.worlds.bodies.physics import MOTIONS, View
from vdit.worlds.bodies.render import framed
from vdit.worlds.forms import COLOURS, SHAPES, SIZES
from vdit.worlds.playground import cast
from vdit.worlds.playground.oracle import read_shots
from vdit.worlds.shots.oracle import scenes
from vdit.worlds.shots.source import BACKGROUNDS, CAMERAS

VERBS = {
    "thrown_left": "is thrown to the left", "thrown_right": "is thrown to the right",
    "rolls_left": "rolls to the left", "rolls_right": "rolls to the right",
    "swings_left": "swings to the left", "swings_right": "swings to the right",
}  # fmt: skip
EVENTS = {"face": "changes expression", "moved": "is moved"}
STRANGE = 0.02  # share of a frame's pixels that nothing explains


def _look(size: int, colour: int, shape: int) -> str:
    """ "a small red ball"; a size that was not read is left out."""
    words = [SIZES[size]] if size >= 0 else []
    text = " ".join([*words, COLOURS[colour], SHAPES[shape]])
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _motion(motion: int, motions: Sequence[str]) -> str:
    name = motions[motion] if motion >= 0 else "moves in no known way"
    return VERBS.get(name, name)


def _often(frames: np.ndarray) -> str:
    """In how many of the frames (T,) something is so."""
    return "every frame" if frames.all() else f"{frames.sum()} of {len(frames)} frames"


def _lines(bodies: Sequence[Body], clean: np.ndarray) -> list[str]:
    """A line for each body, and one where frames (T,) show anything else."""
    lines = [
        f"{_look(body.size, body.colour, body.shape)} {_motion(body.motion, MOTIONS)};"
        f" whole in {_often(body.present)}"
        for body in bodies
    ]
    lines += [] if lines else ["no body"]
    return lines if clean.all() else [*lines, f"something else in {_often(~clean)}"]


def world(video: np.ndarray, fps: float) -> list[str]:
    """Of a clip (T, H, W, 3) uint8 of the world."""
    reading = read(video, fps)
    return _lines(reading.bodies, reading.clean)


def shots(video: np.ndarray, fps: float) -> list[str]:
    """Of a clip (T, H, W, 3) uint8 of several shots."""
    lines = []
    for scene in scenes(video):
        view = framed(View(*video.shape[1:3]), CAMERAS[scene.framing])
        background = BACKGROUNDS[scene.background]
        reading = read(video[scene.begin : scene.end], fps, view, background)
        place = f"{background}, {_plain(CAMERAS[scene.framing])}"
        lines.append(f"{scene.begin / fps:.1f} to {scene.end / fps:.1f} s ({place}):")
        lines += _lines(reading.bodies, reading.clean)
    return lines or ["no room of the world"]


def playground(video: np.ndarray, fps: float) -> list[str]:
    """Of a clip (T, H, W, 3) uint8 of a playground, of one shot or of several."""
    lines = []
    for take in read_shots(video, fps):
        reading: Any = take.reading
        times = f"{take.begin / fps:.1f} to {take.end / fps:.1f} s"
        views = [
            f"{_plain(cast.FRAMINGS[shot.framing])}, {_plain(cast.CAMERAS[shot.camera])} camera"
            for shot in take.shots
        ]
        lines.append(f"{times} ({cast.PLACE_NAMES[reading.place]}; {'; '.join(views)}):")
        looks = [_look(body.look[2], body.look[1], body.look[0]) for body in reading.bodies]
        for look, body in zip(looks, reading.bodies, strict=True):
            seen = f"; whole in {_often(body.whole)}"
            lines.append(f"{look} {_motion(body.motion, cast.MOTIONS)}{seen}")
        for event in reading.events:
            who = looks[event.who] if event.who >= 0 else "the rest"
            happens = EVENTS.get(event.kind, _plain(event.kind))
            lines.append(f"{(take.begin + event.frame) / fps:.1f} s: {who} {happens}")
        if (strange := reading.strange > STRANGE).any():
            lines.append(f"unexplained pixels in {_often(strange)}")
    return lines or ["no place of the playground"]


def _plain(name: str) -> str:
    return name.replace("_", " ")
