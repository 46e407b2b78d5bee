"""config.data: what clips are read or simulated."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vdit.config import default, shared
from vdit.data.labels import by_caption, by_truth
from vdit.data.loader import Source
from vdit.data.mixture import Mixture
from vdit.data.world.oracle import ATTRIBUTES
from vdit.data.world.playground.shots import PlaygroundShots
from vdit.data.world.playground.source import Playground
from vdit.data.world.shots import Shots
from vdit.data.world.source import World
from vdit.errors import UserError


def fields() -> ConfigDict:
    """config.data."""
    data = ConfigDict()
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
    return data


def check(config: ConfigDict) -> None:
    """Refuses values that are not possible, and fields that the source does not take."""
    data = config.data
    shared.check_names(config, {"data.source": SOURCES})
    shared.check_positive(config, "data.fps")
    shared.check_sizes(config, {"data.size": 2, "data.objects": 2, "data.shots": 2})
    shared.check_only(config, (f"data.{name}" for name in OF_TFDS), "data.source", ("tfds",))
    shared.check_only(config, ("data.detail",), "data.source", ("playground",))
    shared.check_only(config, ("data.shots",), "data.source", OF_SHOTS)
    if "{label}" not in data.template:
        raise UserError(f"data.template is {data.template!r}: it has no {{label}}")
    if not 0 <= data.native_fps <= 1000:
        raise UserError(
            f"data.native_fps is {data.native_fps}: 0 (what the set says) to 1000 is allowed"
        )
    if data.label:
        _check_label(config)


def _check_label(config: ConfigDict) -> None:
    """Refuses classes that a source does not have."""
    label, source = config.data.label, config.data.source
    known = {"world": ATTRIBUTES, "folder": ("caption",), "tfds": ("caption",)}.get(source, ())
    if label not in known:
        allowed = ", ".join(known) or "none"
        raise UserError(f"data.label={label!r} with data.source={source}: allowed are {allowed}")
    if source == "world" and tuple(config.data.objects) != (1, 1):
        raise UserError(
            f"data.objects is {tuple(config.data.objects)}: (1, 1) is allowed with data.label,"
            " which is of one body"
        )
    if source == "tfds":
        if config.data.template != shared.value_of(default(), "data.template"):
            raise UserError("data.template with data.label: a class's caption is its name alone")


SECTION = shared.Section(fields, check, free=("threads",))


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
    make = shared.choose(SOURCES, "data.source", config.data.source)
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
