"""Scores on held-out clips: what an oracle reads from frames, always beside two ceilings.

The same code scores real clips, their reconstructions and what was generated from their captions.

Dimension key: N clips, T frames, H height, W width, C colours.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from vdit.config import data as sources
from vdit.data.world import oracle, shots_oracle
from vdit.data.world.playground import oracle as playground_oracle
from vdit.data.world.playground.oracle import shots as playshots
from vdit.data.world.reword import paraphrase
from vdit.errors import UserError
from vdit.runtime.metrics import Metrics
from vdit.runtime.processes import zero_alone, zero_first
from vdit.runtime.progress import say
from vdit.runtime.video import contact_sheet, write_webp
from vdit.sample import Given, Model
from vdit.tokens import clip_frames

OBJECTS = {"one": (1, 1), "two": (2, 2)}
# What a class alone says of a clip, beside itself.
OF_CLASS = ("clips", "gravity_clips", "permanence", "objects")


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


def reconstruct(model: Model, videos: np.ndarray, batch: int = 32) -> np.ndarray:
    """Clips through the autoencoder and back."""
    height, width = videos.shape[2:4]
    parts = []
    for start in range(0, len(videos), batch):
        part = videos[start : start + batch]
        full = np.resize(part, (batch, *part.shape[1:]))
        parts.append(model.decode(model.encode(full), height, width)[: len(part)])
    return np.concatenate(parts)


def heldout(model: Model, workdir: Path, count: int, **options: Any) -> list[dict[str, Any]]:
    """The first `count` held-out clips."""
    with zero_first("clips"):
        source = sources.source(model.config, "heldout", workdir, **options)
    return [source[i] for i in range(min(count, len(source)))]


def evaluate(model: Model, workdir: Path, metrics: Metrics, seed: int = 1) -> list[dict[str, Any]]:
    """The stage eval: writes and returns its rows. Several processes score, each of them, what they
    make together, and process 0 writes."""
    rows: list[dict[str, Any]] = []
    if model.config.data.source == "world":
        rows += score_world(model, workdir, seed)
    elif model.config.data.source == "shots":
        rows += score_shots(model, workdir, seed)
    elif model.config.data.source == "playground":
        rows += score_playground(model, workdir, seed)
    else:
        clips = heldout(model, workdir, model.config.eval.captions)
        real = np.stack([clip["video"] for clip in clips])
        again = reconstruct(model, real)
        rows.append(
            {
                "split": "reconstructed",
                "objects": "all",
                "clips": len(real),
                "psnr": float(psnr(again, real).mean()),
                "ssim": float(ssim(again, real).mean()),
            }
        )
    rows += score_given(model, workdir, seed)
    if model.config.eval.chunk:
        rows += score_length(model, workdir, seed)
    step = model.config.dit.train.steps
    metrics.truncate("eval", -1)
    for row in rows:
        metrics.write("eval", step, row)
    return rows


@contextlib.contextmanager
def longer_texts(model: Model, texts: Sequence[str]) -> Iterator[None]:
    """Meanwhile twice the budget of tokens, if some text needs it: encoders take any number, but
    where padding is text. (What a tokenizer was not made from falls into more tokens.)"""
    tokenizer = model.tokenizer
    try:
        tokenizer.encode(texts)
    except UserError:
        if not tokenizer.padding:
            model.tokenizer = copy.copy(tokenizer)
            model.tokenizer.length = 2 * tokenizer.length
    try:
        yield
    finally:
        model.tokenizer = tokenizer


def reworded(
    model: Model,
    prompts: Sequence[str],
    seed: int,
    shots: Sequence[Sequence[tuple[float, str]]] = (),
) -> np.ndarray:
    """Videos of prompts in wordings that training never shows, and of as many shot lists."""
    with longer_texts(model, [*prompts, *(text for listed in shots for _, text in listed)]):
        return np.stack([made.video for made in model.generate(prompts, seed=seed, shots=shots)])


def score_world(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """Oracle scores by split and number of objects, with 95% intervals.

    The split "paraphrased" is of the first held-out captions in unseen wordings.
    """
    config = model.config
    groups: dict[str, dict[str, list[Any]]] = {"real": {}, "reconstructed": {}, "generated": {}}
    quality: dict[str, dict[str, np.ndarray]] = {"psnr": {}, "ssim": {}}
    captions: dict[str, int] = {}
    asked = {"one": (1, 1)} if config.data.label else OBJECTS
    per_group = max(config.eval.captions // len(asked), 1)
    again_asked = 0 if config.data.label else config.eval.paraphrases // len(asked)
    if again_asked:
        groups["paraphrased"] = {}
    shown = []
    for name, count in asked.items():
        clips = heldout(model, workdir, per_group, objects=count)
        truths = [clip["truth"] for clip in clips]
        prompts = [clip["caption"] for clip in clips]
        real = np.stack([clip["video"] for clip in clips])
        again = reconstruct(model, real)
        say(f"eval: {len(prompts)} held-out captions, {name} object{'s' * (name != 'one')}")
        made = np.stack([r.video for r in model.generate(prompts, seed=seed)])
        captions[name] = len(set(prompts))
        quality["psnr"][name] = psnr(again, real)
        quality["ssim"][name] = ssim(again, real)
        shown.append(np.stack([real[:8], again[:8]], 1).reshape(-1, *real.shape[1:]))
        videos = {"real": real, "reconstructed": again, "generated": made}
        if again_asked:
            words = [paraphrase(prompt) for prompt in prompts[:again_asked]]
            videos["paraphrased"] = reworded(model, words, seed)
        for split, some in videos.items():
            groups[split][name] = [
                oracle.score(video, truth, config.data.fps)
                for video, truth in zip(some, truths, strict=False)
            ]
    write_reconstructions(workdir, np.concatenate(shown), config)
    rows = []
    for split, scores in groups.items():
        for name in (*asked, "all"):
            part = scores[name] if name != "all" else [s for n in asked for s in scores[n]]
            told = captions[name] if name != "all" else sum(captions.values())
            told = min(told, len(part))
            row = {"split": split, "objects": name, "clips": len(part), "captions": told}
            # The oracle's share of clips with the right number of objects is "count" here.
            read = oracle.aggregate(part, intervals=True)
            if split == "generated" and config.data.label:
                read = {key: read[key] for key in read if _told(key, config.data.label)}
            row |= {key.replace("objects", "count"): value for key, value in read.items()}
            if split == "reconstructed":
                chosen = list(asked) if name == "all" else [name]
                for kind, values in quality.items():
                    row[kind] = float(np.concatenate([values[n] for n in chosen]).mean())
            rows.append(row)
    return rows


def _told(score: str, label: str) -> bool:
    """Whether a clip of which only a class by `label` was told can be held to a score."""
    return score.removesuffix("_low").removesuffix("_high") in (label, *OF_CLASS)


def score_shots(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """Scores of clips of several shots, by their oracle, with 95% intervals (Wilson's)."""
    clips = heldout(model, workdir, model.config.eval.captions)
    prompts = [clip["caption"] for clip in clips]
    say(f"eval: {len(prompts)} held-out captions, of {model.config.data.shots[1]} shots at most")
    results = model.generate(prompts, seed=seed, shots=[clip["shots"] for clip in clips])
    made = {"generated": np.stack([result.video for result in results])}
    if some := clips[: model.config.eval.paraphrases]:
        words = [paraphrase(clip["caption"]) for clip in some]
        lists = [[(at, paraphrase(text)) for at, text in clip["shots"]] for clip in some]
        made["paraphrased"] = reworded(model, words, seed, lists)
    return _scored(model, workdir, clips, made, shots_oracle.score_shots,
                   shots_oracle.aggregate_shots, shots_oracle.SCORES)  # fmt: skip


def score_playground(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """Scores of playgrounds, by their oracle; "paraphrased": of the same in unseen wordings."""
    clips = heldout(model, workdir, model.config.eval.captions)
    say(f"eval: {len(clips)} held-out captions, in seen and in unseen wordings")
    several = sources.most_shots(model.config) > 0
    listed = [clip["shots"] for clip in clips] if several else ()
    results = model.generate([clip["caption"] for clip in clips], seed=seed, shots=listed)
    made = {"generated": np.stack([result.video for result in results])}
    if some := clips[: model.config.eval.paraphrases]:
        listed = [clip["paraphrased_shots"] for clip in some] if several else ()
        made["paraphrased"] = reworded(model, [clip["paraphrase"] for clip in some], seed, listed)
    of_one = playground_oracle.score, playground_oracle.aggregate, playground_oracle.SCORES
    of_shots = playshots.score_shots, playshots.aggregate_shots, playshots.SCORES
    return _scored(model, workdir, clips, made, *(of_shots if several else of_one))


def _scored(
    model: Model,
    workdir: Path,
    clips: Sequence[dict[str, Any]],
    made: Mapping[str, np.ndarray],
    score: Callable[[np.ndarray, Mapping[str, Any]], dict[str, float]],
    aggregate: Callable[[Sequence[Mapping[str, float]]], dict[str, float]],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """A row for the real clips, their reconstructions, and each of those that were `made`."""
    real = np.stack([clip["video"] for clip in clips])
    again = reconstruct(model, real)
    shown = np.stack([real[:8], again[:8]], 1).reshape(-1, *real.shape[1:])
    write_reconstructions(workdir, shown, model.config)
    captions = len({clip["caption"] for clip in clips})
    rows = []
    for split, videos in {"real": real, "reconstructed": again, **made}.items():
        scores = [score(video, clip) for video, clip in zip(videos, clips, strict=False)]
        told = min(captions, len(scores))
        row: dict[str, Any] = {"split": split, "objects": "all", "captions": told}
        row |= aggregate(scores)
        for name in names:
            judged = sum(not math.isnan(one[name]) for one in scores)
            low, high = oracle.wilson(row[name], judged)  # of shares it is an upper bound
            row |= {f"{name}_low": low, f"{name}_high": high}
        if split == "reconstructed":
            row |= {k: float(of(again, real).mean()) for k, of in (("psnr", psnr), ("ssim", ssim))}
        rows.append(row)
    return rows


def write_reconstructions(workdir: Path, videos: np.ndarray, config: Any) -> None:
    """reconstructions.webp: real and reconstructed clips in turn."""
    from vdit.runtime.metrics import tile

    zoom = max(config.sample.zoom // 2, 1)
    with zero_alone("reconstructions") as zero:
        if zero:
            big = tile(videos).repeat(zoom, axis=1).repeat(zoom, axis=2)
            write_webp(workdir / "reconstructions.webp", big, config.data.fps)


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


def in_chunks(
    model: Model, prompts: Sequence[str], frames: int, seconds: float, seed: int
) -> np.ndarray:
    """Videos (N, frames, H, W, 3) made `seconds` at a time: each chunk is given the later half of
    the one before, which is all that it knows of what was."""
    p, fps = model.config.vae.patch[0], model.config.data.fps
    count = clip_frames(seconds, fps, p)
    tail = 1 + (count // 2) // p * p
    made = np.stack([r.video for r in model.generate(prompts, seconds, seed=seed)])
    while made.shape[1] < frames:
        seed += len(prompts)
        given = [[Given(video[-tail:])] for video in made]
        more = model.generate(prompts, seconds, seed=seed, given=given)
        made = np.concatenate([made, np.stack([r.video for r in more])[:, tail:]], axis=1)
    return made[:, :frames]


def there(video: np.ndarray, count: int, fps: float) -> np.ndarray:
    """In which frames (T,) of a clip of the world `count` whole bodies are, and nothing else."""
    reading = oracle.read(video, fps)
    if len(reading.bodies) != count:
        return np.zeros(len(video), bool)
    return reading.clean & np.all([body.present for body in reading.bodies], axis=0)


def drifts(video: np.ndarray, fps: float) -> dict[str, float]:
    """What a clip's picture changes by in a second, as shares: of its colour (the mean of each
    channel, of 1), its contrast (their deviation) and its sharpness (mean steps between
    neighbours), both of their means. Least squares over all frames."""
    x = video.astype(np.float64) / 255.0
    steps = [np.abs(np.diff(x, axis=axis)).mean((1, 2, 3)) for axis in (1, 2)]
    levels = {
        "colour": x.mean((1, 2)),
        "contrast": x.std((1, 2)).mean(-1, keepdims=True),
        "sharpness": sum(steps)[:, None],
    }
    time = np.arange(len(x)) / fps
    made = {}
    for name, level in levels.items():
        slope = np.polyfit(time, level, 1)[0]
        whole = 1.0 if name == "colour" else max(float(level.mean()), 1e-6)
        made[name] = float(np.linalg.norm(slope)) / whole
    return made


def score_length(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """What lasts in clips as long as in training: made in one pass, and `eval.chunk` seconds at a
    time by the same model.

    permanence: clips whose bodies are whole in every frame; frames: the share of frames in which
    they are, and of those in the first and last tenth; drift of the picture in percent a second.
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
        whole = np.stack([
            there(video, int(clip["truth"]["count"]), fps)
            for video, clip in zip(videos, clips, strict=True)
        ])  # fmt: skip
        drift = [drifts(video, fps) for video in videos]
        rows.append({
            "task": "length", "way": way, "clips": len(videos), "seconds": frames / fps,
            "permanence": float(whole.all(1).mean()),
            "frames_whole": float(whole.mean()),
            "frames_whole_first": float(whole[:, :tenth].mean()),
            "frames_whole_last": float(whole[:, -tenth:].mean()),
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
                every=max(frames // 20, 1),
                scale=max(config.sample.zoom // 4, 1),
            )
    return rows
