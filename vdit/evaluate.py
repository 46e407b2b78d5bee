"""Scores on held-out clips: what an oracle reads from frames, always beside two ceilings.

The same code scores real clips, their reconstructions and what was generated from their captions.

Dimension key: N clips, T frames, H height, W width, C colours.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from vdit.data import sources
from vdit.model import Codec
from vdit.runtime.metrics import Metrics
from vdit.runtime.processes import zero_alone, zero_first
from vdit.runtime.progress import each
from vdit.runtime.video import tile, write_webp
from vdit.sample import Given, Model
from vdit.tokens import clip_frames


def psnr(video_NTHWC: np.ndarray, truth_NTHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each clip in dB (N,), for 8-bit pixels."""
    return decibel(squared_error(video_NTHWC, truth_NTHWC))


def squared_error(video_NTHWC: np.ndarray, truth_NTHWC: np.ndarray) -> np.ndarray:
    """Mean squared error of each clip (N,), in units of 8-bit pixels."""
    error = video_NTHWC.astype(np.float64) - truth_NTHWC
    return np.square(error).reshape(len(error), -1).mean(1)


def decibel(mean_squared: np.ndarray) -> np.ndarray:
    """Mean squared errors of 8-bit pixels as PSNR in dB."""
    return 10 * np.log10(255.0**2 / np.maximum(mean_squared, 1e-10))


def ssim(video_NTHWC: np.ndarray, truth_NTHWC: np.ndarray) -> np.ndarray:
    """Structural similarity of each clip (N,): Wang et al. 2004, Gaussian window of deviation 1.5.

    Windows span height and width of one frame and colour; means are over all places.
    """
    sigma = (0, 0, 1.5, 1.5, 0)

    def blur(x: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(x, sigma, truncate=3.5, mode="reflect")

    x, y = video_NTHWC.astype(np.float64), truth_NTHWC.astype(np.float64)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    value /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return value.reshape(len(value), -1).mean(1)


def reconstruct(model: Model | Codec, videos: np.ndarray, batch: int = 32) -> np.ndarray:
    """Clips through the autoencoder and back."""
    height, width = videos.shape[2:4]
    parts = []
    for start in range(0, len(videos), batch):
        part = videos[start : start + batch]
        full = np.resize(part, (batch, *part.shape[1:]))
        parts.append(model.decode(model.encode(full), height, width)[: len(part)])
    return np.concatenate(parts)


def heldout(
    model: Model | Codec, workdir: Path, count: int, **options: Any
) -> list[dict[str, Any]]:
    """The first `count` held-out clips."""
    with zero_first("clips"):
        source = sources.source(model.config, "heldout", workdir, **options)
    numbers = range(min(count, len(source)))
    return [source[i] for i in each("held-out clips", numbers, "clips")]


def evaluate(model: Model, workdir: Path, metrics: Metrics, seed: int = 1) -> list[dict[str, Any]]:
    """The stage eval: writes and returns its rows. Several processes score, each of them, what they
    make together, and process 0 writes."""
    source = sources.chosen(model.config)
    rows = (source.part("score") or score_reconstructions)(model, workdir, seed)
    rows += score_given(model, workdir, seed)
    if model.config.eval.chunk:
        rows += source.part("score_chunks")(model, workdir, seed)
    step = model.config.dit.train.steps
    metrics.truncate("eval", -1)
    for row in rows:
        metrics.write("eval", step, row)
    return rows


def score_reconstructions(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """The scores of a source without truth: how near reconstructed held-out clips are."""
    del seed
    clips = heldout(model, workdir, model.config.eval.captions)
    real = np.stack([clip["video"] for clip in clips])
    return [
        {"split": "reconstructed", "objects": "all", "clips": len(real)}
        | quality(reconstruct(model, real), real)
    ]


def quality(video_NTHWC: np.ndarray, truth_NTHWC: np.ndarray) -> dict[str, float]:
    """Mean PSNR and SSIM of clips."""
    return {
        "psnr": float(psnr(video_NTHWC, truth_NTHWC).mean()),
        "ssim": float(ssim(video_NTHWC, truth_NTHWC).mean()),
    }


def write_reconstructions(workdir: Path, videos: np.ndarray, config: Any) -> None:
    """reconstructions.webp: real and reconstructed clips in turn."""
    zoom = max(config.sample.zoom // 2, 1)
    with zero_alone("reconstructions") as zero:
        if zero:
            path = workdir / "reconstructions.webp"
            write_webp(path, tile(videos), config.data.fps, scale=zoom)


def gain(near_N: np.ndarray, still_N: np.ndarray, draws: int = 1000) -> dict[str, float]:
    """By how many dB one set of squared errors, all together, lies below another.

    With a 95% interval, by bootstrap over clips.
    """
    rows = np.random.default_rng(0).integers(0, len(near_N), (draws, len(near_N)))
    gains = decibel(near_N[rows].mean(1)) - decibel(still_N[rows].mean(1))
    low, high = np.percentile(gains, (2.5, 97.5))
    whole = float(decibel(near_N.mean()) - decibel(still_N.mean()))
    return {"gain_db": whole, "gain_db_low": float(low), "gain_db_high": float(high)}


def score_given(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """Given frames: returned exactly; what follows them, against the truth and a frozen frame.

    For extension (1 + p frames given) and image to video (one frame): PSNR of the next p frames,
    beside that of the last given frame held still and that of the clips' reconstructions, and the
    jump at the seam beside the same cut in reconstructed real clips. PSNR is that of the squared
    error of all clips together: in a clip where nothing moves a frozen frame has no error at all,
    and a mean of decibels would be a count of such clips.
    """
    config = model.config
    if not config.eval.given:
        return []
    clips = heldout(model, workdir, config.eval.given)
    real = np.stack([clip["video"] for clip in clips])
    prompts = [clip["caption"] for clip in clips]
    shots = [clip.get("shots", ()) for clip in clips]
    p = config.vae.patch[0]
    if real.shape[1] < 1 + 2 * p or model.dit.one_time:
        return []
    again = reconstruct(model, real)
    rows = []
    tasks: Sequence[tuple[str, int, int]] = (
        ("image_to_video", 0, 1),
        ("extension", 0, clip_frames((1 + p) / config.data.fps, config.data.fps, p)),
    )
    for task, first, count in tasks:
        given = [[Given(video[first : first + count], first)] for video in real]
        results = model.generate(prompts, seed=seed, given=given, shots=shots)
        made = np.stack([result.video for result in results])
        following = slice(count, count + p)
        frozen = np.broadcast_to(real[:, count - 1 : count], real[:, following].shape)
        errors = {
            "next": squared_error(made[:, following], real[:, following]),
            "frozen": squared_error(frozen, real[:, following]),
            "reconstructed": squared_error(again[:, following], real[:, following]),
        }

        def jump(videos: np.ndarray, count: int = count) -> float:
            cut = videos[:, count].astype(np.float64) - videos[:, count - 1]
            return float(np.abs(cut).mean())

        rows.append(
            {
                "task": task,
                "clips": len(real),
                "given_exact": float((made[:, :count] == real[:, :count]).all()),
                **{f"psnr_{name}": float(decibel(e.mean())) for name, e in errors.items()},
                **gain(errors["next"], errors["frozen"]),
                "seam": jump(made),
                "seam_reconstructed": jump(again),
            }
        )
    return rows
