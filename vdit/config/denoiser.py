"""config.dit: the denoiser, a row of `DENOISERS`, with its process and its training."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config import lora, shared
from vdit.config.autoencoder import build_vae
from vdit.config.run import machine
from vdit.config.text import text_content
from vdit.data import sources
from vdit.denoiser import Denoiser, Network
from vdit.diffusion import schedule
from vdit.diffusion.prediction import PREDICTIONS, WEIGHTS
from vdit.errors import UserError
from vdit.models import dit_paper, unet, wan
from vdit.models.dit import AXES, TEXTS, DiT, preset
from vdit.models.text import TextEncoder
from vdit.nn.patch import padded
from vdit.objectives.auxiliary import Weighted, auxiliary, target_names
from vdit.published import image_folder
from vdit.runtime.mesh import sequence_constraint


def fields() -> ConfigDict:
    """config.dit."""
    dit = ConfigDict()
    # vdit; wan (Wan 2.1 and 2.2); or, with one noise level for all tokens, paper (DiT, Latte) or
    # unet (latent diffusion)
    dit.model = "vdit"
    dit.preset = "nano"  # nano, micro, S, B, L, XL, 2B or 10B; or WIDTHxDEPTHxHEADS
    dit.patch = (1, 1)  # rows, columns of latents per token
    # joint: attention over all tokens; factorised: over space and time in turn; windowed: over
    # tiles of dit.window and half a tile around, for long clips
    dit.axes = "joint"
    dit.text = "cross"  # vdit: cross-attention; or context: text tokens in the row (axes=joint)
    dit.window = (4, 8, 8)  # windowed: latent frames, rows and columns (of dit.patch) per tile
    dit.process = "flow"  # flow, cosine; or a beta table: ddpm, scaled_linear (Stable Diffusion)
    dit.learned_variance = False  # beta tables: between posterior and beta, by the hybrid loss
    dit.prediction = "flow"  # what the network predicts: eps, x0, v or flow
    dit.loss_weight = "uniform"  # weight of the squared error over time: uniform or min_snr
    dit.logit_normal = (0.0, 1.3)  # mean and deviation of logit-normal training times; (): uniform
    dit.shift = 4.0  # timestep shift of training and sampling; above 1: more time near pure noise
    dit.pack = (0, 0, 0)  # data.shapes: tokens, samples and caption tokens per row; 0: by the data
    dit.text_drop = 0.1  # share of samples trained without text, for classifier-free guidance
    dit.caption_drop = 0.0  # data.shots: share of captions dropped one by one
    for name, row in DENOISERS.items():
        if row.fields is not None:
            dit[name] = row.fields()
    given = dit.given = ConfigDict()  # share of each conditioning pattern in training (tokens.py)
    given.text = 0.82  # no given frames: text to video
    given.image = 0.0  # the first frame alone
    given.prefix = 0.1  # the first frame, or a span at the start
    given.last = 0.02  # the last frame
    given.first_last = 0.02  # the first and the last frame
    given.suffix = 0.02  # a span at the end
    given.between = 0.02  # the first frame and a span at the end
    # (NAME, WEIGHT) or (NAME, WEIGHT, LAYER) of each auxiliary loss (objectives/auxiliary.py);
    # (): none, as adapters have; ("auto",): AUTO where the source knows its truth and the network
    # has layers
    dit.auxiliary = ("auto",)
    dit.lora = lora.fields()
    # The denoiser of config.init, or of dit.lora.base, guidance included, is learned in few steps
    distill = dit.distill = ConfigDict()
    distill.steps = 0  # steps to sample in; 0: no distillation
    distill.parts = 6  # steps of the teacher in each of them
    dit.train = shared.training(steps=2300, batch=32, learning_rate=0.02)
    dit.train.accumulate = 4  # fastest on CPUs: activations of a micro-batch stay in the cache
    return dit


def check(config: ConfigDict) -> None:
    """Checks the network, the training, and that process, prediction and times fit together."""
    shared.check_training(config, "dit")
    check_dit(config)
    lora.check(config)
    _check_distill(config)
    tables: dict[str, Iterable[str]] = {
        "dit.process": schedule.PROCESSES, "dit.prediction": PREDICTIONS,
        "dit.loss_weight": WEIGHTS,
    }  # fmt: skip
    shared.check_names(config, tables)
    if config.dit.learned_variance and build_process(config).points is None:
        fields = "dit.learned_variance dit.process"
        raise shared.refusal(config, fields, "a beta table such as ddpm is allowed")
    shared.check_only(config, ("dit.wan.boundary",), "dit.model", ("wan",))
    # Traced, without computing: refuses times that do not fit the process.
    jax.eval_shape(training_times(config), jax.ShapeDtypeStruct((1,), jnp.float32))
    if "truth" in targets(config):
        sources.known(config, "truth", "dit.auxiliary")
    for name in ("text_drop", "caption_drop"):
        if not 0.0 <= config.dit[name] <= 1.0:
            raise shared.refusal(config, f"dit.{name}", "0 to 1 is allowed")


def _check_distill(config: ConfigDict) -> None:
    """Checks that there is a teacher, and that it can be followed."""
    steps, parts = config.dit.distill.steps, config.dit.distill.parts
    if not steps:
        return
    if steps < 0 or parts < 1:
        raise shared.refusal(config, "dit.distill.steps dit.distill.parts", "1 or more are allowed")
    if not (config.init or config.dit.lora.base):
        raise shared.refusal(config, "dit.distill.steps init", "a trained workdir is needed")
    if config.data.shapes or tuple(config.dit.auxiliary) not in ((), ("auto",)):
        fields = "dit.distill.steps data.shapes dit.auxiliary"
        raise shared.refusal(config, fields, "clips that are alike and no other loss are allowed")


SECTION = shared.Section(
    fields, check, free=(*shared.FREE_OF_TRAINING, "wan.image_path", "lora.base")
)


class Row(NamedTuple):
    """A denoiser: what dit.model names."""

    build: Callable[..., Any]  # takes the configuration and the options of `build_dit`
    check: Callable[[ConfigDict], None] = lambda config: None
    fields: Callable[[], ConfigDict] | None = None  # its section dit.NAME
    # The field that sets its attention heads, and their numbers, each divisible by mesh.tensor
    heads: Callable[[ConfigDict], tuple[str, tuple[int, ...]]] = lambda config: (
        f"dit.preset={config.dit.preset}",
        (preset(config.dit.preset)["heads"],),
    )


def _build_vdit(config: ConfigDict, **options: Any) -> DiT:
    return DiT(window=tuple(config.dit.window), text=config.dit.text, **options)


def _paper_fields() -> ConfigDict:
    """config.dit.paper; its weights have the published shapes."""
    paper = ConfigDict()
    # in_context, cross_attention, adaln, adaln_zero, or adaln_single (the published Latte)
    paper.conditioning = "adaln_zero"
    paper.classes = 1000  # class labels, not counting the null class; 0: none
    paper.text = False  # cross-attention to text, in place of class labels
    paper.span = 0.0  # positions cover 0 to span over a frame of any size; 0: positions in tokens
    paper.level_theta = 10_000.0  # longest period of the timestep embedding, divided by 2 pi
    paper.epsilons = (1e-6, 1e-6)  # of the norms before attention and before the MLP
    return paper


def _check_paper(config: ConfigDict) -> None:
    """Checks sizes and conditioning of the papers' DiT."""
    paper, size = config.dit.paper, preset(config.dit.preset)
    dit_paper.check(
        paper.conditioning, config.dit.axes, size["width"], size["depth"], size["heads"]
    )
    if bool(paper.classes) == paper.text:
        fields = "dit.paper.classes dit.paper.text"
        raise shared.refusal(config, fields, "one of both is allowed, classes or a text")


