"""The world: the same bytes always, true physics, true captions, pictures that match the truth."""

import concurrent.futures
import hashlib
import multiprocessing
import pickle
import re
from typing import Any

import grain
import numpy as np
import pytest

from vdit.errors import UserError
from vdit.worlds.bodies import caption as grammar
from vdit.worlds.bodies.physics import (
    GRAVITY,
    MAX_OBJECTS,
    MOTIONS,
    RADII,
    RESERVED,
    View,
    form,
)
from vdit.worlds.bodies.render import BACKGROUND, FLOOR_COLOUR, render
from vdit.worlds.bodies.source import World
from vdit.worlds.forms import COLOURS, PALETTE, SHAPES, SIZES

CLIPS = 150


@pytest.fixture(scope="module")
def clips() -> list[dict[str, Any]]:
    world = World(3)
    return [world[index] for index in range(CLIPS)]


def digest(clip: dict[str, Any]) -> str:
    parts = [clip["video"].tobytes(), clip["caption"].encode()]
    parts += [clip["truth"][name].tobytes() for name in sorted(clip["truth"])]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def digest_at(world: World, index: int) -> str:
    return digest(world[index])


def test_contract(clips: list[dict[str, Any]]) -> None:
    world = World(3)
    assert isinstance(world, grain.sources.RandomAccessDataSource)
    assert len(World(3, length=7)) == 7
    n = MAX_OBJECTS
    shapes = {
        "count": ((), np.int32),
        **{name: ((n,), np.int32) for name in ("shape", "colour", "size", "motion")},
        **{name: ((17, n, 2), np.float32) for name in ("position", "velocity")},
        "angle": ((17, n), np.float32),
        "contact": ((17, n), np.bool_),
        "gravity": ((), np.float32),
    }
    for clip in clips[:20]:
        assert clip["video"].shape == (17, 32, 32, 3) and clip["video"].dtype == np.uint8
        truth = clip["truth"]
        assert {k: (v.shape, v.dtype) for k, v in truth.items()} == shapes
        for name in ("shape", "colour", "size", "motion"):
            assert (truth[name][truth["count"] :] == -1).all()
            assert (truth[name][: truth["count"]] >= 0).all()
        assert not truth["position"][:, truth["count"] :].any()
        assert truth["gravity"] == np.float32(GRAVITY)
    batch = next(iter(grain.MapDataset.source(world).map(lambda clip: clip["truth"]).batch(4)))
    assert batch["count"].shape == (4,)


def test_same_bytes_in_any_order_thread_and_process(clips: list[dict[str, Any]]) -> None:
    want = {index: digest(clip) for index, clip in enumerate(clips[:24])}
    world = pickle.loads(pickle.dumps(World(3)))
    order = list(reversed(range(24)))
    assert {index: digest(world[index]) for index in order} == want
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = dict(zip(order, pool.map(lambda index: digest(world[index]), order), strict=True))
    assert got == want
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as processes:
        got = dict(zip(order, processes.map(digest_at, [world] * 24, order), strict=True))
    assert got == want


def test_clips_differ_by_index_seed_and_split() -> None:
    worlds = [World(0), World(1), World(0, "heldout"), World(2**63 - 1)]
    digests = [digest(world[index]) for world in worlds for index in range(8)]
    assert len(set(digests)) == len(digests)


def test_index() -> None:
    world = World(0, length=5)
    assert digest(world[-1]) == digest(world[4])
    for index in (5, -6):
        with pytest.raises(IndexError):
            world[index]


@pytest.mark.parametrize(
    "given",
    [
        {"seed": -1},
        {"split": "test"},
        {"frames": 0},
        {"size": (2, 32)},
        {"fps": 0.0},
        {"objects": (0, 1)},
        {"objects": (2, 1)},
        {"objects": (1, 99)},
        {"length": 0},
    ],
)
def test_wrong_input_is_one_line(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(given))} is .*; allowed: ") as caught:
        World(**{"seed": 0, **given})
    assert "\n" not in str(caught.value)


