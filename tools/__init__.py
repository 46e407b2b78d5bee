"""Commands beside the main one: checkpoints, benchmarks."""

import vdit as vdit  # first: Ctrl-C is one line, also while the rest is imported
