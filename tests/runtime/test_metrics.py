"""The rows, the events read back by tensorboard's own reader, and the lines on the terminal."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vdit.errors import UserError
from vdit.runtime.metrics import Metrics, environment, read
from vdit.runtime.progress import Progress, clock, say
from vdit.runtime.video import tile


def events(workdir, stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(workdir / "tensorboard" / stage)).Reload()


def test_a_row_is_one_json_line_with_six_digits(tmp_path):
    with Metrics(tmp_path) as metrics:
        values = {"loss": np.float32(0.1), "n": np.int64(7), "kl": float("nan"), "text": "a\n<b>"}
        metrics.write("vae", 3, values)
        line = (tmp_path / "metrics.jsonl").read_text()  # flushed before close
    expected = {"stage": "vae", "step": 3, "loss": 0.1, "n": 7, "kl": None, "text": "a\n<b>"}
    assert line.count("\n") == 1 and json.loads(line) == expected
    assert '"loss": 0.1,' in line


def test_tensorboard_reads_scalars_and_videos(tmp_path):
    video = np.zeros((3, 5, 8, 8, 3), np.uint8)
    video[:, np.arange(5), :, np.arange(5)] = 255
    with Metrics(tmp_path) as metrics:
        metrics.write("dit", 1, {"loss": 0.5, "note": "x" * 40})
        metrics.write("dit", 2, {"loss": 0.25})
        metrics.write("eval", 2, {"split": "real", "objects": "one", "colour": 1.0})
        metrics.video("dit", 2, "samples", video, fps=10)
        metrics.video("dit", 2, "fast", video, fps=60)
    found = events(tmp_path, "dit")
    assert [(e.step, e.value) for e in found.Scalars("dit/loss")] == [(1, 0.5), (2, 0.25)]
    assert events(tmp_path, "eval").Scalars("eval/real/one/colour")[0].value == 1.0
    image = Image.open(io.BytesIO(found.Images("dit/samples")[0].encoded_image_string))
    assert image.format == "GIF" and image.n_frames == 5 and image.info["duration"] == 100
    fast = Image.open(io.BytesIO(found.Images("dit/fast")[0].encoded_image_string))
    assert fast.n_frames == 5 and fast.info["duration"] == 20  # no GIF is faster
    assert image.size == tile(video).shape[2:0:-1] == (17, 17)


def test_truncate_takes_back_one_stage_only(tmp_path):
    with Metrics(tmp_path) as metrics:
        for stage in ("vae", "dit"):
            for step in (10, 20, 30):
                metrics.write(stage, step, {"loss": step / 10})
    with Metrics(tmp_path) as metrics:
        metrics.truncate("dit", 20)
        metrics.write("dit", 30, {"loss": 9.0})
    rows = [(r["stage"], r["step"], r["loss"]) for r in read(tmp_path)]
    assert rows[:3] == [("vae", 10, 1.0), ("vae", 20, 2.0), ("vae", 30, 3.0)]
    assert rows[3:] == [("dit", 10, 1.0), ("dit", 20, 2.0), ("dit", 30, 9.0)]
    found = events(tmp_path, "dit").Scalars("dit/loss")
    assert [(e.step, e.value) for e in found] == [(10, 1.0), (20, 2.0), (30, 9.0)]
    assert len(events(tmp_path, "vae").Scalars("vae/loss")) == 3


def test_truncate_of_a_new_workdir_leaves_nothing(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.truncate("vae", 0)
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_line_costs_only_itself(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write("vae", 1, {"loss": 1.0})
        metrics.write("vae", 2, {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [row["step"] for row in read(tmp_path)] == [1]
    with Metrics(tmp_path) as metrics:
        metrics.write("vae", 3, {"loss": 3.0})
        assert [row["step"] for row in read(tmp_path)] == [1, 3]
        metrics.truncate("vae", 3)
        metrics.write("vae", 4, {"loss": 3.0})
    assert path.read_text().count("\n") == len(read(tmp_path)) == 3
    assert read(tmp_path / "nowhere") == []


def test_an_inactive_process_writes_nothing(tmp_path, capsys):
    with Metrics(tmp_path / "run", active=False) as metrics:
        metrics.write("vae", 1, {"loss": 1.0})
        metrics.truncate("vae", 0)
    with Progress("vae", 2, active=False) as progress:
        progress.update(1)
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with Metrics(tmp_path / "file") as metrics, pytest.raises(UserError, match="cannot write"):
        metrics.write("vae", 1, {"loss": 1.0})
    if Path("/dev/full").exists():
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with Metrics(tmp_path) as metrics, pytest.raises(UserError, match="No space left"):
            metrics.write("vae", 1, {"loss": 1.0})


def test_neither_tensorflow_nor_torch_nor_a_warning(tmp_path):
    """Even where tensorflow is installed; and nothing of tensorboard before the first row."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')")
    program = (
        "import sys, numpy as np; from vdit.runtime.metrics import Metrics\n"
        "assert 'tensorboard' not in sys.modules\n"
        f"with Metrics({str(tmp_path)!r}) as m:\n"
        "  m.write('a', 1, {'x': 1.0}); m.video('a', 1, 'v', np.zeros((2, 4, 4, 3), np.uint8), 8)\n"
        "  m.truncate('a', 0)\n"
        "assert not {'tensorflow', 'torch', 'jax'} & sys.modules.keys()"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_environment_names_versions_and_device():
    found = environment()
    assert found["jax"] and found["python"] and found["device"]


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
    say("training")
    with Progress("dit", total=200, start=100, every=0.0) as progress:
        for step in (101, 102):
            progress.update(step, loss=0.123456)
            time.sleep(0.01)
        progress.update(103)
        say("saved [103]")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["training", "dit  101/200  loss 0.1235"]
    assert "steps/s" in lines[2] and "left" in lines[2] and "loss 0.1235" in lines[3]
    assert lines[4] == "saved [103]" and "103/200" in lines[5]
    assert re.search("took 0:0[1-9]", lines[5])


def test_progress_is_quiet_between_lines_and_fast(capsys):
    with Progress("dit", total=10_000) as progress:
        start = time.thread_time()  # of this thread alone: the machine may be busy
        for step in range(10_000):
            progress.update(step, loss=0.1)
        each = (time.thread_time() - start) / 10_000
    assert each < 50e-6
    assert len(capsys.readouterr().out.splitlines()) == 2  # the first and the last


def test_progress_draws_a_bar_on_a_terminal():
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    program = (
        "import time; from vdit.runtime.progress import Progress, say\n"
        "with Progress('dit', 30) as p:\n"
        "  for i in range(30): p.update(i + 1, loss=0.5); time.sleep(0.02)\n"
        "  say('a [note]')"
    )
    path = str(Path(__file__).parents[2])
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": path}
    drawing = subprocess.Popen([sys.executable, "-c", program], stdout=child, env=environ)
    os.close(child)  # read while it draws: a terminal holds a few lines, then makes it wait
    text = b""
    try:
        while chunk := os.read(parent, 65536):
            text += chunk
    except OSError:
        pass  # Linux's way to say that the other end is closed
    os.close(parent)
    assert drawing.wait() == 0
    assert b"30/30" in text and b"steps/s" in text and b"loss 0.5" in text and "━".encode() in text
    assert b"a [note]" in text


def test_clock():
    assert [clock(s) for s in (0, 6.2, 725, 3723)] == ["0:00", "0:07", "12:05", "1:02:03"]