def test_free_flight_is_the_closed_form(clips: list[dict[str, Any]]) -> None:
    for clip in clips:
        truth = clip["truth"]
        for n in range(truth["count"]):
            motion = MOTIONS[truth["motion"][n]]
            touched = truth["contact"][:, n]
            if motion in ("rests",) or motion.startswith("rolls"):
                assert touched[0]
                continue
            first = int(touched.argmax()) if touched.any() else len(touched)
            assert first >= 5
            time = np.arange(first)[:, None] / 10
            start, speed = truth["position"][0, n], truth["velocity"][0, n]
            pull = np.array([[0.0, -GRAVITY]])
            path = start[None] + speed[None] * time + pull / 2 * time**2
            np.testing.assert_allclose(truth["position"][:first, n], path, atol=1e-5)
            np.testing.assert_allclose(
                truth["velocity"][:first, n], speed[None] + pull * time, atol=1e-5
            )
            if motion == "falls":
                assert not speed.any()


def test_energy_does_not_grow() -> None:
    world = World(5, objects=(1, 1), frames=33)
    for index in range(40):
        truth = world[index]["truth"]
        if SHAPES[truth["shape"][0]] != "ball" or MOTIONS[truth["motion"][0]].startswith("rolls"):
            continue  # spin hides a part of the energy
        speed2 = (truth["velocity"][:, 0].astype(float) ** 2).sum(axis=1)
        energy = speed2 / 2 + GRAVITY * truth["position"][:, 0, 1]
        assert (np.diff(energy) < 0.6).all()  # of 10 to 40: a step's fall, pushed out of the floor


def test_motions_are_visible(clips: list[dict[str, Any]]) -> None:
    for clip in clips:
        truth = clip["truth"]
        for n in range(truth["count"]):
            move = truth["position"][4, n] - truth["position"][0, n]
            motion = MOTIONS[truth["motion"][n]]
            if motion == "rests":
                assert abs(move).max() < 0.02
            elif motion == "falls":
                assert move[1] < -0.7 and abs(move[0]) < 1e-4
            else:
                side = -1 if motion.endswith("left") else 1
                assert side * move[0] > 0.5
                assert abs(move[1]) < 0.03 or motion.startswith("thrown")


def test_objects_stay_inside_and_apart(clips: list[dict[str, Any]]) -> None:
    view = View(32, 32)
    for clip in clips:
        truth = clip["truth"]
        count = int(truth["count"])
        looks = [(int(truth["shape"][n]), int(truth["size"][n])) for n in range(count)]
        for n, look in enumerate(looks):
            inner = form(*look).floor - 0.15
            x, y = truth["position"][:, n].T
            assert x.min() > inner and x.max() < view.room_width - inner
            assert y.min() > inner and y.max() < view.top - inner
        if count == 2:
            gaps = np.hypot(*(truth["position"][:, 0] - truth["position"][:, 1]).T)
            assert gaps.min() > form(*looks[0]).floor + form(*looks[1]).floor - 0.15
            half = [form(*look).half for look in looks]
            assert gaps[0] > min(half)
            assert truth["colour"][0] != truth["colour"][1]


def test_many_pairs_meet() -> None:
    world = World(6, objects=(2, 2))
    captions = [world[index]["caption"] for index in range(100)]
    events = [
        phrase
        for name in ("onto", "lands", "into", "collide")
        for phrase in grammar.RELATIONS[name]
    ]
    assert sum(any(f" {event}" in text for event in events) for text in captions) > 30


def kinds_of(clip: dict[str, Any]) -> list[tuple[int, ...]]:
    truth = clip["truth"]
    names = ("shape", "colour", "size", "motion")
    return [tuple(int(truth[name][n]) for name in names) for n in range(truth["count"])]


def test_splits_share_no_kind(clips: list[dict[str, Any]]) -> None:
    train = {kind for clip in clips for kind in kinds_of(clip)}
    assert not train & RESERVED
    world = World(3, "heldout")
    for index in range(40):
        assert any(kind in RESERVED for kind in kinds_of(world[index]))
    assert all(
        kind in RESERVED
        for i in range(20)
        for kind in kinds_of(World(3, "heldout", objects=(1, 1))[i])
    )
    # Balanced: every value of every attribute is reserved equally often, and never wholly.
    for place, names in enumerate((SHAPES, COLOURS, SIZES, MOTIONS)):
        counts = np.bincount([kind[place] for kind in RESERVED], minlength=len(names))
        assert (counts == len(RESERVED) / len(names)).all()
        assert {kind[place] for kind in train} == set(range(len(names)))


def test_objects_asks_for_counts() -> None:
    for count in (1, 2):
        assert {int(World(0, objects=(count, count))[i]["truth"]["count"]) for i in range(6)} == {
            count
        }
    both = [int(World(0)[i]["truth"]["count"]) for i in range(200)]
    assert 70 < both.count(1) < 130


