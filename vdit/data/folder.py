"""`Folder`: a folder of captioned films as a random-access source for grain."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vdit.data.captioned import Captioned
from vdit.data.captions import Row, Skipped, rows
from vdit.data.decode import one_line
from vdit.data.films import DIGESTS, file_digests
from vdit.errors import UserError


class FilmFolder:
    """The films of a folder; the digests of its files are remembered in the folder `cache`."""

    kind = "folder"

    def __init__(self, path: str | os.PathLike[str], cache: str | os.PathLike[str]) -> None:
        if not os.fspath(path):
            raise UserError("no folder of clips is given: its path is empty")
        self._root, self._remembered = Path(path), Path(cache) / DIGESTS
        self.name, self.where = self._root.name, one_line(str(self._root))

    def rows(self, strict: bool, skipped: Skipped) -> list[Row]:
        """The captioned films; see `captions.rows`."""
        return rows(self._root, strict=strict, skipped=skipped)

    def digests(self, names: Sequence[str], workers: int = 1) -> dict[str, str]:
        """See `Films`."""
        return file_digests(self._root, names, self._remembered, workers)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A film's own file."""
        yield self._root / name


class Folder(Captioned):
    """Clips of the films of the folder `path`; see `Captioned`."""

    def __init__(
        self, path: str | os.PathLike[str], *, cache: str | os.PathLike[str], **options: Any
    ):
        super().__init__(FilmFolder(path, cache), cache=cache, **options)
