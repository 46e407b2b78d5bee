"""The paper's DiT and Latte: dense formulations in numpy, the paper's table, what is refused.

(Diffusers' numbers are compared in tests/test_import_weights.py, on imported weights.)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.denoiser import Denoiser
from vdit.diffusion.schedule import process
from vdit.errors import UserError
from vdit.models.dit import PRESETS
from vdit.models.dit_paper import CONDITIONINGS, DiTPaper
from vdit.objectives.auxiliary import Drawn
from vdit.objectives.diffusion import denoising_loss
from vdit.published.text_folder import encoder
from vdit.tokens import Layout, class_condition, dense_tokens, drop_label

SHAPE = (2, 2, 4, 6, 3)  # B n h w Z
LEVEL = np.array([3.0, 700.0])


@functools.partial(jax.jit, static_argnums=0)
def run(model: DiTPaper, params: Any, x: jax.Array, layout: Layout, condition: Any) -> Any:
    return model.apply({"params": params}, x, layout, condition)


def tokens(model: DiTPaper, latent: np.ndarray) -> tuple[jax.Array, Layout]:
    times = jnp.zeros(latent.shape[:2])
    return dense_tokens(jnp.asarray(latent, jnp.float32), model.patch, times, times > 0)


def made(model: DiTPaper, shape: tuple[int, ...] = SHAPE) -> Any:
    """Random parameters, none of them zero; tokens, layout and condition."""
    latent = np.random.default_rng(0).normal(size=shape)
    x, layout = tokens(model, latent)
    told = class_condition(jnp.array([2, -1]), jnp.asarray(LEVEL, jnp.float32))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, layout, told)["params"]
    draw = np.random.default_rng(1).normal
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * draw(size=s.shape), jnp.float32), shapes)
    return params, x, layout, told


# --------------------------------------------------------------------------------------------------
# Token by token in float64


def affine(x: np.ndarray, p: Any) -> np.ndarray:
    return x @ p["kernel"].reshape(-1, p["kernel"].shape[-1]) + p["bias"]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def norm(x: np.ndarray, p: Any = None) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x if p is None else x * p["scale"] + p["bias"]


def attention(x: np.ndarray, memory: np.ndarray, p: Any, heads: int, see: Any) -> np.ndarray:
    q, k, v = affine(x, p["q"]), affine(memory, p["k"]), affine(memory, p["v"])
    out = []
    for cut in np.split(np.arange(q.shape[-1]), heads):
        logits = q[:, cut] @ k[:, cut].T / np.sqrt(len(cut)) + np.where(see, 0.0, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ v[:, cut])
    return affine(np.concatenate(out, -1), p["o"])


def waves(at: np.ndarray, count: int) -> np.ndarray:
    return np.asarray(at)[:, None] * np.array([10_000.0 ** (-i / count) for i in range(count)])


def places(at: np.ndarray, dim: int) -> np.ndarray:
    angle = waves(at, dim // 2)
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def dense(model: DiTPaper, p: Any, x: np.ndarray, label: int, level: float, grid: Any) -> Any:
    """One sample's tokens (L, C) to (L, C), or with learned variance to (L, 2 C)."""
    t, h, w = np.unravel_index(np.arange(len(x)), grid)
    half, kind, length = model.width // 2, model.conditioning, len(x)
    x = affine(x, p["embed"]) + np.concatenate([places(w, half), places(h, half)], 1)
    if model.axes == "joint" and grid[0] > 1:
        x = x + places(t, model.width)
    angle = waves(np.array([level]), 128)
    time = np.concatenate([np.cos(angle), np.sin(angle)], 1)
    time = affine(silu(affine(time, p["level_in"])), p["level_out"])
    told = np.concatenate([time, p["classes"][[label]]])
    vector = told.sum(0)
    if kind == "in_context":
        x = np.concatenate([x, told])
    see = {
        "joint": np.ones((len(x), len(x)), bool),
        "space": t[:, None] == t, "time": (h[:, None] == h) & (w[:, None] == w),
    }  # fmt: skip
    for layer in range(len(next(iter(jax.tree.leaves(p["blocks"]))))):
        for axes, stack in sorted(p["blocks"].items()):
            b = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack)
            if axes == "time" and layer == 0:
                x = x + places(t, model.width)
            shift, scale, gate = np.zeros((2, 1)), np.zeros((2, 1)), np.ones((2, 1))
            if kind.startswith("adaln"):
                parts = affine(silu(vector), b["adaln"]["modulation"]).reshape(2, -1, model.width)
                shift, scale = parts[:, 0], parts[:, 1]
                gate = parts[:, 2] if kind == "adaln_zero" else gate
            y = norm(x, b.get("attention_norm")) * (1 + scale[0]) + shift[0]
            x = x + gate[0] * attention(y, y, b["attention"], model.heads, see[axes])
            if kind == "cross_attention":
                all_ = np.ones((len(x), 2), bool)
                x = x + attention(norm(x, b["cross_norm"]), told, b["cross"], model.heads, all_)
            y = norm(x, b.get("mlp_norm")) * (1 + scale[1]) + shift[1]
            up = affine(y, b["mlp"]["up"])
            up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
            x = x + gate[1] * affine(up, b["mlp"]["down"])
    x = x[:length]
    if kind.startswith("adaln"):
        shift, scale = affine(silu(vector), p["final"]["modulation"]).reshape(2, -1)
        x = norm(x) * (1 + scale) + shift
    else:
        x = norm(x, p["final_norm"])
    out = affine(x, p["out"])
    if not model.learned_variance:
        return out
    latent = SHAPE[-1]
    kinds = [
        np.concatenate([out[:, s + k * latent : s + (k + 1) * latent]
                        for s in range(0, out.shape[1], 2 * latent)], 1)
        for k in (0, 1)
    ]  # fmt: skip
    return np.concatenate(kinds, 1)


