"""Playgrounds of several shots: the same bytes always, cuts that pixels show, true captions, and
what the oracle reads by a clip's own truth and by another's."""

import functools
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.playground import get_config
from vdit.config import joined
from vdit.data import sources
from vdit.errors import UserError
from vdit.worlds.clips import MAX_SHOTS
from vdit.worlds.forms import COLOURS, SHAPES, SIZES
from vdit.worlds.playground import oracle
from vdit.worlds.playground.caption import parse
from vdit.worlds.playground.cast import (
    CAMERAS,
    EVENTS,
    EXPRESSIONS,
    FRAMINGS,
    MATERIAL_NAMES,
    MAX_CHARACTERS,
    MOTIONS,
    PLACE_NAMES,
    RESERVED,
    SETS,
)
from vdit.worlds.playground.lexicon import LEXICON
from vdit.worlds.playground.oracle.camera import Eye
from vdit.worlds.playground.oracle.shots import SCORES, find_shots
from vdit.worlds.playground.shots import JUMP, PlaygroundShots
from vdit.worlds.playground.source import Playground
from vdit.worlds.shots.caption import COURSES

Clip = dict[str, Any]
FRAMES = 37


@functools.cache
def clips(split: str, number: int) -> list[Clip]:
    source = PlaygroundShots(3, split, FRAMES, shots=(2, 3))
    return [source[index] for index in range(number)]


def digest(clip: Clip) -> str:
    told = [repr(value) for key, value in sorted(clip.items()) if key not in ("video", "truth")]
    parts = [clip["video"].tobytes(), *(text.encode() for text in told)]
    parts += [clip["truth"][name].tobytes() for name in sorted(clip["truth"])]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def bounds(clip: Clip) -> list[int]:
    return [0, *np.flatnonzero(clip["truth"]["cuts"]).tolist(), len(clip["video"])]


def shots(clip: Clip) -> list[tuple[int, int, int]]:
    """Number, first frame and end of each shot."""
    edges = bounds(clip)
    return [(k, edges[k], edges[k + 1]) for k in range(len(edges) - 1)]


def test_same_bytes_in_any_order_and_apart_from_other_streams() -> None:
    options: Any = {"frames": 37, "size": (32, 32), "shots": (1, 3)}
    source = PlaygroundShots(3, **options)
    want = [digest(source[index]) for index in range(5)]
    again = pickle.loads(pickle.dumps(source))
    assert [digest(again[index]) for index in reversed(range(5))] == want[::-1]
    others = [PlaygroundShots(4, **options), PlaygroundShots(3, "heldout", **options)]
    assert not set(want) & {digest(other[index]) for other in others for index in range(5)}
    short = PlaygroundShots(3, length=7, **options)
    assert len(short) == 7 and digest(short[-3]) == want[4]
    with pytest.raises(IndexError):
        short[7]


def test_contract() -> None:
    """What `Playground` has by the clip is by the shot; all else is as there."""
    n, t, s = MAX_CHARACTERS, FRAMES, MAX_SHOTS
    plain = Playground(3, frames=t)[0]["truth"]
    new = {"shot": (t,), "take": (t,), "cuts": (t,), "framing": (s,), "shown": (s, n),
           "course": (s, n)}  # fmt: skip
    by_shot = ("place", "camera_kind", "built", "side", "spot", "gravity", "tower", "motion",
               "event", "seen")  # fmt: skip
    for clip in clips("train", 16):
        assert set(clip) == {"video", "caption", "shots", "truth"}
        truth, count = clip["truth"], int(clip["truth"]["count"])
        assert set(truth) == {*plain, *new}
        for name, value in truth.items():
            if name in new:
                assert value.shape == new[name]
            else:
                want = (s,) * (name in by_shot) + plain[name].shape
                assert (value.shape, value.dtype) == (want, plain[name].dtype)
        assert clip["video"].shape == (t, 64, 64, 3) and clip["video"].dtype == np.uint8
        np.testing.assert_array_equal(truth["shot"], np.cumsum(truth["cuts"]))
        begins = bounds(clip)[:-1]
        assert all((begin - 1) % 4 == 0 for begin in begins[1:])
        assert [at for at, _ in clip["shots"]] == [begin / 12 for begin in begins]
        told = (truth["motion"] >= 0) ^ (truth["course"] >= 0)
        assert told[: len(begins), :count].all() and told.sum() == len(begins) * count