def _build_paper(config: ConfigDict, **options: Any) -> dit_paper.DiTPaper:
    return dit_paper.DiTPaper(patch=tuple(config.dit.patch), **config.dit.paper, **options)


def _unet_fields() -> ConfigDict:
    """config.dit.unet; it replaces dit.preset."""
    unet = ConfigDict()
    unet.widths = (320, 640, 1280, 1280)  # channels per level, from full resolution down
    unet.blocks = 2  # residual blocks per level; one more on the way up
    unet.heads = (8, 8, 8, 8)  # attention heads per level
    unet.depths = (1, 1, 1, 0)  # transformer blocks after each residual block of a level
    unet.middle = 1  # transformer blocks in the middle
    unet.groups = 32  # groups of the group norms
    unet.linear = False  # linear layers around the transformers, not 1x1 convolutions
    unet.temporal = True  # layers over time; False: frames are independent
    return unet


def _check_unet(config: ConfigDict) -> None:
    """Checks the sizes of the U-Net."""
    dit = config.dit
    unet.check(**{name: value for name, value in dit.unet.items() if name != "linear"})
    if (dit.preset, dit.axes) != ("nano", "joint"):
        allowed = "nano and joint, the defaults, are allowed; dit.unet has its size"
        raise shared.refusal(config, "dit.preset dit.axes dit.model", allowed)


