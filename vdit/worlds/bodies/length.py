"""Long clips: generated in one pass, and chunk by chunk.

Dimension key: N clips, T frames, H height, W width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vdit.evaluate import heldout, reconstruct
from vdit.runtime.processes import zero_alone
from vdit.runtime.progress import say
from vdit.runtime.video import contact_sheet
from vdit.sample import Given, Model
from vdit.tokens import clip_frames
from vdit.worlds.bodies import oracle


def in_chunks(
    model: Model, prompts: Sequence[str], frames: int, seconds: float, seed: int
) -> np.ndarray:
    """Videos (N, frames, H, W, 3), each chunk of `seconds` given the second half of the last."""
    p, fps = model.config.vae.patch[0], model.config.data.fps
    count = clip_frames(seconds, fps, p)
    tail = 1 + (count // 2) // p * p
    videos = np.stack([r.video for r in model.generate(prompts, seconds, seed=seed)])
    while videos.shape[1] < frames:
        seed += len(prompts)
        given = [[Given(video[-tail:])] for video in videos]
        more = model.generate(prompts, seconds, seed=seed, given=given)
        videos = np.concatenate([videos, np.stack([r.video for r in more])[:, tail:]], axis=1)
    return videos[:, :frames]


def there(video: np.ndarray, count: int, fps: float) -> np.ndarray:
    """Frames (T,) that show exactly `count` intact bodies and nothing else."""
    reading = oracle.read(video, fps)
    if len(reading.bodies) != count:
        return np.zeros(len(video), bool)
    return reading.clean & np.all([body.present for body in reading.bodies], axis=0)


def drifts(video: np.ndarray, fps: float) -> dict[str, float]:
    """Drift of the picture in 1/s, by least squares: of colour (channel means, of full scale), and,
    relative to its mean, of contrast (deviation) and of sharpness (mean absolute gradient)."""
    x = video.astype(np.float64) / 255.0
    steps = [np.abs(np.diff(x, axis=axis)).mean((1, 2, 3)) for axis in (1, 2)]
    levels = {
        "colour": x.mean((1, 2)),
        "contrast": x.std((1, 2)).mean(-1, keepdims=True),
        "sharpness": sum(steps)[:, None],
    }
    time = np.arange(len(x)) / fps
    rates = {}
    for name, level in levels.items():
        slope = np.polyfit(time, level, 1)[0]
        unit = 1.0 if name == "colour" else max(float(level.mean()), 1e-6)
        rates[name] = float(np.linalg.norm(slope)) / unit
    return rates


def score(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """Permanence and drift of clips generated in one pass and `eval.chunk` seconds at a time.

    permanence: share of clips with all bodies intact in every frame; frames_whole: share of frames,
    also of the first and the last tenth alone; drift in percent a second.
    """
    config, fps = model.config, model.config.data.fps
    clips = heldout(model, workdir, config.eval.given)
    real, prompts = np.stack([c["video"] for c in clips]), [c["caption"] for c in clips]
    frames, tenth = real.shape[1], max(real.shape[1] // 10, 1)
    say(f"eval: {len(prompts)} clips of {frames / fps:.0f} s, in one pass and in chunks")
    ways = {
        "real": real,
        "reconstructed": reconstruct(model, real, min(len(real), config.sample.batch)),
        "one_pass": np.stack([r.video for r in model.generate(prompts, seed=seed)]),
        "chunks": in_chunks(model, prompts, frames, config.eval.chunk, seed),
    }
    rows = []
    for way, videos in ways.items():
        intact = np.stack([
            there(video, int(clip["truth"]["count"]), fps)
            for video, clip in zip(videos, clips, strict=True)
        ])  # fmt: skip
        drift = [drifts(video, fps) for video in videos]
        rows.append({
            "task": "length", "way": way, "clips": len(videos), "seconds": frames / fps,
            "permanence": float(intact.all(1).mean()),
            "frames_whole": float(intact.mean()),
            "frames_whole_first": float(intact[:, :tenth].mean()),
            "frames_whole_last": float(intact[:, -tenth:].mean()),
            **{
                f"{name}_drift_percent_a_second": 100 * float(np.mean([d[name] for d in drift]))
                for name in drift[0]
            },
        })  # fmt: skip
    few = min(len(prompts), 4)
    with zero_alone("length") as zero:
        if zero:
            contact_sheet(
                workdir / "length.png",
                [videos[i] for i in range(few) for videos in ways.values()],
                [f"{way}: {prompts[i]}" for i in range(few) for way in ways],
                every=max(frames // 20, 1), scale=max(config.sample.zoom // 4, 1),
            )  # fmt: skip
    return rows
