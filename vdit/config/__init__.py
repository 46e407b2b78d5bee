"""The configuration, one file per section: fields with defaults, their checks, what they build.

`joined.py` has the checks that read several sections, `identity.py` config.json and digests.
"""

from ml_collections import ConfigDict

ROAD = ("vae", "latents", "dit", "sample", "eval")  # from pixels to samples, in order
STAGES = (*ROAD, "low", "classify")  # what a run may do


def default() -> ConfigDict:
    """All fields with their defaults, locked: a misspelt field is an error."""
    from vdit.config.joined import SECTIONS  # late: --help needs no JAX

    config = ConfigDict()
    config.seed = 0
    config.init = ""  # weights to begin from: a workdir, or the name of weights in the package
    config.stages = ROAD  # what --mode=run does
    for name, section in SECTIONS.items():
        config[name] = section.fields()
    config.lock()
    return config
