"""The configuration: a file a section, with its fields, their checks and the parts they build.

`joined.py` checks what joins sections, `identity.py` says what a workdir's results depend on.
"""

from ml_collections import ConfigDict

ROAD = ("vae", "latents", "dit", "sample", "eval")  # from pixels to samples, in order
STAGES = (*ROAD, "classify")  # what a run may walk


def default() -> ConfigDict:
    """Every field with its default, locked: a typo in a field's name is an error."""
    from vdit.config.joined import SECTIONS  # late: --help answers before JAX is imported

    config = ConfigDict()
    config.seed = 0
    config.stages = ROAD  # what --mode=run walks
    for name, section in SECTIONS.items():
        config[name] = section.fields()
    config.lock()
    return config
