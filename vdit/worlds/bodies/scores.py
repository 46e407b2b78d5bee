"""Scores of clips of bodies, by number of objects."""

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
# What a class alone says of a clip, beside itself.
OF_CLASS = ("clips", "gravity_clips", "permanence", "objects")


def score(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
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
