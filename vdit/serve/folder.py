"""The served folder: results, and the files that were uploaded.

    FOLDER/ID.mp4 .webp .gif .json [.png]   a result, with its settings
    FOLDER/uploads/ID .png .json            an upload, a picture of it, and what is known of it

IDs are given out here. A path is made of a name that has the form of an ID and of a suffix that is
in a table; no other text of a request gets into one, and links are not followed.
"""

import contextlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vdit.data.decode import DecodeError, Decoder, Limits, one_line
from vdit.errors import UserError
from vdit.runtime.files import atomic_path, refusing, write_text
from vdit.runtime.video import write_png

ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{17}", re.ASCII)
KINDS = {
    "mp4": "video/mp4", "gif": "image/gif", "webp": "image/webp", "png": "image/png",
    "json": "application/json",
}  # fmt: skip
UPLOAD = 2**26  # bytes of a file, at most
KEPT = 100  # uploads; older ones are deleted
SETTINGS = 2**20  # bytes of a result's settings that are read
PICTURE = 160  # pixels of the longer side of an upload's picture
# Over these, an upload is refused; an ordinary clip of a minute is far below.
LIMITS = Limits(pixels=2**24, frames=2**14, bytes=UPLOAD, memory=2**31, silence=15, seconds=60)


def new_id() -> str:
    """An ID that nobody guesses; later ones sort behind."""
    now = time.time()
    when = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    return f"{when}-{int(now % 1 * 1e6):05x}{secrets.token_hex(6)}"


class Folder:
    """Results and uploads below `root`; closing it ends its decoders."""

    def __init__(self, root: Path) -> None:
        with refusing(root):
            root.mkdir(parents=True, exist_ok=True)
            self.root = root.resolve()
            self.uploads = self.root / "uploads"
            self.uploads.mkdir(exist_ok=True)
        if self.uploads.is_symlink():
            raise UserError(f"{self.uploads} is a link: a folder is needed")
        self.decoder = Decoder(LIMITS, workers=2)

    def close(self) -> None:
        self.decoder.close()

    def file(self, name: str, suffix: str) -> Path | None:
        """A result's file; None if there is none."""
        if suffix not in KINDS or not ID.fullmatch(name):
            return None
        return _plain(self.root / f"{name}.{suffix}")

    def results(self, most: int, before: str = "") -> Iterator[dict[str, Any]]:
        """The newest results, or the newest before an ID."""
        names = [path.stem for path in self.root.glob("*.json") if ID.fullmatch(path.stem)]
        for name in sorted(names, reverse=True):
            if most and (not before or name < before) and (found := self.result(name)):
                most -= 1
                yield found

    def result(self, name: str) -> dict[str, Any] | None:
        """A result: its ID, its settings, and the suffixes of its files."""
        settings = self._read(self.file(name, "json"))
        files = [suffix for suffix in KINDS if self.file(name, suffix)]
        if settings is None or "mp4" not in files:
            return None
        return {"id": name, "settings": settings, "files": files}

    def add_upload(self, shown: str, copy: Any) -> dict[str, Any]:
        """Keeps an upload, which copy(file) writes, if it can be decoded; what is known of it."""
        name = new_id()
        with atomic_path(self.uploads / name) as temporary:
            with temporary.open("wb") as file:
                copy(file)
            with _named(shown, temporary):
                info = self.decoder.probe(temporary)
                first = self.decoder.frames(temporary, [0.0], _within(info.height, info.width))
        write_png(self.uploads / f"{name}.png", first[0])
        known = {
            "name": one_line(shown, 80), "frames": info.frames, "fps": info.fps,
            "width": info.width, "height": info.height, "seconds": info.seconds,
        }  # fmt: skip
        write_text(self.uploads / f"{name}.json", json.dumps(known) + "\n")
        self._forget()
        return {"id": name, **known}

    def upload(self, name: str) -> dict[str, Any] | None:
        """What is known of an upload; None if there is none of that ID."""
        if not ID.fullmatch(name) or _plain(self.uploads / name) is None:
            return None
        known = self._read(_plain(self.uploads / f"{name}.json"))
        return None if known is None else {"id": name, **known}

    def picture(self, name: str) -> Path | None:
        """The PNG of an upload."""
        return _plain(self.uploads / f"{name}.png") if ID.fullmatch(name) else None

    def clip(
        self, kind: str, name: str, shown: str, fps: float, size: tuple[int, int] | None,
        frames: int, last: int = 0,
    ) -> tuple[np.ndarray, str]:  # fmt: skip
        """The first `frames` frames of an "upload" or a "result", or its `last` ones, uint8
        (t, H, W, 3), and a summary. Without a size the first one as it is."""
        path = self.file(name, "mp4")
        if kind == "upload":
            path = _plain(self.uploads / name) if ID.fullmatch(name) else None
        if path is None:
            raise UserError(f"{shown}: there is no such {kind} (any more)")
        kept: list[np.ndarray] = []
        count = 0
        until = None if last else (frames if size else 1) / fps
        with _named(shown, path):
            for part in self.decoder.stream(path, fps, size, until=until):
                kept, count = [*kept, part], count + len(part)
                while last and count - len(kept[0]) >= last:
                    count -= len(kept.pop(0))
        video: np.ndarray = np.concatenate(kept)
        video = video[-last:] if last else video[: frames if size else 1]
        return video, f"{shown}: {len(video)} frames"

    def _read(self, path: Path | None) -> dict[str, Any] | None:
        try:
            if path is None or path.stat().st_size > SETTINGS:
                return None
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _forget(self) -> None:
        """Deletes the oldest uploads."""
        names = sorted(path.stem for path in self.uploads.glob("*.json") if ID.fullmatch(path.stem))
        for name in names[:-KEPT]:
            for suffix in ("", ".png", ".json"):
                with contextlib.suppress(OSError):
                    os.unlink(self.uploads / f"{name}{suffix}")


def _plain(path: Path) -> Path | None:
    """The path of a file that is there, and no link."""
    try:
        return path if stat.S_ISREG(path.lstat().st_mode) else None
    except OSError:
        return None


def _within(height: int, width: int) -> tuple[int, int]:
    """A size of the same aspect, within PICTURE."""
    scale = min(PICTURE / max(height, width), 1.0)
    return max(round(height * scale), 1), max(round(width * scale), 1)


@contextlib.contextmanager
def _named(shown: str, path: Path) -> Iterator[None]:
    """Names a file that cannot be used as its owner does, not by its path here."""
    shown = one_line(shown, 80)
    try:
        yield
    except DecodeError as error:
        raise UserError(f"{shown}: {error.reason.replace(str(path), shown)}") from None
