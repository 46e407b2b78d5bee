"""Data sources: what `data.source` names. Each is a row of a registry, `DataSource`.

The rows of the built-in worlds name their parts by strings, so this module imports no world. Other
packages add rows by an entry point of the group vdit.sources, experiments by `register`.
"""

import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vdit.data.labels import Labelled, Question, by_caption
from vdit.data.loader import Source
from vdit.data.mixture import Mixture, Shares
from vdit.errors import UserError

GROUP = "vdit.sources"  # of entry points
SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A row of the registry; functions and tables may be given as "module:name", imported on use.

    `make(config, split, workdir, **options)` gives the clips of a split, "train" or "heldout", by
    random access: {"video": uint8 (T, H, W, 3), "caption": str}, the same bytes every time; with
    `data.label` they are `labels.Classed`. The options, (frames, size, fps) of `clip_shape` and the
    source's own, override the configuration. A source whose bytes depend on more than the
    configuration (a folder's content, versions) has a `digest`, a string, and may have that of its
    videos alone, `pictures`. `texts()` gives (where, caption) of all clips without their videos.
    """

    make: Callable[..., Source] | str
    # The fields of config.data among OPTIONAL that this source reads.
    takes: tuple[str, ...] = ()
    endless: bool = False  # simulated: any number of clips, no files
    # The least data.shots[1] for which clips have "shots", a list of (start, caption); 0: none has.
    shots_from: int = 0
    labels: tuple[str, ...] = ()  # allowed values of data.label
    questions: Mapping[str, Question] | str | None = None  # for the classifier
    check: Callable[[ConfigDict], None] | str | None = None  # `UserError` for bad configurations
    shapes: Callable[[ConfigDict, Path], Source] | str | None = None  # clips of data.shapes
    # (model, workdir, seed) -> rows of metrics.jsonl. Without it clips get the scores that need no
    # truth; `score_chunks` is for eval.chunk.
    score: Callable[..., list[dict[str, Any]]] | str | None = None
    score_chunks: Callable[..., list[dict[str, Any]]] | str | None = None
    # A clip -> float32 (T, N, F), for dit.auxiliary: of each frame and body whether it is in the
    # picture (0 or 1), row and column in pixels, velocity down and right, and any other numbers;
    # all but the places scaled to deviations of about 1.
    truth: Callable[[Mapping[str, Any]], np.ndarray] | str | None = None
    # A clip -> bool (T, H, W), for vae.body_weight: the pixels in which bodies are.
    bodies: Callable[[Mapping[str, Any]], np.ndarray] | str | None = None
    # (video uint8 (T, H, W, 3), fps) -> what an oracle reads from a clip, in lines for people.
    reading: Callable[[np.ndarray, float], list[str]] | str | None = None

    def part(self, name: str) -> Any:
        """The field `name`, imported where a string names it."""
        value = getattr(self, name)
        return _imported(value) if isinstance(value, str) else value


def _imported(name: str) -> Any:
    """What "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def clip_shape(config: ConfigDict) -> dict[str, Any]:
    """Frames, size and rate of the clips that config.data describes."""
    data = config.data
    return {"frames": data.frames, "size": tuple(data.size), "fps": data.fps}


def _store(config: ConfigDict, workdir: Path) -> Any:
    """The `captioned.Store` of data.source."""
    make, fields = STORES[config.data.source]
    options = {name: config.data[name] for name in fields}
    return _imported(make)(config.data.path, workdir / "clips", **options)


def _captioned(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Source:
    from vdit.data.captioned import Captioned

    heldout = config.data.heldout
    store = options.pop("store", None) or _store(config, workdir)

    def clips(split: str) -> Captioned:
        return Captioned(
            store,
            **{**clip_shape(config), **options},
            stride=config.data.stride,
            strict=config.data.strict,
            seed=config.seed,
            split=split if heldout else "train",
            heldout=heldout,
            cache=workdir / "clips",
            skipped_path=workdir / "skipped.jsonl",
        )

    made = clips(split)
    if not config.data.label:
        return made
    other = clips(SPLITS[1 - SPLITS.index(split)])
    return by_caption(made, sorted({*made.captions, *other.captions}))


def _captioned_shapes(config: ConfigDict, workdir: Path) -> Mixture:
    """Each training film at those of data.shapes that suit its aspect.

    Raises `UserError` for a shape that suits none.
    """
    shapes = range(len(config.data.shapes))
    mixture, used = _shaped(config, workdir, shapes)
    _check_used(config, used, config.data.path)
    return mixture


def _shaped(config: ConfigDict, workdir: Path, shapes: Sequence[int]) -> tuple[Mixture, list[int]]:
    """The training films at those of some of data.shapes that suit; and the numbers of these."""
    from vdit.data.clips import write_skipped
    from vdit.data.films import fitting

    store = _store(config, workdir)
    base: Any = _captioned(config, "train", workdir, store=store)
    sizes = [(int(height), int(width)) for _, height, width, _ in config.data.shapes]
    files, aspects = [row.file for row in base.rows], workdir / "clips" / "aspects.json"
    shown = fitting(store, files, [sizes[i] for i in shapes], aspects)
    made, used, skipped = list[Any](), list[int](), list(base.skipped)
    for number, i in enumerate(shapes):
        frames, _, _, fps = config.data.shapes[i]
        parts = [row for row in base.rows if number in shown[row.file]]
        if not parts:
            continue
        options = {"frames": int(frames), "size": sizes[i], "fps": fps, "parts": parts}
        made.append(_captioned(config, "train", workdir, store=store, **options))
        used.append(i)
        skipped += made[-1].skipped
    write_skipped(workdir / "skipped.jsonl", skipped)
    rates = [float(config.data.shapes[i][3]) for i in used]
    mixture = Mixture(made, rates, endless=False, to_the_end=True)
    mixture.skipped = list(dict.fromkeys(skipped))
    return mixture, used


def _check_used(config: ConfigDict, used: Collection[int], where: str) -> None:
    """Refuses shapes that suit no film."""
    for i, shape in enumerate(config.data.shapes):
        if i not in used:
            raise UserError(
                f"data.shapes has {tuple(shape)!r}: every film of {where} has an aspect that"
                " another shape suits better; leave it out"
            )


def _parts(config: ConfigDict) -> list[tuple[ConfigDict, float]]:
    """The configuration of each source of data.mixture, and its share."""
    parts = []
    for source, path, share, *frames in config.data.mixture:
        part = config.copy_and_resolve_references()
        part.data.source, part.data.path, part.data.mixture = source, path, ()
        part.data.frames = frames[0] if frames else config.data.frames
        parts.append((part, float(share)))
    return parts


def _shares(workdir: Path, made: list[Any], shares: list[float], kinds: Any = None) -> Shares:
    from vdit.data.clips import write_skipped

    mixed = Shares(made, shares, kinds)
    write_skipped(workdir / "skipped.jsonl", mixed.skipped)
    return mixed


def _mixture(config: ConfigDict, split: str, workdir: Path) -> Shares:
    """The sources of data.mixture whose clips have data.frames."""
    parts = [x for x in _parts(config) if x[0].data.frames == config.data.frames]
    made = [_captioned(part, split, workdir) for part, _ in parts]
    return _shares(workdir, made, [share for _, share in parts])


def _mixture_shapes(config: ConfigDict, workdir: Path) -> Shares:
    """Each source of data.mixture at data.shapes, those of other frames at shapes of as many."""
    made, kinds, shapes = list[Any](), list[list[int]](), config.data.shapes
    for part, _ in _parts(config):
        frames = part.data.frames
        own = [i for i, x in enumerate(shapes) if frames in (config.data.frames, x[0])]
        mixture, used = _shaped(part, workdir, own)
        made.append(mixture)
        kinds.append(used)
    _check_used(config, {i for used in kinds for i in used}, "data.mixture")
    return _shares(workdir, made, [share for _, share in _parts(config)], kinds)


def _is_part(part: Any) -> bool:
    """Whether it is (source, path, share), with or without frames."""
    if not isinstance(part, tuple | list) or len(part) not in (3, 4):
        return False
    source, path, share = part[:3]
    sound = isinstance(source, str) and isinstance(path, str) and isinstance(share, int | float)
    return sound and source in STORES and 0 < share < math.inf


def _check_mixture(config: ConfigDict) -> None:
    """Checks data.mixture."""
    data = config.data
    if data.path or not data.mixture:
        raise UserError(
            "data.source=mixture: data.mixture lists (source, path, share), data.path is empty"
        )
    known = [data.frames, *(int(shape[0]) for shape in data.shapes)]
    for part in data.mixture:
        if not _is_part(part):
            raise UserError(
                f"data.mixture has {part!r}: (source, path, share) or (source, path, share, frames)"
                f" is allowed, with a source of {', '.join(STORES)} and a share over 0"
            )
        if part[3:] and (not isinstance(part[3], int) or part[3] not in known):
            raise UserError(
                f"data.mixture has {part!r}: {part[3]!r} frames; data.frames and data.shapes have"
                f" {', '.join(map(str, sorted(set(known))))}"
            )
    if all(part[3:] not in ((), (data.frames,)) for part in map(tuple, data.mixture)):
        raise UserError(f"data.mixture has no source of data.frames={data.frames} frames")


def _tfds(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Source:
    from vdit.data.tfds import VideoSet

    label = config.data.label
    clips = VideoSet(
        config.data.path,
        **{**clip_shape(config), **options},
        **{name: config.data[name] for name in OF_TFDS if name != "template"},
        template="{label}" if label else config.data.template,
        stride=config.data.stride,
        seed=config.seed,
        split=split,
        heldout=config.data.heldout,
        checked=workdir / "tfds.json",
        skipped_path=workdir / "skipped.jsonl",
    )
    if not label:
        return clips
    if clips.classes is None:
        raise UserError(f"data.label={label}: {clips.name} has no ClassLabel for a caption")
    return by_caption(clips, clips.classes)


def _check_tfds(config: ConfigDict) -> None:
    """Checks the template and the rate."""
    if "{label}" not in config.data.template:
        raise UserError(f"data.template is {config.data.template!r}: it has no {{label}}")
    if config.data.label and config.data.template != TEMPLATE:
        raise UserError("data.template with data.label: a class's caption is its name alone")
    if not 0 <= config.data.native_fps <= 1000:
        raise UserError(
            f"data.native_fps is {config.data.native_fps}: 0 (what the set says) to 1000 is allowed"
        )


TEMPLATE = "a video of {label}"  # data.template where nobody has set it
OF_TFDS = ("name", "native_fps", "template", "video_field", "caption_field")
# The fields of config.data that not every source takes.
OPTIONAL = ("detail", "shots", "strict", "heldout", "filter", "mixture", *OF_TFDS)
# Sources of captioned films: their `captioned.Store`, and the fields of config.data that it takes.
FIELDS = ("video_field", "caption_field")
STORES: dict[str, tuple[str, tuple[str, ...]]] = {
    "folder": ("vdit.data.folder:FilmFolder", ()),
    "webdataset": ("vdit.data.tars:Tars", FIELDS),
    "parquet": ("vdit.data.tables:Parquet", (*FIELDS, "filter")),
    "datasets": ("vdit.data.tables:Saved", (*FIELDS, "filter", "name")),
}
BODIES, SHOTS, PLAYGROUND = (f"vdit.worlds.{name}" for name in ("bodies", "shots", "playground"))
SOURCES: dict[str, DataSource] = {
    "world": DataSource(
        f"{BODIES}.source:make",
        endless=True,
        labels=("colour", "shape", "size", "motion"),
        questions=f"{BODIES}.source:QUESTIONS",
        check=f"{BODIES}.source:check",
        score="vdit.worlds.scores:score_bodies",
        score_chunks=f"{BODIES}.length:score",
        truth=f"{BODIES}.source:picture_truth",
        bodies=f"{BODIES}.source:picture_bodies",
        reading="vdit.worlds.reading:world",
    ),
    "shots": DataSource(
        f"{SHOTS}.source:make",
        takes=("shots",),
        endless=True,
        shots_from=1,
        score="vdit.worlds.scores:score_shots",
        truth=f"{BODIES}.source:picture_truth",
        bodies=f"{BODIES}.source:picture_bodies",
        reading="vdit.worlds.reading:shots",
    ),
    "playground": DataSource(
        f"{PLAYGROUND}.shots:make",
        takes=("shots", "detail"),
        endless=True,
        shots_from=2,
        score="vdit.worlds.scores:score_playground",
        truth=f"{PLAYGROUND}.source:picture_truth",
        bodies=f"{PLAYGROUND}.source:picture_bodies",
        reading="vdit.worlds.reading:playground",
    ),
    **{
        name: DataSource(
            _captioned,
            ("strict", "heldout", *fields),
            labels=("caption",),
            shapes=_captioned_shapes,
        )
        for name, (_, fields) in STORES.items()
    },
    "tfds": DataSource(_tfds, takes=("heldout", *OF_TFDS), labels=("caption",), check=_check_tfds),
}
SOURCES["mixture"] = DataSource(
    _mixture,
    ("strict", "heldout", "mixture", *FIELDS),
    check=_check_mixture,
    shapes=_mixture_shapes,
)
BUILT_IN = frozenset(SOURCES)


def register(name: str, source: DataSource) -> None:
    """Adds a source, which `data.source=name` chooses."""
    if name in BUILT_IN:
        raise UserError(f"register({name!r}): this is a source of vdit; choose another name")
    SOURCES[name] = source


def chosen(config: ConfigDict) -> DataSource:
    """The row that data.source names: built in, registered or installed."""
    name = config.data.source
    if name in SOURCES:
        return SOURCES[name]
    installed = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in installed:
        known = ", ".join(sorted({*SOURCES, *installed}))
        raise UserError(f"data.source={name!r}: known are {known}")
    row = installed[name].load()
    if not isinstance(row, DataSource):
        raise UserError(f"data.source={name}: {installed[name].value} is no vdit DataSource")
    return row


def named(has: Callable[[DataSource], bool]) -> str:
    """The names of the sources for which `has` is true."""
    return " and ".join(name for name, row in SOURCES.items() if has(row)) or "none"


def check(config: ConfigDict, defaults: ConfigDict) -> None:
    """Checks the source's name, fields of other sources, and its label.

    `defaults`: the default configuration.
    """
    data, row = config.data, chosen(config)
    for name in OPTIONAL:
        if name not in row.takes and data[name] != defaults.data[name]:
            known = named(lambda other, name=name: name in other.takes)  # type: ignore[misc]
            raise UserError(
                f"data.{name} is given with data.source={data.source}: only {known}"
                f" {'take' if ' and ' in known else 'takes'} it"
            )
    if data.label and data.label not in row.labels:
        raise UserError(
            f"data.label={data.label!r} with data.source={data.source}: allowed are"
            f" {', '.join(row.labels) or 'none'}"
        )
    if row.check is not None:
        row.part("check")(config)


def check_limits(config: ConfigDict) -> None:
    """Makes a simulated source once, which checks its options before anything is trained."""
    if chosen(config).endless:
        training_clips(config, Path())


def class_count(config: ConfigDict) -> int:
    """The number of classes by data.label; 0 if it depends on the clips."""
    known = chosen(config).part("questions") or {}
    return len(known[config.data.label].classes) if config.data.label in known else 0


def questions(config: ConfigDict) -> Mapping[str, Question]:
    """The questions that the classifier can learn from the source's clips."""
    row = chosen(config)
    if row.questions is None:
        known = named(lambda other: other.questions is not None)
        raise UserError(
            f"data.source is {config.data.source}: the stage classify needs labels, which only"
            f" {known} gives"
        )
    return row.part("questions")


def known(config: ConfigDict, name: str, field: str) -> Callable[[Mapping[str, Any]], np.ndarray]:
    """What the source tells of a clip: `DataSource.truth` or `bodies`, which `field` needs;
    `UserError` if it does not know."""
    row = chosen(config)
    if getattr(row, name) is None:
        has = named(lambda other: getattr(other, name) is not None)
        raise UserError(
            f"{field} needs the {name} of clips, and data.source is {config.data.source}: only"
            f" {has} have it"
        )
    return row.part(name)


def most_shots(config: ConfigDict) -> int:
    """The largest number of shots in a clip; 0 for sources of one caption a clip."""
    least, most = chosen(config).shots_from, config.data.shots[1]
    return most if least and most >= least else 0


def has_files(config: ConfigDict) -> bool:
    """Whether the configuration names files of clips."""
    return bool(config.data.path or config.data.mixture)


def identity(config: ConfigDict, clips: Any) -> dict[str, str]:
    """What identifies the files in data.path or data.mixture: a digest of the videos, or else the
    path."""
    if not has_files(config):
        return {}
    pictures = getattr(clips, "pictures", "") or getattr(clips, "digest", "")
    return {"data.content": pictures or os.path.realpath(config.data.path)}


def source(config: ConfigDict, split: str, workdir: Path, **options: Any) -> Any:
    """The clips of a split ("train" or "heldout"), with data.label as `Classed`."""
    return chosen(config).part("make")(config, split, workdir, **options)


def labelled(config: ConfigDict, split: str, workdir: Path) -> Labelled:
    """The clips of a split with the right answers to config.classify.questions."""
    known = questions(config)
    return Labelled(
        source(config, split, workdir), [known[name] for name in config.classify.questions]
    )


def training_clips(config: ConfigDict, workdir: Path) -> Any:
    """The clips that the DiT learns from: the train split, or its mixture of data.shapes."""
    row, shapes = chosen(config), config.data.shapes
    if not shapes:
        return source(config, "train", workdir)
    if row.shapes is not None:
        return row.part("shapes")(config, workdir)
    options = [
        {"frames": int(frames), "size": (int(height), int(width)), "fps": fps}
        for frames, height, width, fps in shapes
    ]
    clips = [source(config, "train", workdir, **each) for each in options]
    return Mixture(clips, [float(shape[3]) for shape in shapes], endless=row.endless)
