"""Imported arrays as links: read as copies are, on any mesh and in any dtype, and as safely."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.published.test_weights import OTHERS, ROWS, SHAPES, shards, tensors
from tools import import_weights
from tools.importing.parts import Part
from vdit.errors import UserError
from vdit.published import weights
from vdit.runtime.checkpoint import Checkpoints, newest_good_step, restore_ema, saved_shapes
from vdit.runtime.mesh import make_mesh, param_sharding


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """Two shards, with layers of two dtypes."""
    folder = tmp_path / "source"
    folder.mkdir()
    shards(folder)
    bias = "last.bias"
    narrow = {k: x if k == bias else x.astype(jnp.bfloat16) for k, x in tensors().items()}
    for path in folder.glob("*.safetensors"):
        names = weights.read_header(path).keys()
        save_file({name: narrow[name] for name in names}, path)
    made = weights.plan(weights.read_headers(folder), SHAPES, ROWS, OTHERS, folder)
    return Part(folder, made, {"stage": "dit"})


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), a, b)


def test_they_are_read_as_they_would_be_copied(part: Part, tmp_path: Path) -> None:
    copied, linked = (tmp_path / name / "checkpoints" / "dit" for name in ("copied", "linked"))
    for folder in (copied, linked):
        import_weights.write_part("dit", part, None, folder.parents[1], copy=folder == copied)
    assert newest_good_step(linked) == 0
    files = [path for path in (linked / "0" / "ema").iterdir() if path.suffix == ".safetensors"]
    assert len(files) == 2 and all(path.is_symlink() for path in files)
    assert saved_shapes(linked, 0, "ema") == saved_shapes(copied, 0, "ema")
    whole = restore_ema(copied, 0)
    same(restore_ema(linked, 0), whole)
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    split = restore_ema(linked, 0, lambda tree: param_sharding(mesh, tree))
    same(jax.device_get(split), jax.device_get(whole))
    places = param_sharding(mesh, whole)
    jax.tree.map(lambda x, at: np.testing.assert_(x.sharding == at), split, places)
    # A training takes them in float32.
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), whole)
    state = {"step": jax.ShapeDtypeStruct((), jnp.int32), "opt": wide}
    restored = Checkpoints(linked).restore(state, wide, spare=("opt",))
    assert restored is not None
    same(restored.ema, jax.tree.map(lambda x: x.astype(jnp.float32), whole))


def test_another_file_is_named(part: Part, tmp_path: Path) -> None:
    import_weights.write_part("dit", part, None, tmp_path, copy=False)
    directory, path = tmp_path / "checkpoints" / "dit", part.folder / "a.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="ema/a.safetensors: its bytes are not those"):
        newest_good_step(directory)
    path.unlink()
    with pytest.raises(UserError, match="ema/a.safetensors: missing"):
        newest_good_step(directory)