def _unet_heads(config: ConfigDict) -> tuple[str, tuple[int, ...]]:
    return "dit.unet.heads", tuple(config.dit.unet.heads)


def _build_unet(config: ConfigDict, **options: Any) -> unet.UNet:
    taken = ("learned_variance", "attend", "unroll", "remat", "matmul")
    return unet.UNet(**config.dit.unet, **{name: options[name] for name in taken})


def _wan_fields() -> ConfigDict:
    """config.dit.wan."""
    wan = ConfigDict()
    wan.hidden = 8960  # width of the MLPs
    wan.beside = 0  # image to video: channels of a mask and latents beside the noisy ones, or 20
    wan.image = 0  # Wan 2.1's image to video: width of an image's features (CLIP: 1280)
    wan.image_path = ""  # folder of the image encoder
    wan.token_times = False  # a noise level for each token (TI2V): a video's beginning may be given
    # Two experts (A14B): stage low has the one for noise levels below this, stage dit that for all
    # others. 0: one network for all
    wan.boundary = 0.0
    return wan


def _check_wan(config: ConfigDict) -> None:
    """Checks the sizes of Wan's transformer."""
    size = preset(config.dit.preset)
    wan.check(size["width"], size["heads"])
    shared.check_positive(config, "dit.wan.hidden")
    if min(config.dit.wan.beside, config.dit.wan.image) < 0:
        fields = "dit.wan.beside dit.wan.image"
        raise shared.refusal(config, fields, "numbers of at least 0 are allowed")
    if not 0.0 <= config.dit.wan.boundary < 1.0:
        raise shared.refusal(config, "dit.wan.boundary", "0 to 1 is allowed")
    if config.dit.axes != "joint" or config.dit.learned_variance:
        fields = "dit.axes dit.learned_variance dit.model"
        raise shared.refusal(config, fields, "joint and False, the defaults, are allowed")


def _build_wan(config: ConfigDict, **options: Any) -> wan.Wan:
    taken = {name: x for name, x in options.items() if name not in ("axes", "learned_variance")}
    own = {x: config.dit.wan[x] for x in ("hidden", "beside", "image", "token_times")}
    return wan.Wan(patch=tuple(config.dit.patch), text_length=config.text.length, **own, **taken)


DENOISERS = {
    "vdit": Row(_build_vdit),
    "paper": Row(_build_paper, _check_paper, _paper_fields),
    "unet": Row(_build_unet, _check_unet, _unet_fields, _unet_heads),
    "wan": Row(_build_wan, _check_wan, _wan_fields),
}


