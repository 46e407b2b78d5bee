"""Clips of several shots: the same bytes always, true captions, cuts where they may be, and what
the oracle says of real clips and of clips broken on purpose."""

import concurrent.futures
import functools
import hashlib
import multiprocessing
import pickle
import re
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
import pytest

from vdit.errors import UserError
from vdit.worlds.bodies import caption as grammar
from vdit.worlds.bodies.physics import FREE, RESERVED, View, form
from vdit.worlds.bodies.render import BACKDROPS, FRAMINGS, framed, render
from vdit.worlds.clips import MAX_SHOTS, shot_blocks
from vdit.worlds.forms import COLOURS, SHAPES, SIZES
from vdit.worlds.shots import caption as words
from vdit.worlds.shots.oracle import SCORES, aggregate_shots, scenes, score_shots
from vdit.worlds.shots.source import BACKGROUNDS, CAMERAS, Shots

VIEW = View(32, 32)
Clip = dict[str, Any]


@functools.cache
def clips(split: str, number: int = 60, **options: Any) -> list[Clip]:
    source = Shots(3, split, **options)
    return [source[index] for index in range(number)]


def digest(clip: Clip) -> str:
    parts = [clip["video"].tobytes(), clip["caption"].encode(), repr(clip["shots"]).encode()]
    parts += [clip["truth"][name].tobytes() for name in sorted(clip["truth"])]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def digest_at(source: Shots, index: int) -> str:
    return digest(source[index])


def bounds(clip: Clip) -> list[int]:
    return [0, *np.flatnonzero(clip["truth"]["cuts"]).tolist(), len(clip["video"])]


def kinds(clip: Clip) -> list[tuple[int, int, int, int]]:
    """Looks, as kinds without a motion."""
    truth = clip["truth"]
    table = np.stack([truth[name] for name in ("shape", "colour", "size")], 1)
    return [(int(a), int(b), int(c), 0) for a, b, c in table[: int(truth["count"])]]


# ---- the source -----------------------------------------------------------------------------


def test_same_bytes_in_any_order_thread_and_process() -> None:
    want = {index: digest(clip) for index, clip in enumerate(clips("train")[:12])}
    source = pickle.loads(pickle.dumps(Shots(3)))
    assert isinstance(source, grain.sources.RandomAccessDataSource)
    order = list(reversed(range(12)))
    assert {index: digest(source[index]) for index in order} == want
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = dict(zip(order, pool.map(lambda index: digest(source[index]), order), strict=True))
    assert got == want
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as processes:
        got = dict(zip(order, processes.map(digest_at, [source] * 12, order), strict=True))
    assert got == want
    others = [Shots(4), Shots(3, "heldout"), Shots(3, fps=12.0)]
    assert not set(want.values()) & {digest(other[i]) for other in others for i in range(12)}


