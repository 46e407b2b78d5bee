"""Oracle scores of clips of the world, by number of objects."""

from pathlib import Path
from typing import Any

import numpy as np

from vdit.evaluate import heldout, psnr, reconstruct, ssim, write_reconstructions
from vdit.runtime.progress import say
from vdit.sample import Model
from vdit.worlds.bodies import oracle
from vdit.worlds.reword import paraphrase
from vdit.worlds.scores import reworded

OBJECTS = {"one": (1, 1), "two": (2, 2)}
# Scores that hold for any clip of a class, beside the class itself.
OF_CLASS = ("clips", "gravity_clips", "permanence", "objects")


def score(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """Oracle scores by split and number of objects, with 95% intervals.

    The split "paraphrased" repeats the first captions in held-out wordings.
    """
    config = model.config
    groups: dict[str, dict[str, list[Any]]] = {"real": {}, "reconstructed": {}, "generated": {}}
    quality: dict[str, dict[str, np.ndarray]] = {"psnr": {}, "ssim": {}}
    captions: dict[str, int] = {}
    counts = {"one": (1, 1)} if config.data.label else OBJECTS
    per_group = max(config.eval.captions // len(counts), 1)
    paraphrases = 0 if config.data.label else config.eval.paraphrases // len(counts)
    if paraphrases:
        groups["paraphrased"] = {}
    shown = []
    for name, count in counts.items():
        clips = heldout(model, workdir, per_group, objects=count)
        truths = [clip["truth"] for clip in clips]
        prompts = [clip["caption"] for clip in clips]
        real = np.stack([clip["video"] for clip in clips])
        again = reconstruct(model, real)
        say(f"eval: {len(prompts)} held-out captions, {name} object{'s' * (name != 'one')}")
        generated = np.stack([r.video for r in model.generate(prompts, seed=seed)])
        captions[name] = len(set(prompts))
        quality["psnr"][name] = psnr(again, real)
        quality["ssim"][name] = ssim(again, real)
        shown.append(np.stack([real[:8], again[:8]], 1).reshape(-1, *real.shape[1:]))
        videos = {"real": real, "reconstructed": again, "generated": generated}
        if paraphrases:
            words = [paraphrase(prompt) for prompt in prompts[:paraphrases]]
            videos["paraphrased"] = reworded(model, words, seed)
        for split, some in videos.items():
            groups[split][name] = [
                oracle.score(video, truth, config.data.fps)
                for video, truth in zip(some, truths, strict=False)
            ]
    write_reconstructions(workdir, np.concatenate(shown), config)
    rows = []
    for split, scores in groups.items():
        for name in (*counts, "all"):
            part = scores[name] if name != "all" else [s for n in counts for s in scores[n]]
            number = captions[name] if name != "all" else sum(captions.values())
            number = min(number, len(part))
            row = {"split": split, "objects": name, "clips": len(part), "captions": number}
            # The oracle's share of clips with the right number of objects is "count" here.
            read = oracle.aggregate(part, intervals=True)
            if split == "generated" and config.data.label:
                read = {key: read[key] for key in read if _applies(key, config.data.label)}
            row |= {key.replace("objects", "count"): value for key, value in read.items()}
            if split == "reconstructed":
                chosen = list(counts) if name == "all" else [name]
                for kind, values in quality.items():
                    row[kind] = float(np.concatenate([values[n] for n in chosen]).mean())
            rows.append(row)
    return rows


def _applies(score: str, label: str) -> bool:
    """Whether a score applies to clips generated from the class by `label` alone."""
    return score.removesuffix("_low").removesuffix("_high") in (label, *OF_CLASS)
