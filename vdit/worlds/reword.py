"""Tables of words, and captions in synonyms that training never shows."""

import functools
import re


def read_words(table: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Names with their wordings: "name: wording | wording / wordings of another kind". Entries end
    at a semicolon, and with a line, but for one that goes on indented by 4."""
    lines = table.strip("\n").replace("\n    ", " ")
    rows = (row.partition(":") for row in re.split(r";|\n", lines))
    return {
        name.strip(): tuple(tuple(map(str.strip, kind.split("|"))) for kind in wordings.split("/"))
        for name, _, wordings in rows
    }


# "held-out synonym: phrase | phrase" of the grammar; the longest match wins.
_TABLE = """
sphere: ball | disc; crate: box | square; pyramid: triangle; tiny: small | little; huge: large | big
plummets: falls from above | drops from above | falls down | drops down | falls | drops
plummeting: falling from above | falling down | dropping down | falling | dropping
is flung: is thrown | is tossed; sails: flies; flung: thrown | tossed; sailing: flying
tumbles: rolls; tumbling: rolling; skids: slides; skidding: sliding
is at rest: rests on the floor | lies on the floor | sits on the floor | stands on the floor
at rest: resting on the floor | lying on the floor | sitting on the floor | standing on the floor
airborne: through the air; on the ground: along the floor | across the floor; upon: onto | on top of
and settles on: and lands on | and comes down on
and meets: and bumps into | and hits | and collides with; and meets the: and hits the
and they crash: and they collide | and the two collide | and they bump into each other
and stay apart: and they do not touch | and the two never touch
staying apart: without touching each other; close by: next to | beside
and rebounds: and bounces on the floor | and bounces back up | and bounces
footage of: a video of | a clip of; behold: we see | there is
a panorama: a wide shot | wide shot | seen from afar | in full view
a detail: a close-up | close-up | seen up close | a close shot
under a bright sky: by day | in daylight | on a meadow by day
under the stars: at night | by night | in the dark of night
within a living room: indoors on a wooden floor | inside a house | indoors
among dunes: in the desert | on desert sand
in an empty hall: in a plain grey room | in a grey room | in the studio
remains motionless: lies still | does not move | stays where it is
rebounds: bounces up again | comes down and bounces | bounces
travels further: moves on | keeps moving | goes on
"""
UNSEEN = {phrase: unseen for unseen, (phrases,) in read_words(_TABLE).items() for phrase in phrases}


@functools.cache
def _pattern() -> re.Pattern[str]:
    longest = sorted(UNSEEN, key=len, reverse=True)
    return re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, longest)) + r")(?![\w-])")


def paraphrase(caption: str) -> str:
    """A caption of the world or of shots in held-out words; colours, sides and order stay."""
    return _pattern().sub(lambda found: UNSEEN[found[0]], caption)
