"""`VideoSet`: a prepared TensorFlow Datasets video set as a random-access source, TensorFlow-free.

A set is a folder SET[/CONFIG]/VERSION with features.json, dataset_info.json and ArrayRecord shards.
features.json is parsed here, and no class that it names is imported. TFDS reads two plain fields,
the stored video and the caption, by `as_data_source`; `stored.py` decodes the video under limits.
All records are read once before training, so a damaged one is reported first.

Dimension key: N records, T frames, H height, W width.
"""

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf import json_format
from tensorflow_datasets.core.proto import dataset_info_pb2, feature_pb2
from tensorflow_datasets.core.read_only_builder import builder_from_metadata

from vdit.data.clips import Clips, held_out, write_skipped
from vdit.data.decode import Limits, one_line, said
from vdit.data.media import fit
from vdit.data.stored import Stored, shown
from vdit.errors import UserError
from vdit.runtime.files import read_cache, write_text
from vdit.runtime.progress import Progress

VERSION = re.compile(r"\d+\.\d+\.\d+")
PLAIN = re.compile(r"[\w.-]+")  # names of sets and splits, parts of file names
TEMPLATE = re.compile(r"([\w.-]|\{[A-Z_]+\})*")
HELDOUT = ("test", "validation", "valid", "val")  # the first of these in a set is held out
CAPTIONS = ("caption", "text", "label")  # preferred among several fields that could be the caption
HEAD_MOST = 2**26  # bytes of a JSON file
Measured = tuple[dict[str, np.ndarray], dict[str, list[str]]]  # shapes and captions, by split
CHECK_FORMAT = 1  # changes whenever the same records would be checked differently

# The classes of features that TFDS defines, and the field of the message that each one fills.
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


