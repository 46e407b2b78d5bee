"""From a configuration to the parts that it names: sources, models, processes, text encoders."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.data.labels import QUESTIONS, by_caption, by_truth
from vdit.data.loader import Source
from vdit.data.mixture import Mixture
from vdit.data.world.playground.shots import PlaygroundShots
from vdit.data.world.playground.source import Playground
from vdit.data.world.shots import Shots
from vdit.data.world.source import World
from vdit.diffusion import schedule
from vdit.errors import UserError
from vdit.models import lpips, text, text_folder, unet, vivit, weights
from vdit.models.autoencoder import Autoencoder
from vdit.models.discriminator import Discriminator
from vdit.models.dit import DiT, preset
from vdit.models.dit_paper import DiTPaper
from vdit.models.minilm import POSITIONS, minilm_tokenizer
from vdit.models.vae import VAE
from vdit.models.vae_conv import ConvVAE
from vdit.nn.attention import Attend
from vdit.nn.patch import padded
from vdit.runtime import attention
from vdit.runtime.files import write_text
from vdit.runtime.machine import operand_dtype
from vdit.runtime.mesh import gather


def choose(table: Any, what: str, name: str) -> Any:
    """table[name]; an unknown name is refused with the list of the known ones."""
    if name not in table:
        raise UserError(f"{what}={name!r}: known are {', '.join(sorted(table))}")
    return table[name]


def token_shards(config: ConfigDict, mesh: Mesh | None) -> int:
    """What a row's tokens are filled up to a multiple of, so that a mesh can split them; 1 where a
    denoiser's attention needs the clip's grid."""
    joint = config.dit.model == "vdit" and config.dit.axes == "joint"
    return mesh.shape["sequence"] if mesh is not None and joint else 1


def check_classes(config: ConfigDict, count: int) -> None:
    """Refuses a model of another number of classes than its source has."""
    if config.dit.paper.classes != count:
        raise UserError(
            f"dit.paper.classes is {config.dit.paper.classes}: {count} is allowed, the number of"
            f" classes of data.source={config.data.source} by data.label={config.data.label}"
        )


def _shape(config: ConfigDict) -> dict[str, Any]:
    """Frames, size and rate of the base clips."""
    data = config.data
    return {"frames": data.frames, "size": tuple(data.size), "fps": data.fps}


def _world(config: ConfigDict, split: str, workdir: Path, **options: Any) -> World:
    del workdir
    options = {**_shape(config), "objects": tuple(config.data.objects), **options}
    return World(config.seed, split, **options)


def _shots(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Shots:
    del workdir
    options = {**_shape(config), "objects": tuple(config.data.objects), **options}
    return Shots(
        config.seed, split, shots=tuple(config.data.shots), align=config.vae.patch[0], **options
    )


def _playground(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Any:
    del workdir
    options = {**_shape(config), "objects": tuple(config.data.objects), **options}
    options["detail"] = config.data.detail
    if not most_shots(config):
        return Playground(config.seed, split, **options)
    shots, align = tuple(config.data.shots), config.vae.patch[0]
    return PlaygroundShots(config.seed, split, shots=shots, align=align, **options)


def _folder(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Any:
    from vdit.data.folder import Folder

    return Folder(
        config.data.path,
        **{**_shape(config), **options},
        stride=config.data.stride,
        seed=config.seed,
        split=split,
        cache=workdir / "clips",
        skipped_path=workdir / "skipped.jsonl",
    )


def _folder_shapes(config: ConfigDict, workdir: Path) -> Mixture:
    """Of the films that train clips of the base shape, each at those shapes that suit its aspect.

    Raises `UserError` for a shape that suits none.
    """
    from vdit.data.folder import fitting, write_skipped

    base = source(config, "train", workdir)
    shapes, root = config.data.shapes, Path(config.data.path)
    sizes = [(int(height), int(width)) for _, height, width, _ in shapes]
    files = [row.file for row in base.rows]
    shown = fitting(root, files, sizes, workdir / "clips" / "aspects.json")
    sources, skipped = [], list(base.skipped)
    for i, (frames, _, _, fps) in enumerate(shapes):
        parts = [row for row in base.rows if i in shown[row.file]]
        if not parts:
            raise UserError(
                f"data.shapes has {tuple(shapes[i])!r}: every film of {root} has an aspect that"
                " another shape suits better; leave it out"
            )
        options = {"frames": int(frames), "size": sizes[i], "fps": fps, "parts": parts}
        sources.append(source(config, "train", workdir, **options))
        skipped += sources[-1].skipped
    write_skipped(workdir / "skipped.jsonl", skipped)
    rates = [float(shape[3]) for shape in shapes]
    mixture = Mixture(sources, rates, endless=False, to_the_end=True)
    mixture.skipped = list(dict.fromkeys(skipped))
    return mixture


def _tfds(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Source:
    from vdit.data.tfds import VideoSet

    return VideoSet(
        config.data.path,
        **{**_shape(config), **options},
        **{name: config.data[name] for name in OF_TFDS if name != "template"},
        template="{label}" if config.data.label else config.data.template,
        stride=config.data.stride,
        seed=config.seed,
        split=split,
        checked=workdir / "tfds.json",
        skipped_path=workdir / "skipped.jsonl",
    )


OF_TFDS = ("name", "native_fps", "template", "video_field", "caption_field")
SOURCES = {
    "world": _world, "shots": _shots, "playground": _playground, "folder": _folder, "tfds": _tfds,
}  # fmt: skip
OF_SHOTS = ("shots", "playground")  # sources that take data.shots
ENDLESS = ("world", "playground")  # sources that simulate clips of one caption


def most_shots(config: ConfigDict) -> int:
    """How many shots a clip has at most; 0 where it has one caption alone."""
    source, most = config.data.source, config.data.shots[1]
    return most if source == "shots" or (source == "playground" and most > 1) else 0


def source(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Any:
    """The clips of a split ("train" or "heldout"), with data.label as `Classed`."""
    make = choose(SOURCES, "data.source", config.data.source)
    clips, label = make(config, split, workdir, **options), config.data.label
    if not label:
        return clips
    if config.data.source == "world":
        return by_truth(clips, label)
    if config.data.source == "tfds":
        if clips.classes is None:
            raise UserError(f"data.label={label}: {clips.name} has no ClassLabel for a caption")
        return by_caption(clips, clips.classes)
    other = make(config, "heldout" if split == "train" else "train", workdir, **options)
    return by_caption(clips, sorted({*clips.captions, *other.captions}))


def token_pixels(config: ConfigDict) -> tuple[int, int]:
    """Rows and columns of pixels of one token: videos are padded to a multiple of them."""
    (_, q, r), (a, b) = config.vae.patch, config.dit.patch
    return q * a, r * b


def latent_shape(
    config: ConfigDict, frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """Latents (t, h, w, Z) of a clip, padded to whole tokens."""
    return vae(config).latent_shape(frames, *padded((height, width), token_pixels(config)))


def training_clips(config: ConfigDict, workdir: Path) -> Any:
    """The clips that are encoded for the DiT: the train split, or its mixture of data.shapes."""
    if not config.data.shapes:
        return source(config, "train", workdir)
    if config.data.source == "folder":
        return _folder_shapes(config, workdir)
    sources = [
        source(
            config, "train", workdir, frames=int(frames), size=(int(height), int(width)), fps=fps
        )
        for frames, height, width, fps in config.data.shapes
    ]
    rates = [float(shape[3]) for shape in config.data.shapes]
    return Mixture(sources, rates, endless=config.data.source in ENDLESS)


# Where a network runs: on one device or, in steps, on a mesh. `platform` says for what kind of
# machine it is, where that is neither the mesh's nor this one.


def _attend(config: ConfigDict, mesh: Mesh | None, platform: str | None) -> Attend:
    choose(attention.KERNELS, "run.attention", config.run.attention)
    return attention.kernel(config.run.attention, mesh, platform, config.run.sequence)


def conv_widths(config: ConfigDict) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of a convolutional autoencoder's levels, in the encoder and in the decoder."""
    vae, both = config.vae, (config.vae.width, config.vae.decoder_width or config.vae.width)
    first, second = (tuple(width * m for m in vae.multipliers) for width in both)
    return first, second


