"""The world's grammar: sentences about every object's looks and motion, and true relations.

Each object is introduced once as "a SIZE COLOUR SHAPE", and its motion follows before the next is
introduced; a relation is only said where it is true of the clip.
"""

from collections.abc import Sequence

from vdit.worlds.bodies.physics import Kind, Run, Start, View
from vdit.worlds.clips import Draws
from vdit.worlds.forms import COLOURS, SHAPES, SIZES
from vdit.worlds.reword import read_words

SHAPE_WORDS = {"ball": ("ball", "disc"), "box": ("box", "square"), "triangle": ("triangle",)}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
COLOUR_WORDS = {colour: (colour,) for colour in COLOURS}

# Motion -> (finite forms, forms after "that" is dropped). {side} is left or right; balls roll,
# boxes and triangles slide.
MOTION_WORDS = read_words("""
falls: falls | drops | falls down | drops down | falls from above | drops from above
    / falling | dropping | falling down | dropping down | falling from above
thrown: is thrown to the {side} | flies to the {side} | is tossed to the {side}
    | flies {side}wards through the air | is thrown {side}wards
    / thrown to the {side} | flying to the {side} | tossed to the {side}
rolls: rolls to the {side} | rolls {side}wards along the floor | rolls {side}wards across the floor
    | rolls {side}wards
    / rolling to the {side} | rolling {side}wards | rolling {side}wards along the floor
slides: slides to the {side} | slides {side}wards along the floor
    | slides {side}wards across the floor | slides {side}wards
    / sliding to the {side} | sliding {side}wards | sliding {side}wards along the floor
rests: rests on the floor | lies on the floor | sits on the floor | stands on the floor
    / resting on the floor | lying on the floor | sitting on the floor | standing on the floor
""")

