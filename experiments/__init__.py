"""Configurations: each file has its launch line as its docstring.

Where vdit is installed they are vdit.experiments, and go by both names.
"""

import sys

sys.modules.setdefault("experiments", sys.modules[__name__])
