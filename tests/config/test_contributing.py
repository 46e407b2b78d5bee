"""The additions that CONTRIBUTING shows, made to a copy of the package and run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from contributing import examples

ROOT = Path(__file__).parents[2]
COMMENT = re.compile(r"@@.*\n")  # between the hunks: for readers


def apply(diff: str, root: Path) -> None:
    """Changes the files of a diff. A hunk's old lines stand in the file exactly once."""
    for file, hunks in re.findall(r"^--- a/(\S+)\n\+\+\+ b/.*\n((?:[-+ @].*\n|\n)+)", diff, re.M):
        path = root / file
        text = path.read_text(encoding="utf-8")
        for hunk in filter(None, COMMENT.split(hunks)):
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(x[1:] for x in lines if x[0] in kinds) for kinds in (" -", " +"))
            assert text.count(old) == 1, f"{file} has not once:\n{old}"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")


def add(title: str, root: Path) -> None:
    """A copy of the package with what the section's examples add."""
    for room in ("vdit", "experiments"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    for language, text in examples(title):
        if language == "diff":
            apply(text, root)
        elif name := re.match(r"# (\S+\.py)\n", text):
            (root / name[1]).write_text(text[name.end() :], encoding="utf-8")


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in that copy."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environ = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environ, capture_output=True, text=True
    )


COMMAND = ("-m", "vdit.main", "--config=experiments/base.py:smoke", "--workdir=w")
FIELD = """
from experiments.base import get_config
from vdit.config import joined
from vdit.config.denoiser import build_dit
from vdit.config.identity import digest, stage_fields
config = get_config("smoke")
joined.check(config)
assert config.dit.mlp_ratio == build_dit(config).mlp_ratio == 4.0
assert "dit.mlp_ratio" not in stage_fields(config, "dit")
config.dit.mlp_ratio = 2.0
assert build_dit(config).mlp_ratio == stage_fields(config, "dit")["dit.mlp_ratio"] == 2.0
"""


def test_a_configuration_field(tmp_path: Path) -> None:
    add("A configuration field", tmp_path)
    done = python(tmp_path, "-c", FIELD)
    assert done.returncode == 0, done.stderr
    for arguments, words in (
        (["--config.dit.mlp_ratio=0"], "dit.mlp_ratio is 0.0: a number above 0 is allowed"),
        (["--config.dit.mlp_ratio=2", "--config.dit.model=paper"], "only vdit takes it"),
    ):
        done = python(tmp_path, *COMMAND, *arguments)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr


SMALL = (
    "--config.data.frames=5", "--config.latents.clips=8", "--config.vae.train.steps=3",
    "--config.dit.train.steps=3", "--config.sample.clips=1", "--config.sample.steps=2",
    "--config.stages=('vae','latents','dit','sample')",
)  # fmt: skip


def test_a_denoiser(tmp_path: Path) -> None:
    """From the caption to a video."""
    add("A model", tmp_path)
    chosen = ("--config.dit.model=deep_set", "--config.dit.deep_set.width=64")
    done = python(tmp_path, *COMMAND, *SMALL, *chosen)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "w" / "samples").glob("*"))
    done = python(tmp_path, *COMMAND, *chosen, "--config.dit.deep_set.depth=0")
    assert "dit.deep_set.depth is 0: a number above 0 is allowed" in done.stderr.splitlines()[-1]


OPTIMIZER = """
import jax, jax.numpy as jnp, numpy as np
from experiments.base import get_config
from vdit.config import joined
from vdit.runtime.optimizer import make_optimizer
config = get_config("smoke")
config.dit.train.optimizer = "lion"
joined.check(config)
rule = make_optimizer("lion", learning_rate=0.1, steps=9, schedule="constant", clip=None)
params = {"blocks": {"q": {"kernel": jnp.zeros((2, 3, 4))}}}
gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
updates, _ = rule.update(gradients, rule.init(params), params)
want = jax.tree.map(lambda x: -0.1 * jnp.sign(x), gradients)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, want)
"""


def test_an_optimizer(tmp_path: Path) -> None:
    add("An optimizer", tmp_path)
    done = python(tmp_path, "-c", OPTIMIZER)
    assert done.returncode == 0, done.stderr
