"""The truth as a picture shows it: places, colours and motion are those of the rendered frames."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base
from vdit.config import joined
from vdit.data import sources
from vdit.encode import truth_of_latents
from vdit.errors import UserError
from vdit.objectives.auxiliary import BLUR, DENSITY, truth_target
from vdit.tokens import Layout, grid_positions, latent_times
from vdit.worlds.bodies.physics import ROOM, View
from vdit.worlds.bodies.render import render
from vdit.worlds.bodies.source import World
from vdit.worlds.forms import COLOURS, PALETTE
from vdit.worlds.playground import cast
from vdit.worlds.playground.render import lit
from vdit.worlds.playground.shots import PlaygroundShots
from vdit.worlds.playground.source import Playground
from vdit.worlds.shots.source import Shots
from vdit.worlds.truth import SPEED

# So small that characters have no face, whose ink may lie in their middle.
OPEN: Any = {"size": (48, 48), "objects": (1, 3), "built": ("none",)}
SOURCES: dict[str, tuple[Any, float]] = {
    "world": (World(3, size=(32, 48)), ROOM),
    "shots": (Shots(3, shots=(2, 3)), ROOM),
    "playground": (Playground(3, **OPEN), cast.ROOM),
    "playground shots": (PlaygroundShots(3, **OPEN), cast.ROOM),
}
CLIPS = 6


def truth_of(name: str, clip: dict[str, Any]) -> np.ndarray:
    return sources.SOURCES[name.split()[0]].part("truth")(clip)


@pytest.mark.parametrize("name", SOURCES)
def test_the_pixel_at_a_bodys_place_has_its_colour(name: str) -> None:
    source, _ = SOURCES[name]
    right, seen = [], 0
    for clip in (source[i] for i in range(CLIPS)):
        truth, known, video = clip["truth"], truth_of(name, clip), clip["video"]
        last = int(truth["count"]) - 1  # is painted over the others
        assert known.shape[:2] == truth["position"].shape[:2] and not known[:, last + 1 :, 0].any()
        assert (known[..., 5 : 5 + len(COLOURS)] ** 2).sum(-1).max() == pytest.approx(6)
        place = np.floor(known[:, last, 1:3]).astype(int)
        inside = ((place >= 0) & (place < video.shape[1:3])).all(1)
        seen += inside.sum()
        assert known[inside, last, 0].all()
        colour = PALETTE[int(known[0, last, 5:11].argmax())]
        shot = truth.get("shot", np.zeros(len(video), np.int32))
        where = np.atleast_1d(truth.get("place", -1))  # of each shot; -1: no light of its own
        where = where[np.minimum(shot, len(where) - 1)]
        for frame in np.flatnonzero(inside):
            at = int(where[frame])
            want = lit(colour, cast.PLACE_NAMES[at]) if at >= 0 else np.array(colour)
            right.append(np.abs(video[frame, *place[frame]] - want).max() < 3)
    assert seen > 50 and np.mean(right) > 0.98


@pytest.mark.parametrize("name", SOURCES)
def test_bodies_are_where_the_mask_says(name: str) -> None:
    source, _ = SOURCES[name]
    bodies = sources.SOURCES[name.split()[0]].part("bodies")
    shares = []
    for clip in (source[i] for i in range(CLIPS)):
        truth, video, mask = clip["truth"], clip["video"].astype(int), bodies(clip)
        assert mask.shape == video.shape[:3] and mask.dtype == bool
        kinds, shot = truth["colour"][: int(truth["count"])], truth.get("shot")
        where = np.broadcast_to(truth["place"] if "place" in truth else -1, (4,))
        at = where[shot if shot is not None else np.zeros(len(video), int)]
        lights = {
            place: [lit(PALETTE[k], cast.PLACE_NAMES[place]) if place >= 0 else PALETTE[k]
                    for k in kinds] for place in set(at.tolist())
        }  # fmt: skip
        for frame, place in enumerate(at.tolist()):
            painted = np.abs(video[frame, :, :, None] - lights[place]).max(-1).min(-1) < 3
            assert not (painted & ~mask[frame]).any()
            shares.append(painted.sum() / max(mask[frame].sum(), 1))
    assert 0.2 < np.mean(shares) < 0.9  # bodies fill much of their circles


@pytest.mark.parametrize("name", SOURCES)
def test_velocities_are_how_places_change_and_cuts_part_them(name: str) -> None:
    source, room = SOURCES[name]
    apart, within = [], []
    for clip in (source[i] for i in range(CLIPS)):
        known, count = truth_of(name, clip), int(clip["truth"]["count"])
        pixels = min(clip["video"].shape[1:3]) / room * SPEED / source.fps
        place, velocity = known[:, :count, 1:3] / pixels, known[:, :count, 3:5]
        step = np.diff(place, axis=0) - (velocity[1:] + velocity[:-1]) / 2
        cut = np.diff(clip["truth"].get("shot", np.zeros(len(known)))) > 0
        apart += np.abs(step[cut]).max((1, 2)).tolist()
        within += np.abs(step[~cut]).ravel().tolist()
    assert np.median(within) < 0.05 and np.quantile(within, 0.8) < 0.3
    assert bool(apart) == ("shots" in name) and (not apart or np.median(apart) > 2)


def test_a_characters_look_is_told_and_who_leaves_the_picture_is_not_there() -> None:
    source = PlaygroundShots(3, size=(64, 64), built=("none",))
    gone = 0
    for clip in (source[i] for i in range(2 * CLIPS)):
        truth, known = clip["truth"], truth_of("playground", clip)
        parts = np.split(known, np.cumsum((5, 6, 3, 2, 4)), axis=2)[1:]
        names = ("colour", "shape", "size", "material", "expression")
        for part, name in zip(parts, names, strict=True):
            told = np.where(part.any(-1), part.argmax(-1), -1)
            np.testing.assert_array_equal(told, np.broadcast_to(truth[name], told.shape))
        count, place = int(truth["count"]), known[..., 1:3]
        far = ((place < -20) | (place > 84)).any(-1)[:, :count]
        gone += far.sum()
        assert not known[:, :count, 0][far].any()
        assert known[:, :count, 0][((place > 0) & (place < 64)).all(-1)[:, :count]].all()
    assert gone > 0


def rendered() -> tuple[dict[str, Any], np.ndarray]:
    """A clip of two bodies, and its pixels that show one."""
    clip = World(1, objects=(2, 2))[0]
    none = np.zeros((17, 0, 2)), np.zeros((17, 0))
    empty = render([], *none, View(32, 32)).astype(int)
    return clip, np.abs(clip["video"] - empty).max(-1) > 30


def test_where_the_target_says_that_a_body_is_the_picture_has_it() -> None:
    clip, mask = rendered()
    known = truth_of_latents(truth_of("world", clip), 17, (1, 1, 1))[:17]  # a token: 2x2 pixels
    grid = jnp.asarray(grid_positions(latent_times(17, 1, 10.0), 16, 16))[None]
    nothing = jnp.zeros(grid.shape[:2], jnp.int32)
    layout = Layout(grid, nothing, nothing)
    tokens = jnp.repeat(jnp.asarray(known, jnp.float32), 256, axis=0)[None]
    target = np.asarray(jax.jit(lambda x: truth_target(x, layout, (2, 2)))(tokens))
    near = target.reshape(17, 16, 16, -1) * np.sqrt(DENSITY * np.pi * BLUR**2)
    there = near[..., 0] > 0.8
    assert there.any((1, 2)).all()
    for frame, row, column in np.argwhere(there):
        pixels = frame, slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
        assert mask[pixels].all()
        colour = np.array(PALETTE[int(near[frame, row, column, 5:11].argmax())])
        assert np.abs(clip["video"][pixels].astype(int) - colour).max() < 3
    # Off the bodies there is nothing, and an offset points to the body.
    assert np.abs(near[~mask.reshape(17, 16, 2, 16, 2).any((2, 4))][:, 0]).max() < 0.5
    frame, row, column = np.argwhere(there)[0]
    assert near[frame, row - 1, column, 1] > 0 > near[frame, row + 1, column, 1]


@pytest.mark.parametrize("p", [1, 2, 4])
def test_latents_have_the_truth_of_their_middle_and_no_latent_that_of_two_shots(p: int) -> None:
    clip = Shots(3, shots=(2, 3), align=p)[1]
    known = truth_of("shots", clip)
    known[:, 0, 1] = np.arange(len(known))  # a body that moves on by one row a frame
    known[:, 0, 2] = 8.0 * clip["truth"]["shot"]
    count = 1 + (len(known) - 1) // p
    stored = truth_of_latents(known, count, (p, 4, 8))
    want = latent_times(count, p, 1.0)
    np.testing.assert_allclose(stored[:count, 0, 1] * 4, want, atol=0.02)
    image, span = (count - 2) * p, (count - 3) * p + 1  # the first frames of the extra spans
    np.testing.assert_allclose(
        stored[count:, 0, 1] * 4, [image, span, span + p / 2 + 0.5], atol=0.02
    )
    assert set(stored[:count, 0, 2].tolist()) == set(clip["truth"]["shot"].tolist())


def test_a_source_without_truth_is_refused(tmp_path: Any) -> None:
    config = base.get_config("smoke")
    config.dit.auxiliary = (("truth", 0.7),)
    joined.check(config)
    config.data.source, config.data.path = "folder", str(tmp_path)
    words = "data.source is folder: only world and shots and playground have it"
    with pytest.raises(UserError, match=words):
        joined.check(config)
    config.dit.auxiliary = (("truth", 0.0),)
    joined.check(config)