def check_dit(config: ConfigDict) -> None:
    """Checks the network's fields."""
    row = shared.choose(DENOISERS, "dit.model", config.dit.model)
    shared.check_names(config, {"dit.axes": AXES, "dit.text": TEXTS})
    shared.check_sizes(config, {"dit.patch": 2, "dit.window": 3})
    shared.check_only(config, ("dit.window",), "dit.axes", ("windowed",))
    if config.dit.axes == "windowed" and config.dit.model != "vdit":
        raise shared.refusal(config, "dit.axes dit.model", "vdit is allowed")
    preset(config.dit.preset)
    row.check(config)


def build_dit(config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None) -> Any:
    """The denoiser, on one device or on a mesh."""
    check_dit(config)
    return DENOISERS[config.dit.model].build(
        config,
        **preset(config.dit.preset),
        axes=config.dit.axes,
        learned_variance=config.dit.learned_variance,
        remat=config.run.remat,
        **machine(config, mesh, platform)._asdict(),
    )


AUTO = (("truth", 0.7),)


def auxiliary_losses(config: ConfigDict, network: Network) -> list[Weighted]:
    """The auxiliary losses that dit.auxiliary names."""
    chosen = tuple(config.dit.auxiliary)
    if chosen == ("auto",):
        alone = config.dit.lora.rank or config.dit.distill.steps
        known = sources.chosen(config).truth and network.layers and not alone
        chosen = AUTO if known else ()
    return auxiliary(chosen, network)


def build_image_encoder(config: ConfigDict) -> image_folder.Encoder | None:
    """The image encoder of a network that reads one's features; None for any other."""
    if config.dit.model != "wan" or not config.dit.wan.image:
        return None
    if not config.dit.wan.image_path:
        raise UserError("dit.wan.image_path is empty: the folder of the image encoder is needed")
    return image_folder.read(config.dit.wan.image_path, machine(config, None, None).matmul)


def conditions_content(config: ConfigDict) -> dict[str, str]:
    """The digests of the folders of the text and the image encoder, if they are known, which
    identify them along with the fields."""
    content = text_content(config) if config.text.path else {}
    if path := config.dit.wan.image_path:
        content["dit.wan.image_content"] = image_folder.content(path)
    return content


def targets(config: ConfigDict) -> tuple[str, ...]:
    """The entries of a batch that auxiliary losses read."""
    return target_names(auxiliary_losses(config, build_dit(config)))


def build_process(config: ConfigDict) -> schedule.Process:
    """The noise process."""
    return schedule.process(config.dit.process)


def training_times(config: ConfigDict, stage: str = "dit") -> Callable[[jax.Array], jax.Array]:
    """The function that turns uniform numbers into training times: of two experts, those of the
    stage's."""
    boundary = config.dit.wan.boundary
    return functools.partial(
        schedule.sample_times,
        build_process(config),
        logit_normal=config.dit.logit_normal or None,
        shift=config.dit.shift,
        between=(0.0, boundary) if stage == "low" else (boundary, 1.0),
    )


def token_shards(config: ConfigDict, mesh: Mesh | None) -> int:
    """The multiple that rows of tokens are padded to, so that a mesh can split them; 1 for
    attention that needs the clip's grid."""
    joint = config.dit.model == "vdit" and config.dit.axes == "joint"
    return mesh.shape["sequence"] if mesh is not None and joint else 1


def token_pixels(config: ConfigDict) -> tuple[int, int]:
    """Rows and columns of pixels per token: videos are padded to multiples of them."""
    (_, q, r), (a, b) = config.vae.patch, config.dit.patch
    return q * a, r * b


def latent_shape(
    config: ConfigDict, frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """Shape (t, h, w, Z) of a clip's latents, padded to full tokens."""
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
