"""Films inside of larger files, such as tar shards and tables: where each lies, and its caption.

A shard is read once, for the digests of its films, into an index, which is remembered by the
shard's path, size and times. Reading a film is then one seek, and no shard is opened again while
the decoded films (`FilmCache`) remain.
"""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vdit.data.captions import SUFFIXES, Row, Skipped
from vdit.data.decode import one_line
from vdit.data.films import DIGESTS, file_digests, file_status
from vdit.errors import UserError
from vdit.runtime.files import read_cache, refusing, temporary_path, write_text
from vdit.runtime.progress import each

FORMAT = 1  # changes whenever the same shard would be indexed differently
PICTURES = (".avif", ".jpeg", ".jpg", ".png", ".webp")
MOST = 100_000  # shards that a pattern may name
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


@dataclasses.dataclass
class Index:
    """What a shard holds; its names lack that of the shard."""

    films: dict[str, tuple[Any, str]]  # where the reader finds it, and SHA-256 of its bytes
    # (what names it in messages, film, caption). A film that is not in `films` is a file's path.
    captions: list[tuple[str, str, str]]
    wrong: Skipped  # films that cannot be used, as (name, reason)
    unused: Skipped  # what is no film, as (name, reason)
    schema: str = ""  # equal for shards that belong together


Build = Callable[[Path], Index]
Read = Callable[[Path, Any], Iterable[bytes]]  # (shard, where) -> the film's bytes


