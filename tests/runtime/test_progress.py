"""Bars: what a terminal shows, and that nothing else sees any of a passing one."""

import os
import pty
import subprocess
import sys

import pytest

from vdit.runtime import progress
from vdit.runtime.progress import Progress, each

CODE = """
import time
from vdit.runtime import progress
progress.SHORT = {short}
for item in progress.each("reading", range(4), "clips"):
    time.sleep(0.2)
progress.say("end")
"""


def terminal(code: str) -> str:
    """What a program prints on a terminal."""
    mine, its = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=its, stderr=its, env=env)
    os.close(its)
    shown = b""
    try:
        while part := os.read(mine, 4096):
            shown += part
    except OSError:  # the terminal's other end is closed
        pass
    assert process.wait() == 0, shown
    return shown.decode()


def test_a_terminal_sees_what_takes_long() -> None:
    shown = terminal(CODE.format(short=0.1))
    assert "reading" in shown and "2/4" in shown and "clips/s" in shown and "left" in shown
    assert "\x1b[2K" in shown  # the bar's line is deleted
    assert "end" in shown.splitlines()[-1] and "reading" not in shown.splitlines()[-1]
    assert "reading" not in terminal(CODE.format(short=9.0))


def test_nothing_else_sees_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SHORT", 0.0)
    assert list(each("reading", "abc", "letters")) == ["a", "b", "c"]
    with Progress("denoising", 4, passing=True) as bar:
        assert bar.beyond(2) is None
        bar.update(4)
    assert capsys.readouterr().out == ""
    with Progress("dit", 4) as bar:  # a stage's own prints lines there
        bar.update(4, loss=0.5)
    assert "dit  4/4" in capsys.readouterr().out