# ---- captions -------------------------------------------------------------------------------


def words(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: name for name, names in table.items() for word in names}


SHAPE_OF, SIZE_OF = words(grammar.SHAPE_WORDS), words(grammar.SIZE_WORDS)
COLOUR_OF = words(grammar.COLOUR_WORDS)
OBJECT = re.compile(rf"\ba ({'|'.join(SIZE_OF)}) ({'|'.join(COLOUR_OF)}) ({'|'.join(SHAPE_OF)})\b")


def parse(text: str) -> list[tuple[int, int, int, int]]:
    """Reads (shape, colour, size, motion) of each object back, by its own means."""
    found = list(OBJECT.finditer(text))
    kinds = []
    for n, match in enumerate(found):
        end = found[n + 1].start() if n + 1 < len(found) else len(text)
        rest = re.sub(
            r"(to|on) the (left|right) of|(left|right) wall|(on|near) the (left|right)\b",
            "",
            text[match.end() : end],
        )
        verb = re.search(
            r"fall|drop|thrown|flies|flying|tossed|roll|slid|rest|lie|lying|sit|stand", rest
        )
        assert verb, text
        side = re.search(r"left|right", rest)
        motion = {"fall": "falls", "drop": "falls"}.get(verb[0])
        if verb[0] in ("roll", "slid"):
            assert (verb[0] == "roll") == (SHAPE_OF[match[3]] == "ball")
            motion = "rolls"
        motion = motion or (
            "thrown" if verb[0] in ("thrown", "flies", "flying", "tossed") else "rests"
        )
        if motion in ("rolls", "thrown"):
            assert side, text
            motion += "_" + side[0]
        kinds.append(
            (
                SHAPES.index(SHAPE_OF[match[3]]),
                COLOURS.index(COLOUR_OF[match[2]]),
                SIZES.index(SIZE_OF[match[1]]),
                MOTIONS.index(motion),
            )
        )
    return kinds


def test_captions_say_exactly_the_truth() -> None:
    for world in (World(7), World(7, "heldout", fps=24.0, size=(48, 80))):
        for index in range(250):
            clip = world[index]
            assert sorted(parse(clip["caption"])) == sorted(kinds_of(clip)), clip["caption"]


def test_relations_are_true() -> None:
    world = World(8, objects=(2, 2))
    seen = set()
    for index in range(300):
        clip = world[index]
        text, truth = clip["caption"], clip["truth"]
        kinds = kinds_of(clip)
        order = [kinds.index(kind) for kind in parse(text)]
        one, two = order
        if text.startswith(
            tuple(grammar.RELATIONS[name][k] for name in grammar.PLACES for k in (0, 1))
        ):
            one, two = two, one
        position, velocity = truth["position"].astype(float), truth["velocity"].astype(float)
        dx, dy = position[0, two] - position[0, one]
        gap = np.hypot(*(position[:, one] - position[:, two]).T)
        near = sum(form(kinds[n][0], kinds[n][2]).outer for n in order)
        both = truth["contact"][:, one] & truth["contact"][:, two]
        for name, phrases in grammar.RELATIONS.items():
            after = "$" if name in ("collide", "apart") else " (a|the) "
            if not any(re.search(rf"(^| ){phrase}{after}", text) for phrase in phrases):
                continue
            seen.add(name)
            side = np.sign(velocity[0, one, 0])
            # A meeting: both touched something in one interval, near each other.
            met = bool((both[1:] & (np.minimum(gap[1:], gap[:-1]) < near + 0.7)).any())
            assert {
                "onto": met and MOTIONS[kinds[one][3]] == "falls" and dy < 0,
                "lands": met and MOTIONS[kinds[one][3]][:5] in ("falls", "throw") and dy < 0,
                "into": met and side * dx > 0,
                "towards": side * dx > 0,
                "away": side * dx < 0,
                "beside": abs(dx) < 2.5 and MOTIONS[kinds[one][3]] == "falls",
                "left": dx > 0,
                "right": dx < 0,
                "above": dy < 0,
                "below": dy > 0,
                "collide": met,
                "apart": gap.min() > sum(form(kinds[n][0], kinds[n][2]).floor for n in order),
            }[name], (index, name, text)
            break
    assert seen == set(grammar.RELATIONS)


