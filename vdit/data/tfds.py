"""`VideoSet`: a prepared TensorFlow Datasets video set as a random-access source, TensorFlow-free.

A set is a folder SET[/CONFIG]/VERSION with features.json, dataset_info.json and ArrayRecord shards.
features.json is only read: no class that it names is looked up. TFDS itself is told of two plain
fields, the video as it is stored and the caption, and reads them by `as_data_source`; what is
stored is inflated or decoded here, under limits. Every record is read once before training, so a
damaged one is named before anything is learned.

Dimension key: N records, T frames, H height, W width.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import operator
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf import json_format
from tensorflow_datasets.core.proto import dataset_info_pb2, feature_pb2
from tensorflow_datasets.core.read_only_builder import builder_from_metadata

from vdit.data.decode import Limits, one_line
from vdit.data.media import fit
from vdit.errors import UserError
from vdit.runtime.files import write_text
from vdit.runtime.progress import Progress

VERSION = re.compile(r"\d+\.\d+\.\d+")
PLAIN = re.compile(r"[\w.-]+")  # names of sets and splits, which become names of files
TEMPLATE = re.compile(r"([\w.-]|\{[A-Z_]+\})*")
HELDOUT = ("test", "validation", "valid", "val")  # the first that a set has is held out
CAPTIONS = ("caption", "text", "label")  # preferred where several fields could be the caption
MOST = 2**30  # bytes of one video's pixels
HEAD_MOST = 2**26  # bytes of a JSON file
CHECK_FORMAT = 1  # another number when the same records would be judged otherwise

# TFDS's own classes of features, and the field of the message that each one fills.
_CORE = "tensorflow_datasets.core.features."
CLASSES = {
    "audio_feature.Audio": "audio", "bounding_boxes.BBoxFeature": "bounding_box",
    "class_label_feature.ClassLabel": "class_label", "dataset_feature.Dataset": "sequence",
    "feature.Tensor": "tensor", "features_dict.FeaturesDict": "features_dict",
    "image_feature.Image": "image", "labeled_image.LabeledImage": "image",
    "scalar.Scalar": "tensor", "sequence_feature.Sequence": "sequence",
    "tensor_feature.Tensor": "tensor", "text_feature.Text": "text",
    "translation_feature.Translation": "translation",
    "translation_feature.TranslationVariableLanguages": "translation",
    "video_feature.Video": "video",
}  # fmt: skip
VIDEOS = "Tensor((T, H, W, 3), uint8), Video or Sequence(Image)"


@dataclasses.dataclass(frozen=True)
class _Stored:
    """How a set keeps its videos: shape (T, H, W, channels), None where records differ."""

    shape: tuple[int | None, ...]
    encoding: str  # none, bytes, zlib, or images: a list of PNG or JPEG files


class VideoSet:
    """Clips of `frames` frames at `fps` and `size`, of a prepared set: a grain data source.

    Item i is {"video": uint8 (T, H, W, 3), "caption": str}, the same bytes every time; clips begin
    every `stride` seconds of each video. `name` is SET[/CONFIG][:VERSION] in the folder `path`;
    empty, it is the only set there. `native_fps` is the rate of the videos' own frames (0: the
    "fps" of the set's metadata.json); the picture at a time is the last one that began by then.
    The caption is a text, or a class's name in place of {label} in `template`. The fields for both
    are found, where `video_field` and `caption_field` do not name them.

    "heldout" is the set's test or validation split; of a set without, the share `heldout` of its
    split "train", at least one video, chosen by `seed`. So no video is in both splits.

    Videos shorter than a clip are listed in `skipped` as (record, reason), and in the file
    `skipped_path`. What the records hold is remembered in the file `checked`, so that they need
    not be read again while their digests stay. `digest` tells whether two sources hold the same
    clips in the same order.

    Raises `UserError`, in one line: no such set, or several; not of ArrayRecord files; no field
    that can be read; a record or shard that is damaged; too few videos.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str = "",
        frames: int = 17,
        size: tuple[int, int] = (32, 32),
        fps: float = 10.0,
        native_fps: float = 0.0,
        stride: float = 1.0,
        split: str = "train",
        video_field: str = "",
        caption_field: str = "",
        template: str = "a video of {label}",
        heldout: float = 0.1,
        seed: int = 0,
        checked: str | os.PathLike[str] | None = None,
        skipped_path: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
    ):
        _check(frames, size, fps, native_fps, stride, split, template, heldout)
        self.frames, self.size, self.fps, self.split = frames, (size[0], size[1]), fps, split
        self._limits, self._template = limits or Limits(), template
        self.name, folder = find(path, name)
        self._where = one_line(f"{path}: {self.name}")
        info = _info(folder, self._where)
        self._field, self._stored, raw = _fields(folder, self._where, video_field, caption_field)
        info.features.CopyFrom(raw.to_proto())
        try:
            builder = builder_from_metadata(os.path.abspath(folder), info)
            label = builder.info.features[self._field[1]]
            named = isinstance(label, tfds.features.ClassLabel)
            self._labels = tuple(label.names) if named else None
            told = dict(builder.info.metadata.items())
            self._native = native_fps or float(told.get("fps", 0))
        except Exception as error:  # whatever TFDS says of a set that it cannot read
            raise UserError(f"{self._where}: cannot be read ({_said(error)})") from None
        if not 0 < self._native < math.inf:
            raise UserError(
                f"{self._where} does not tell its frame rate: give --config.data.native_fps=RATE"
            )
        self._index(builder, checked, heldout, seed, stride)
        if skipped_path is not None:
            lines = (json.dumps({"file": name, "reason": why}) for name, why in self.skipped)
            write_text(skipped_path, "".join(line + "\n" for line in lines))

    def _index(
        self,
        builder: Any,
        checked: str | os.PathLike[str] | None,
        heldout: float,
        seed: int,
        stride: float,
    ) -> None:
        """Checks the records of both splits, and lists the clips of the wanted one."""
        splits = builder.info.splits
        own = next((name for name in HELDOUT if _count(splits, name)), "")
        if not _count(splits, "train"):
            there = ", ".join(splits) or "none"
            raise UserError(f"{self._where} has no clips in a split train; its splits: {there}")
        names = ["train"] + ([own] if own else [])
        try:
            records = {name: builder.as_data_source(name) for name in names}
        except Exception as error:  # whatever TFDS says of the names of files
            raise UserError(f"{self._where}: cannot be read ({_said(error)})") from None
        self._shards = {name: list(_shards(splits[name], self._where)) for name in names}
        told = (self._content(builder), self._field, self._labels, CHECK_FORMAT)
        content = hashlib.sha256(repr(told).encode()).hexdigest()
        self._split = own if self.split == "heldout" and own else "train"
        shapes = _remembered(checked, content)
        if shapes is None:
            shapes = self._measure(records)
            if checked is not None:
                lists = {name: array.tolist() for name, array in shapes.items()}
                write_text(checked, json.dumps({"content": content, "shapes": lists}))
        self._records, shape_N3 = records[self._split], shapes[self._split]
        for height, width in sorted({(int(h), int(w)) for _, h, w in shape_N3}):
            fit(np.zeros((1, height, width, 3), np.uint8), self.size, self._limits)
        chosen = np.arange(len(shape_N3))
        if not own:
            chosen = _share(len(shape_N3), self.split, heldout, seed, self._where)
        ratio = self.fps / self._native
        have = np.ceil(shape_N3[:, 0] * ratio - 1e-6).astype(int)  # k / fps < T / native_fps
        step = max(1, round(stride * self.fps))
        starts = {n: np.arange(0, have[n] - self.frames + 1, step) for n in chosen.tolist()}
        self.skipped = [
            (self._record(self._split, n), f"{have[n]} frames at {self.fps:g} fps: a clip has"
             f" {self.frames}")
            for n, first in starts.items() if not len(first)
        ]  # fmt: skip
        if len(self.skipped) == len(starts):
            raise UserError(
                f"{self._where}: none of the {len(starts)} videos for {self.split} is as long as a"
                f" clip of {self.frames} frames at {self.fps:g} fps; the longest has"
                f" {have[chosen].max()}"
            )
        self._start = np.concatenate(list(starts.values()))
        self._number = np.repeat(list(starts), [len(first) for first in starts.values()])
        asked = (content, self._split, self._template, self.frames, self.size, self.fps)
        parts = (repr((asked, self._native)).encode(), self._start.tobytes())
        self.digest = hashlib.sha256(b"".join((*parts, self._number.tobytes()))).hexdigest()

    def _content(self, builder: Any) -> list[tuple[str, int, str]]:
        """Name, size and SHA-256 of all that the clips come from."""
        shards = [path for paths in self._shards.values() for path, _ in paths]
        found = []
        for path in (Path(builder.data_dir) / "features.json", *shards):
            try:
                status = path.stat()
                key = (status.st_size, status.st_mtime_ns, status.st_ino)
                found.append((path.name, status.st_size, _sha256(path, key)))
            except OSError as error:
                raise UserError(f"cannot read {one_line(str(path))}: {error.strerror}") from None
        return found

    def _measure(self, records: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Reads every record; their videos' (T, H, W), (N, 3) for each split."""
        total = sum(len(source) for source in records.values())
        shapes: dict[str, np.ndarray] = {}
        done = 0
        with Progress(f"reading {one_line(self.name, 60)}", total) as progress:
            for name, source in records.items():
                for path, count in self._shards[name]:
                    _check_shard(path, count)
                rows = []
                for number in range(len(source)):
                    rows.append(self._read(name, source, number)[0].shape[:3])
                    done += 1
                    progress.update(done)
                shapes[name] = np.array(rows).reshape(-1, 3)
        return shapes

    def _read(self, split: str, source: Any, number: int) -> tuple[np.ndarray, str]:
        """The whole video, uint8 (T, H, W, 3), and the caption of a record."""
        video, caption = self._field
        try:
            element = source[number]
            return (
                _frames(element[video], self._stored, self._limits),
                _caption(element[caption], self._labels, self._template),
            )
        except Exception as error:  # whatever readers say of a foreign record
            where = self._record(split, number)
            raise UserError(f"{self._where}: {where}: {_said(error)}") from None

    def _record(self, split: str, number: int) -> str:
        """Names a record by its shard and its place there."""
        for path, count in self._shards[split]:
            if number < count:
                return f"{one_line(path.name)} record {number}"
            number -= count
        raise IndexError(number)

    def origin(self, index: SupportsIndex) -> tuple[str, float]:
        """(record, second at which it begins) of a clip."""
        index = self._checked(index)
        place = self._record(self._split, int(self._number[index]))
        return place, float(self._start[index] / self.fps)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, where captions are of a ClassLabel."""
        return self._labels

    def __len__(self) -> int:
        return len(self._start)

    def __repr__(self) -> str:
        return f"VideoSet({self.name!r}, {self.split}, {self.digest[:16]})"  # grain compares it

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = self._checked(index)
        video_THW3, caption = self._read(self._split, self._records, int(self._number[index]))
        times = (self._start[index] + np.arange(self.frames)) / self.fps
        pictures = np.floor(times * self._native + 1e-6).astype(int)
        chosen_THW3 = video_THW3[np.minimum(pictures, len(video_THW3) - 1)]
        return {"video": fit(chosen_THW3, self.size, self._limits), "caption": caption}

    def _checked(self, index: SupportsIndex) -> int:
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"clip {number} of {len(self)}")
        return number


def _check(
    frames: int,
    size: Sequence[int],
    fps: float,
    native_fps: float,
    stride: float,
    split: str,
    template: str,
    heldout: float,
) -> None:
    if frames < 1 or len(size) != 2 or min(size) < 1:
        raise UserError(f"tfds frames={frames}, size={tuple(size)}: whole numbers from 1 on")
    if not 0 < fps <= 1000 or not 0 < stride < math.inf or not 0 <= native_fps <= 1000:
        raise UserError(
            f"tfds fps={fps}, native_fps={native_fps}, stride={stride} s: over 0 (native_fps: 0 is"
            " what the set says), rates at most 1000"
        )
    if split not in ("train", "heldout"):
        raise UserError(f"tfds split={split!r}: train or heldout")
    if "{label}" not in template:
        raise UserError(f"tfds template={template!r}: a text with {{label}} in it")
    if not 0 < heldout < 1:
        raise UserError(f"tfds heldout={heldout}: a share over 0 and under 1")


def _said(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return one_line(" ".join(text.split()), 200)


# ---------------------------------------------------------------------------------------------
# The set: its folder, its files, its fields
# ---------------------------------------------------------------------------------------------


def find(path: str | os.PathLike[str], name: str = "") -> tuple[str, Path]:
    """The full name, SET[/CONFIG]:VERSION, and the folder of the one set that `name` fits.

    The name is compared with what is there and never becomes part of a path.
    """
    shown = one_line(os.fspath(path))
    if not os.fspath(path):
        raise UserError("no folder of TFDS sets is given: data.path is empty")
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{shown}: not a folder")
    if (root / "dataset_info.json").is_file():
        raise UserError(f"{shown} is a set itself: data.path is the folder above SET/VERSION")
    found = {
        f"{folder.parent.relative_to(root).as_posix()}:{folder.name}": folder
        for depth in ("*/*", "*/*/*")
        for folder in sorted(root.glob(depth))
        if VERSION.fullmatch(folder.name) and (folder / "dataset_info.json").is_file()
    }
    wanted, _, version = name.partition(":")

    def fits(full: str) -> bool:
        base, _, its = full.partition(":")
        return wanted in ("", base, base.split("/")[0]) and version in ("", its)

    fitting = [full for full in found if fits(full)]
    if len(fitting) == 1:
        return fitting[0], found[fitting[0]]
    listed = one_line(", ".join(fitting or found) or "none")
    if fitting:
        raise UserError(f"{shown} holds several sets ({listed}): choose one with data.name")
    raise UserError(
        f"{shown} holds no prepared set {one_line(name, 80)}: SET[/CONFIG][:VERSION]; there: "
        f"{listed}"
    )


def _parsed(path: Path, message: Any) -> Any:
    """A JSON file as a protocol message."""
    try:
        if path.stat().st_size > HEAD_MOST:
            raise UserError(f"{one_line(str(path))}: over {HEAD_MOST >> 20} MiB")
        return json_format.Parse(path.read_text(encoding="utf-8"), message)
    except OSError as error:
        raise UserError(f"cannot read {one_line(str(path))}: {error.strerror}") from None
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{one_line(str(path))}: not as TFDS writes it since 4.5 ({_said(error)})"
        ) from None


def _info(folder: Path, where: str) -> Any:
    """dataset_info.json, whose names are fit to become names of files in the folder."""
    info = _parsed(folder / "dataset_info.json", dataset_info_pb2.DatasetInfo())
    if info.file_format != "array_record":
        raise UserError(
            f'{where} is kept as {one_line(info.file_format or "tfrecord", 40)}: prepare it with'
            ' file_format="array_record"'
        )
    for text in (info.name, *(split.name for split in info.splits)):
        if not PLAIN.fullmatch(text):
            raise UserError(f"{where}: dataset_info.json has the name {ascii(text)[:80]}")
    for split in info.splits:
        if not TEMPLATE.fullmatch(split.filepath_template):
            shown = ascii(split.filepath_template)[:80]
            raise UserError(f"{where}: dataset_info.json has the file name {shown}")
    return info


def _fields(
    folder: Path, where: str, video: str, caption: str
) -> tuple[tuple[str, str], _Stored, tfds.features.FeaturesDict]:
    """Names of the video's and the caption's field, how videos are stored, and what TFDS reads."""
    top = _parsed(folder / "features.json", feature_pb2.Feature())
    _check_classes("features", top, where)
    if top.WhichOneof("content") != "features_dict":
        raise UserError(f"{where}: its features are {_described(top)}: a FeaturesDict is allowed")
    there = dict(sorted(top.features_dict.features.items()))
    stored = {name: kept for name, proto in there.items() if (kept := _stored(proto))}
    said = [name for name, proto in there.items() if _is_text(proto)]
    video = _choose("video", video, there, list(stored), ("video",), VIDEOS, where)
    caption = _choose("caption", caption, there, said, CAPTIONS, "Text or ClassLabel", where)
    text, kept = tfds.features.Text(), stored[video]
    if kept.encoding == "images":
        feature: Any = tfds.features.Sequence(text)
    elif kept.encoding == "none":
        feature = tfds.features.Tensor(shape=kept.shape, dtype=np.uint8)
    elif kept.shape.count(None) > 1:  # then a record tells its own shape
        shape = tfds.features.Tensor(shape=(4,), dtype=np.int32)
        feature = tfds.features.FeaturesDict({"shape": shape, "value": text})
    else:
        feature = text
    label = there[caption].class_label.num_classes
    is_label = there[caption].WhichOneof("content") == "class_label"
    said_as = tfds.features.ClassLabel(num_classes=label) if is_label else text
    return (video, caption), kept, tfds.features.FeaturesDict({video: feature, caption: said_as})


def _check_classes(name: str, proto: Any, where: str) -> None:
    """Refuses a feature, or one inside it, of a class that is not TFDS's own."""
    known, content = proto.python_class_name, proto.WhichOneof("content")
    if not known.startswith(_CORE) or CLASSES.get(known.removeprefix(_CORE)) != content:
        raise UserError(
            f"{where}: {one_line(name, 40)} in features.json is of the class"
            f" {one_line(known, 80) or 'none'} ({content}): only TFDS's own are read, and no other"
            " is imported"
        )
    for inner, feature in sorted(proto.features_dict.features.items()):
        _check_classes(inner, feature, where)
    if content == "sequence":
        _check_classes(name, proto.sequence.feature, where)


def _choose(
    what: str,
    given: str,
    there: Mapping[str, Any],
    fitting: Sequence[str],
    usual: Sequence[str],
    allowed: str,
    where: str,
) -> str:
    """The field that is given, or the only one that fits, or the one with a usual name."""
    option = f"data.{what}_field"
    if given and given not in fitting:
        is_ = f"is {_described(there[given])}" if given in there else "is not there"
        listed = one_line(", ".join(f"{n}: {_described(proto)}" for n, proto in there.items()))
        raise UserError(
            f"{where}: {option}={one_line(given, 40)} {is_}; {allowed} is allowed; there: {listed}"
        )
    named = fitting if len(fitting) == 1 else [name for name in usual if name in fitting]
    if given or named:
        return given or named[0]
    if fitting:
        listed = one_line(", ".join(fitting))
        raise UserError(f"{where} has several {what} fields ({listed}): choose one with {option}")
    listed = one_line(", ".join(f"{n}: {_described(proto)}" for n, proto in there.items()))
    raise UserError(f"{where} has no {what} field: {allowed} is allowed; there: {listed}")


def _described(proto: Any) -> str:
    """A feature in words."""
    kind = proto.python_class_name.rsplit(".", 1)[-1]
    content = proto.WhichOneof("content")
    if content == "sequence":
        return f"{kind}({_described(proto.sequence.feature)})"
    if content in ("tensor", "image", "video"):
        told = getattr(proto, content)
        return f"{kind}({_shown(_dimensions(told.shape))}, {one_line(told.dtype, 20)})"
    return kind


def _dimensions(shape: Any) -> tuple[int | None, ...]:
    return tuple(None if n < 0 else int(n) for n in shape.dimensions)


def _shown(shape: Sequence[int | None]) -> str:
    return f"({', '.join('?' if n is None else str(n) for n in shape)})"


def _stored(proto: Any) -> _Stored | None:
    """How a field keeps videos; None if it is none that can be read."""
    content = proto.WhichOneof("content")
    if content == "tensor":
        shape, encoding = _dimensions(proto.tensor.shape), proto.tensor.encoding or "none"
        known = encoding in ("bytes", "zlib") or encoding == "none" and shape.count(None) < 2
        good = proto.tensor.dtype == "uint8" and known and not proto.tensor.optional
        channels: tuple[int, ...] = (3,)
    else:
        image, encoding = proto.video, "images"
        shape = _dimensions(image.shape)
        good = content == "video"
        if content == "sequence":
            image, length = proto.sequence.feature.image, proto.sequence.length
            shape = (None if length < 0 else length, *_dimensions(image.shape))
            good = proto.sequence.feature.python_class_name.endswith(".Image")
        good = good and image.dtype in ("", "uint8")
        channels = (1, 3)
    good = good and len(shape) == 4 and shape[3] in channels and 0 not in shape
    return _Stored(shape, encoding) if good else None


def _is_text(proto: Any) -> bool:
    """Whether a field can be the caption: a text, or a class."""
    scalar = proto.tensor.dtype == "string" and not proto.tensor.shape.dimensions
    return proto.WhichOneof("content") in ("text", "class_label") or scalar


def _count(splits: Any, name: str) -> int:
    return splits[name].num_examples if name in splits else 0


def _shards(split: Any, where: str) -> Iterator[tuple[Path, int]]:
    """Files and numbers of records of a split."""
    for path, count in zip(split.filepaths, split.shard_lengths, strict=True):
        try:
            there = Path(path).is_file()
        except OSError:  # no file can have such a name
            there = False
        if not there:
            raise UserError(f"{where}: its shard {one_line(Path(path).name, 100)} is missing")
        yield Path(path), count


@functools.cache
def _sha256(path: Path, status: tuple[int, ...]) -> str:
    """SHA-256 of a file, once for each size and time of change."""
    del status
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shard(path: Path, count: int) -> None:
    """Refuses a shard that cannot be opened, or has another number of records."""
    try:
        reader = ArrayRecordReader(str(path))
        there = reader.num_records()
        reader.close()
    except Exception as error:
        raise UserError(f"{one_line(str(path))}: damaged ({_said(error)})") from None
    if there != count:
        raise UserError(
            f"{one_line(str(path))}: {there} records, where dataset_info.json says {count}"
        )


def _remembered(
    checked: str | os.PathLike[str] | None, content: str
) -> dict[str, np.ndarray] | None:
    """What the records of a set hold, if they have been read before and are the same."""
    try:
        told = json.loads(Path(checked or "").read_text(encoding="utf-8"))
        if told["content"] != content:
            return None
        return {name: np.array(rows).reshape(-1, 3) for name, rows in told["shapes"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _share(count: int, split: str, heldout: float, seed: int, where: str) -> np.ndarray:
    """The records of one split, where the set has only train."""
    if count < 2:
        raise UserError(f"{where}: {count} video; one to train and one to hold out are needed")
    ranked = sorted(range(count), key=lambda n: hashlib.sha256(f"{seed} {n}".encode()).digest())
    held = min(count - 1, max(1, round(heldout * count)))
    return np.array(sorted(ranked[:held] if split == "heldout" else ranked[held:]))


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


def _caption(value: Any, labels: tuple[str, ...] | None, template: str) -> str:
    """The caption on one line; ValueError where there is none."""
    if labels is not None:
        if not 0 <= int(value) < len(labels):
            raise ValueError(f"its label is {value} of {len(labels)} classes")
        return template.replace("{label}", labels[int(value)])
    text = " ".join((value.decode("utf-8") if isinstance(value, bytes) else str(value)).split())
    if not text:
        raise ValueError("its caption is empty")
    return text


def _frames(value: Any, stored: _Stored, limits: Limits) -> np.ndarray:
    """The pixels of a stored video: uint8 (T, H, W, 3); ValueError says what is wrong."""
    if stored.encoding == "images":
        return _images(list(value), stored.shape, limits)
    shape = stored.shape
    if isinstance(value, Mapping):
        own, value = tuple(int(n) for n in value["shape"]), value["value"]
        if not _agree(own, shape):
            raise ValueError(f"its shape is {_shown(own)}, not {_shown(shape)}")
        shape = own
    if isinstance(value, bytes):
        known = math.prod(n for n in shape if n is not None)  # bytes at one of what is free
        most = _most(shape, limits) if None in shape else known
        _check_size([n or 1 for n in shape], limits)
        if stored.encoding == "zlib":
            value = inflate(value, most)
        if len(value) > most or not value or len(value) % known or len(value) < known:
            raise ValueError(f"{len(value)} bytes are no video of the shape {_shown(shape)}")
        value = np.frombuffer(value, np.uint8)
    video_THW3 = np.reshape(value, [-1 if n is None else n for n in shape])
    if video_THW3.dtype != np.uint8 or not video_THW3.size:
        raise ValueError(f"its video is {video_THW3.dtype} {_shown(video_THW3.shape)}")
    _check_size(video_THW3.shape, limits)
    return video_THW3


def _agree(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether a record's own shape is one that its set allows."""
    same = [w in (None, n) and n > 0 for n, w in zip(shape, wanted, strict=False)]
    return len(shape) == len(wanted) and all(same)


def _most(shape: Sequence[int | None], limits: Limits) -> int:
    """Bytes that a video may have of which one side is free."""
    frames, *sides = shape[:3]
    known = math.prod(n for n in shape if n is not None)
    if frames is None:
        return min(MOST, known * limits.frames)
    return min(MOST, frames * limits.pixels * 3)


def _check_size(shape: Sequence[int], limits: Limits) -> None:
    """Refuses a video over the limits."""
    frames, height, width = shape[:3]
    if frames > limits.frames:
        raise ValueError(f"{frames} frames: over the limit of {limits.frames}")
    if height * width > limits.pixels:
        raise ValueError(f"frames of {width}x{height}: over the limit of {limits.pixels} pixels")
    if frames * height * width * 3 > MOST:
        raise ValueError(f"a video of {_shown(shape)}: over the limit of {MOST >> 20} MiB")


def inflate(data: bytes, most: int) -> bytes:
    """The content of a zlib stream; ValueError if it is damaged, cut, or has over `most` bytes.

    No more than one byte over `most` is ever inflated.
    """
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(f"damaged zlib data ({_said(error)})") from None
    if len(content) > most:
        raise ValueError(f"its zlib data inflates to over {most} bytes")
    if not stream.eof or stream.unused_data:
        raise ValueError("its zlib data is cut short or goes on after its end")
    return content


def _images(files: Sequence[bytes], shape: Sequence[int | None], limits: Limits) -> np.ndarray:
    """The pixels of a video kept as PNG or JPEG files: uint8 (T, H, W, 3)."""
    from PIL import Image

    if not files or shape[0] not in (None, len(files)):
        raise ValueError(f"{len(files)} frames, where its set has {_shown(shape)}")
    pictures: list[np.ndarray] = []
    for number, file in enumerate(files):
        try:
            with Image.open(io.BytesIO(file), formats=("PNG", "JPEG")) as image:
                told = (len(files), image.height, image.width)
                wanted = (len(files), *(pictures[0].shape[:2] if pictures else shape[1:3]))
                if not _agree(told, wanted):
                    raise ValueError(f"{_shown(told)}, where {_shown(wanted)} is wanted")
                _check_size(told, limits)  # before anything is decoded
                pictures.append(np.asarray(image.convert("RGB")))
        except (OSError, SyntaxError, EOFError, struct.error, ValueError) as error:
            raise ValueError(f"frame {number} is damaged or another's: {_said(error)}") from None
    return np.stack(pictures)
