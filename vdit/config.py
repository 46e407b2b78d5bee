"""The configuration: every field with its default; an experiment states only what differs."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

ROAD = ("vae", "latents", "dit", "sample", "eval")  # from pixels to samples, in order
STAGES = (*ROAD, "classify")  # what a run may walk


def default() -> ConfigDict:
    """The whole configuration, locked: a typo in a field's name is an error."""
    config = ConfigDict()
    config.seed = 0
    config.stages = ROAD  # what --mode=run walks

    data = config.data = ConfigDict()
    # world: simulated physics; shots: the same in several shots; playground: characters with
    # materials and faces, cameras, things to climb and topple; folder: videos with captions; tfds:
    # a prepared TFDS video set
    data.source = "world"
    data.path = ""  # folder: where the files are; tfds: the data_dir, the folder above SET
    data.name = ""  # tfds: SET[/CONFIG][:VERSION]; empty: the only set there
    data.native_fps = 0.0  # tfds: rate of the set's own frames; 0: "fps" of its metadata.json
    data.template = "a video of {label}"  # tfds: caption of a set that has classes for captions
    data.video_field = ""  # tfds: the feature that holds the videos; empty: found by its type
    data.caption_field = ""  # tfds: a Text or ClassLabel; empty: the only one, or by its name
    # What a clip's class is, for dit.paper.classes. world: shape, colour, size or motion of its one
    # body; folder, tfds: "caption", each different one (of tfds the ClassLabel) is a class
    data.label = ""
    data.frames = 17  # frames of a clip: 1 + k * the VAE's temporal patch
    data.size = (32, 32)  # height, width in pixels
    data.fps = 10.0  # frames a second
    data.objects = (1, 2)  # world, shots, playground (up to 6): least and most bodies in a clip
    data.shots = (1, 1)  # shots, playground (to (1, 4)): least and most shots in a clip
    # playground: captions go up to 0 a clause, 1 a sentence, 2 with events, 3 hundreds of words
    data.detail = 3
    data.stride = 1.0  # folder, tfds: seconds between the starts of clips cut from one film
    data.threads = 1  # threads that read ahead
    # What the DiT learns from, where that is not clips of the above: rows of (frames, height,
    # width, fps), which the clips have in turn and which are packed into rows of one length. Films
    # of a folder have only those that suit their aspect.
    data.shapes = ()

    text = config.text = ConfigDict()
    # learned: trained with the DiT; minilm, t5, umt5, clip: pretrained, frozen; none: no text
    text.encoder = "learned"
    text.path = ""  # t5, umt5, clip: folder with config.json, tokenizer.json and safetensors
    # Budget of a caption in tokens; a longer one is refused. Where it is more than minilm or clip
    # have positions for, captions that need it are encoded in chunks.
    text.length = 40
    text.padding = False  # clip, dit.model=unet: padding is attended to, as in Stable Diffusion
    text.vocab = 1024  # learned: size of the byte-level BPE vocabulary
    text.width = 128  # learned: width of the encoder
    text.depth = 2  # learned: layers
    text.heads = 4  # learned: attention heads

    vae = config.vae = ConfigDict()
    # vivit; or convolutions: kl (latent diffusion's, frame by frame), causal (Wan's)
    vae.model = "vivit"
    vae.patch = (4, 8, 8)  # frames, rows, columns of a latent place; kl: 1 frame; powers of two
    vae.channels = 24  # latent channels
    vae.width = 128
    vae.multipliers = (1, 2, 4, 4)  # kl, causal: of the width, at full size, half of it, ...
    vae.blocks = 2  # kl, causal: residual blocks of a level; the decoder has one more
    vae.groups = 32  # kl: of the group norm
    vae.pixels = 1  # causal: side of squares of pixels that are folded into channels first
    vae.residual = False  # causal: levels beside averages and duplicates of their input (Wan 2.2's)
    vae.decoder_width = 0  # causal: in place of vae.width in the decoder; 0: the same
    vae.encoder_depth = 2  # vivit, as those below: layers
    vae.decoder_depth = 2
    vae.heads = 4
    vae.window = 4  # latent frames that attention looks back over, its own included
    vae.mlp_ratio = 4.0
    vae.detail = 512  # vivit: hidden width of an MLP beside the linear map to pixels; 0: none
    vae.activation = "gelu"  # gelu (by tanh), gelu_erf, silu or relu2
    vae.chunk = 16  # latent frames that are encoded or decoded at a time
    vae.tile = 512  # larger frames are decoded in blended tiles of so many pixels a side; 0: never
    vae.kl_weight = 1e-3  # weight of the KL, a mean over latent elements
    vae.l1_weight = 0.0  # weight of the absolute error beside the squared
    vae.lpips_weight = 0.0  # weight of LPIPS beside them; needs pip install 'vdit[lpips]'
    vae.lpips_net = "alex"  # its network: alex or vgg
    # Of a discriminator's judgement, times how much smaller its gradient is at the last layer than
    # that of the errors above; 0: no discriminator.
    vae.adversarial_weight = 0.0
    vae.adversarial_start = 1000  # steps before it begins
    vae.adversarial_width = 32  # of its first level
    vae.adversarial_levels = 3  # each halves height and width
    vae.train = _training(steps=2500, batch=8, learning_rate=0.03)
    vae.train.ema = 0.99
    vae.train.discriminator = ConfigDict()  # what differs for this group of parameters
    vae.train.discriminator.adam_learning_rate = 2e-4

    latents = config.latents = ConfigDict()
    latents.clips = 12_000  # clips to encode (a folder's own number, where that is less)
    latents.batch = 64
    latents.shard = 1024  # clips in one file
    latents.features = True  # store a frozen encoder's text features beside the token ids

    dit = config.dit = ConfigDict()
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
    paper = dit.paper = ConfigDict()  # dit.model=paper; shapes as its published weights have them
    # in_context, cross_attention, adaln, adaln_zero, or adaln_single (the published Latte)
    paper.conditioning = "adaln_zero"
    paper.classes = 1000  # without the null class; 0: no classes
    paper.text = False  # attends to a text
    paper.span = 0.0  # positions go from 0 to it over a frame of any size; 0: they count tokens
    paper.level_theta = 10_000.0  # longest period of the time's features, over 2 pi
    paper.epsilons = (1e-6, 1e-6)  # of the norms before attention and MLP
    unet = dit.unet = ConfigDict()  # dit.model=unet, whose size is not dit.preset's
    unet.widths = (320, 640, 1280, 1280)  # channels of each level: full size, half of it, ...
    unet.blocks = 2  # residual blocks of a level; one more on the way up
    unet.heads = (8, 8, 8, 8)  # attention heads of each level
    unet.depths = (1, 1, 1, 0)  # transformer blocks behind each residual block of a level, or none
    unet.middle = 1  # and in the middle
    unet.groups = 32  # of the group norms
    unet.linear = False  # transformers begin and end in linear layers, not convolutions of 1 pixel
    unet.temporal = True  # layers over time; False: each frame by itself
    given = dit.given = ConfigDict()  # shares of what is given in training (see tokens.patterns)
    given.text = 0.82  # nothing
    given.prefix = 0.1  # the first frame, or a span before
    given.last = 0.02  # an image at the end
    given.first_last = 0.02  # images at both ends
    given.suffix = 0.02  # a span after
    given.between = 0.02  # an image before, a span after
    dit.train = _training(steps=2300, batch=32, learning_rate=0.02)
    dit.train.accumulate = 4  # a part's activations stay in a CPU's cache: less time a step

    classify = config.classify = ConfigDict()  # ViViT
    # SIZE/TUBELET: nano, S, B, L, H or WIDTHxDEPTHxHEADS; side x frames, as 16x2
    classify.preset = "nano/8x4"
    classify.model = "joint"  # or factorised_: encoder, self_attention, dot_product
    classify.pool = "token"  # what the head reads: token or mean
    classify.samples = 0  # 0: tubelets; else so many frames, sampled uniformly (tubelets of x1)
    classify.activation = "gelu"  # gelu (by tanh), gelu_erf, silu or relu2
    classify.mlp_ratio = 4.0
    classify.epsilon = 1e-6  # of the norms
    classify.classes = 0  # of an imported head (classes.json names them); 0: the questions' answers
    classify.questions = ("motion", "impacts")  # also shape, colour and size
    classify.smoothing = 0.1  # share of the target that is spread over all answers
    classify.heldout = 512  # clips that the accuracy is of
    classify.train = _training(steps=600, batch=32, learning_rate=0.02)

    sample = config.sample = ConfigDict()
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

    evaluate = config.eval = ConfigDict()
    evaluate.captions = 256  # held-out captions, one- and two-object scenes half and half
    evaluate.paraphrases = 128  # of these, asked in unseen wordings as well
    evaluate.given = 64  # clips whose continuation is scored against the truth, or 0
    # world: seconds that clips are made in at a time, to compare with one pass; 0: they are not
    evaluate.chunk = 0.0

    mesh = config.mesh = ConfigDict()  # devices along each axis; -1 takes what is left
    mesh.data = -1
    mesh.fsdp = 1
    mesh.tensor = 1
    mesh.sequence = 1

    run = config.run = ConfigDict()  # how, not what: dtype and attention change only rounding
    run.dtype = "auto"  # of matmul operands: float32, bfloat16, or what the machine does fastest
    run.attention = "auto"  # by machine and length; or xla, chunked, splash (TPU), cudnn (GPU)
    # tokens split over mesh.sequence exchange heads (ulysses), pass keys round (ring), do both as
    # the heads go (auto), or have all keys everywhere (gather)
    run.sequence = "auto"
    run.unroll = 64  # layers unrolled at a time; 1 compiles fastest
    run.remat = "none"  # rematerialise the DiT's activations: none, dots or full
    run.log_every = 20  # steps between rows of metrics.jsonl
    run.save_every = 200  # steps between checkpoints
    run.keep = 2  # checkpoints that stay
    # Seconds without a step after which a process prints its stacks and ends (ten times as many for
    # a stage's first step, which compiles); 0: for ever
    run.stuck = 1800.0
    run.lost = 60.0  # of several processes: seconds without a sign of one that end all
    config.lock()
    return config


