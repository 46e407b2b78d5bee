"""The classifier's objective: its definition, its parts, its metrics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.models.vivit import ViViT
from vdit.objectives.classify import answers, classify_objective, smoothed_cross_entropy

QUESTIONS = {"motion": 3, "impacts": 2}


def made(smoothing: float) -> tuple[Any, Any, Any, ViViT]:
    model = ViViT(sum(QUESTIONS.values()), 8, 1, 2, patch=(2, 4, 4))
    rng = np.random.default_rng(0)
    batch = {
        "video": rng.integers(0, 255, (4, 4, 8, 8, 3), dtype=np.uint8),
        "label": np.array([[0, 1], [2, 0], [1, 1], [2, 1]], np.int32),
        "ordinal": np.arange(4, dtype=np.uint32),
    }
    objective = classify_objective(model, QUESTIONS, smoothing)
    shapes = jax.eval_shape(objective.init, jax.random.key(0), batch)
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)
    return objective, params, batch, model


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_and_the_metrics_are_their_definitions(smoothing: float) -> None:
    objective, params, batch, model = made(smoothing)
    loss, weight, metrics = jax.jit(objective.loss)(params, {}, batch, jax.random.key(0))
    video = batch["video"].astype(np.float32) / 127.5 - 1
    logits: Any = jax.jit(model.apply)({"params": params["vivit"]}, video)
    total = 0.0
    for i, (name, part) in enumerate((("motion", logits[:, :3]), ("impacts", logits[:, 3:]))):
        x = np.asarray(part, np.float64)
        share = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        classes = x.shape[1]
        wanted = (1 - smoothing) * np.eye(classes)[batch["label"][:, i]] + smoothing / classes
        total += -(wanted * np.log(share)).sum() / 2
        right = (x.argmax(-1) == batch["label"][:, i]).sum()
        assert float(metrics[f"accuracy_{name}"]) == right
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert float(weight) == 4


def test_smoothing_s_least_loss_is_the_entropy_of_its_target() -> None:
    share = jnp.array([[0.8 + 0.05, 0.05, 0.05, 0.05]])  # smoothing 0.2 over four classes
    least = smoothed_cross_entropy(jnp.log(share), jnp.array([0]), 0.2)
    np.testing.assert_allclose(least[0], -(share * jnp.log(share)).sum(), rtol=1e-5)
    gradient = jax.grad(lambda x: smoothed_cross_entropy(x, jnp.array([0]), 0.2).sum())
    np.testing.assert_allclose(gradient(jnp.log(share)), 0.0, atol=1e-6)


def test_answers_cut_the_head_in_order() -> None:
    parts = answers(jnp.arange(10.0).reshape(2, 5), QUESTIONS)
    np.testing.assert_array_equal(parts["motion"], [[0, 1, 2], [5, 6, 7]])
    np.testing.assert_array_equal(parts["impacts"], [[3, 4], [8, 9]])
