"""Few-step sampling: a trained denoiser learns its own guided trajectory in four steps.

python -m vdit.main --config=experiments/distill.py:WORKDIR --workdir=NEW      about 20 minutes
python -m vdit.main --config=experiments/distill.py:WORKDIR,2 --workdir=NEW    in two steps

WORKDIR is a workdir, or weights of the package (base). The student samples without guidance: one
pass a step, where its teacher takes two and a half.
"""

from ml_collections import ConfigDict

from vdit.config.identity import read_config
from vdit.errors import UserError
from vdit.shipped import find

PARTS = 20  # steps of the teacher in all


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of the workdir `variant`, or "WORKDIR,STEPS", to distil its denoiser."""
    workdir, _, steps = variant.partition(",")
    if not workdir or not (steps or "4").isdecimal() or not 1 <= int(steps or 4) <= PARTS:
        raise UserError(
            f"experiments/distill.py:{variant}: WORKDIR or WORKDIR,STEPS is allowed, with 1 to"
            f" {PARTS} steps"
        )
    config = read_config(find(workdir))
    config.init = workdir
    config.dit.auxiliary = ()
    config.dit.distill.steps = config.sample.steps = int(steps or 4)
    config.dit.distill.parts = PARTS // config.dit.distill.steps
    config.dit.train.steps = 1400
    config.dit.train.batch = 16
    config.dit.train.accumulate = 2
    config.dit.train.learning_rate = 0.01
    config.dit.train.adam_learning_rate = 1e-3
    config.dit.train.ema = 0.99
    config.sample.sampler = "ddim"
    config.sample.eta = config.sample.push = 0.0
    config.sample.guidance = 1.0
    return config