class Shards:
    """The captioned films of shards: a `captioned.Store`.

    `build` makes a shard's index, which depends on `settings` too; `read` gives a film's bytes. The
    folder `cache` holds the indices.
    """

    def __init__(
        self, kind: str, path: str, shards: Sequence[Path], cache: str | os.PathLike[str],
        build: Build, read: Read, settings: Sequence[object],
    ) -> None:  # fmt: skip
        self.kind, self.where, self.name = kind, one_line(path), one_line(Path(path).name)
        self._cache, self._read = Path(cache), read
        self._films: dict[str, tuple[Path, Any, str]] = {}
        self._rows: list[Row] = []
        self._wrong: Skipped = []
        self._unused: Skipped = []
        indices = _indices(shards, self._cache, build, repr((kind, FORMAT, *settings)))
        for shard, name, index in zip(shards, _names(shards), indices, strict=True):
            if index.schema != indices[0].schema:
                raise UserError(
                    f"{one_line(str(shard))} has {index.schema}, and {one_line(str(shards[0]))}"
                    f" {indices[0].schema}: shards of one schema are allowed"
                )
            for film, (place, digest) in index.films.items():
                self._films[f"{name}/{film}"] = shard, place, digest
            for where, film, caption in index.captions:
                inside = f"{name}/{film}" if film in index.films else film
                self._rows.append(Row(f"{name}/{where}", inside, caption))
            self._wrong += [(f"{name}/{film}", reason) for film, reason in index.wrong]
            self._unused += [(f"{name}/{what}", reason) for what, reason in index.unused]

    def rows(self, strict: bool, skipped: Skipped) -> list[Row]:
        """See `captioned.Store`."""
        if self._wrong and (strict or not self._rows):
            name, reason = self._wrong[0]
            raise UserError(f"{self.where}: {name}: {reason}")
        if not self._rows:
            raise UserError(f"{self.where}: no film in it ({', '.join((*SUFFIXES, *PICTURES))})")
        skipped += self._wrong + self._unused
        return self._rows

    def digests(self, names: Sequence[str], workers: int = 1) -> dict[str, str]:
        """See `films.Films`."""
        files = [name for name in names if name not in self._films]
        found = file_digests(Path(), files, self._cache / DIGESTS, workers) if files else {}
        return {name: found.get(name) or self._films[name][2] for name in names}

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A copy of a film, deleted at the end; of a film that is a file this itself."""
        if name not in self._films:
            yield Path(name)
            return
        shard, place, digest = self._films[name]
        with temporary_path(self._cache, "film") as path:
            read = hashlib.sha256()
            with refusing(path), path.open("wb") as file:
                for data in self._read(shard, place):
                    read.update(data)
                    file.write(data)
            if read.hexdigest() != digest:
                raise UserError(f"{one_line(str(shard))}: it has changed; begin the run again")
            yield path


def _names(shards: Sequence[Path]) -> list[str]:
    """What the shards are called in messages: the end of the path that tells them apart."""
    same = Counter(shard.name for shard in shards)
    return [one_line(x.name if same[x.name] == 1 else x.as_posix()) for x in shards]


def _indices(shards: Sequence[Path], cache: Path, build: Build, settings: str) -> list[Index]:
    """The indices of shards, of which those that are new or have changed are built."""
    places, found, new = [], dict[Path, Index](), []
    for shard in shards:
        status = list(file_status(shard))
        key = hashlib.sha256(f"{status[0]} {settings}".encode()).hexdigest()
        places.append((cache / f"index-{key[:32]}.json", status))
        known = _remembered(*places[-1])
        if known is None:
            new.append((shard, *places[-1]))
        else:
            found[shard] = known

    def work(shard: Path, place: Path, status: list[Any]) -> None:
        found[shard] = build(shard)
        if list(file_status(shard)) != status:
            raise UserError(f"{one_line(str(shard))}: it changed while it was read; begin again")
        fields = {"shard": status, "index": dataclasses.asdict(found[shard])}
        write_text(place, json.dumps(fields))

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        jobs = [pool.submit(work, *shard) for shard in new]
        try:
            for job in each("index", jobs, "shards") if jobs else ():
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[shard] for shard in shards]


def _remembered(place: Path, status: list[Any]) -> Index | None:
    """The index in a file; None if it is of another shard or of an earlier state, or damaged."""
    fields = read_cache(place)
    if fields.get("shard") != status:
        return None
    try:
        index = Index(**fields["index"])
        index.films = {str(name): (at, str(sha)) for name, (at, sha) in index.films.items()}
        index.captions = [(str(a), str(b), str(c)) for a, b, c in index.captions]
        index.wrong, index.unused = (
            [(str(name), str(why)) for name, why in pairs] for pairs in (index.wrong, index.unused)
        )
        return index
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def shard_paths(path: str, suffix: str, source: str) -> list[Path]:
    """The shards that data.path names: a file, a folder of them, or a pattern.

    A pattern has `*`, `?` and `[...]` as in a shell, and braces: `{000..127}`, `{a,b}`.
    """
    if not path:
        raise UserError(f"data.source={source}: data.path is empty; give shards (*{suffix})")
    if "://" in path or path.startswith("pipe:"):
        raise UserError(f"data.path={one_line(path)}: only files of this machine are read")
    whole = Path(path)
    if whole.is_dir():
        found = sorted(x for x in whole.iterdir() if x.suffix.lower() == suffix and x.is_file())
    elif whole.exists():
        found = [whole]
    else:
        found = []
        for name in itertools.islice(_expanded(path), MOST + 1):
            some = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
            if not some:
                raise UserError(f"data.path={one_line(path)}: no file {one_line(name)}")
            found += [Path(shard) for shard in some]
    if not 0 < len(found) <= MOST:
        number = f"over {MOST}" if found else "no"
        raise UserError(f"data.path={one_line(path)}: {number} shards (*{suffix}) in it")
    return list({os.path.realpath(shard): shard for shard in found}.values())


def _expanded(pattern: str) -> Iterator[str]:
    """What the braces of a pattern stand for, in order."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, listed = match.groups()
    begin, end = pattern[: match.start()], pattern[match.end() :]
    if listed is not None:
        parts: Iterable[str] = listed.split(",")
    else:
        width = len(first) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        parts = (f"{n:0{width}d}" for n in range(int(first), int(last) + step, step))
    for part in parts:
        yield from _expanded(begin + part + end)