CASES = [
    ("in_context", "joint", True), ("cross_attention", "joint", False),
    ("cross_attention", "factorised", True), ("adaln", "joint", True),
    ("adaln", "factorised", False), ("adaln_zero", "joint", False),
    ("adaln_zero", "factorised", True),
]  # fmt: skip


@pytest.mark.parametrize("conditioning, axes, variance", CASES)
def test_each_conditioning_is_its_dense_formulation(
    conditioning: str, axes: str, variance: bool
) -> None:
    model = DiTPaper(
        width=12, depth=2, heads=3, conditioning=conditioning, axes=axes, classes=4,
        learned_variance=variance,
    )  # fmt: skip
    params, x, layout, told = made(model)
    out = np.asarray(run(model, params, x, layout, told))
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for row, label in enumerate((2, 4)):  # -1 is the null class, behind the others
        want = dense(model, p, np.asarray(x[row], np.float64), label, LEVEL[row], layout.grid)
        assert want.shape == out[row].shape
        assert np.abs(out[row] - want).max() / np.abs(want).max() < 2e-5


def test_the_null_class_is_what_dropping_leaves() -> None:
    model = DiTPaper(width=12, depth=1, heads=1, classes=4)
    params, x, layout, told = made(model)
    dropped = drop_label(told, jnp.array([True, False]))
    assert dropped.label is not None and dropped.label.tolist() == [-1, -1]
    both = run(model, params, x, layout, dropped)
    one = run(model, params, x, layout, told)
    assert jnp.abs(both[0] - one[0]).max() > 1e-3 and jnp.abs(both[1] - one[1]).max() == 0


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_it_starts_at_zero_and_runs_change_nothing(conditioning: str) -> None:
    model = DiTPaper(width=8, depth=2, heads=1, conditioning=conditioning, classes=3)
    params, x, layout, told = made(model)
    start = model.init(jax.random.key(0), x, layout, told)["params"]
    assert jnp.abs(run(model, start, x, layout, told)).max() == 0
    other = run(model.clone(unroll=2, remat="full"), params, x, layout, told)
    np.testing.assert_allclose(run(model, params, x, layout, told), other, rtol=1e-4, atol=1e-5)


def test_the_objective_s_loss_trains_it() -> None:
    """Prediction and learned variance both have a gradient, in every parameter."""
    model = DiTPaper(width=8, depth=1, heads=1, classes=3)
    params, x, layout, told = made(model)
    loss = denoising_loss(Denoiser(model, process("ddpm"), "eps", encoder("none")))
    eps = jax.random.normal(jax.random.key(2), x.shape)

    def value(params: Any) -> jax.Array:
        drawn = Drawn(x, eps, jnp.array([0.5, 0.9]), layout, told)
        return loss({"dit": params}, drawn)[0]

    gradient = jax.jit(jax.grad(value))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.isfinite(leaf).all() and (jnp.abs(leaf).max() > 0 or "'k'" in str(path)), path


@pytest.mark.parametrize(
    "size, conditioning, millions",
    [
        ("S", "adaln_zero", 33), ("B", "adaln_zero", 130), ("L", "adaln_zero", 458),
        ("XL", "adaln_zero", 675), ("XL", "adaln", 600), ("XL", "cross_attention", 598),
        ("XL", "in_context", 449),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_paper(size: str, conditioning: str, millions: float) -> None:
    """Tables 1 and 4 of the DiT paper, patches of 2."""
    model = DiTPaper(**PRESETS[size], conditioning=conditioning)
    x, layout = jax.eval_shape(lambda: tokens(model, np.zeros((2, 1, 4, 4, 4))))
    told = class_condition(jnp.array([2, -1]), jnp.zeros(2))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, layout, told)["params"]
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) / 1e6
    assert abs(count - millions) / millions < 0.02


def test_what_such_a_model_cannot_do_is_refused_in_one_line() -> None:
    model = DiTPaper(width=8, depth=2, heads=1, classes=3)
    params, x, layout, told = made(model)

    def refused(what: str, model: DiTPaper, layout: Layout, told: Any) -> None:
        with pytest.raises(UserError, match=what) as caught:
            model.init(jax.random.key(0), x, layout, told)
        assert "\n" not in str(caught.value)

    two = told.replace(level=jnp.zeros((2, 2)))
    refused("one time for all tokens: given frames are not", model, layout, two)
    refused("needs dense batches", model, layout.replace(grid=None), told)
    refused("known are in_context, cross", model.clone(conditioning="film"), layout, told)
    mixed = model.clone(conditioning="in_context", axes="factorised")
    refused("joint is allowed", mixed, layout, told)
    refused("multiple of 2", model.clone(axes="factorised", depth=3), layout, told)
    refused("the heads must divide", model.clone(heads=3), layout, told)
