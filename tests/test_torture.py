"""The torture tool: a few kills and faults, and what it counts as a difference."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from several import LIMIT, ROOT

from tools import torture
from tools.torturing import kills, memory
from tools.torturing.runs import Layout, differences, layout_of

ROOTED = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounts a disk, as root"
)


def run(folder: Path, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tools.torture", f"--folder={folder}", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--kills=3", "--layout=1x1"),
        ("--kills=2", "--layout=1x8,data:2,fsdp:2,tensor:2"),
        ("--kills=2", "--layout=2x2,data:2,fsdp:2"),
        ("--kills=3", "--layout=1x1", "--signal=INT"),
        ("--kills=2", "--layout=2x2,data:2,fsdp:2", "--signal=TERM"),
    ],
    ids=" ".join,
)
def test_a_run_that_is_ended_at_random_times_ends_equal_to_the_bit(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    count = flags[0].partition("=")[2]
    assert f"{count} of {count} signals: runs equal to the bit" in run(tmp_path, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["failing", "small", "slow", "clock"])
def test_faults_are_one_line_and_the_same_command_goes_on(chain: str, tmp_path: Path) -> None:
    assert "runs equal to the bit" in run(tmp_path, f"--faults={chain}")


@ROOTED
@pytest.mark.slow
@pytest.mark.parametrize("chain", ["full", "read-only"])
def test_so_it_is_with_a_disk_that_refuses(chain: str, tmp_path: Path) -> None:
    assert "runs equal to the bit" in run(tmp_path, f"--faults={chain}")


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    assert "200 requests" in run(tmp_path, "--memory", "--steps=2000", "--requests=200")


def workdir(path: Path, loss: float = 0.5, seconds: float = 1.0, sample: bytes = b"film") -> Path:
    (path / "samples").mkdir(parents=True)
    (path / "samples" / "a.mp4").write_bytes(sample)
    rows = [{"stage": "vae", "step": 1, "loss": loss, "seconds": seconds}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_counts_as_a_difference(tmp_path: Path) -> None:
    whole = workdir(tmp_path / "whole")
    assert not differences(whole, workdir(tmp_path / "same", seconds=2.0))
    assert "metrics.jsonl" in differences(whole, workdir(tmp_path / "loss", loss=0.6))[0]
    other = workdir(tmp_path / "sample", sample=b"fiLm")
    assert differences(whole, other) == ["samples/a.mp4 differs"]
    (other / "samples" / "a.mp4").rename(other / "samples" / ".a.1.tmp.mp4")
    assert differences(whole, other) == [
        "samples/a.mp4 is in one alone", "samples/.a.1.tmp.mp4 is left"
    ]  # fmt: skip
    (whole / "checkpoints" / "vae" / "3").mkdir(parents=True)
    found = differences(whole, workdir(tmp_path / "step"))
    assert found == ["checkpoints/vae: steps [3] and []"]


@pytest.mark.parametrize(
    ("number", "statuses", "said", "good"),
    [
        (signal.SIGKILL, [-9], "", True),
        (signal.SIGKILL, [1], "Traceback (most recent call last):\n", False),
        (signal.SIGINT, [130], "vdit: stopped\n", True),
        (signal.SIGINT, [143], "vdit: stopped\n", False),
        (signal.SIGINT, [130], "vdit: stopped\nException ignored in\n", False),
        (signal.SIGTERM, [143], "vdit: stopped\n", True),
        (signal.SIGTERM, [-15], "", False),
        (signal.SIGTERM, [143, 1], "vdit: stopped\n", True),
    ],
)
def test_how_a_process_should_end(
    number: signal.Signals, statuses: list[int], said: str, good: bool
) -> None:
    life: Any = SimpleNamespace(err=lambda index: said)
    if good:
        kills.check(life, 0, statuses, number, set())
    else:
        with pytest.raises(AssertionError):
            kills.check(life, 0, statuses, number, set())


def test_a_wrong_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--layout=2", "--layout=0x1", "--layout=1x2,fsd:2", "--faults=x", "--kills=0"):
        assert torture.main([flag]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert layout_of("2x4,fsdp:8") == Layout(2, 4, "fsdp:8")


def test_growth_is_that_of_the_second_half() -> None:
    flat = memory.parts([50.0, *[100.0] * 79])
    assert flat == [100.0] * 8 and memory.growth(flat) == 0.0
    assert memory.growth(memory.parts([*map(float, range(100, 180))])) > memory.FLAT
