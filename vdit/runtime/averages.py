"""Averages of parameters over training whose length is chosen afterwards (post-hoc EMA).

Karras et al. 2024 (arXiv:2312.02696), section 3: while training, two averages with power-function
profiles are updated and snapshots of both are kept; a weighted sum of snapshots is, by least
squares over the profiles, the average of any other length. A length is sigma_rel, the deviation of
the profile in units of the training so far.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdit.errors import UserError
from vdit.runtime.checkpoint import Checkpoints, Folder, restore_ema

KEPT = {"short": 0.05, "long": 0.10}  # lengths of the two averages
LONGEST = 0.25  # sigma_rel that a profile can have is below 0.2887, the uniform average's
FOLDER = "averages"
MOST = 10**9  # snapshots; none is deleted


def exponent(length: float) -> float:
    """gamma of a profile t^gamma of relative length sigma_rel (equation 126 of the paper): the
    positive root of g^3 + 7 g^2 + (16 - s) g + 12 - s with s = 1 / sigma_rel^2."""
    if not 0 < length <= LONGEST:
        raise UserError(f"a length of {length} for an average: more than 0, to {LONGEST}")
    s = length**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def begun(params: Any) -> dict[str, Any]:
    """The averages at step 0."""
    return {name: jax.tree.map(lambda x: x + 0, params) for name in KEPT}


def follow(averages: dict[str, Any], params: Any, step: jax.typing.ArrayLike) -> dict[str, Any]:
    """The averages after update number `step` (from 0), by beta = (1 - 1 / t)^(gamma + 1) at t =
    step + 1 (equation 127): the first one is the parameters."""
    t = jnp.asarray(step, jnp.float32) + 1

    def update(average: Any, length: float) -> Any:
        kept = (1 - 1 / t) ** (exponent(length) + 1)
        return jax.tree.map(lambda a, p: p + kept * (a - p), average, params)

    return {name: update(average, KEPT[name]) for name, average in averages.items()}


def overlap(t_a: float, gamma_a: float, t_b: float, gamma_b: float) -> float:
    """Inner product of the profiles of averages at times t_a and t_b (appendix C.3)."""
    ratio = t_a / t_b if t_a < t_b else t_b / t_a
    power = gamma_b if t_a < t_b else gamma_a
    scale = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * max(t_a, t_b))
    return scale * ratio**power


def weights(steps: Sequence[int], lengths: Sequence[float], length: float) -> np.ndarray:
    """Weights of snapshots, taken after `steps` updates of averages of `lengths`, whose sum is
    nearest to the average of `length` over all steps up to the last (Algorithm 3)."""
    gammas, last, wanted = [exponent(x) for x in lengths], max(steps), exponent(length)
    known = list(zip(steps, gammas, strict=True))
    products = np.array([[overlap(*one, *other) for other in known] for one in known])
    target = np.array([overlap(*one, last, wanted) for one in known])
    return np.linalg.lstsq(products * last, target * last, rcond=1e-12)[0]


class Kept:
    """The snapshots of a stage: checkpoints whose EMA is `begun`'s tree; none is deleted."""

    def __init__(self, workdir: Path, stage: str) -> None:
        self._checkpoints = Checkpoints(folder(workdir, stage), keep=MOST)

    def save(self, step: int, averages: dict[str, Any]) -> None:
        """Saves in the background; a step that is there is left as it is."""
        self._checkpoints.save(step, {"step": jnp.asarray(step)}, averages, None, {"step": step})

    def wait(self) -> None:
        """Waits for the save in the background."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Waits for the save in the background."""
        self._checkpoints.close()


def folder(workdir: Path, stage: str) -> Path:
    """Where the snapshots of a stage are."""
    return workdir / FOLDER / stage


def chosen(directory: Folder, step: int, length: float, place: Any = None) -> Any:
    """The average of `length` at `step`, from the snapshots up to it in `directory`.

    `place` gives the shardings of a snapshot's tree of shapes. Raises `UserError` without
    snapshots.
    """
    steps = [at for at in Checkpoints(directory).steps() if at <= step]
    if step not in steps:
        raise UserError(
            f"sample.ema={length:g} needs the averages of step {step} in {directory}, which"
            " dit.train.averages=True keeps while training"
        )
    lengths = list(KEPT.values()) * len(steps)
    solved = iter(weights([at for at in steps for _ in KEPT], lengths, length).tolist())
    total: Any = None
    for at in steps:
        read = restore_ema(directory, at, place)
        for name in KEPT:
            part = jax.tree.map(functools.partial(jnp.multiply, next(solved)), read[name])
            total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total
