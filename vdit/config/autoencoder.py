"""config.vae and config.latents: the autoencoder, a row of `AUTOENCODERS`, its losses and training,
and the cache of its latents."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config import shared
from vdit.config.run import Machine, machine
from vdit.models import lpips
from vdit.models.autoencoder import Autoencoder
from vdit.models.discriminator import GROUPS, Discriminator
from vdit.models.vae import VAE
from vdit.models.vae_conv import ConvVAE
from vdit.published.lpips import weights_file


def fields() -> ConfigDict:
    """config.vae."""
    vae = ConfigDict()
    # vivit: causal transformer; kl: latent diffusion's convolutions, frame by frame; causal: Wan's
    # causal convolutions
    vae.model = "vivit"
    vae.patch = (4, 8, 8)  # frames, rows, columns per latent position (kl: 1 frame); powers of two
    vae.channels = 24  # latent channels
    vae.width = 128  # hidden width; kl, causal: channels of the first level
    vae.multipliers = (1, 2, 4, 4)  # kl, causal: channels of each level, in units of vae.width
    vae.blocks = 2  # kl, causal: residual blocks per level; the decoder has one more
    vae.groups = 32  # kl: groups of the group norm
    vae.pixels = 1  # causal: side of the pixel squares that are folded into channels first
    vae.residual = False  # causal: shortcuts around levels by averaging and duplicating (Wan 2.2)
    vae.decoder_width = 0  # causal: vae.width of the decoder; 0: the same
    vae.encoder_depth = 2  # vivit: encoder layers
    vae.decoder_depth = 2  # vivit: decoder layers
    vae.heads = 4  # vivit: attention heads
    vae.window = 4  # vivit: latent frames that causal attention covers, including the current one
    vae.mlp_ratio = 4.0  # vivit: hidden width of the MLPs, in units of vae.width
    vae.detail = 512  # vivit: hidden width of an MLP parallel to the linear map to pixels; 0: none
    vae.activation = "gelu"  # vivit: gelu (tanh approximation), gelu_erf, silu or relu2
    vae.chunk = 16  # latent frames encoded or decoded at a time
    vae.tile = 512  # side in pixels of the blended tiles that decode larger frames; 0: no tiles
    vae.kl_weight = 1e-3  # weight of the KL divergence, averaged over latent elements
    vae.l1_weight = 0.0  # weight of the L1 error, added to the squared error
    # Further weight of the squared error where bodies are; for simulated clips
    vae.body_weight = 0.0
    # Trained on squares of each clip: their side in pixels and their number; side 0: whole frames.
    # With vae.body_weight they are chosen where bodies are
    vae.crop = (0, 1)
    vae.lpips_weight = 0.0  # weight of the perceptual loss; needs pip install 'vdit[lpips]'
    vae.lpips_net = "alex"  # network of the perceptual loss: alex or vgg
    # Weight of the adversarial loss, times the ratio of the other losses' gradient norm to its own
    # at the decoder's last layer; 0: no discriminator
    vae.adversarial_weight = 0.0
    vae.adversarial_start = 1000  # steps before the adversarial loss begins
    vae.adversarial_width = 32  # channels of the discriminator's first level
    vae.adversarial_levels = 3  # levels of the discriminator; each halves height and width
    vae.train = shared.training(steps=2500, batch=8, learning_rate=0.03)
    vae.train.ema = 0.99
    vae.train.discriminator = ConfigDict()  # overrides of vae.train for the discriminator
    vae.train.discriminator.adam_learning_rate = 2e-4
    return vae


def latents_fields() -> ConfigDict:
    """config.latents."""
    latents = ConfigDict()
    latents.clips = 12_000  # clips to encode; of a folder at most all
    latents.batch = 64  # clips encoded at a time
    latents.shard = 1024  # clips per file
    latents.features = True  # cache features of a frozen text encoder along with the token ids
    return latents


def check(config: ConfigDict) -> None:
    """Checks the network, its losses and its training."""
    shared.check_training(config, "vae")
    check_vae(config)
    _check_losses(config)


SECTION = shared.Section(fields, check, free=("chunk", "tile", *shared.FREE_OF_TRAINING))
LATENTS = shared.Section(
    latents_fields,
    lambda config: shared.check_positive(config, "latents.clips", "latents.batch", "latents.shard"),
    free=("batch",),
)


class Row(NamedTuple):
    """An autoencoder: what vae.model names."""

    check: Callable[[ConfigDict], None]
    build: Callable[[ConfigDict, Machine], Autoencoder]


def _check_vivit(config: ConfigDict) -> None:
    sizes = ("width", "encoder_depth", "decoder_depth", "mlp_ratio")
    shared.check_positive(config, *(f"vae.{name}" for name in sizes))
    heads, width = config.vae.heads, config.vae.width
    if heads < 1 or width % (2 * heads):
        raise shared.refusal(config, "vae.heads vae.width", "heads of even width are allowed")


def _build_vivit(config: ConfigDict, machine: Machine) -> VAE:
    names = (
        "channels", "width", "encoder_depth", "decoder_depth", "heads", "window", "mlp_ratio",
        "activation", "detail",
    )  # fmt: skip
    return VAE(
        patch=tuple(config.vae.patch),
        **machine._asdict(),
        **{name: config.vae[name] for name in names},
    )


def _conv(config: ConfigDict, **options: Any) -> ConvVAE:
    vae, causal = config.vae, config.vae.model == "causal"
    return ConvVAE(
        patch=tuple(vae.patch),
        channels=vae.channels,
        widths=tuple(vae.width * m for m in vae.multipliers),
        decoder_widths=tuple((vae.decoder_width or vae.width) * m for m in vae.multipliers),
        blocks=vae.blocks,
        causal=causal,
        groups=0 if causal else vae.groups,
        pixels=vae.pixels,
        residual=vae.residual,
        **options,
    )


def _check_conv(config: ConfigDict) -> None:
    """Checks the levels and widths of a convolutional autoencoder."""
    vae, causal = config.vae, config.vae.model == "causal"
    levels, (p, q, r) = tuple(vae.multipliers), vae.patch
    side = max(vae.pixels, 1) * 2 ** max(len(levels) - 1, 0)
    times = tuple(2**i for i in range(len(levels))) if causal else (1,)
    if not levels or min(levels) < 1 or (q, r) != (side, side) or p not in times:
        fields = "vae.patch vae.multipliers vae.pixels vae.model"
        allowed = f"{side} rows and columns are allowed, and {times} frames"
        raise shared.refusal(config, fields, allowed)
    shared.check_positive(config, "vae.blocks", "vae.width", "vae.pixels")
    if vae.decoder_width < 0:
        raise shared.refusal(config, "vae.decoder_width", "0 or more is allowed")
    model = _conv(config)
    if not causal and (vae.groups < 1 or any(width % vae.groups for width in model.widths)):
        raise shared.refusal(config, "vae.groups", f"it must divide the widths {model.widths}")
    if vae.residual:
        model.check()
    elif causal and any(width % 2 for width in model.decoder_widths):
        fields = "vae.decoder_width vae.width vae.multipliers"
        raise shared.refusal(config, fields, "even numbers of channels are allowed")


def _build_conv(config: ConfigDict, machine: Machine) -> ConvVAE:
    return _conv(config, attend=machine.attend, matmul=machine.matmul)


AUTOENCODERS = {
    "vivit": Row(_check_vivit, _build_vivit),
    "kl": Row(_check_conv, _build_conv),
    "causal": Row(_check_conv, _build_conv),
}
OF_CAUSAL = ("vae.pixels", "vae.residual", "vae.decoder_width")


def check_vae(config: ConfigDict) -> None:
    """Checks the network's fields."""
    row = shared.choose(AUTOENCODERS, "vae.model", config.vae.model)
    shared.check_sizes(config, {"vae.patch": 3})
    shared.check_positive(config, "vae.window", "vae.channels", "vae.chunk")
    shared.check_only(config, OF_CAUSAL, "vae.model", ("causal",))
    least = 4 * max(config.vae.patch[1:])
    if config.vae.tile and config.vae.tile < least:
        raise shared.refusal(config, "vae.tile", f"0 (none) and {least} or more are allowed")
    row.check(config)