class VideoSet(Clips):
    """Clips of `frames` frames at `fps` and `size`, of a prepared set: a grain data source.

    Item i is {"video": uint8 (T, H, W, 3), "caption": str}, the same bytes every time; a clip
    starts every `stride` seconds of each video. `name` is SET[/CONFIG][:VERSION] in the folder
    `path`; it may be empty if there is one set. `native_fps` is the frame rate of the videos (0:
    "fps" of the set's metadata.json); resampling takes the last frame that began by then. The
    caption is a text, or `template` with a class name for {label}. `video_field` and
    `caption_field` name the two fields where several could serve.

    "heldout" is the set's test or validation split; without one, it is a share `heldout` of the
    videos of "train", at least one, drawn by `seed`. So no video is in both splits.

    Videos shorter than a clip are listed in `skipped` and in the file `skipped_path`. The file
    `checked` caches the shapes of the records: unchanged records are not read again.

    Raises `UserError` for a set that is missing, ambiguous, not stored as ArrayRecord, damaged or
    too small, or has no readable field.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, name: str = "", frames: int = 17,
        size: tuple[int, int] = (32, 32), fps: float = 10.0, native_fps: float = 0.0,
        stride: float = 1.0, split: str = "train", video_field: str = "", caption_field: str = "",
        template: str = "a video of {label}", heldout: float = 0.1, seed: int = 0,
        checked: str | os.PathLike[str] | None = None,
        skipped_path: str | os.PathLike[str] | None = None, limits: Limits | None = None,
    ):  # fmt: skip
        super().__init__("tfds", frames, size, fps, stride, split)
        if not 0 <= native_fps <= 1000:
            raise UserError(f"tfds native_fps={native_fps}: 0 (what the set says) to 1000")
        if "{label}" not in template:
            raise UserError(f"tfds template={template!r}: a text with {{label}} in it")
        if not 0 < heldout < 1:
            raise UserError(f"tfds heldout={heldout}: a share over 0 and under 1")
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
            self._native = native_fps or float(dict(builder.info.metadata.items()).get("fps", 0))
        except Exception as error:  # any error of TFDS about a set that it cannot read
            raise UserError(f"{self._where}: cannot be read ({said(error)})") from None
        if not 0 < self._native < math.inf:
            raise UserError(f"{self._where} has no frame rate: give --config.data.native_fps=RATE")
        content, shapes, captions = self._open(builder, checked)
        self._captions = captions[self._split]
        self._choose_clips(content, shapes[self._split], heldout, seed)
        if skipped_path is not None:
            write_skipped(skipped_path, self.skipped)

    def _open(
        self, builder: Any, checked: str | os.PathLike[str] | None
    ) -> tuple[str, dict[str, np.ndarray], dict[str, list[str]]]:
        """The digest of the set's content; shapes (N, 3) of its videos and captions, by split."""
        splits = builder.info.splits
        known = [name for name in ("train", *HELDOUT) if name in splits]
        filled = [name for name in known if splits[name].num_examples]
        if filled[:1] != ["train"]:
            listed = ", ".join(splits) or "none"
            raise UserError(f"{self._where} has no clips in a split train; its splits: {listed}")
        self._heldout = filled[1] if len(filled) > 1 else ""  # a split of the set
        self._split = filled[1] if self.split == "heldout" and self._heldout else "train"
        names = filled[:2]
        try:
            records = {name: builder.as_data_source(name) for name in names}
        except Exception as error:  # any error of TFDS about names of files
            raise UserError(f"{self._where}: cannot be read ({said(error)})") from None
        self._records = records[self._split]
        self._shards = {name: list(_shards(splits[name], self._where)) for name in names}
        files = [Path(builder.data_dir) / "features.json"]
        files += [path for paths in self._shards.values() for path, _ in paths]
        hashed = ([_hashed(path) for path in files], self._field, self._labels, CHECK_FORMAT)
        content = hashlib.sha256(repr(hashed).encode()).hexdigest()
        key = f"{content} {self._template}"
        measured = _remembered(checked, key)
        if measured is None:
            measured = self._measure(records)
            if checked is not None:
                lists = {name: array.tolist() for name, array in measured[0].items()}
                kept = {"content": key, "shapes": lists, "captions": measured[1]}
                write_text(checked, json.dumps(kept))
        return content, *measured

    def _choose_clips(self, content: str, shape_N3: np.ndarray, heldout: float, seed: int) -> None:
        """Cuts the videos of the split into clips; skips those that are too short."""
        for height, width in sorted({(int(h), int(w)) for _, h, w in shape_N3}):
            fit(np.zeros((1, height, width, 3), np.uint8), self.size, self._limits)
        chosen = list(range(len(shape_N3)))
        if not self._heldout:  # the set has only train
            if len(chosen) < 2:
                needed = "one to train and one to hold out are needed"
                raise UserError(f"{self._where}: {len(chosen)} video; {needed}")
            held = held_out([str(number) for number in chosen], heldout, seed)
            chosen = [n for n in chosen if (n in held) == (self.split == "heldout")]
        have = np.ceil(shape_N3[:, 0] * (self.fps / self._native) - 1e-6).astype(int)
        for number in chosen:  # frame k exists if k / fps < T / native_fps
            if have[number] < self.frames:
                self._skip_short(self._span_name(number), have[number])
        if len(self.skipped) == len(chosen):
            raise UserError(
                f"{self._where}: none of the {len(chosen)} videos for {self.split} is as long as a"
                f" clip of {self.frames} frames at {self.fps:g} fps; the longest has"
                f" {have[chosen].max()}"
            )
        settings = (content, self._split, self._template, self.frames, self.size, self.fps)
        self._cut({n: (0, int(have[n])) for n in chosen}, (settings, self._native))

    def _measure(self, records: Mapping[str, Any]) -> Measured:
        """Reads every record; the shapes (T, H, W) of the videos, (N, 3), and captions by split."""
        shapes: dict[str, np.ndarray] = {}
        captions: dict[str, list[str]] = {}
        done = 0
        total = sum(len(source) for source in records.values())
        with Progress(f"reading {one_line(self.name, 60)}", total) as progress:
            for name, source in records.items():
                for path, count in self._shards[name]:
                    _check_shard(path, count)
                rows, captions[name] = [], []
                for number in range(len(source)):
                    video_THW3, caption = self._read(name, source, number)
                    rows.append(video_THW3.shape[:3])
                    captions[name].append(caption)
                    done += 1
                    progress.update(done)
                shapes[name] = np.array(rows).reshape(-1, 3)
        return shapes, captions

    def texts(self) -> Iterator[tuple[str, str]]:
        """(where, caption) of each video."""
        for number in np.unique(self._span).tolist():
            yield f"{self._where}: {self._span_name(number)}", self._captions[number]

    def caption(self, index: SupportsIndex) -> str:
        """The caption of a clip, without its video."""
        return self._captions[self._place(index)[0]]

    def _read(self, split: str, source: Any, number: int) -> tuple[np.ndarray, str]:
        """The complete video, uint8 (T, H, W, 3), and the caption of a record."""
        video, caption = self._field
        try:
            element = source[number]
            text = _caption(element[caption], self._labels, self._template)
            return self._stored.read(element[video], self._limits), text
        except Exception as error:  # any error of a reader about an untrusted record
            where = self._record(split, number)
            raise UserError(f"{self._where}: {where}: {said(error)}") from None

    def _record(self, split: str, number: int) -> str:
        """A record's name: its shard, and its number in it."""
        for path, count in self._shards[split]:
            if number < count:
                return f"{one_line(path.name)} record {number}"
            number -= count
        raise IndexError(number)

    def _span_name(self, number: int) -> str:
        return self._record(self._split, number)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names if captions come from a ClassLabel."""
        return self._labels

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        number, start = self._place(index)
        video_THW3, caption = self._read(self._split, self._records, number)
        times = (start + np.arange(self.frames)) / self.fps
        pictures = np.floor(times * self._native + 1e-6).astype(int)
        chosen_THW3 = video_THW3[np.minimum(pictures, len(video_THW3) - 1)]
        return {"video": fit(chosen_THW3, self.size, self._limits), "caption": caption}


def find(path: str | os.PathLike[str], name: str = "") -> tuple[str, Path]:
    """The full name, SET[/CONFIG]:VERSION, and the folder of the one set that matches `name`.

    The name is compared with existing folders and never becomes part of a path.
    """
    where, root = one_line(os.fspath(path)), Path(path)
    if not os.fspath(path):
        raise UserError("no folder of TFDS sets is given: data.path is empty")
    if not root.is_dir():
        raise UserError(f"{where}: not a folder")
    if (root / "dataset_info.json").is_file():
        raise UserError(f"{where} is a set itself: data.path is the folder above SET/VERSION")
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
        raise UserError(f"{where} holds several sets ({listed}): choose one with data.name")
    wanted = f"{one_line(name, 80)}: SET[/CONFIG][:VERSION]"
    raise UserError(f"{where} holds no prepared set {wanted}; there: {listed}")


def _parsed(path: Path, message: Any) -> Any:
    """A JSON file as a protocol message."""
    name = one_line(str(path))
    try:
        if path.stat().st_size > HEAD_MOST:
            raise UserError(f"{name}: over {HEAD_MOST >> 20} MiB")
        return json_format.Parse(path.read_text(encoding="utf-8"), message)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{name}: not as TFDS writes it since 4.5 ({said(error)})") from None


def _info(folder: Path, where: str) -> Any:
    """dataset_info.json, with names that are safe as file names in the folder."""
    info = _parsed(folder / "dataset_info.json", dataset_info_pb2.DatasetInfo())
    if info.file_format != "array_record":
        raise UserError(
            f"{where} is kept as {one_line(info.file_format or 'tfrecord', 40)}: prepare it with"
            ' file_format="array_record"'
        )
    names = [("name", PLAIN, text) for text in (info.name, *(s.name for s in info.splits))]
    names += [("file name", TEMPLATE, split.filepath_template) for split in info.splits]
    for kind, pattern, text in names:
        if not pattern.fullmatch(text):
            raise UserError(f"{where}: dataset_info.json has the {kind} {ascii(text)[:80]}")
    return info


def _fields(
    folder: Path, where: str, video: str, caption: str
) -> tuple[tuple[str, str], Stored, tfds.features.FeaturesDict]:
    """Names of the video and the caption field, how videos are stored, and features for TFDS."""
    top = _parsed(folder / "features.json", feature_pb2.Feature())
    _check_classes("features", top, where)
    if top.WhichOneof("content") != "features_dict":
        raise UserError(f"{where}: its features are {_described(top)}: a FeaturesDict is allowed")
    fields = dict(sorted(top.features_dict.features.items()))
    videos = {name: stored for name, proto in fields.items() if (stored := _stored(proto))}
    texts = [
        name for name, proto in fields.items()
        if proto.WhichOneof("content") in ("text", "class_label")
        or (proto.tensor.dtype == "string" and not proto.tensor.shape.dimensions)
    ]  # fmt: skip
    video = _choose("video", video, fields, list(videos), ("video",), VIDEOS, where)
    caption = _choose("caption", caption, fields, texts, CAPTIONS, "Text or ClassLabel", where)
    text, stored = tfds.features.Text(), videos[video]
    if stored.encoding == "images":
        feature: Any = tfds.features.Sequence(text)
    elif stored.encoding == "none":
        feature = tfds.features.Tensor(shape=stored.shape, dtype=np.uint8)
    elif stored.shape.count(None) > 1:  # then each record has a shape
        shape = tfds.features.Tensor(shape=(4,), dtype=np.int32)
        feature = tfds.features.FeaturesDict({"shape": shape, "value": text})
    else:
        feature = text
    if fields[caption].WhichOneof("content") == "class_label":
        text = tfds.features.ClassLabel(num_classes=fields[caption].class_label.num_classes)
    return (video, caption), stored, tfds.features.FeaturesDict({video: feature, caption: text})


def _check_classes(name: str, proto: Any, where: str) -> None:
    """Refuses a feature, nested ones included, whose class TFDS does not define."""
    known, content = proto.python_class_name, proto.WhichOneof("content")
    if not known.startswith(_CORE) or CLASSES.get(known.removeprefix(_CORE)) != content:
        raise UserError(
            f"{where}: {one_line(name, 40)} in features.json is of the class"
            f" {one_line(known, 80) or 'none'} ({content}): only those of TFDS are read"
        )
    for inner, feature in sorted(proto.features_dict.features.items()):
        _check_classes(inner, feature, where)
    if content == "sequence":
        _check_classes(name, proto.sequence.feature, where)


def _choose(
    what: str, given: str, fields: Mapping[str, Any], fitting: Sequence[str], usual: Sequence[str],
    allowed: str, where: str,
) -> str:  # fmt: skip
    """The named field, or the only one that fits, or the one with a usual name."""
    option = f"data.{what}_field"
    listed = one_line(", ".join(f"{name}: {_described(proto)}" for name, proto in fields.items()))
    if given and given not in fitting:
        is_ = f"is {_described(fields[given])}" if given in fields else "is not there"
        raise UserError(
            f"{where}: {option}={one_line(given, 40)} {is_}; {allowed} is allowed; there: {listed}"
        )
    if not fitting:
        raise UserError(f"{where} has no {what} field: {allowed} is allowed; there: {listed}")
    named = fitting if len(fitting) == 1 else [name for name in usual if name in fitting]
    if not given and not named:
        several = one_line(", ".join(fitting))
        raise UserError(f"{where} has several {what} fields ({several}): choose one with {option}")
    return given or named[0]


def _described(proto: Any) -> str:
    """A feature as text."""
    kind = proto.python_class_name.rsplit(".", 1)[-1]
    content = proto.WhichOneof("content")
    if content == "sequence":
        return f"{kind}({_described(proto.sequence.feature)})"
    if content in ("tensor", "image", "video"):
        array = getattr(proto, content)
        return f"{kind}({shown(_dimensions(array.shape))}, {one_line(array.dtype, 20)})"
    return kind


def _dimensions(shape: Any) -> tuple[int | None, ...]:
    return tuple(None if n < 0 else int(n) for n in shape.dimensions)


def _stored(proto: Any) -> Stored | None:
    """How a field stores videos; None if it holds none that can be read."""
    content = proto.WhichOneof("content")
    channels: tuple[int, ...] = (1, 3)
    if content == "tensor":
        shape, encoding, channels = _dimensions(proto.tensor.shape), proto.tensor.encoding, (3,)
        encoding = encoding or "none"
        known = encoding in ("bytes", "zlib") or encoding == "none" and shape.count(None) < 2
        good = proto.tensor.dtype == "uint8" and known and not proto.tensor.optional
    elif content == "sequence":
        image, length = proto.sequence.feature.image, proto.sequence.length
        shape, encoding = (None if length < 0 else length, *_dimensions(image.shape)), "images"
        good = proto.sequence.feature.python_class_name.endswith(".Image")
        good = good and image.dtype in ("", "uint8")
    else:
        shape, encoding = _dimensions(proto.video.shape), "images"
        good = content == "video" and proto.video.dtype in ("", "uint8")
    good = good and len(shape) == 4 and shape[3] in channels and 0 not in shape
    return Stored(shape, encoding) if good else None


def _shards(split: Any, where: str) -> Iterator[tuple[Path, int]]:
    """The shards of a split and their numbers of records."""
    for path, count in zip(split.filepaths, split.shard_lengths, strict=True):
        try:
            exists = Path(path).is_file()
        except OSError:  # no file can have such a name
            exists = False
        if not exists:
            raise UserError(f"{where}: its shard {one_line(Path(path).name, 100)} is missing")
        yield Path(path), count


def _hashed(path: Path) -> tuple[str, int, str]:
    """Name, size and SHA-256 of a file."""
    try:
        status = path.stat()
        key = (status.st_size, status.st_mtime_ns, status.st_ino)
        return path.name, status.st_size, _sha256(path, key)
    except OSError as error:
        raise UserError(f"cannot read {one_line(str(path))}: {error.strerror}") from None


@functools.cache
def _sha256(path: Path, status: tuple[int, ...]) -> str:
    """SHA-256 of a file, cached by its status."""
    del status
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shard(path: Path, count: int) -> None:
    """Refuses a shard that cannot be opened or has another number of records."""
    name = one_line(str(path))
    try:
        reader = ArrayRecordReader(str(path))
        records = reader.num_records()
        reader.close()
    except Exception as error:
        raise UserError(f"{name}: damaged ({said(error)})") from None
    if records != count:
        raise UserError(f"{name}: {records} records, where dataset_info.json says {count}")


def _remembered(checked: str | os.PathLike[str] | None, content: str) -> Measured | None:
    """The cached shapes of a set's videos, and their captions, if its content is unchanged."""
    kept = read_cache(checked or "")
    try:
        if kept.get("content") != content:
            return None
        shapes = {name: np.array(rows).reshape(-1, 3) for name, rows in kept["shapes"].items()}
        return shapes, {name: list(map(str, kept["captions"][name])) for name in shapes}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _caption(value: Any, labels: tuple[str, ...] | None, template: str) -> str:
    """The caption on one line; raises ValueError if there is none."""
    if labels is not None:
        if not 0 <= int(value) < len(labels):
            raise ValueError(f"its label is {value} of {len(labels)} classes")
        return template.replace("{label}", labels[int(value)])
    text = " ".join((value.decode("utf-8") if isinstance(value, bytes) else str(value)).split())
    if not text:
        raise ValueError("its caption is empty")
    return text
