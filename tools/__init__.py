"""Commands beside the main one: checkpoints, weights, plans, benchmarks.

Where vdit is installed they are vdit.tools: imports among them are relative.
"""

import vdit as vdit  # first: Ctrl-C is one line, also while the rest is imported
