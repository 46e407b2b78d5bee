"""Held-out paraphrases of captions, to measure robustness to wording.

`paraphrase` replaces phrases of the grammar by synonyms that no caption of training has.
"""

import functools
import re

# Phrase of the grammar -> held-out synonym; the longest match wins.
UNSEEN = {
    # shapes, sizes
    "ball": "sphere", "disc": "sphere", "box": "crate", "square": "crate",
    "triangle": "pyramid", "small": "tiny", "little": "tiny", "large": "huge", "big": "huge",
    # motions
    "falls from above": "plummets", "drops from above": "plummets", "falls down": "plummets",
    "drops down": "plummets", "falls": "plummets", "drops": "plummets",
    "falling from above": "plummeting", "falling down": "plummeting",
    "dropping down": "plummeting", "falling": "plummeting", "dropping": "plummeting",
    "is thrown": "is flung", "is tossed": "is flung", "flies": "sails",
    "thrown": "flung", "tossed": "flung", "flying": "sailing",
    "rolls": "tumbles", "rolling": "tumbling", "slides": "skids", "sliding": "skidding",
    "rests on the floor": "is at rest", "lies on the floor": "is at rest",
    "sits on the floor": "is at rest", "stands on the floor": "is at rest",
    "resting on the floor": "at rest", "lying on the floor": "at rest",
    "sitting on the floor": "at rest", "standing on the floor": "at rest",
    "through the air": "airborne", "along the floor": "on the ground",
    "across the floor": "on the ground",
    # what happens between two
    "onto": "upon", "on top of": "upon", "and lands on": "and settles on",
    "and comes down on": "and settles on", "and bumps into": "and meets",
    "and hits the": "and meets the", "and hits": "and meets", "and collides with": "and meets",
    "and they collide": "and they crash", "and the two collide": "and they crash",
    "and they bump into each other": "and they crash",
    "and they do not touch": "and stay apart",
    "without touching each other": "staying apart",
    "and the two never touch": "and stay apart",
    "next to": "close by", "beside": "close by",
    "and bounces on the floor": "and rebounds", "and bounces back up": "and rebounds",
    "and bounces": "and rebounds",
    # openings
    "a video of": "footage of", "a clip of": "footage of", "we see": "behold",
    "there is": "behold",
    # shots: framings, places, what goes on
    "a wide shot": "a panorama", "wide shot": "a panorama", "seen from afar": "a panorama",
    "in full view": "a panorama", "a close-up": "a detail", "close-up": "a detail",
    "seen up close": "a detail", "a close shot": "a detail",
    "by day": "under a bright sky", "in daylight": "under a bright sky",
    "on a meadow by day": "under a bright sky", "at night": "under the stars",
    "by night": "under the stars", "in the dark of night": "under the stars",
    "indoors on a wooden floor": "within a living room", "inside a house": "within a living room",
    "indoors": "within a living room", "in the desert": "among dunes",
    "on desert sand": "among dunes", "in a plain grey room": "in an empty hall",
    "in a grey room": "in an empty hall", "in the studio": "in an empty hall",
    "lies still": "remains motionless", "does not move": "remains motionless",
    "stays where it is": "remains motionless", "bounces up again": "rebounds",
    "comes down and bounces": "rebounds", "bounces": "rebounds",
    "moves on": "travels further", "keeps moving": "travels further", "goes on": "travels further",
}  # fmt: skip


@functools.cache
def _pattern() -> re.Pattern[str]:
    longest = sorted(UNSEEN, key=len, reverse=True)
    return re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, longest)) + r")(?![\w-])")


def paraphrase(caption: str) -> str:
    """A caption of the world or of shots in held-out words; colours, sides and order stay."""
    return _pattern().sub(lambda found: UNSEEN[found[0]], caption)