def test_a_take_is_one_simulation_and_a_cut_shows() -> None:
    """Positions run on over a cut within a take, and jump at another's; frames jump at each."""
    went_on = 0
    for clip in clips("train", 16):
        truth, video = clip["truth"], clip["video"].astype(float)
        count = int(truth["count"])
        for k, begin, _ in shots(clip)[1:]:
            off = np.abs(video[begin] - video[begin - 1]).mean()
            before, after = (truth["camera"][begin + side] for side in (-1, 0))
            step = np.abs(np.diff(truth["position"][begin - 1 : begin + 1, :count], axis=0)).max()
            near = [np.abs(video[f] - video[f - 1]).mean() for f in (begin - 1, begin + 1)]
            assert off > 1.5 * max(near)
            if goes_on := truth["take"][begin] == truth["take"][begin - 1]:
                went_on += 1
                assert abs(after[2] - before[2]) >= JUMP and step < 1.0
                assert truth["place"][k] == truth["place"][k - 1]
            else:
                assert truth["place"][k] != truth["place"][k - 1]
            assert goes_on == (truth["motion"][k, 0] < 0)
    assert went_on >= 4


def test_splits_share_no_look_and_all_shots_have_the_clip_s() -> None:
    def looks(clip: Clip) -> set[tuple[int, ...]]:
        truth = clip["truth"]
        table = np.stack([truth[name] for name in ("shape", "colour", "size", "material")], 1)
        return {tuple(row) for row in table[: int(truth["count"])].tolist()}

    assert all(not looks(clip) & RESERVED for clip in clips("train", 16))
    assert all(looks(clip) & RESERVED for clip in clips("heldout", 16))


@pytest.mark.parametrize("unseen", [False, True])
def test_captions_are_true(unseen: bool) -> None:
    phrases = [words[not unseen] for table in LEXICON.values() for words in table.values()]
    other = [f" {phrase} " for group in phrases for phrase in group]
    courses = events = 0
    for clip in clips("heldout", 16):
        truth = clip["truth"]
        who = {COLOURS[c]: n for n, c in enumerate(truth["colour"][: truth["count"]].tolist())}
        look = {
            colour: {"shape": SHAPES[truth["shape"][n]], "size": SIZES[truth["size"][n]],
                     "material": MATERIAL_NAMES[truth["material"][n]]}
            for colour, n in who.items()
        }  # fmt: skip
        text = clip["paraphrase" if unseen else "caption"]
        listed = clip["paraphrased_shots" if unseen else "shots"]
        for one in (text, *(one for _, one in listed)):
            plain = " " + one.translate(str.maketrans("", "", ",.;:")) + " "
            assert not any(phrase in plain for phrase in other), one
        told = parse(text)
        assert ("shots", ("one", "two", "three", "four")[len(listed) - 1]) in told.said
        assert set(told.characters) == set(who)
        for kind, names in (("place", PLACE_NAMES), ("framing", FRAMINGS)):
            want = [names[value] for value in truth[kind][: len(listed)]]
            assert [name for k, name in told.said if k == kind] in ([], want), text
        for colour, said in told.characters.items():
            assert said == {key: look[colour][key] for key in said}
        for (k, begin, end), (_, text) in zip(shots(clip), listed, strict=True):
            told = parse(text)
            said = {"place": {PLACE_NAMES[truth["place"][k]]},
                    "camera": {CAMERAS[truth["camera_kind"][k]]},
                    "framing": {FRAMINGS[truth["framing"][k]]},
                    "gravity": {"moon" if truth["gravity"][k] < 5 else "earth"},
                    "built": {SETS[truth["built"][k]], "tower" * int(truth["tower"][k])},
            }  # fmt: skip
            for kind, name in told.said:
                assert kind == "followed" or name in said[kind], text
            if (truth["motion"][k] < 0).all():
                assert ("framing", FRAMINGS[truth["framing"][k]]) in told.said
            for colour, attributes in told.characters.items():
                n = who[colour]
                motion = MOTIONS[truth["motion"][k, n]]
                if SHAPES[truth["shape"][n]] != "ball":
                    motion = motion.replace("rolls", "slides")
                want = {**look[colour], "motion": motion,
                        "course": COURSES[truth["course"][k, n]],
                        "expression": EXPRESSIONS[truth["expression"][begin, n]]}  # fmt: skip
                courses += "course" in attributes
                for key in set(attributes) - {"spot", "end"}:
                    assert attributes[key] == want[key], (key, text)
            rows = truth["event"][k][truth["event"][k][:, 0] >= 0]
            assert ((begin <= rows[:, 0]) & (rows[:, 0] < end)).all()
            if told.events:
                assert [kind for kind, _, _ in told.events] == [EVENTS[e] for e in rows[:, 1]]
                events += len(rows)
    assert courses > 5 and events > 20