# Relation of one object to another, or of both -> phrases. `relations` says when each is true.
RELATIONS = {
    "onto": ("onto", "on top of"),
    "lands": ("and lands on", "and comes down on"),
    "into": ("into", "and bumps into", "and hits", "and collides with"),
    "towards": ("towards", "in the direction of"),
    "away": ("away from",),
    "beside": ("next to", "beside"),
    "left": ("to the left of", "on the left of"),
    "right": ("to the right of", "on the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
    "collide": ("and they collide", "and the two collide", "and they bump into each other"),
    "apart": ("and they do not touch", "without touching each other", "and the two never touch"),
}
EVENTS = ("onto", "lands", "into")
COURSES = ("towards", "away", "beside")
PLACES = ("left", "right", "above", "below")

OPENINGS = ("a video of", "a clip of", "there is", "we see")
LINKS = ("and", "while")
BOUNCES = ("and bounces", "and bounces on the floor", "and bounces back up")
WALLS = ("and hits the {side} wall", "and bounces off the {side} wall")
SPOTS = {
    "left": ("on the left", "near the left wall"),
    "middle": ("in the middle", "in the centre of the room"),
    "right": ("on the right", "near the right wall"),
}
SPOT_SPANS = {"left": (0.0, 0.28), "middle": (0.42, 0.58), "right": (0.72, 1.0)}  # of the width


def relations(starts: Sequence[Start], run: Run, one: int, two: int) -> set[str]:
    """The names in RELATIONS that are true of object `one` towards object `two` in this clip."""
    a, b = starts[one], starts[two]
    dx, dy = b.x - a.x, b.y - a.y
    side = -1 if a.vx < 0 else 1
    moves, other_moves = a.vx != 0, b.vx != 0
    true = set()
    meeting = next((m for m in run.meetings if (m.one, m.two) == (one, two)), None)
    if meeting is None:
        true.add("apart")
        if a.motion == "falls" and b.motion == "rests" and abs(dx) < 2.5:
            if run.contact[:, one].any():  # it has come down
                true.add("beside")
    else:
        true.add("collide")
        if meeting.above and b.motion == "rests" and not run.contact[: meeting.frame, one].any():
            true |= {"lands", "onto"} if a.motion == "falls" else {"lands"}
        elif moves and side * dx > 0.6 and not meeting.above:
            # Still on its way: neither a bounce nor a wall has turned it round.
            if side * run.velocity[meeting.frame - 1, one, 0] > 0.3:
                true.add("into")
    if moves and not other_moves and abs(dx) > 0.6:
        true.add("towards" if side * dx > 0 else "away")
    if abs(dx) > 0.8 and abs(dx) > 0.7 * abs(dy):
        true.add("left" if dx > 0 else "right")
    if abs(dy) > 1.2 and abs(dy) > abs(dx):
        true.add("below" if dy > 0 else "above")
    return true


def look(draws: Draws, kind: Kind) -> str:
    """An object's size, colour and shape in words."""
    shape, colour, size, _ = kind
    return (
        f"{draws.pick(SIZE_WORDS[SIZES[size]])} {draws.pick(COLOUR_WORDS[COLOURS[colour]])} "
        f"{draws.pick(SHAPE_WORDS[SHAPES[shape]])}"
    )


def _motion(draws: Draws, start: Start, form: int) -> str:
    """The motion's words: form 0 finite ("rolls ..."), 1 after a noun ("rolling ...")."""
    verb, _, side = start.motion.partition("_")
    if verb == "rolls" and SHAPES[start.kind[0]] != "ball":
        verb = "slides"
    return draws.pick(MOTION_WORDS[verb][form]).format(side=side)


def _after(draws: Draws, start: Start, then: str = "") -> str:
    """The motion as an attribute of a noun: "falling", "that falls", "which is thrown ..."; before
    another verb (`then`: "and hits") only in a finite form."""
    turn = 2 + draws.below(2) if then.startswith("and") else draws.below(4)
    if turn < 2:
        return _motion(draws, start, 1)
    return f"{'that' if turn == 2 else 'which'} {_motion(draws, start, 0)}"


def _alone(draws: Draws, start: Start, run: Run, view: View, places: bool) -> str:
    """A caption of one object."""
    thing = "a " + look(draws, start.kind)
    wall = _wall(start, run, view)
    tails = [""]
    if not start.grounded and _bounces(run):
        tails += BOUNCES
    if wall:
        tails += [phrase.format(side=wall) for phrase in WALLS] * 2
    tail = draws.pick(tails)
    part = start.x / view.room_width
    spot = next((name for name, (low, high) in SPOT_SPANS.items() if low < part < high), "")
    where = draws.pick(SPOTS[spot]) if draws.chance(0.35) and spot and places else ""
    if draws.chance(0.4):
        text = f"{draws.pick(OPENINGS)} {thing} {_after(draws, start, tail)}"
    else:
        text = f"{thing} {_motion(draws, start, 0)}"
        if where:
            text, where = f"{where}, {text}", ""
    text = f"{text} {tail}" if tail else text
    return f"{text}, {where} at the start" if where else text


def _bounces(run: Run) -> bool:
    """Whether the only object of a clip comes down and is seen going up again at the next frame."""
    speed = run.velocity[:, 0, 1]
    return bool(((speed[:-1] < -0.5) & (speed[1:] > 0.5)).any())


def _wall(start: Start, run: Run, view: View) -> str:
    """The wall that the only object of a clip surely bounces off first: left, right, or "".

    It turned round between two frames, and straight on its inscribed circle would cross the wall.
    """
    before, after = run.velocity[:-1, 0, 0], run.velocity[1:, 0, 0]
    straight = run.position[:-1, 0, 0] + before * run.step
    left = (before < 0) & (after > 0) & (straight < start.form.floor)
    right = (before > 0) & (after < 0) & (straight > view.room_width - start.form.floor)
    hits = left | right
    if not hits.any():
        return ""
    return "left" if left[hits.argmax()] else "right"


def _pair(draws: Draws, starts: Sequence[Start], run: Run) -> str:
    """A caption of the first two objects."""
    orders = [(0, 1), (1, 0)]
    if draws.chance(0.5):
        orders.reverse()
    options = []
    for one, two in orders:
        true = relations(starts, run, one, two)
        options += [(one, two, name) for name in RELATIONS if name in true]
    # What happens is said more often than how things lie.
    for group in (EVENTS, COURSES):
        those = [option for option in options if option[2] in group]
        if those and draws.chance(0.55):
            options = those
            break
        options = [option for option in options if option[2] not in group]
    one, two, name = draws.pick(options)
    a, b = starts[one], starts[two]
    look_a, look_b = look(draws, a.kind), look(draws, b.kind)
    phrase = draws.pick(RELATIONS[name])
    opening = f"{draws.pick(OPENINGS)} " if draws.chance(0.25) else ""
    if name in EVENTS or name in COURSES:
        act = _motion(draws, a, 0) if not opening else _after(draws, a, phrase)
        return f"{opening}a {look_a} {act} {phrase} a {look_b} {_after(draws, b)}"
    if name in PLACES:
        turn = draws.below(3)
        if turn == 0:
            return f"{phrase} a {look_b} {_after(draws, b)}, a {look_a} {_motion(draws, a, 0)}"
        if turn == 1 and name in ("left", "right") and a.motion in ("falls", "rests"):
            act = _motion(draws, a, 0) if not opening else _after(draws, a, phrase)
            return f"{opening}a {look_a} {act} {phrase} a {look_b} {_after(draws, b)}"
        both = _both(draws, a, b, look_a, look_b, "")
        # Colours differ within a clip, so these names need no size.
        one_name, two_name = look_a.split(" ", 1)[1], look_b.split(" ", 1)[1]
        return f"{both}; the {one_name} starts {phrase} the {two_name}"
    both = _both(draws, a, b, look_a, look_b, opening)
    comma = "" if phrase.startswith("without") else ","
    return f"{both}{comma} {phrase}"


def _both(draws: Draws, a: Start, b: Start, look_a: str, look_b: str, opening: str) -> str:
    if opening:
        return f"{opening}a {look_a} {_after(draws, a)} and a {look_b} {_after(draws, b)}"
    link = draws.pick(LINKS)
    return f"a {look_a} {_motion(draws, a, 0)} {link} a {look_b} {_motion(draws, b, 0)}"


def caption(
    draws: Draws, starts: Sequence[Start], run: Run, view: View, places: bool = True
) -> str:
    """One English sentence about the clip, in lower case and without a full stop; `places`: it may
    say where in the room an object starts."""
    if len(starts) == 1:
        return _alone(draws, starts[0], run, view, places)
    text = _pair(draws, starts, run)
    for start in starts[2:]:
        text += f", and a {look(draws, start.kind)} {_motion(draws, start, 0)}"
    return text
