"""The examples of CONTRIBUTING.md for layers and the diffusion maths, run as they are written."""

import ast
import functools
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.base import get_config
from vdit.config.denoiser import build_dit
from vdit.diffusion.prediction import PREDICTIONS, target, to_x0_eps
from vdit.diffusion.schedule import PROCESSES, Process, add_noise, process
from vdit.errors import UserError
from vdit.nn.linear import Linear
from vdit.runtime import attention, optimizer
from vdit.runtime.machine import matmul
from vdit.runtime.mesh import batch_sharding, make_mesh, param_sharding

sys.path.append(str(Path(__file__).parent / "kernels"))
from beside import beside_xla, difference  # noqa: E402

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(heading: str, kind: str = "python") -> str:
    """The one example under a heading; a table's `{..., "row": x}` adds to the table."""
    section = TEXT.split(f"\n### {heading}\n")[1].split("\n### ")[0]
    (code,) = re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)
    return re.sub(r"^(\w+) = \{\.\.\., ", r"\1 = {**\1, ", code, flags=re.MULTILINE)


def run(code: str, **names: Any) -> dict[str, Any]:
    space = {"jax": jax, "jnp": jnp, **names}
    exec(code, space)
    return space


@pytest.mark.parametrize("masked", [False, True])
def test_an_attention_kernel(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    code, row = example("An attention kernel").split("\n\n\n")
    kernel = run(code)["attend"]
    known = run(row, KERNELS=attention.KERNELS, jax_nn=SimpleNamespace(attend=kernel))["KERNELS"]
    monkeypatch.setattr(attention, "KERNELS", known)
    config = get_config("smoke")
    config.run.attention = "jax"
    assert build_dit(config).attend is kernel
    mine, plain = beside_xla(kernel, 6, 10, masked)
    assert all(difference(a, b) < 1e-5 for a, b in zip(mine, plain, strict=True))


def check_algebra(made: Process, prediction: str) -> None:
    """x0 and eps come back from the network's answer, also at both ends of time."""
    t = jnp.linspace(0.0, 1.0, 9)
    x0, eps = jax.random.normal(jax.random.key(0), (2, 9, 5))
    x_t = add_noise(made, x0, eps, t)
    y = target(prediction, made, t, x0, eps)
    got = to_x0_eps(prediction, made, t, x_t, y)
    assert all(bool(jnp.isfinite(x).all()) for x in got)
    np.testing.assert_array_equal(got[0][0], x_t[0])
    np.testing.assert_allclose(got[0][1:-1], x0[1:-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got[1][1:-1], eps[1:-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_process(prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(example("A process"), PROCESSES=PROCESSES, Process=Process)["PROCESSES"]
    monkeypatch.setitem(PROCESSES, "quadratic", rows["quadratic"])
    made = process("quadratic")
    assert (float(made.alpha(0.0)), float(made.sigma(0.0))) == (1.0, 0.0)
    t = jnp.linspace(0.1, 0.9, 5)
    for curve, slope in ((made.alpha, made.d_alpha), (made.sigma, made.d_sigma)):
        np.testing.assert_allclose(jax.vmap(jax.grad(curve))(t), slope(t), rtol=1e-5)
    check_algebra(made, prediction)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_prediction(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(f"rows = {{{example('A prediction')}}}")["rows"]
    monkeypatch.setitem(PREDICTIONS, "difference", rows["difference"])
    check_algebra(process(name), "difference")


def test_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices go to Lion, whose steps are the learning rate's sign; biases to AdamW."""
    assert '"lion": optax.scale_by_lion,' in example("An optimizer", "diff")
    monkeypatch.setitem(optimizer.OPTIMIZERS, "lion", optax.scale_by_lion)
    made = optimizer.make_optimizer(
        "lion", learning_rate=0.5, adam_learning_rate=0.1, steps=9, schedule="constant", b1=0.8
    )
    params = {"blocks": {"q": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}}}
    gradient = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    updates, _ = made.update(gradient, made.init(params), params)
    for name, rate in (("kernel", 0.5), ("bias", 0.1)):
        want = -rate * np.sign(gradient["blocks"]["q"][name])
        np.testing.assert_allclose(updates["blocks"]["q"][name], want, rtol=1e-4)
    with pytest.raises(UserError, match="it has b1, b2"):
        optimizer.make_optimizer("lion", learning_rate=0.5, steps=9, momentum=0.5)


def test_a_layer_that_is_split_over_devices() -> None:
    """A gated MLP of its own kernel names, on a mesh and on one device."""
    ((pattern, axes),) = ast.literal_eval(f"[{example('A layer that is split over devices')}]")
    rules = ((pattern, axes), (r"(^|/)down/kernel$", ("tensor", None)))
    mesh = make_mesh({"data": 4, "tensor": 2})
    x = jax.random.normal(jax.random.key(0), (8, 16, 64))
    one = matmul("float32", make_mesh({}, jax.devices()[:1]))

    def loss(params: Any, x: jax.Array, how: Any) -> jax.Array:
        def linear(name: str, features: int, x: jax.Array) -> jax.Array:
            out: Any = Linear(features, False, matmul=how).apply({"params": params[name]}, x)
            return out

        hidden = jax.nn.silu(linear("gate", 128, x)) * linear("up", 128, x)
        return jnp.square(linear("down", 64, hidden)).mean()

    sizes = {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}
    params = {
        name: {"kernel": jax.random.normal(jax.random.key(i), shape) * shape[0] ** -0.5}
        for i, (name, shape) in enumerate(sizes.items())
    }
    grad = jax.value_and_grad(functools.partial(loss, how=one))
    want = jax.jit(grad)(params, x)
    placed = jax.device_put(params, param_sharding(mesh, params, rules))
    assert placed["gate"]["kernel"].sharding.shard_shape((64, 128)) == (64, 64)
    many = jax.value_and_grad(functools.partial(loss, how=matmul("float32", mesh)))
    with jax.set_mesh(mesh):
        got = jax.jit(many)(placed, jax.device_put(x, batch_sharding(mesh)))
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)