@functools.cache
def readings() -> list[list[oracle.shots.Take]]:
    return [oracle.read_shots(clip["video"], 12.0) for clip in clips("heldout", 3)]


def test_real_clips_score_as_they_should_and_another_s_truth_low() -> None:
    some = clips("heldout", 3)
    own = [oracle.judge_shots(*pair) for pair in zip(readings(), some, strict=True)]
    result = oracle.aggregate_shots(own)
    for name in SCORES:
        assert not result[name] < 0.9, (name, result[name])
    assert result["cut_precision"] == result["cut_recall"] == result["identity"] == 1
    pairs = zip(readings(), [*some[1:], some[0]], strict=True)
    other = oracle.aggregate_shots([oracle.judge_shots(*pair) for pair in pairs])
    for name in ("cut_recall", "colour", "shape", "material", "identity", "motion",
                 "every_attribute"):  # fmt: skip
        assert other[name] < 0.5, (name, other[name])


def test_what_is_wrong_in_one_shot_is_wrong_in_its_scores() -> None:
    """A cut that is missing, a character of another look after it, no place at all."""
    clip = clips("heldout", 1)[0]
    begin, end = bounds(clip)[1:3]
    frozen = np.repeat(clip["video"][:1], 9, 0)
    assert [begin for begin, *_ in find_shots(Eye(frozen))] == [0]
    swapped = clip["video"].copy()
    swapped[begin:end] = swapped[begin:end, :, :, ::-1]  # red for blue
    result = oracle.score_shots(swapped, clip)
    assert result["identity"] == result["every_attribute"] == 0 < result["colour"]
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    assert all(place < 0 for _, place, _ in find_shots(Eye(noise)))


@pytest.mark.parametrize(
    "given",
    [{"shots": (0, 2)}, {"shots": (3, 2)}, {"shots": (1, 5)}, {"align": 0}, {"frames": 33},
     {"frames": 0}, {"detail": 4}],
)  # fmt: skip
def test_wrong_input_is_one_line(given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(UserError, match=f"^Playground: {name} is .*; allowed: ") as caught:
        PlaygroundShots(**{"seed": 0, "frames": 49, "shots": (1, 3), **given})
    assert "\n" not in str(caught.value)


def test_the_experiment_asks_for_it() -> None:
    config = get_config("shots_smoke")
    joined.check(config)
    source = sources.source(config, "heldout", Path())
    assert isinstance(source, PlaygroundShots) and source.shots == (1, 2) and source.align == 4
    assert sources.most_shots(config) == 2 and sources.most_shots(get_config("smoke")) == 0
    assert get_config("shots").data.shots == (1, 3)
    config.data.shapes = ((25, 64, 64, 12.0),)
    with pytest.raises(UserError, match="one caption a clip"):
        joined.check(config)