def test_contract() -> None:
    frames, n = 33, 2
    shapes = {
        "count": ((), np.int32), "gravity": ((), np.float32), "fps": ((), np.float32),
        **{name: ((n,), np.int32) for name in ("shape", "colour", "size")},
        **{name: ((MAX_SHOTS, n), np.int32) for name in ("motion", "course")},
        **{name: ((frames, n, 2), np.float32) for name in ("position", "velocity")},
        "angle": ((frames, n), np.float32), "contact": ((frames, n), np.bool_),
        **{name: ((frames,), np.int32) for name in ("shot", "take", "background", "framing")},
        "cuts": ((frames,), np.bool_), "camera": ((frames, 3), np.float32),
    }  # fmt: skip
    source = Shots(3, length=7)
    assert len(source) == 7 and digest(source[-1]) == digest(source[6])
    with pytest.raises(IndexError):
        source[7]
    for clip in clips("train")[:20]:
        assert set(clip) == {"video", "caption", "shots", "truth"}
        assert clip["video"].shape == (frames, 32, 32, 3) and clip["video"].dtype == np.uint8
        truth = clip["truth"]
        assert {k: (v.shape, v.dtype) for k, v in truth.items()} == shapes
        np.testing.assert_array_equal(truth["shot"], np.cumsum(truth["cuts"]))
        starts = [begin / 10 for begin in bounds(clip)[:-1]]
        assert [start for start, _ in clip["shots"]] == starts
        count = len(starts)
        told = (truth["motion"] >= 0) ^ (truth["course"] >= 0)
        assert told[:count, : truth["count"]].all()
        assert told.sum() == count * truth["count"]


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, {1, 2, 3, 4}),
        ({"frames": 17, "shots": (2, 2)}, {2}),
        ({"frames": 29, "shots": (4, 4)}, {4}),
        ({"frames": 49, "align": 2, "fps": 24.0, "shots": (1, 4)}, {1, 2, 3, 4}),
        ({"frames": 20, "align": 1, "shots": (3, 4), "size": (24, 40)}, {3, 4}),
        ({"frames": 1, "shots": (1, 1)}, {1}),
    ],
)
def test_cuts_are_aligned_and_shots_long_enough(options: Any, counts: set[int]) -> None:
    source = Shots(1, **options)
    first, later = shot_blocks(source.fps, source.align, FREE)
    seen = set()
    for index in range(40):
        clip = source[index]
        ends = bounds(clip)
        seen.add(len(ends) - 1)
        assert all((cut - 1) % source.align == 0 for cut in ends[1:-1])
        if len(ends) > 2:
            lengths = np.diff(ends)
            assert lengths[0] >= 1 + first * source.align
            assert lengths[1:].min() >= later * source.align
        # No latent frame j, of frames j*p - p + 1 to j*p, covers two shots.
        shot = clip["truth"]["shot"]
        latent = -(-np.arange(len(shot)) // source.align)
        assert all(len(set(shot[latent == j].tolist())) == 1 for j in set(latent.tolist()))
    assert seen == counts


@pytest.mark.parametrize(
    "given",
    [{"seed": -1}, {"split": "test"}, {"frames": 0}, {"size": (2, 32)}, {"fps": 0.0},
     {"objects": (0, 1)}, {"length": 0}, {"shots": (0, 2)}, {"shots": (3, 2)}, {"shots": (1, 5)},
     {"align": 0}],
)  # fmt: skip
def test_wrong_input_is_one_line(given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(UserError, match=f"^Shots: {name} is .*; allowed: ") as caught:
        Shots(**{"seed": 0, **given})
    assert "\n" not in str(caught.value)


def test_too_few_frames_name_frames_and_shots() -> None:
    with pytest.raises(UserError, match=r"frames is 28; allowed: 29 or more for shots=\(2, 4\)"):
        Shots(0, frames=28, shots=(2, 4))
    Shots(0, frames=29, shots=(2, 4))


def test_splits_share_no_kind() -> None:
    def held(clip: Clip) -> set[tuple[int, ...]]:
        return {
            (*kind[:3], int(motion))
            for row in clip["truth"]["motion"]
            for kind, motion in zip(kinds(clip), row, strict=False)
            if motion >= 0
        }

    assert all(not held(clip) & RESERVED for clip in clips("train"))
    assert all(held(clip) & RESERVED for clip in clips("heldout"))


def test_takes_move_on_and_cuts_change_the_picture() -> None:
    goes_on = 0
    for clip in clips("train"):
        truth = clip["truth"]
        count = int(truth["count"])
        for shot, cut in enumerate(bounds(clip)[1:-1], start=1):
            same = truth["take"][cut] == truth["take"][cut - 1]
            assert same == (truth["background"][cut] == truth["background"][cut - 1])
            if same:
                goes_on += 1
                assert truth["framing"][cut] != truth["framing"][cut - 1]
                step = truth["position"][cut, :count] - truth["position"][cut - 1, :count]
                assert np.abs(step).max() < 1.2  # metres in a tenth of a second
            else:
                told = truth["motion"][:shot, :count]
                last = told[told[:, 0] >= 0][-1]
                assert (truth["motion"][shot, :count] != last).any()
    assert goes_on > 15


def test_pictures_match_the_truth() -> None:
    for clip in clips("train")[:20]:
        truth, count = clip["truth"], int(clip["truth"]["count"])
        reach = np.array([form(kind[0], kind[2]).outer for kind in kinds(clip)])
        for begin, end in zip(bounds(clip)[:-1], bounds(clip)[1:], strict=True):
            camera = CAMERAS[truth["framing"][begin]]
            view, backdrop = framed(VIEW, camera), BACKGROUNDS[truth["background"][begin]]
            place = truth["position"][begin:end, :count].astype(float)
            again = render(kinds(clip), place, truth["angle"][begin:end, :count].astype(float),
                           view, backdrop)  # fmt: skip
            assert np.abs(again.astype(int) - clip["video"][begin:end]).max() <= 1
            x, y, zoom = truth["camera"][begin].tolist()
            half = 2.5 / zoom
            assert (view.left, view.right) == pytest.approx((x - half, x + half), abs=1e-5)
            assert view.top == pytest.approx(y + half, abs=1e-5)
            if camera != "wide":  # all of each object is in the picture
                assert (np.abs(place[..., 0] - x) + reach < half + 1e-5).all()


def test_a_picture_of_twice_the_size_shrinks_to_the_same() -> None:
    small, large = Shots(5), Shots(5, size=(64, 64))
    for index in range(4):
        one, two = small[index], large[index]
        assert one["caption"] == two["caption"] and one["shots"] == two["shots"]
        shrunk = two["video"].astype(float).reshape(33, 32, 2, 32, 2, 3).mean((2, 4))
        assert np.abs(shrunk - one["video"]).mean() < 0.4


# ---- captions -------------------------------------------------------------------------------


def names(table: Any) -> dict[str, str]:
    return {word: name for name, group in table.items() for word in group}


SHAPE_OF, SIZE_OF = names(grammar.SHAPE_WORDS), names(grammar.SIZE_WORDS)
LOOK = re.compile(rf"\b({'|'.join(SIZE_OF)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPE_OF)})\b")


def looks(text: str) -> list[tuple[int, int, int, int]]:
    return sorted(
        (SHAPES.index(SHAPE_OF[c]), COLOURS.index(b), SIZES.index(SIZE_OF[a]), 0)
        for a, b, c in LOOK.findall(text)
    )


def named(text: str, table: Any) -> list[str]:
    """Names in `table` whose words the text says, in order; the longest words first."""
    pattern = "|".join(sorted(names(table), key=len, reverse=True))
    return [names(table)[word] for word in re.findall(rf"(?<![\w-])({pattern})(?![\w-])", text)]


def test_shot_captions_say_the_truth() -> None:
    for clip in clips("train") + clips("heldout"):
        truth = clip["truth"]
        for shot, (begin, (_, text)) in enumerate(zip(bounds(clip), clip["shots"], strict=False)):
            assert looks(text) == sorted(kinds(clip)), text
            assert named(text, words.FRAMING_WORDS) == [CAMERAS[truth["framing"][begin]]], text
            assert set(named(text, words.PLACE_WORDS)) == {
                BACKGROUNDS[truth["background"][begin]]
            }, text
            if truth["course"][shot, 0] >= 0:
                does = named(text, words.COURSE_WORDS)
                found = dict(zip(looks_in_order(text), does, strict=True))
                for n, kind in enumerate(kinds(clip)):
                    assert found[kind] == words.COURSES[truth["course"][shot, n]], text


def looks_in_order(text: str) -> list[tuple[int, int, int, int]]:
    return [looks(match[0])[0] for match in LOOK.finditer(text)]


def test_clip_captions_say_the_truth() -> None:
    lengths = []
    for clip in clips("train") + clips("heldout"):
        text, truth = clip["caption"], clip["truth"]
        shots = len(clip["shots"])
        lengths.append(len(text.split()))
        number = re.match(r"(one|a single|1|two|2|three|3|four|4) shots?\b", text)
        assert number and number[1] in words.NUMBERS[shots - 1], text
        assert (" shot " in number[0] + " ") == (shots == 1)
        assert set(looks(text)) == set(kinds(clip)), text
        begins = bounds(clip)[:-1]
        places = named(text, words.PLACE_WORDS)
        assert places in ([], [BACKGROUNDS[truth["background"][b]] for b in begins]), text
        framings = named(text, words.FRAMING_WORDS)
        assert framings in ([], [CAMERAS[truth["framing"][b]] for b in begins]), text
        if len(looks(text)) > truth["count"]:  # each shot is told, in order
            at = [text.index(shot) for _, shot in clip["shots"]]
            assert at == sorted(at)
    assert min(lengths) < 8 and max(lengths) > 60
    assert len({clip["caption"] for clip in clips("train")}) == len(clips("train"))


def test_courses() -> None:
    t = np.arange(8) / 10
    tracks = {
        "still": np.stack([0 * t, 0 * t], 1),
        "left": np.stack([-t, 0 * t], 1),
        "right": np.stack([t, 0 * t], 1),
        "moves": np.stack([abs(t - 0.3), 0 * t], 1),
        "bounces": np.stack([t, 2 * abs(t - 0.3)], 1),
    }
    assert {name: words.COURSES[words.course(track, 10)] for name, track in tracks.items()} == {
        name: name for name in tracks
    }


# ---- the oracle -----------------------------------------------------------------------------


def means(harm: Callable[[Clip], np.ndarray], some: list[Clip]) -> dict[str, float]:
    return aggregate_shots([score_shots(harm(clip), clip) for clip in some])


@functools.cache
def several() -> list[Clip]:
    """Clips of two or more shots of two objects."""
    return clips("heldout", 16, objects=(2, 2), shots=(2, 4))


@pytest.mark.parametrize("size", [(32, 32), (64, 64)])
def test_real_clips_score_the_ceiling(size: tuple[int, int]) -> None:
    result = means(lambda clip: clip["video"], clips("heldout", 40, size=size))
    assert result["clips"] == 40 and all(result[name] >= 0.95 for name in SCORES), result


def test_noise_of_a_decoder_hides_no_cut() -> None:
    rng = np.random.default_rng(0)

    def noisy(clip: Clip) -> np.ndarray:
        video = clip["video"] + rng.normal(0, 5, clip["video"].shape)
        return np.clip(video, 0, 255).astype(np.uint8)

    result = means(noisy, several())
    assert all(result[name] >= 0.9 for name in SCORES), result


def test_every_room_is_told_apart() -> None:
    video = np.concatenate([
        render((), np.zeros((1, 0, 2)), np.zeros((1, 0)), framed(VIEW, camera), backdrop)
        for backdrop in BACKDROPS for camera in FRAMINGS
    ])  # fmt: skip
    found = [(scene.background, scene.framing) for scene in scenes(video)]
    assert found == [(b, c) for b in range(len(BACKDROPS)) for c in range(len(FRAMINGS))]


def test_the_truth_of_another_clip_fails() -> None:
    some = clips("heldout", 40)
    other = {id(clip): some[index - 1]["video"] for index, clip in enumerate(some)}
    result = means(lambda clip: other[id(clip)], some)
    assert result["identity"] < 0.1 and result["every_attribute"] == 0, result
    assert all(result[name] < 0.6 for name in SCORES), result


def redrawn(clip: Clip, shot: int, change: Callable[[list[Any]], list[Any]]) -> np.ndarray:
    """The clip with other looks in one shot."""
    video, truth = clip["video"].copy(), clip["truth"]
    begin, end = bounds(clip)[shot : shot + 2]
    count = int(truth["count"])
    view = framed(VIEW, CAMERAS[truth["framing"][begin]])
    video[begin:end] = render(
        change(kinds(clip)), truth["position"][begin:end, :count].astype(float),
        truth["angle"][begin:end, :count].astype(float), view,
        BACKGROUNDS[truth["background"][begin]],
    )  # fmt: skip
    return video


def swapped(clip: Clip) -> np.ndarray:
    """With the two colours changed over in the last shot."""

    def change(looks: list[Any]) -> list[Any]:
        (a, b, c, d), (e, f, g, h) = looks
        return [(a, f, c, d), (e, b, g, h)]

    return redrawn(clip, len(clip["shots"]) - 1, change)


def recoloured(clip: Clip) -> np.ndarray:
    """With a colour of neither in the last shot."""

    def change(looks: list[Any]) -> list[Any]:
        free = next(c for c in range(6) if c not in (looks[0][1], looks[1][1]))
        return [(looks[0][0], free, *looks[0][2:]), looks[1]]

    return redrawn(clip, len(clip["shots"]) - 1, change)


def frozen(clip: Clip) -> np.ndarray:
    return np.repeat(clip["video"][:1], len(clip["video"]), 0)


def doubled(clip: Clip) -> np.ndarray:
    """With the last shot's picture repeated beside itself at half strength."""
    video, begin = clip["video"].astype(int), bounds(clip)[-2]
    video[begin:] = np.minimum(video[begin:], np.roll(video[begin:], 11, 2))
    return video.astype(np.uint8)


def but_one(some: list[Clip]) -> float:
    """The mean where one shot of each clip is wrong."""
    return float(np.mean([1 - 1 / len(clip["shots"]) for clip in some]))


def test_changed_characters_lose_identity() -> None:
    some = several()
    result = means(recoloured, some)
    assert result["identity"] == result["every_attribute"] == 0
    assert result["colour"] == pytest.approx(but_one(some))
    assert result["cut_precision"] == result["cut_recall"] == result["background"] == 1
    differ = [clip for clip in some if kinds(clip)[0][0::2] != kinds(clip)[1][0::2]]
    result = means(swapped, differ)
    assert len(differ) > 5 and result["identity"] == 0 and result["colour"] == 1, result


def test_missing_late_and_spurious_cuts_are_seen() -> None:
    some = several()
    result = means(frozen, some)
    assert result["cut_recall"] == result["shots"] == result["every_attribute"] == 0
    assert result["background"] <= 0.5 and result["motion"] <= 0.5

    def late(clip: Clip) -> np.ndarray:
        return np.concatenate([clip["video"][:1], clip["video"][:-1]])

    result = means(late, some)
    assert result["cut_precision"] == result["cut_recall"] == 0 and result["shots"] == 1
    assert result["background"] == result["identity"] == 1

    def spurious(clip: Clip) -> np.ndarray:
        video = clip["video"].copy()
        video[bounds(clip)[1] // 2] = video[-1]
        return video

    result = means(spurious, some)
    assert result["shots"] <= 0.2 and result["cut_precision"] < 0.7 and result["cut_recall"] == 1
    single = clips("heldout", 8, shots=(1, 1))
    assert means(lambda clip: clip["video"], single)["every_attribute"] == 1
    moving = means(frozen, single)
    assert moving["cut_recall"] == 1 and moving["motion"] < 0.4


def test_doubled_bodies_and_noise_score_low() -> None:
    some = several()
    result = means(doubled, some)
    assert result["identity"] <= 0.1 and result["permanence"] <= but_one(some) + 0.01, result
    rng = np.random.default_rng(0)
    every = some + clips("heldout", 8, shots=(1, 1))
    for harm in (
        lambda clip: rng.integers(0, 256, clip["video"].shape, dtype=np.uint8),
        lambda clip: np.zeros_like(clip["video"]),
    ):
        result = means(harm, every)
        assert all(result[name] <= 0.1 for name in SCORES), result
