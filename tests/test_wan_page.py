"""The commands of docs/wan.md, run as they are written on a small pipeline of random weights."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from several import LIMIT

from tests.published.test_wan_pipeline import pipeline
from tests.test_wan_training import clip_folder
from vdit.runtime.video import write_png

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    """The page's commands of vdit, each once, in order."""
    page = (ROOT / "docs" / "wan.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return list(
        dict.fromkeys(line for line in lines if re.match(r"python -m (vdit|tools)\.", line))
    )


@pytest.mark.slow
def test_the_page(tmp_path: Path) -> None:
    """TI2V's weights take every command: from words, from an image, finetuned and written back."""
    pipeline(tmp_path / "FOLDER", "ti2v")
    clip_folder(tmp_path / "CLIPS", 4)
    write_png(tmp_path / "first.png", np.full((32, 48, 3), 200, np.uint8))
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    found = commands()
    assert len(found) >= 6
    for line in found:
        _, _, module, *arguments = shlex.split(line)
        if "experiments/lora.py" in line:  # two steps instead of 300
            short = {"dit.train.steps": 2, "dit.train.warmup": 0, "sample.clips": 1}
            arguments += [f"--config.{name}={value}" for name, value in short.items()]
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=tmp_path, env=env, text=True,
            capture_output=True, timeout=LIMIT,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert list((tmp_path / "samples").glob("*.mp4"))
    assert (tmp_path / "PIPELINE" / "model_index.json").is_file()
    assert not (tmp_path / "PIPELINE" / "transformer").is_symlink()
