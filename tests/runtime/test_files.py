"""A folder that one process holds."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vdit.errors import UserError
from vdit.runtime import files
from vdit.runtime.files import alone, atomic_folder, atomic_path, refusing, sweep

HOLD = """
import sys, time
from pathlib import Path
from vdit.runtime.files import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_by_one_process_until_that_ends(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use by another run"), alone(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_what_dead_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / "samples").mkdir()
    other, mine = "0" * 8, files.HOST
    parent = os.getppid()
    names = {
        "dead": f".a.{mine}-{child.pid}-abcdef.tmp.mp4",
        "mine": f"samples/.b.c.{mine}-{os.getpid()}-abcdef.tmp",
        "alive": f".a.{mine}-{parent}-abcdef.tmp.mp4",
        "elsewhere": f".a.{other}-{child.pid}-abcdef.tmp.mp4",
        "elsewhere, old": f"samples/.a.{other}-{child.pid}-abcdef.tmp.mp4",
        "a user's": ".notes.tmp.txt",
    }
    for name in names.values():
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / names["elsewhere, old"], (0, 0))
    sweep(tmp_path)
    left = {name for name, path in names.items() if (tmp_path / path).exists()}
    assert left == {"alive", "elsewhere", "a user's"}


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (RuntimeError("write() failed: No space left on device; writing x"), "No space left"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "No such file"),
    ],
)
def test_what_the_disk_refuses_is_one_line_and_leaves_nothing(
    raised: Exception, reason: str, tmp_path: Path
) -> None:
    """Libraries in C++ raise errors of their own."""
    for atomic in (atomic_path, atomic_folder):
        with (
            pytest.raises(UserError, match=f"cannot write .*out: {reason}"),
            atomic(tmp_path / "out") as path,
        ):
            path.mkdir(exist_ok=True)
            raise raised
    assert not list(tmp_path.iterdir())


def test_a_mistake_stays_a_mistake(tmp_path: Path) -> None:
    for raised in (RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "x"), KeyError("x")):
        with pytest.raises(type(raised)), refusing(tmp_path, reading=True):
            raise raised
    where = OSError(errno.EROFS, "Read-only file system", "/data/x")
    with pytest.raises(UserError, match="read or write /data/x: Read-only"):
        with refusing(tmp_path, reading=True):
            raise where


def test_a_name_may_have_255_bytes(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".txt", "𠮷" * 62 + ".json"):
        files.write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    with atomic_folder(tmp_path / ("y" * 255)) as folder:
        (folder / "a").write_text("a")
    assert len(list(tmp_path.iterdir())) == 3
