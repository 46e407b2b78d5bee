"""A trained or imported ViViT at work: what it answers, what a video is to it, and how often it is
right.

Dimension key: B batch, T frames, H height, W width; t h w tokens, D width, K answers.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vdit import stages
from vdit.config.classifier import answer_counts, answer_names, build_classifier
from vdit.config.identity import read_config
from vdit.data import sources
from vdit.data.decode import read_clip
from vdit.errors import UserError
from vdit.models.vivit import ViViT
from vdit.nn.patch import to_float
from vdit.objectives.classify import answers
from vdit.runtime.checkpoint import read_newest, restore_ema
from vdit.runtime.files import atomic_path
from vdit.runtime.metrics import Metrics
from vdit.runtime.progress import say

BEST = 5  # answers that are printed


class Seen(NamedTuple):
    """What videos are to the network."""

    tokens: np.ndarray  # (B, t, h, w, D)
    pooled: np.ndarray  # (B, D), which the head reads
    answers: dict[str, np.ndarray]  # of each question the probabilities (B, K)


class Classifier:
    """A network, its parameters, and the names of what it can answer to each question."""

    def __init__(
        self, config: ConfigDict, params: Any, names: dict[str, list[str]], step: int
    ) -> None:
        self.config, self.names, self.step = config, names, step
        self._params, self._model = params, build_classifier(config)
        self._apply: Any = jax.jit(functools.partial(self._model.apply, method=self._run))

    def _run(self, model: ViViT, video_BTHWC: jax.Array) -> Any:
        found = model.features(to_float(video_BTHWC))
        parts = answers(model.head(found.pooled), answer_counts(self.config))
        return *found, {name: jax.nn.softmax(part) for name, part in parts.items()}

    def see(self, video_BTHWC: np.ndarray) -> Seen:
        """Features and answers of uint8 videos of the configuration's length and size."""
        made = self._apply({"params": self._params}, jnp.asarray(video_BTHWC))
        return Seen(*jax.device_get(made))


def load(workdir: str | Path) -> Classifier:
    """The classifier of a workdir: its newest good checkpoint."""
    config, directory = read_config(Path(workdir)), Path(workdir) / "checkpoints" / "classify"
    step, params = read_newest(directory, lambda step: restore_ema(directory, step)["vivit"])
    return Classifier(config, params, answer_names(config, Path(workdir)), step)


def evaluate(workdir: Path, metrics: Metrics) -> dict[str, Any]:
    """Its accuracy on the first held-out clips, as a row of stage classify."""
    model = load(workdir)
    config = model.config
    stages.refuse_foreign_head(config)
    clips = sources.labelled(config, "heldout", workdir)

    def guess(video: np.ndarray) -> np.ndarray:
        seen = model.see(video).answers
        return np.stack([part.argmax(-1) for part in seen.values()], axis=-1)

    row = stages.accuracy(config, clips, guess)
    metrics.write("classify", model.step, row)
    return row


def read_video(path: str, config: ConfigDict) -> tuple[np.ndarray, str]:
    """A file as uint8 (T, H, W, 3), as the configuration's clips are, and what to say of it."""
    frames, fps, size = config.data.frames, config.data.fps, tuple(config.data.size)
    video, said = read_clip(path, fps, size, frames)
    if len(video) < frames:
        said += f", the last held for {frames - len(video)}"
        video = np.concatenate([video, video[-1:].repeat(frames - len(video), axis=0)])
    return video, said


def write_features(workdir: Path, out: Path, videos: Sequence[str]) -> None:
    """Of each video OUT/NAME.npz: tokens (t, h, w, D), pooled (D,), answers/QUESTION (K,).

    Says which answers are the likeliest.
    """
    model = load(workdir)
    named = {Path(path).stem: path for path in videos}
    if len(named) < len(videos):
        raise UserError(f"--video: {len(videos)} files have {len(named)} names; each needs its own")
    for name, path in named.items():
        video, said = read_video(path, model.config)
        say(said)
        tokens, pooled, found = model.see(video[None])
        arrays = {f"answers/{question}": part[0] for question, part in found.items()}
        with atomic_path(out / f"{name}.npz") as target, target.open("wb") as file:
            np.savez(file, tokens=tokens[0], pooled=pooled[0], **arrays)
        for question, part in found.items():
            best = np.argsort(-part[0])[:BEST]
            likely = ", ".join(f"{model.names[question][i]} {part[0, i]:.2f}" for i in best)
            say(f"{name}: {question}: {likely}")
        say(f"{out / name}.npz")