def _training(steps: int, batch: int, learning_rate: float) -> ConfigDict:
    train = ConfigDict()
    train.steps = steps
    train.batch = batch  # samples of one step, over all devices
    train.accumulate = 1  # parts that a step's batch is computed in
    train.optimizer = "muon"  # muon (matrices; the rest by adamw) or adamw
    train.learning_rate = learning_rate  # of the matrices in attention and MLP
    train.adam_learning_rate = 2e-3  # of all other parameters; 0: muon a tenth, adamw the same
    train.weight_decay = 0.0
    train.warmup = 20  # steps
    train.schedule = "cosine"  # cosine, linear or constant after the warm-up
    train.clip = 1.0  # global norm of gradients
    train.ema = 0.995  # decay of the averaged parameters
    return train


# What each stage's result depends on. Fields in FREE are choices of the run: more steps or
# another cadence is no conflict, another model is.
DEPENDS: dict[str, tuple[str, ...]] = {
    "vae": ("seed", "data", "vae"),
    "latents": ("seed", "data", "vae", "latents", "text"),
    "dit": ("seed", "data", "vae", "latents", "text", "dit"),
    "classify": ("seed", "data", "classify"),
}
FREE = {"steps", "threads", "schedule", "warmup"}
# Nor do these (of the path's folder, its content counts).
HOW = {"latents.batch", "text.path", "classify.heldout", "vae.chunk", "vae.tile"}
# Fields that came later: left out at their first value, so that older workdirs go on.
LATER: dict[str, Any] = {
    "data.shapes": (), "dit.pack": (0, 0, 0), "dit.learned_variance": False,
    "data.shots": (1, 1), "data.detail": 3, "dit.caption_drop": 0.0, "dit.model": "vdit",
    "dit.paper.conditioning": "adaln_zero", "dit.paper.classes": 1000, "dit.paper.text": False,
    "dit.window": (4, 8, 8), "dit.text": "cross", "text.padding": False,
    "dit.paper.span": 0.0, "dit.paper.level_theta": 10_000.0, "dit.paper.epsilons": (1e-6, 1e-6),
    "data.name": "", "data.native_fps": 0.0, "data.template": "a video of {label}",
    "data.video_field": "", "data.caption_field": "", "data.label": "",
    "dit.unet.widths": (320, 640, 1280, 1280), "dit.unet.blocks": 2,
    "dit.unet.heads": (8, 8, 8, 8), "dit.unet.depths": (1, 1, 1, 0), "dit.unet.middle": 1,
    "dit.unet.groups": 32, "dit.unet.linear": False, "dit.unet.temporal": True,
    "vae.model": "vivit", "vae.multipliers": (1, 2, 4, 4), "vae.blocks": 2, "vae.groups": 32,
    "vae.detail": 0, "vae.pixels": 1, "vae.residual": False, "vae.decoder_width": 0,
    "vae.lpips_weight": 0.0, "vae.lpips_net": "alex", "vae.adversarial_weight": 0.0,
    "vae.adversarial_start": 1000, "vae.adversarial_width": 32, "vae.adversarial_levels": 3,
    "vae.train.discriminator.adam_learning_rate": 2e-4,
    "classify.activation": "gelu", "classify.mlp_ratio": 4.0, "classify.epsilon": 1e-6,
    "classify.classes": 0,
}  # fmt: skip


def stage_fields(config: ConfigDict, stage: str) -> dict[str, Any]:
    """The fields that a stage's result depends on, flat: {"vae.width": 192, ...}."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, ConfigDict):
            for name in value:
                walk(f"{prefix}.{name}" if prefix else name, value[name])
        elif prefix in LATER and value == LATER[prefix]:
            return
        elif prefix.split(".")[-1] not in FREE and prefix not in HOW:
            flat[prefix] = list(value) if isinstance(value, tuple) else value

    for name in DEPENDS[stage]:
        walk(name, config[name])
    return flat


def digest(fields: dict[str, Any]) -> str:
    """SHA-256 of fields, the same whatever their order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], most: int = 3) -> str:
    """The fields in which two runs differ, as one readable line."""
    names: Iterable[str] = sorted(set(old) | set(new))
    changed = [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    ]
    more = f" and {len(changed) - most} more" if len(changed) > most else ""
    return "; ".join(changed[:most]) + more
