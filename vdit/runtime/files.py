"""Atomic writes (a temporary name, then a rename), and a lock on a folder."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vdit.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` with the same suffix; renames it to `path` on success.

    On an error the temporary file is removed and `path` stays unchanged; one of the file system
    becomes a `UserError` with the path and the reason.
    """
    path = Path(path)
    mine = f"{os.getpid()}-{os.urandom(3).hex()}"  # another machine may have the same number
    temporary = path.with_name(f".{path.stem}.{mine}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Locks `folder` while the context lasts; the system releases it if this process dies.

    Raises `UserError` if another process holds it. On a file system without locks it does nothing.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use by another run: wait for its end, or give another --workdir"
            ) from None
        except OSError:
            pass
        yield


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file that a user may have written: UTF-8, with or without a byte order mark.

    Raises `OSError`, and `UserError` for other encodings.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None


def read_cache(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object that only saves work; empty if it is missing or damaged."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def appears(path: Path, seconds: float = 60.0) -> bool:
    """Whether a file exists within some seconds: a shared folder may show another machine's files
    late."""
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # refreshes what NFS has cached
    return path.exists()