def conv(config: ConfigDict, mesh: Mesh | None, platform: str | None) -> ConvVAE:
    widths, decoder_widths = conv_widths(config)
    causal = config.vae.model == "causal"
    return ConvVAE(
        patch=tuple(config.vae.patch),
        channels=config.vae.channels,
        widths=widths,
        decoder_widths=decoder_widths,
        blocks=config.vae.blocks,
        causal=causal,
        groups=0 if causal else config.vae.groups,
        pixels=config.vae.pixels,
        residual=config.vae.residual,
        attend=_attend(config, mesh, platform),
        dtype=operand_dtype(config.run.dtype, mesh, platform),
    )


def _vivit(config: ConfigDict, mesh: Mesh | None, platform: str | None) -> VAE:
    fields = (
        "channels", "width", "encoder_depth", "decoder_depth", "heads", "window", "mlp_ratio",
        "activation", "detail",
    )  # fmt: skip
    return VAE(
        patch=tuple(config.vae.patch),
        attend=_attend(config, mesh, platform),
        unroll=config.run.unroll,
        dtype=operand_dtype(config.run.dtype, mesh, platform),
        gather=gather(mesh),
        **{name: config.vae[name] for name in fields},
    )


VAES = {"vivit": _vivit, "kl": conv, "causal": conv}