def build_vae(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> Autoencoder:
    """The autoencoder, on one device or on a mesh."""
    check_vae(config)
    return AUTOENCODERS[config.vae.model].build(config, machine(config, mesh, platform))


def _check_losses(config: ConfigDict) -> None:
    """Checks the losses; the perceptual loss needs its weights installed."""
    vae, size = config.vae, tuple(config.data.size)
    side, count = vae.crop if len(vae.crop) == 2 else (0, 0)
    if count < 1 or side > min(size) or any(side % each for each in vae.patch[1:]):
        rows, columns = vae.patch[1:]
        allowed = f"(a multiple of {rows} and {columns} up to {min(size)}, 1 or more)"
        raise shared.refusal(config, "vae.crop vae.patch data.size", f"{allowed} is allowed")
    size = (side, side) if side else size
    shared.check_names(config, {"vae.lpips_net": lpips.NETS})
    for name in ("body_weight", "lpips_weight", "adversarial_weight", "adversarial_start"):
        if vae[name] < 0:
            raise shared.refusal(config, f"vae.{name}", "0 or more is allowed")
    width, levels = vae.adversarial_width, vae.adversarial_levels
    if width < GROUPS or width % GROUPS:
        raise shared.refusal(config, "vae.adversarial_width", f"a multiple of {GROUPS} is allowed")
    if levels < 1 or (vae.adversarial_weight and min(size) < 2**levels):
        allowed = "1 to the number of times that the frame can be halved is allowed"
        raise shared.refusal(config, "vae.adversarial_levels data.size", allowed)
    if vae.lpips_weight:
        least = lpips.NETS[vae.lpips_net].least
        if min(size) < least:
            allowed = f"{least} rows and columns or more are allowed"
            raise shared.refusal(config, "data.size vae.lpips_net", allowed)
        weights_file(vae.lpips_net)


def build_lpips(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> lpips.LPIPS:
    """The network of the perceptual loss."""
    return lpips.LPIPS(config.vae.lpips_net, machine(config, mesh, platform).matmul.dtype)


def build_discriminator(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> Discriminator:
    """The PatchGAN discriminator for video."""
    matmul = machine(config, mesh, platform).matmul
    return Discriminator(config.vae.adversarial_width, config.vae.adversarial_levels, matmul)
