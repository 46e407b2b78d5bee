"""`Tars`: captioned films in tar shards, as the library webdataset writes them.

Members that lie side by side with one name up to the first dot of the file name are a sample:
`000017.mp4` and `000017.txt`. Nothing is unpacked to the names in a shard and nothing unpickled.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from vdit.data.captions import SUFFIXES, checked_caption
from vdit.data.decode import one_line, said
from vdit.data.shards import PICTURES, Index, Shards, shard_paths
from vdit.errors import UserError

KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's own rule
PICKLES = ("pickle", "pkl", "pt", "pth", "pyd")
CAPTIONS = ("caption", "text")  # fields of a .json
BLOCK = 512  # bytes
CHUNK = 1 << 20
LONGEST = 1 << 20  # bytes of a text or JSON member
Place = tuple[int, int]  # first byte, and number of bytes


class Tars(Shards):
    """The films of the tars that `path` names (`shard_paths`).

    `video_field` is the film's ending, such as "mp4", where samples have several; `caption_field`
    the ending of the text, or the field of the .json. Else the caption is the .txt, or the field
    "caption" or "text" of the .json.
    """

    def __init__(
        self, path: str, cache: str | os.PathLike[str], video_field: str = "",
        caption_field: str = "",
    ) -> None:  # fmt: skip
        fields = video_field.lower().removeprefix("."), caption_field.removeprefix(".")
        shards = shard_paths(path, ".tar", "webdataset")
        super().__init__(
            "webdataset", path, shards, cache, lambda shard: build(shard, *fields), read, fields
        )


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in a tar."""

    name: str
    place: Place

    @property
    def key(self) -> str:
        """The sample's name; empty for a member that belongs to none."""
        match = KEY.fullmatch(self.name)
        return match[1] if match else ""

    @property
    def ending(self) -> str:
        """What follows the sample's name, in small letters."""
        match = KEY.fullmatch(self.name)
        return match[2].lower() if match else ""


def read(shard: Path, place: Place) -> Iterator[bytes]:
    """The bytes of a member, in pieces."""
    first, left = place
    try:
        with shard.open("rb") as file:
            file.seek(first)
            while data := file.read(min(left, CHUNK)):
                left -= len(data)
                yield data
    except OSError as error:
        raise UserError(f"cannot read {one_line(str(shard))}: {said(error)}") from None


def build(shard: Path, video_field: str = "", caption_field: str = "") -> Index:
    """The index of a tar."""
    index = Index({}, [], [], [])
    ignored = collections.Counter[str]()
    for key, group in itertools.groupby(_members(shard, index), lambda member: member.key):
        sample: dict[str, Member] = {}
        for member in group:
            if key and member.ending in sample:
                raise UserError(
                    f"{one_line(str(shard))}: two members of one name, {one_line(member.name)};"
                    " one of each is allowed in a sample"
                )
            sample[member.ending] = member
        if key:
            _take(shard, sample, video_field, caption_field, index, ignored)
    for ending, count in sorted(ignored.items()):
        pickled = any(part in PICKLES for part in ending.split("."))
        reason = "a pickle, which is never read" if pickled else "neither film nor caption"
        index.unused.append((one_line(f"*.{ending}"), f"{reason} ({count} members)"))
    return index


