"""The command line as people write it; what is wrong in a configuration's file is its line."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from vdit import main
from vdit.config import command
from vdit.errors import UserError
from vdit.runtime import progress

ROOT = Path(__file__).parents[2]


def test_a_space_and_a_home_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = ["vdit", "--config", "x.py", "--config.data.path=~/clips", "--prompt=~ is a tilde", "~"]
    assert command.plain(words) == [
        "vdit", "--config=x.py", "--config.data.path=/home/me/clips", "--prompt=~ is a tilde", "~"
    ]  # fmt: skip
    assert command.plain(["vdit", "--config"]) == ["vdit", "--config"]
    assert command.plain(["--negative=~/x", "--out=~/x"]) == ["--negative=~/x", "--out=/home/me/x"]


def test_a_folder_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="the current folder is gone"):
        main.parse(["vdit", "--workdir=run"])


@pytest.mark.parametrize("flag, words", [
    ("--config.nosuch=1", "--config has no field 'nosuch'"),
    ("--config.vae.widht=3", "--config has no field 'widht' Did you mean \"width\" instead of"),
])  # fmt: skip
def test_an_unknown_field_is_named(flag: str, words: str) -> None:
    code = "import sys; from vdit import main; main.parse(sys.argv)"
    command = [sys.executable, "-c", code, f"--config={ROOT}/experiments/base.py", flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert words in done.stderr.splitlines()[-1]


def test_a_colon_in_a_path_is_told(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "c.py").write_text("")
    with pytest.raises(UserError, match=r"no such file .*/a; what follows the first colon is its"):
        command.load(str(tmp_path / "a:b" / "c.py"))


@pytest.mark.parametrize("text, words", [
    ("import nothing_of_that_name", "line 1: ModuleNotFoundError: No module named 'nothing_of"),
    ("\nget_config = lambda: 1 / 0", "line 2: ZeroDivisionError: division by zero"),
    ("def get_config(:", "SyntaxError"), ("", "KeyError: 'get_config'"),
    ("open('/nowhere')", "line 1: FileNotFoundError"),
    ("import sys\nsys.exit(3)", "line 2: SystemExit: 3"),
    ("def get_config():\n    return 3", "gives no ConfigDict but 3"),
    ("def get_config():\n    from vdit.config import default\n    default().vae.widht = 3",
     "line 3: AttributeError: 'Key \"widht\" does not exist"),
])  # fmt: skip
def test_an_error_in_a_configuration_is_its_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as error:
        command.load(str(tmp_path / "mine.py"))
    line = str(error.value)
    assert words in line and line.startswith(f"--config={tmp_path / 'mine.py'}: ")
    assert len(line) < 400 and ("widht" not in words or 'mean "width"' in line)


def test_a_files_own_refusal_is_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / "experiments" / "base.py"
    assert main.main(["vdit", f"--config={file}:nosuch", "--workdir=/nowhere"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("vdit: experiments/base.py:nosuch: known variants are") and "\n" in line
    assert line.count("\n") == 1


def test_a_configuration_finds_its_package_from_any_folder(tmp_path: Path) -> None:
    """Here `experiments`, which is not installed, as a command in another folder does."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").write_text("")
    (tmp_path / "lab" / "first.py").write_text("WIDTH = 48")
    (tmp_path / "lab" / "second.py").write_text(
        "from lab import first\nfrom vdit.config import default\n"
        "def get_config(arg=''):\n    c = default()\n    c.vae.width = first.WIDTH\n    return c\n"
    )
    path = list(sys.path)
    try:
        assert command.load(str(tmp_path / "lab" / "second.py")).vae.width == 48
    finally:
        sys.path[:] = path
        sys.modules.pop("lab", None)


def test_a_narrow_stream_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "latin-1", "cp1252"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        progress.say("红球-0.mp4")
        with progress.Progress("vae", 1) as bar:
            bar.update(1, name="ü红")
        stream.flush()
        assert b"\\u7ea2\\u7403-0.mp4\n" in stream.buffer.getvalue()  # type: ignore[attr-defined]


CTRL_C = """
import os, signal, sys, threading, time
from vdit import main
def work(*given):
    threading.Thread(target=time.sleep, args=(30,)).start()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
main.work = work
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell said "&"
main.command.leave(main.main(["vdit", "--mode=sample", f"--workdir={sys.argv[1]}", "--prompt=y"]))
"""


def test_ctrl_c_is_one_line_and_status_130(tmp_path: Path) -> None:
    """At once, whatever threads are still at work."""
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C, str(tmp_path / "x")], capture_output=True, text=True,
        timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "vdit: stopped; the same command goes on\n"
    assert not list(tmp_path.iterdir())
