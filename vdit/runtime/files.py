"""Atomic writes (a temporary name, then a rename), and a lock on a folder."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vdit.errors import HALF_WRITTEN, UserError

HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # of a temporary file's name
STEM = 40  # characters of it: names have 255 bytes at most
TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)-[0-9a-f]{6}\.tmp(\.\w+)?", re.DOTALL)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` with the same suffix; renames it to `path` on success.

    On an error the temporary file is removed and `path` stays unchanged; see `refusing`.
    """
    path = Path(path)
    temporary = _beside(path)
    with refusing(path), all_or_nothing(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def temporary_path(folder: Path, name: str) -> Iterator[Path]:
    """Yields a path in `folder`, with the suffix of `name`; deletes the file at the end."""
    temporary = _beside(folder / name)
    with all_or_nothing(temporary):
        with refusing(temporary):
            folder.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A new name beside `path`, which `sweep` recognises."""
    mine = f"{HOST}-{os.getpid()}-{os.urandom(3).hex()}"
    return path.with_name(f".{path.stem[:STEM]}.{mine}.tmp{path.suffix}")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new, temporary folder beside `path`, as `atomic_path` does a file's path."""
    temporary = path.with_name(f".{path.name[:STEM]}.{os.getpid()}.tmp")
    with refusing(path), all_or_nothing(temporary):
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str], reading: bool = False) -> Iterator[None]:
    """Makes an error of the file system a `UserError` with the path and the reason: a full disk, a
    folder that is read-only, a device that fails. With `reading` only what is wrong with the disk,
    with the path of the error."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (reason := disk_reason(error, reading)) is None:
            raise
        where, how = path, "write"
        if reading:
            where, how = getattr(error, "filename", None) or path, "read or write"
        raise UserError(f"cannot {how} {where}: {reason}") from error


DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM,
    errno.EMFILE, errno.ESTALE,
)  # fmt: skip


def disk_reason(error: Exception, disk: bool = False) -> str | None:
    """Why the file system refused; None for another error. Libraries in C++ raise errors of their
    own with its words. `disk`: errors of `DISK` alone, not what is wrong with a path."""
    if isinstance(error, OSError) and (error.errno in DISK or not disk):
        return error.strerror or str(error)
    return next((text for text in map(os.strerror, DISK) if text in str(error)), None)


@contextlib.contextmanager
def all_or_nothing(*paths: Path) -> Iterator[None]:
    """Deletes these files and folders where the body fails, or a signal ends the process in it."""
    HALF_WRITTEN.update(paths)
    try:
        yield
    except BaseException:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        HALF_WRITTEN.difference_update(paths)


def sweep(workdir: Path) -> None:
    """Deletes the temporary files of processes of this machine that are gone, in a workdir and its
    folders; what another machine left is deleted a day later."""
    for path in [*workdir.glob(".*.tmp*"), *workdir.glob("*/.*.tmp*")]:
        if match := TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                old = time.time() - path.stat().st_mtime > 24 * 3600
                if old if match[1] != HOST else not _lives(int(match[2])):
                    path.unlink()


def _lives(process: int) -> bool:
    """Whether another process of this number does; this one has begun no file yet."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return process != os.getpid()


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
