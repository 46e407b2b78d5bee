"""Signals: one line, the status of the signal, nothing half written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vdit.errors import Interrupted
from vdit.runtime.preemption import Preemption

ROOT = Path(__file__).parents[2]
LINE = "vdit: stopped; the same command goes on\n"
WRITES = """
import signal, sys, time
from pathlib import Path
from vdit import errors
from vdit.runtime import files, preemption
for number in errors.SIGNALS:
    signal.signal(number, errors.stop)  # as in a command
if sys.argv[2] == "thread":
    preemption.listen()
folder = Path(sys.argv[1])
with files.all_or_nothing(folder / "a.mp4", folder / "a.json"), files.atomic_folder(folder / "out"):
    (folder / "a.mp4").write_text("whole")
    with files.atomic_path(folder / "a.json") as path:
        path.write_text("half")
        print("writing", flush=True)
        time.sleep(600)
"""
ARMED = """
import signal, sys, time
from vdit import errors
from vdit.runtime import preemption
for number in errors.SIGNALS:
    signal.signal(number, errors.stop)
preemption.listen()
with preemption.Preemption() as asked:
    asked.reached(1)
    print("training", flush=True)
    while not asked.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(600)
"""


def begin(program: str, *args: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", program, *args], stdout=pipe, stderr=pipe, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["thread", "handler"])
def test_a_command_that_writes_is_ended_by_a_signal_at_once(
    number: signal.Signals, how: str, tmp_path: Path
) -> None:
    """In a thread, too, while the main one is in a call that signals do not end."""
    process = begin(WRITES, str(tmp_path), how)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 3
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == LINE
    assert process.returncode == 128 + number and not list(tmp_path.iterdir())


def test_a_first_signal_asks_a_training_and_a_second_ends_it() -> None:
    process = begin(ARMED)
    assert process.stdout is not None and process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    asked = "SIGINT: saving, then stopping; again to stop at once\n"
    assert process.communicate(timeout=60)[1] == asked + LINE
    assert process.returncode == 143


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at what is imported")
@pytest.mark.parametrize(
    "words", [["vdit", "eval"], ["vdit.main", "--mode=eval"], ["tools.export_weights", "--raw"]]
)
def test_ctrl_c_is_one_line_while_modules_are_imported(words: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", *words, f"--workdir={tmp_path}"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    until = time.monotonic() + 60
    while "numpy" not in maps.read_text() and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", LINE)


def test_outside_of_a_command_a_signal_asks_once_and_only_where_something_is_to_be_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Interrupted, "status", 143)
    old = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Preemption() as preemption:
        with pytest.raises(KeyboardInterrupt):  # no step is made
            os.kill(os.getpid(), signal.SIGINT)
        assert not preemption.reached(1)
        preemption.rest()
        with pytest.raises(KeyboardInterrupt):  # as while sampling
            os.kill(os.getpid(), signal.SIGINT)
        assert not preemption.reached(2)
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested and preemption.reached(3)
        assert Interrupted.status == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == old