def _take(
    shard: Path, sample: Mapping[str, Member], video_field: str, caption_field: str, index: Index,
    ignored: collections.Counter[str],
) -> None:  # fmt: skip
    """Adds a sample's film and caption to the index, or what is wrong with it."""
    films: list[str] = []
    for suffixes in (SUFFIXES, PICTURES):  # a picture beside a film is its thumbnail
        films = films or [x for x in sample if f".{x.rpartition('.')[2]}" in suffixes]
    if video_field:
        films = [ending for ending in sample if ending == video_field]
    texts = [ending for ending in (caption_field.lower() or "txt", "json") if ending in sample]
    ignored.update(sample.keys() - {*films, *texts})
    first = one_line(next(iter(sample.values())).name)
    if len(films) != 1:
        named = f"several films (.{', .'.join(films)}); data.video_field chooses"
        wanted = f".{video_field}" if video_field else ", ".join((*SUFFIXES, *PICTURES))
        index.wrong.append((first, named if films else f"no film in its sample ({wanted})"))
        return
    film = sample[films[0]]
    name = one_line(film.name)
    try:
        caption = _caption(shard, sample, texts, caption_field)
    except UserError as error:
        index.wrong.append((name, str(error)))
        return
    digest = hashlib.sha256()
    for data in read(shard, film.place):
        digest.update(data)
    index.films[name] = film.place, digest.hexdigest()
    index.captions.append((name, name, caption))


def _caption(shard: Path, sample: Mapping[str, Member], texts: list[str], field: str) -> str:
    """The caption of a sample; `UserError` with the reason for one without."""
    if not texts:
        raise UserError(f"no caption beside it (.{field or 'txt'}, .json)")
    member = sample[texts[0]]
    name = one_line(PurePosixPath(member.name).name)
    if member.place[1] > LONGEST:
        raise UserError(f"{name} has over {LONGEST} bytes")
    try:
        text = b"".join(read(shard, member.place)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start})") from None
    if texts[0] != "json" or field.lower() == "json":
        return checked_caption(name, text)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({said(error)})") from None
    wanted = (field,) if field else CAPTIONS
    known = [key for key in wanted if isinstance(fields, dict) and key in fields]
    if not known:
        raise UserError(f"{name} has no field {' or '.join(wanted)}; data.caption_field names it")
    return checked_caption(name, fields[known[0]])


def _members(shard: Path, index: Index) -> Iterator[Member]:
    """The files in a tar, in order; links and the like are added to `index.unused`.

    Raises `UserError` for a tar that is no such file, is cut short or damaged, or has unsafe names.
    """
    where = one_line(str(shard))
    try:
        with shard.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            seen: set[str] = set()
            last = -1
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    name, place = info.name, (info.offset_data, info.size)
                    if info.offset <= last or info.size < 0:
                        raise UserError(f"{where}: damaged at byte {last}; make it again")
                    if sum(place) > size:
                        raise UserError(f"{where}: {_cut(size)}")
                    last = info.offset
                    if info.isdir():
                        continue
                    _check_name(where, name, seen)
                    if info.isreg() and not info.issparse():
                        yield Member(name, place)
                    else:
                        index.unused.append((one_line(name), "a link or a special file"))
                _check_end(where, file, tar.offset)
    except UserError:
        raise
    except tarfile.TarError as error:
        cut = "unexpected end" in str(error)
        why = _cut(size) if cut else f"not an uncompressed tar ({said(error)})"
        raise UserError(f"{where}: {why}") from None
    except (OSError, ValueError, OverflowError, EOFError, IndexError) as error:
        raise UserError(f"{where}: not a tar that can be read ({said(error)})") from None


def _cut(size: int) -> str:
    return f"cut short at {size} bytes; copy it again, or leave it out of data.path"


def _check_name(where: str, name: str, seen: set[str]) -> None:
    """Refuses names outside of a folder, and the same again."""
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        raise UserError(
            f"{where}: the member {ascii(name)} lies outside of it; make it again with names"
            " inside of a folder"
        )
    if name in seen:
        raise UserError(f"{where}: two members of one name, {one_line(name)}; one is allowed")
    seen.add(name)


def _check_end(where: str, file: BinaryIO, end: int) -> None:
    """Refuses a tar without its end mark, zeros, or with data behind it."""
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise UserError(f"{where}: {_cut(end + len(block))}")
    if any(block):
        raise UserError(f"{where}: damaged at byte {end}; make it again")
    if any(file.read(20 * BLOCK)):
        raise UserError(
            f"{where}: goes on behind its end mark at byte {end}; tar --concatenate joins tars"
        )