def vae(config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None) -> Autoencoder:
    """The autoencoder, for one device or for steps on a mesh."""
    return choose(VAES, "vae.model", config.vae.model)(config, mesh, platform)


def lpips_net(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> lpips.LPIPS:
    """The network that the autoencoder's reconstructions are compared by."""
    return lpips.LPIPS(config.vae.lpips_net, operand_dtype(config.run.dtype, mesh, platform))


def discriminator(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> Discriminator:
    """The network that the autoencoder learns to fool."""
    dtype = operand_dtype(config.run.dtype, mesh, platform)
    return Discriminator(config.vae.adversarial_width, config.vae.adversarial_levels, dtype)


def _paper(config: ConfigDict, **options: Any) -> DiTPaper:
    return DiTPaper(patch=tuple(config.dit.patch), **config.dit.paper, **options)


def _vdit(config: ConfigDict, **options: Any) -> DiT:
    return DiT(window=tuple(config.dit.window), text=config.dit.text, **options)


def _unet(config: ConfigDict, **options: Any) -> unet.UNet:
    shared = ("learned_variance", "attend", "unroll", "remat", "dtype")
    return unet.UNet(**config.dit.unet, **{name: options[name] for name in shared})


DITS: dict[str, Any] = {"vdit": _vdit, "paper": _paper, "unet": _unet}


def dit(config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None) -> Any:
    """The denoiser, for one device or for steps on a mesh."""
    return choose(DITS, "dit.model", config.dit.model)(
        config,
        **preset(config.dit.preset),
        axes=config.dit.axes,
        learned_variance=config.dit.learned_variance,
        attend=_attend(config, mesh, platform),
        unroll=config.run.unroll,
        remat=config.run.remat,
        dtype=operand_dtype(config.run.dtype, mesh, platform),
        gather=gather(mesh),
    )


def questions(config: ConfigDict) -> dict[str, int]:
    """What the classifier is asked, and how many answers there are to each."""
    if config.classify.classes:
        return {"class": config.classify.classes}
    return {
        name: len(choose(QUESTIONS, "classify.questions", name).classes)
        for name in config.classify.questions
    }


def classifier(
    config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None
) -> vivit.ViViT:
    """The ViViT that answers all questions by one head, for one device or for steps on a mesh."""
    return vivit.ViViT(
        sum(questions(config).values()),
        **vivit.preset(config.classify.preset),
        model=config.classify.model,
        pool=config.classify.pool,
        activation=config.classify.activation,
        mlp_ratio=config.classify.mlp_ratio,
        epsilon=config.classify.epsilon,
        attend=_attend(config, mesh, platform),
        samples=config.classify.samples,
        unroll=config.run.unroll,
        remat=config.run.remat,
        dtype=operand_dtype(config.run.dtype, mesh, platform),
        gather=gather(mesh),
    )


def process(config: ConfigDict) -> schedule.Process:
    """The noise process."""
    return schedule.process(config.dit.process)


def tokenizer(config: ConfigDict, workdir: Path, captions: Any = None) -> text.Tokenizer:
    """The tokenizer in the workdir; made from `captions()` (and saved) if it is not there yet.

    That of an encoder in a folder is read from the folder each time.
    """
    name = config.text.encoder
    if name == "none":
        return text.Tokenizer(text.no_tokenizer(), 1)
    if name in text_folder.FAMILIES:
        read = text_folder.read_tokenizer(name, config.text.path)
        chunk = text_folder.positions(name, config.text.path)
        if config.text.padding and chunk is not None and config.text.length > chunk:
            raise UserError(
                f"text.length is {config.text.length} with text.padding: {chunk}, the positions of"
                f" text.path={config.text.path}, are allowed"
            )
        return text.Tokenizer(read, config.text.length, config.text.padding, chunk)
    path = workdir / "tokenizer.json"
    if not path.exists():
        if captions is None:
            raise UserError(f"{path} is missing: the workdir holds no trained text model")
        if name == "minilm":
            made = minilm_tokenizer()
        else:
            made = text.learned_tokenizer(captions(), config.text.vocab)
        write_text(path, made)
    chunk = POSITIONS if name == "minilm" else None
    return text.Tokenizer(path.read_text(encoding="utf-8"), config.text.length, chunk=chunk)


CLASSES = "classes.json"


def write_classes(config: ConfigDict, workdir: Path, classes: Sequence[str]) -> None:
    """classes.json: the names of a model's classes, in order."""
    check_classes(config, len(classes))
    write_text(workdir / CLASSES, to_json(classes))


def to_json(classes: Sequence[str]) -> str:
    """The content of classes.json."""
    return json.dumps(list(classes), ensure_ascii=False, indent=1) + "\n"


def read_classes(config: ConfigDict, workdir: Path) -> list[str]:
    """The names of a model's classes; numbers where it has none, nothing if it has no classes."""
    count = config.dit.paper.classes if config.dit.model == "paper" else 0
    return _read_names(count, workdir / CLASSES)


def answers(config: ConfigDict, workdir: Path) -> dict[str, list[str]]:
    """The names of the answers to each question of the classifier in a workdir."""
    if config.classify.classes:
        return {"class": _read_names(config.classify.classes, workdir / CLASSES)}
    return {name: list(QUESTIONS[name].classes) for name in questions(config)}


def _read_names(count: int, path: Path) -> list[str]:
    if not count or not path.exists():
        return [str(i) for i in range(count)]
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(names, list) or len(names) != count:
        raise UserError(f"{path}: a list of {count} names is expected")
    return [str(name) for name in names]


class Vocabulary(NamedTuple):
    """What a text encoder's shapes follow from: the tokens that a tokenizer knows."""

    vocab: int


def text_encoder(
    config: ConfigDict,
    tokens: text.Tokenizer | Vocabulary,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> text.TextEncoder:
    """The text encoder."""
    options: dict[str, Any] = {}
    if config.text.encoder == "learned":
        options = {
            "vocab": tokens.vocab,
            "width": config.text.width,
            "depth": config.text.depth,
            "heads": config.text.heads,
            "unroll": min(config.run.unroll, config.text.depth),
            "dtype": operand_dtype(config.run.dtype, mesh, platform),
            "gather": gather(mesh),
        }
    if config.text.encoder in text_folder.FAMILIES:
        options = {"path": config.text.path, "vocab": tokens.vocab}
    return text.encoder(config.text.encoder, **options)


def look_through_text(config: ConfigDict) -> None:
    """Reads the folder of a text encoder; `UserError` for a number that is not finite."""
    if config.text.encoder in text_folder.FAMILIES:
        _, plan = text_folder.read_module(config.text.encoder, config.text.path)
        weights.look_through(plan)


def text_content(config: ConfigDict) -> dict[str, str]:
    """What identifies an encoder beside the configuration's fields: the content of its folder."""
    if config.text.encoder not in text_folder.FAMILIES:
        return {}
    return {"text.content": text_folder.content(config.text.encoder, config.text.path)}


def wordless(
    config: ConfigDict, encoder: text.TextEncoder, tokenizer: text.Tokenizer, params: Any = None
) -> dict[str, np.ndarray]:
    """Features and mask of the text without words, where that stands for no text.

    So it does in a published model with its pretrained encoder (`params`, read if not given); other
    models have a null key.
    """
    told = config.dit.model == "unet" or (config.dit.model == "paper" and config.dit.paper.text)
    if not told or not encoder.frozen:
        return {}
    ids, mask = tokenizer.empty()
    params = encoder.init(jax.random.key(0), ids, mask) if params is None else params
    return {"features": text.encode_features(encoder, params, ids, mask)[0], "mask": mask[0]}
