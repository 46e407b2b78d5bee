"""config.sample and config.eval: how videos are sampled from a trained workdir, and scored."""

from ml_collections import ConfigDict

from vdit.config import shared
from vdit.diffusion.sampler import SAMPLERS


def fields() -> ConfigDict:
    """config.sample."""
    sample = ConfigDict()
    sample.sampler = "ddim"  # ddpm, ddim, euler or dpmpp_2m
    sample.steps = 25
    sample.shift = 0.0  # as dit.shift, of the sampling times alone; 0: dit.shift
    sample.spacing = "trailing"  # of a table's points: trailing (from the last), leading (to first)
    sample.eta = 1.0  # ddim: share of noise; fresh noise mends what an earlier step got wrong
    sample.variance = "posterior"  # ddpm: posterior, beta or learned
    sample.guidance = 2.5  # classifier-free guidance; 1 is none
    sample.push = 0.0  # dit.model=vdit: away from a weaker answer, by so much of the difference
    sample.push_above = 0.5  # while more noise (sigma) than this is left
    sample.skip = (0.25, 0.75)  # the weaker one's attention is left out in this part of the depth
    sample.clips = 16  # videos that the stage sample makes
    sample.batch = 64  # at once
    sample.zoom = 8  # pixels are repeated this often in the shown pictures of small videos
    return sample


def check(config: ConfigDict) -> None:
    """Refuses unknown samplers and numbers that are not above 0."""
    shared.check_names(config, {"sample.sampler": SAMPLERS})
    shared.check_positive(config, "sample.steps", "sample.batch", "sample.zoom")


def eval_fields() -> ConfigDict:
    """config.eval."""
    evaluate = ConfigDict()
    evaluate.captions = 256  # held-out captions, one- and two-object scenes half and half
    evaluate.paraphrases = 128  # of these, asked in unseen wordings as well
    evaluate.given = 64  # clips whose continuation is scored against the truth, or 0
    # world: seconds that clips are made in at a time, to compare with one pass; 0: they are not
    evaluate.chunk = 0.0
    return evaluate


SECTION = shared.Section(fields, check)
EVAL = shared.Section(eval_fields, lambda config: None)
