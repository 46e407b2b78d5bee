"""config.sample and config.eval: how a trained workdir generates videos, and how it is scored."""

from ml_collections import ConfigDict

from vdit.config import shared
from vdit.diffusion.sampler import SAMPLERS
from vdit.runtime.averages import LONGEST


def fields() -> ConfigDict:
    """config.sample."""
    sample = ConfigDict()
    sample.sampler = "ddim"  # a row of SAMPLERS in vdit/diffusion/sampler.py
    sample.steps = 25
    sample.shift = 0.0  # timestep shift of sampling alone, with spacing trailing; 0: dit.shift
    # trailing, karras, exponential; on a beta table (trailing: from the last point) leading (to the
    # first); flow_sigmas (diffusers' UniPC for flow models) or wan (Wan's release), whose networks
    # see whole numbers of 1000 t; or times from 1 down, as 1,0.75,0.5, as many as steps
    sample.spacing = "trailing"
    sample.eta = 1.0  # ddim: 0 deterministic, 1 fresh noise, which corrects errors of earlier steps
    sample.variance = "posterior"  # ddpm: posterior, beta or learned
    sample.order = 2  # unipc: 1, 2 or 3
    sample.bh = "bh2"  # unipc: the function B(h), bh1 or bh2
    sample.churn = 0.0  # edm: fresh noise before a step, gamma = S_churn / N; at most 0.414
    sample.churn_levels = (0.05, 50.0)  # edm: sigma / alpha between which there is churn
    sample.churn_noise = 1.003  # edm: factor of that noise
    sample.guidance = 2.5  # classifier-free guidance scale; 1: off
    # That of Wan's expert for low noise levels; 0, or sample.guidance=1: sample.guidance
    sample.guidance_low = 0.0
    sample.guidance_levels = (0.0, 1.0)  # noise levels (sigma) between which guidance applies
    sample.guidance_parallel = 1.0  # share of its part along the conditional x0; 0: APG, 1: all
    sample.guidance_radius = 0.0  # most root mean square of cond - null; 0: no limit
    # vdit: autoguidance scale minus 1; the degraded network skips attention. 0: off
    sample.push = 0.0
    sample.push_above = 0.5  # noise level (sigma) above which autoguidance applies
    sample.skip = (0.25, 0.75)  # part of the depth where the degraded network skips attention
    # Length of the average of the weights, as a share of the training (sigma_rel of post-hoc EMA),
    # from what dit.train.averages kept; 0: the average of dit.train.ema
    sample.ema = 0.0
    sample.clips = 16  # videos that stage sample generates
    sample.batch = 64  # videos generated at a time
    sample.zoom = 8  # magnification of small videos in pictures
    return sample


def check(config: ConfigDict) -> None:
    """Checks the sampler and the sizes."""
    shared.check_names(config, {"sample.sampler": SAMPLERS})
    shared.check_positive(config, "sample.steps", "sample.batch", "sample.clips", "sample.zoom")
    if not 0 <= config.sample.ema <= LONGEST:
        raise shared.refusal(config, "sample.ema", f"0 to {LONGEST} is allowed")


def eval_fields() -> ConfigDict:
    """config.eval."""
    evaluate = ConfigDict()
    evaluate.captions = 256  # held-out captions, half of them of one object, half of two
    evaluate.paraphrases = 128  # how many of them to score in unseen wordings too
    evaluate.given = 64  # clips whose continuation is compared with the ground truth; 0: none
    # world: also generate clips in chunks of this many seconds, to compare with one pass; 0: off
    evaluate.chunk = 0.0
    return evaluate


SECTION = shared.Section(fields, check)
EVAL = shared.Section(eval_fields, lambda config: shared.check_positive(config, "eval.captions"))
