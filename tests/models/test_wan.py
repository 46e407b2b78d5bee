"""Wan's transformer: diffusers' numbers and gradients, attention to padding, what is refused."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools import import_weights
from vdit.config.denoiser import build_dit
from vdit.config.identity import read_config
from vdit.errors import UserError
from vdit.models.wan import Wan
from vdit.nn.patch import patchify
from vdit.runtime.checkpoint import restore_ema
from vdit.tokens import Condition, Layout, dense_tokens, text_condition

GOLDEN = Path(__file__).parents[1] / "golden" / "wan"
EXPECTED = np.load(GOLDEN / "expected.npz")
CASES = sorted({key.rsplit("/", 1)[0] for key in EXPECTED.files if "/" in key})


@functools.cache
def imported(name: str, root: Path) -> tuple[Wan, Any]:
    """The network of a golden folder, and its parameters."""
    work = root / name
    if not work.exists():
        assert import_weights.main([f"--source={GOLDEN / name}", f"--workdir={work}"]) == 0
    config = read_config(work)
    config.run.dtype, config.dit.wan.token_times = "float32", name == "ti2v"
    return build_dit(config), restore_ema(work / "checkpoints" / "dit", 0)["dit"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wan")


def given(case: str) -> dict[str, np.ndarray]:
    parts = [key.rsplit("/", 1) for key in EXPECTED.files]
    return {part[1]: EXPECTED["/".join(part)] for part in parts if part[0] == case}


def tokens(x: np.ndarray) -> jax.Array:
    return patchify(jnp.asarray(x), (1, 2, 2)).reshape(len(x), -1, 4 * x.shape[-1])


def inputs(case: str, stored: dict[str, np.ndarray]) -> tuple[jax.Array, Layout, Condition]:
    """Tokens, layout and condition of a case."""
    x, text, mask = (jnp.asarray(stored[name]) for name in ("x", "text", "mask"))
    first = jnp.arange(x.shape[1])[None] < (1 if case.startswith("ti2v") else 0)
    first = jnp.broadcast_to(first, x.shape[:2])
    x, layout = dense_tokens(x, (2, 2), jnp.zeros(x.shape[:2]), first)
    level = jnp.asarray(EXPECTED["times"], jnp.float32)[:, None]
    if case.startswith("ti2v"):
        level = jnp.concatenate([level, jnp.zeros_like(level)], axis=1)
    pooled = jnp.zeros((len(x), 1, text.shape[-1]))
    condition = text_condition(text[:, None], mask[:, None], pooled, level)
    beside = tokens(stored["beside"]) if "beside" in stored else None
    image = jnp.asarray(stored["image"]) if "image" in stored else None
    return x, layout, condition.replace(beside=beside, image=image)  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", CASES)
def test_diffusers_numbers_and_gradients(case: str, root: Path, near: Any) -> None:
    stored = given(case)
    model, params = imported(case.split("/")[0], root)
    x, layout, condition = inputs(case, stored)

    def run(x: jax.Array, text: jax.Array) -> jax.Array:
        told = condition.replace(text=text)  # type: ignore[attr-defined]
        return model.apply({"params": params}, x, layout, told)

    @jax.jit
    def both(x: jax.Array, text: jax.Array, back: jax.Array) -> Any:
        out, pull = jax.vjp(run, x, text)
        return out, *pull(back)

    out, to_x, to_text = both(x, condition.text, tokens(stored["back"]))
    near(f"Wan, {case}", out, tokens(stored["out"]))
    near(f"Wan, {case}, by latents", to_x, tokens(stored["to_x"]), 1e-4)
    seen = stored["mask"][..., None]
    near(f"Wan, {case}, by text", to_text[:, 1:] * seen, stored["to_text"] * seen, 1e-4)
    assert not np.asarray(to_text)[:, 1:][~stored["mask"]].any()


def test_tokens_after_layers(root: Path) -> None:
    """The first layer's are another network's last, of which only the head is left."""
    model, params = imported("t2v", root)
    told = inputs("t2v/1x4x4", given("t2v/1x4x4"))
    run = jax.jit(functools.partial(model.apply, {"params": params}), static_argnames="hidden")
    out, kept = run(*told, hidden=(1, 2))
    np.testing.assert_array_equal(out, run(*told))
    cut = params | {"blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
    _, alone = model.clone(depth=1).apply({"params": cut}, *told, hidden=(1,))
    np.testing.assert_allclose(kept[1], alone[1], atol=1e-5)
    assert np.abs(np.asarray(kept[2]) - np.asarray(kept[1])).max() > 0.1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"grid": None}, "needs dense batches"),
        ({"levels": 2}, "knows one time for all tokens"),
        ({"levels": 4, "token_times": True}, "knows one caption a clip"),
        ({"beside": 7}, "needs an image's latents"),
        ({"heads": 5}, "heads of an even size"),
    ],
)
def test_what_is_refused(change: dict[str, Any], words: str, root: Path) -> None:
    model, params = imported("t2v", root)
    x, layout, condition = inputs("t2v/1x4x4", given("t2v/1x4x4"))
    told: Any = condition
    if "grid" in change:
        layout = layout.replace(grid=None)  # type: ignore[attr-defined]
    told = told.replace(level=jnp.tile(told.level, (1, change.pop("levels", 1))))
    changed = {name: value for name, value in change.items() if name != "grid"}
    with pytest.raises(UserError, match=words):
        jax.eval_shape(model.clone(**changed).apply, {"params": params}, x, layout, told)
