"""The core knows no world: what does not choose one loads neither a world nor its physics."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "vdit").rglob("*.py"))
]
CORE = [name for name in NAMES if not name.startswith("vdit.worlds")]
assert len(CORE) > 50
IMPORTED = f"import importlib, vdit\nfor name in {CORE!r}: importlib.import_module(name)\n"
SAMPLED = """
from tools import import_weights
from vdit import main
source = "--source=tests/golden/pipelines/dit"
assert import_weights.main([source, f"--workdir={tmp}/work"]) == 0
ask = ["vdit", "--mode=sample", f"--workdir={tmp}/work", "--prompt=999", f"--out={tmp}/out"]
main.FLAGS(["vdit"])
assert main.main(ask) == 0
"""
TRAINED = """
from pathlib import Path
import numpy as np
from experiments import folder
from vdit.run import run
from vdit.runtime.video import write_mp4
root = Path(tmp) / "films"
root.mkdir()
for i in range(4):
    pixels = np.random.default_rng(i).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    write_mp4(root / f"{i}.mp4", pixels, 10.0)
    (root / f"{i}.txt").write_text(f"film {i}")
config = folder.get_config("smoke")
config.data.path, config.data.frames, config.data.size = str(root), 5, (16, 16)
config.vae.train.steps = config.dit.train.steps = 3
config.vae.train.batch = config.dit.train.batch = 8
config.latents.clips = config.latents.batch = 3
config.stages = ("vae", "latents", "dit")
config.vae.train.optimizer = config.dit.train.optimizer = "adamw"  # compiles faster than Muon
run(config, Path(tmp) / "work")
"""


@pytest.mark.parametrize(
    "code", [IMPORTED, SAMPLED, TRAINED], ids=["import", "sample an import", "train on a folder"]
)
def test_no_world_is_loaded(code: str, tmp_path: Path) -> None:
    after = (
        "import sys\n"
        "bad = [n for n in sys.modules if n.startswith(('pymunk', 'vdit.worlds'))]\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"tmp = {str(tmp_path)!r}\n{code}{after}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