def test_captions_vary(clips: list[dict[str, Any]]) -> None:
    texts = [clip["caption"] for clip in clips]
    assert len(set(texts)) > 0.95 * len(texts)
    lengths = [len(text.split()) for text in texts]
    assert 5 <= min(lengths) and max(lengths) <= 31
    # Templates: what stays when the objects' looks and the sides are taken out.
    plain = {re.sub(r"left|right", "S", OBJECT.sub("X", text)) for text in texts}
    assert len(plain) > 80


# ---- pictures -------------------------------------------------------------------------------


def alone(
    shape: int, colour: int, size: int, at: tuple[float, float], turn: float, view: View
) -> np.ndarray:
    position = np.array([[at]], float)
    return render([(shape, colour, size, 0)], position, np.array([[turn]]), view)[0]


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("size", range(len(SIZES)))
def test_picture_matches_its_truth(shape: int, size: int) -> None:
    view = View(32, 32)
    points = form(shape, size).corners
    area = np.pi * RADII[size] ** 2
    if points:
        (x, y), (xn, yn) = np.array(points).T, np.roll(np.array(points), -1, axis=0).T
        area = (x * yn - y * xn).sum() / 2
    for colour, turn in enumerate((0.0, 0.3, 0.8, 1.1, 2.0, -2.5)):
        at = (2.31 + 0.07 * colour, 2.2 - 0.05 * colour)
        picture = alone(shape, colour, size, at, turn, view).astype(float)
        paint, wall = np.array(PALETTE[colour], float), np.array(BACKGROUND, float)
        above = picture[: int(view.top * view.scale)]
        cover = ((above - wall) @ (paint - wall)) / ((paint - wall) @ (paint - wall))
        row, column = np.mgrid[: cover.shape[0], : cover.shape[1]] + 0.5
        centroid = (
            (cover * column).sum() / cover.sum() / view.scale,
            view.top - (cover * row).sum() / cover.sum() / view.scale,
        )
        np.testing.assert_allclose(centroid, at, atol=0.3 / view.scale)
        assert abs(cover.sum() / view.scale**2 / area - 1) < 0.06
        inside = above[cover > 0.99]
        assert len(inside) > 10 and abs(inside - paint).max() <= 3


def test_background_is_wall_and_floor() -> None:
    picture = alone(0, 0, 0, (2.5, 3.0), 0.0, View(64, 64))
    assert (picture[0] == BACKGROUND).all() and (picture[-1] == FLOOR_COLOUR).all()


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24), (33, 47)])
def test_a_picture_of_twice_the_size_shrinks_to_the_same(size: tuple[int, int]) -> None:
    height, width = size
    world, larger = World(9, size=size), World(9, size=(2 * height, 2 * width))
    for index in range(4):
        small, big = world[index], larger[index]
        assert small["caption"] == big["caption"]
        shrunk = big["video"].astype(float).reshape(17, height, 2, width, 2, 3).mean(axis=(2, 4))
        difference = abs(shrunk - small["video"])
        assert difference.mean() < 0.2 and difference.max() < 90  # a triangle's tip


def test_truth_is_where_the_picture_shows_it(clips: list[dict[str, Any]]) -> None:
    view = View(32, 32)
    for clip in clips[:40]:
        truth = clip["truth"]
        for n in range(truth["count"]):
            paint = np.array(PALETTE[truth["colour"][n]], float)
            for frame in (0, 4):
                same = abs(clip["video"][frame] - paint).max(axis=-1) < 3
                row, column = (np.argwhere(same) + 0.5).mean(axis=0) / view.scale
                x, y = truth["position"][frame, n]
                assert abs(column - x) < 0.12 and abs(view.top - row - y) < 0.12


@pytest.mark.parametrize(
    "frames,fps,size",
    [(1, 10.0, (32, 32)), (5, 24.0, (20, 36)), (60, 30.0, (16, 16)), (3, 1.0, (8, 4))],
)
def test_any_length_rate_and_size(frames: int, fps: float, size: tuple[int, int]) -> None:
    world = World(1, frames=frames, fps=fps, size=size)
    for index in range(6):
        clip = world[index]
        assert clip["video"].shape == (frames, *size, 3)
        assert sorted(parse(clip["caption"])) == sorted(kinds_of(clip))


def test_the_first_frame_does_not_depend_on_length_or_rate() -> None:
    long, image = World(2), World(2, frames=1, fps=25.0)
    for index in range(10):
        np.testing.assert_array_equal(long[index]["video"][:1], image[index]["video"])
