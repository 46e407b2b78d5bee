"""Wordings of playgrounds' captions, each unique, so that captions can be parsed."""

import re

from vdit.worlds.reword import read_words

# Kinds, and of each the names with their wordings: "name: seen | seen / unseen". A course is what a
# character does in a shot in which its take goes on.
_TABLE = """
size
  small: small | little | tiny / miniature; large: large | big | huge / giant
colour
  red: red | crimson / scarlet; green: green | emerald / jade; blue: blue | azure / cobalt
  yellow: yellow | golden / lemon; purple: purple | violet / plum
  orange: orange | amber / tangerine
shape
  ball: ball | sphere | disc / orb; box: box | square | cube / block
  triangle: triangle | wedge / three-cornered thing
material
  bouncy: bouncy | springy | rubber / elastic; heavy: heavy | iron | weighty / massive
  slippery: slippery | icy | slick / greasy; soft: soft | woolly | plush / squashy
expression
  happy: happy | smiling | cheerful / joyful; sad: sad | unhappy | gloomy / sorrowful
  surprised: surprised | astonished | amazed / startled; angry: angry | furious | cross / enraged
  asleep: sleeping | dozing | slumbering / snoozing
place
  day: by day | in daylight | on a sunny day / in the sunshine
  night: at night | by night | under a dark sky / after sunset
  indoors: indoors | inside a house | in a room / within four walls
  moon: on the moon | on the lunar surface / on the earth's own satellite
gravity
  earth: gravity is that of the earth | things weigh what they weigh on earth
    / the pull downwards is the usual one
  moon: gravity is weak | everything falls slowly / the pull downwards is a sixth of the usual one
camera
  static: the camera stands still | seen by a still camera | the view is fixed
    / filmed from a tripod
  pan_left: the camera pans left | the camera turns to the left | a pan to the left
    / the lens sweeps leftwards
  pan_right: the camera pans right | the camera turns to the right | a pan to the right
    / the lens sweeps rightwards
  tilt_up: the camera tilts up | the camera looks up | a tilt upwards / the lens climbs
  tilt_down: the camera tilts down | the camera looks down | a tilt downwards / the lens sinks
  zoom_in: the camera zooms in | the camera comes closer | a slow zoom in
    / the lens draws everything nearer
  zoom_out: the camera zooms out | the camera draws back | a slow zoom out
    / the lens takes in more and more
  follow: the camera follows | the camera stays with | the camera goes along with
    / the lens keeps tracking
  shake: the camera shakes | the picture trembles | a shaky hand-held camera / the lens wobbles
built
  ramp: a ramp | a slope / an incline; platform: a platform | a ledge / a shelf
  pendulum: a pendulum | a rope to swing on / a swinging line
  spring: a spring | a springboard / a plate on coils; pour: a spout | an open pipe / a chute
  tower: a tower of blocks | a stack of blocks / a pile of cubes
motion
  rests: rests on the floor | lies on the floor | sits on the floor / waits on the ground
  falls: falls | drops down | falls from above / plunges
  thrown_left: is thrown to the left | flies to the left / is hurled leftwards
  thrown_right: is thrown to the right | flies to the right / is hurled rightwards
  rolls_left: rolls to the left | rolls leftwards / trundles leftwards
  rolls_right: rolls to the right | rolls rightwards / trundles rightwards
  slides_left: slides to the left | slides leftwards / skids leftwards
  slides_right: slides to the right | slides rightwards / skids rightwards
  swings_left: swings to the left | hangs on a rope and swings left / dangles and sways left
  swings_right: swings to the right | hangs on a rope and swings right / dangles and sways right
event
  lands: lands | comes down | touches down / ends its fall
  rolls_down: reaches the foot of the ramp | comes off the ramp / leaves the incline
  drops_off: drops off the platform | goes over the edge / tumbles from the shelf
  swings: swings through the lowest point | sweeps past the middle / passes the bottom
  springs: is thrown up by the spring | bounces up from the spring / gets launched by the coils
  moved: is pushed away | is knocked from its place / gets shoved aside
  hits: hits | bumps into | knocks into / strikes
  topples: the tower falls | the tower topples | the stack comes down / the pile collapses
  fells: knocks over the tower | makes the tower fall / brings the pile down
  pours: many little balls pour from above | a stream of beads begins to pour
    / a cascade of pellets starts
  face: is now | from now on is / is all of a sudden
spot
  left: on the left | on the left side / at the left hand
  middle: in the middle | in the centre / halfway across
  right: on the right | on the right side / at the right hand
end
  : ends up | comes to its place / finishes
shots
  one: one shot | a single shot / a lone take; two: two shots | a pair of shots / a brace of takes
  three: three shots | a series of three shots / a trio of takes
  four: four shots | a series of four shots / a quartet of takes
framing
  whole: in full view | the whole scene / everything at once
  wide: a wide shot | seen from afar / a distant vantage
  close_left: a close-up of the left side | seen up close, to the left
    / a tight frame of the left half
  close: a close-up | seen up close | a close shot / a tight frame
  close_right: a close-up of the right side | seen up close, to the right
    / a tight frame of the right half
course
  still: lies still | does not move | stays where it is / remains motionless
  bounces: bounces | comes down and bounces / rebounds
  left: moves on to the left | keeps moving to the left / travels further left
  right: moves on to the right | keeps moving to the right / travels further right
  moves: moves on | keeps moving | goes on / travels further
link
  opening: a video of | a clip of | we see / footage of
  first: first | to begin with / at the outset; then: then | next | after that / thereupon
  last: finally | at last / in the end; same: and at the same time | just when / in the same moment
  starts: at the start it is | it begins / its first place is
  made: it is | it feels / to the touch it is; looks: it looks | its face is / to the eye it is
  there: there is | one can see / at hand is
"""


LEXICON = {  # kind -> name -> seen wordings, held-out ones
    kind: read_words(rows)
    for kind, rows in (part.split("\n", 1) for part in re.split(r"\n(?! )", _TABLE.strip()))
}
LINKS = LEXICON.pop("link")  # what no reader needs
