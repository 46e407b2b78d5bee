"""config.dit: the denoiser, one row of `DENOISERS`, with its process and its training."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config import shared
from vdit.config.autoencoder import build_vae
from vdit.config.run import machine
from vdit.denoiser import Denoiser
from vdit.diffusion import schedule
from vdit.diffusion.prediction import PREDICTIONS, WEIGHTS
from vdit.errors import UserError
from vdit.models import dit_paper, unet
from vdit.models.dit import AXES, TEXTS, DiT, preset
from vdit.models.text import TextEncoder
from vdit.nn.patch import padded
from vdit.objectives.auxiliary import auxiliary
from vdit.runtime.mesh import sequence_constraint


def fields() -> ConfigDict:
    """config.dit."""
    dit = ConfigDict()
    # or with one time for all tokens: paper, DiT as published, and Latte; unet, latent diffusion's
    dit.model = "vdit"
    dit.preset = "nano"  # nano, micro, S, B, L or XL; or WIDTHxDEPTHxHEADS
    dit.patch = (1, 1)  # rows, columns of latents in one token
    # joint: attention over all tokens; factorised: over space and time in turn; windowed: over
    # tiles of dit.window and half a tile around, for length
    dit.axes = "joint"
    # vdit: every block attends to the text (cross), or rows hold its tokens too (context: joint)
    dit.text = "cross"
    dit.window = (4, 8, 8)  # windowed: latent frames, rows and columns (of dit.patch) of a tile
    # flow, cosine, or a table: ddpm, scaled_linear (Stable Diffusion's)
    dit.process = "flow"
    dit.learned_variance = False  # a table: between posterior and beta, by the hybrid loss
    dit.prediction = "flow"  # what the network predicts: eps, x0, v or flow
    dit.loss_weight = "uniform"  # of the squared error by time: uniform or min_snr
    dit.logit_normal = (0.0, 1.3)  # mean and deviation of the training times' logits; (): uniform
    dit.shift = 4.0  # more than 1 puts more training and sampling times near pure noise
    # data.shapes: tokens, samples and caption tokens of a row; 0 is chosen from the data
    dit.pack = (0, 0, 0)
    dit.text_drop = 0.1  # share of samples whose captions are dropped, for guidance
    dit.caption_drop = 0.0  # data.shots: share of captions that are dropped one by one
    for name, row in DENOISERS.items():
        if row.fields is not None:
            dit[name] = row.fields()
    given = dit.given = ConfigDict()  # shares of what is given in training (see tokens.patterns)
    given.text = 0.82  # nothing
    given.prefix = 0.1  # the first frame, or a span before
    given.last = 0.02  # an image at the end
    given.first_last = 0.02  # images at both ends
    given.suffix = 0.02  # a span after
    given.between = 0.02  # an image before, a span after
    # (NAME, WEIGHT) of each auxiliary loss; see objectives/auxiliary.py
    dit.auxiliary = ()
    dit.train = shared.training(steps=2300, batch=32, learning_rate=0.02)
    dit.train.accumulate = 4  # a part's activations stay in a CPU's cache: less time a step
    return dit


def check(config: ConfigDict) -> None:
    """Refuses what `build_dit`, `build_process` or the training would refuse late."""
    shared.check_training(config, "dit")
    check_dit(config)
    check_process(config)
    auxiliary(config.dit.auxiliary, build_dit(config))
    if not 0.0 <= config.dit.caption_drop <= 1.0:
        raise UserError(f"dit.caption_drop is {config.dit.caption_drop}: 0 to 1 is allowed")


SECTION = shared.Section(fields, check, free=shared.FREE_OF_TRAINING)


class Row(NamedTuple):
    """A denoiser that dit.model names."""

    build: Callable[..., Any]  # of the configuration and the options of `build_dit`
    check: Callable[[ConfigDict], None] = lambda config: None
    fields: Callable[[], ConfigDict] | None = None  # of a section of its own, dit.NAME
    # What its attention heads follow from, and their numbers; a mesh's tensor must divide them.
    heads: Callable[[ConfigDict], tuple[str, tuple[int, ...]]] = lambda config: (
        f"dit.preset={config.dit.preset}", (preset(config.dit.preset)["heads"],)
    )


def _build_vdit(config: ConfigDict, **options: Any) -> DiT:
    return DiT(window=tuple(config.dit.window), text=config.dit.text, **options)


def _paper_fields() -> ConfigDict:
    """config.dit.paper; shapes as its published weights have them."""
    paper = ConfigDict()
    # in_context, cross_attention, adaln, adaln_zero, or adaln_single (the published Latte)
    paper.conditioning = "adaln_zero"
    paper.classes = 1000  # without the null class; 0: no classes
    paper.text = False  # attends to a text
    paper.span = 0.0  # positions go from 0 to it over a frame of any size; 0: they count tokens
    paper.level_theta = 10_000.0  # longest period of the time's features, over 2 pi
    paper.epsilons = (1e-6, 1e-6)  # of the norms before attention and MLP
    return paper


def _check_paper(config: ConfigDict) -> None:
    """Refuses what no DiT of the paper can be."""
    paper, size = config.dit.paper, preset(config.dit.preset)
    dit_paper.check(
        paper.conditioning, config.dit.axes, size["width"], size["depth"], size["heads"]
    )
    if bool(paper.classes) == paper.text:
        raise UserError(
            f"dit.paper.classes={paper.classes} with dit.paper.text={paper.text}: one of both is"
            " allowed, classes or a text"
        )


def _build_paper(config: ConfigDict, **options: Any) -> dit_paper.DiTPaper:
    return dit_paper.DiTPaper(patch=tuple(config.dit.patch), **config.dit.paper, **options)


def _unet_fields() -> ConfigDict:
    """config.dit.unet; the U-Net's size is not dit.preset's."""
    unet = ConfigDict()
    unet.widths = (320, 640, 1280, 1280)  # channels of each level: full size, half of it, ...
    unet.blocks = 2  # residual blocks of a level; one more on the way up
    unet.heads = (8, 8, 8, 8)  # attention heads of each level
    unet.depths = (1, 1, 1, 0)  # transformer blocks behind each residual block of a level, or none
    unet.middle = 1  # and in the middle
    unet.groups = 32  # of the group norms
    unet.linear = False  # transformers begin and end in linear layers, not convolutions of 1 pixel
    unet.temporal = True  # layers over time; False: each frame by itself
    return unet


def _check_unet(config: ConfigDict) -> None:
    """Refuses what no U-Net can be."""
    dit = config.dit
    unet.check(**{name: value for name, value in dit.unet.items() if name != "linear"})
    if (dit.preset, dit.axes) != ("nano", "joint"):
        raise UserError(
            f"dit.preset={dit.preset}, dit.axes={dit.axes} with dit.model=unet: its size is"
            " dit.unet's, and nano and joint, the defaults, are allowed"
        )


def _unet_heads(config: ConfigDict) -> tuple[str, tuple[int, ...]]:
    return "dit.unet.heads", tuple(config.dit.unet.heads)


def _build_unet(config: ConfigDict, **options: Any) -> unet.UNet:
    taken = ("learned_variance", "attend", "unroll", "remat", "matmul")
    return unet.UNet(**config.dit.unet, **{name: options[name] for name in taken})


DENOISERS = {
    "vdit": Row(_build_vdit),
    "paper": Row(_build_paper, _check_paper, _paper_fields),
    "unet": Row(_build_unet, _check_unet, _unet_fields, _unet_heads),
}


def check_dit(config: ConfigDict) -> None:
    """Refuses a network that there is not."""
    row = shared.choose(DENOISERS, "dit.model", config.dit.model)
    shared.check_names(config, {"dit.axes": AXES, "dit.text": TEXTS})
    shared.check_sizes(config, {"dit.patch": 2, "dit.window": 3})
    shared.check_only(config, ("dit.window",), "dit.axes", ("windowed",))
    if config.dit.axes == "windowed" and config.dit.model != "vdit":
        raise UserError(f"dit.axes=windowed with dit.model={config.dit.model}: vdit is allowed")
    preset(config.dit.preset)
    row.check(config)


def build_dit(config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None) -> Any:
    """The denoiser, for one device or for steps on a mesh."""
    check_dit(config)
    return DENOISERS[config.dit.model].build(
        config,
        **preset(config.dit.preset),
        axes=config.dit.axes,
        learned_variance=config.dit.learned_variance,
        remat=config.run.remat,
        **machine(config, mesh, platform)._asdict(),
    )


def check_process(config: ConfigDict) -> None:
    """Refuses a process, a prediction and times that do not go together."""
    tables: dict[str, Iterable[str]] = {
        "dit.process": schedule.PROCESSES, "dit.prediction": PREDICTIONS,
        "dit.loss_weight": WEIGHTS,
    }  # fmt: skip
    shared.check_names(config, tables)
    if config.dit.learned_variance and build_process(config).points is None:
        raise UserError(
            f"dit.learned_variance needs a table as dit.process=ddpm, not {config.dit.process}"
        )
    # Traced, so that no device is touched: it refuses what does not fit the process.
    jax.eval_shape(training_times(config), jax.ShapeDtypeStruct((1,), jnp.float32))


def build_process(config: ConfigDict) -> schedule.Process:
    """The noise process."""
    return schedule.process(config.dit.process)


def training_times(config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """The function from uniform numbers to training times."""
    return functools.partial(
        schedule.sample_times,
        build_process(config),
        logit_normal=config.dit.logit_normal or None,
        shift=config.dit.shift,
    )


def token_shards(config: ConfigDict, mesh: Mesh | None) -> int:
    """What a row's tokens are filled up to a multiple of, so that a mesh can split them; 1 where a
    denoiser's attention needs the clip's grid."""
    joint = config.dit.model == "vdit" and config.dit.axes == "joint"
    return mesh.shape["sequence"] if mesh is not None and joint else 1


def token_pixels(config: ConfigDict) -> tuple[int, int]:
    """Rows and columns of pixels of one token: videos are padded to a multiple of them."""
    (_, q, r), (a, b) = config.vae.patch, config.dit.patch
    return q * a, r * b


def latent_shape(
    config: ConfigDict, frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """Latents (t, h, w, Z) of a clip, padded to whole tokens."""
    return build_vae(config).latent_shape(frames, *padded((height, width), token_pixels(config)))


def build_denoiser(
    config: ConfigDict,
    encoder: TextEncoder,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> Denoiser:
    """The denoiser with its process and its conditions, for one device or for steps on a mesh."""
    return Denoiser(
        build_dit(config, mesh, platform),
        build_process(config),
        config.dit.prediction,
        encoder,
        tuple(config.dit.patch),
        multiple=token_shards(config, mesh),
        **({} if mesh is None else {"constrain": sequence_constraint(mesh)}),
    )
