"""Classification of videos: softmax cross-entropy with label smoothing.

Dimension key: B batch, T frames, H height, W width, C colours, Q questions, K classes of one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vdit.models.vivit import ViViT
from vdit.nn.patch import to_float
from vdit.objectives.objective import Batch, Objective, Params, Sums


def smoothed_cross_entropy(logits_BK: jax.Array, label_B: jax.Array, smoothing: float) -> jax.Array:
    """Cross-entropy (B,) to the label's share 1 - s, and s spread evenly over all K classes.

    Szegedy et al. 2016, section 7 (with the uniform prior).
    """
    log_BK = jax.nn.log_softmax(logits_BK.astype(jnp.float32), axis=-1)
    own_B = jnp.take_along_axis(log_BK, label_B[:, None], axis=-1)[:, 0]
    return -(1.0 - smoothing) * own_B - smoothing * log_BK.mean(-1)


def answers(logits: jax.Array, questions: Mapping[str, int]) -> dict[str, jax.Array]:
    """One head's logits (B, sum of K), cut into those of each question (B, K)."""
    parts, start = {}, 0
    for name, classes in questions.items():
        parts[name] = logits[:, start : start + classes]
        start += classes
    return parts


def classify_objective(
    model: ViViT, questions: Mapping[str, int], smoothing: float = 0.0
) -> Objective:
    """The mean cross-entropy over questions, each a name and its number of classes.

    A batch holds "video" (B, T, H, W, C) uint8 and "label" (B, Q) int32, in the order of
    `questions`; the model has as many classes as all questions together. Metrics: accuracy_NAME.
    Nothing is random: `key` and the samples' ordinals are not used.
    """

    def init(key: jax.Array, batch: Batch) -> Params:
        return {"vivit": model.init(key, to_float(batch["video"][:1]))["params"]}

    def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array) -> Sums:
        del frozen, key
        logits: Any = model.apply({"params": params["vivit"]}, to_float(batch["video"]))
        total, metrics = jnp.zeros(()), {}
        for i, (name, part_BK) in enumerate(answers(logits, questions).items()):
            label_B = batch["label"][:, i]
            total += smoothed_cross_entropy(part_BK, label_B, smoothing).sum() / len(questions)
            right_B = jnp.argmax(part_BK, axis=-1) == label_B
            metrics[f"accuracy_{name}"] = right_B.sum().astype(jnp.float32)
        return total, jnp.float32(logits.shape[0]), metrics

    return Objective(init, loss)
