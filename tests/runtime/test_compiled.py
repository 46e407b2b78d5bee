"""The cache of compiled programs: where it is, what is thrown away, what damage does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vdit.runtime import compiled

PROGRAM = """
import jax, jax.numpy as jnp
from vdit.runtime import compiled
place = compiled.keep()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

def double(x):
    return 2 * x

def files():
    return sorted(place.glob("jit_double-*"))

def value():
    jax.clear_caches()
    return float(jax.jit(double)(jnp.ones(())))

assert value() == 2.0
(path,) = files()
whole = path.read_bytes()
for damage in (whole[:9], whole[:40] + bytes([whole[40] ^ 255]) + whole[41:]):
    path.write_bytes(damage)
    assert value() == 2.0
    assert files() == [path] and len(path.read_bytes()) > 40
import warnings
warnings.warn("another warning is shown")
"""


def test_a_damaged_program_is_compiled_and_kept_anew(tmp_path: Path) -> None:
    """Without a word on stderr; the folder is below $XDG_CACHE_HOME."""
    unset = (compiled.NAME, "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "another warning is shown" in done.stderr and "persistent" not in done.stderr
    assert [*tmp_path.glob("vdit/compiled/*/jit_double-*")]


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compiled.NAME, "")
    assert compiled.keep() is None
    assert not [*tmp_path.iterdir()]


def test_processors_have_folders_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kinds = {}
    for flags in ("avx2", "avx2 avx512f"):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\nbogomips : {flags}\n")
        text = compiled.processor(tmp_path / "cpuinfo")
        monkeypatch.setattr(compiled, "processor", lambda text=text: text)
        kinds[compiled.folder()] = text
        monkeypatch.undo()
    assert [*kinds.values()] == ["flags : avx2", "flags : avx2 avx512f"]


def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "kind" / f"program-{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10))
        os.utime(path, (1000 + number % 3, 1000))
    (tmp_path / "kind" / "program-9").touch()
    compiled.prune(tmp_path, 25)
    assert sorted(path.name[-1] for path in tmp_path.rglob("program-*")) == ["1", "2"]
