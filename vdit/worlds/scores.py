"""Oracle scores of real, reconstructed and generated clips.

Dimension key: N clips, T frames, H height, W width.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vdit.data.sources import most_shots
from vdit.errors import UserError
from vdit.evaluate import heldout, quality, reconstruct, write_reconstructions
from vdit.runtime.progress import each, say
from vdit.sample import Model
from vdit.worlds.bodies import oracle as bodies
from vdit.worlds.playground import oracle as playground
from vdit.worlds.playground.oracle.shots import SCORES as SCORES_OF_SHOTS
from vdit.worlds.reword import paraphrase
from vdit.worlds.shots import oracle as shots
from vdit.worlds.statistics import wilson

OBJECTS = {"one": (1, 1), "two": (2, 2)}  # groups of the world's clips
# Fields of a row that hold for any clip of a class, beside the scores of the class itself.
OF_CLASS = ("split", "objects", "clips", "captions", "gravity_clips", "permanence", "count")


def generated(
    model: Model, prompts: Sequence[str], seed: int,
    shots: Sequence[Sequence[tuple[float, str]]] = (),
) -> np.ndarray:  # fmt: skip
    """Videos of prompts (and shot lists), also in wordings and of more bodies than training shows.
    If a text needs it, the token budget is doubled: encoders take any length, but where padding is
    part of the text."""
    tokenizer = model.tokenizer
    try:
        tokenizer.encode([*prompts, *(text for listed in shots for _, text in listed)])
    except UserError:
        if not tokenizer.padding:
            model.tokenizer = copy.copy(tokenizer)
            model.tokenizer.length = 2 * tokenizer.length
    try:
        return np.stack([r.video for r in model.generate(prompts, seed=seed, shots=shots)])
    finally:
        model.tokenizer = tokenizer


class Oracle(NamedTuple):
    """The scores of a kind of clip."""

    score: Callable[[np.ndarray, Mapping[str, Any]], dict[str, float]]  # video, clip
    aggregate: Callable[[Sequence[Mapping[str, float]]], dict[str, float]]
    names: Sequence[str] = ()  # of scores that are fractions, for their intervals


def oracle_of(config: ConfigDict) -> Oracle:
    """The oracle of a simulated source's clips."""
    kind, several = config.data.source, most_shots(config) > 0
    if kind == "playground" and several:
        return Oracle(playground.score_shots, playground.aggregate_shots, SCORES_OF_SHOTS)
    if kind == "playground":
        return Oracle(playground.score, playground.aggregate, playground.SCORES)
    if kind == "shots":
        return Oracle(shots.score_shots, shots.aggregate_shots, shots.SCORES)
    if kind != "world":
        raise UserError(f"data.source={kind}: world, shots and playground have an oracle")

    def aggregate(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        # The oracle's share of clips with the right number of objects is "count" here.
        read = bodies.aggregate(scores, intervals=True)
        return {name.replace("objects", "count"): value for name, value in read.items()}

    fps = config.data.fps
    return Oracle(lambda video, clip: bodies.score(video, clip["truth"], fps), aggregate)


def score_captions(
    model: Model, workdir: Path, seed: int, oracle: Oracle,
    reword: Callable[[dict[str, Any]], tuple[str, Sequence[tuple[float, str]]]] | None,
    objects: Mapping[str, tuple[int, int]] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Scores of held-out clips, reconstructions, and what is generated from their captions.

    The split "paraphrased" repeats the first eval.paraphrases in held-out wordings: `reword(clip)`
    gives the caption and the shots. `objects` groups the clips by numbers of objects.
    """
    evaluation = model.config.eval
    groups: Mapping[str, tuple[int, int] | None] = objects or {"all": None}
    several = most_shots(model.config) > 0
    made: list[tuple[list[dict[str, Any]], dict[str, np.ndarray]]] = []
    for name, count in groups.items():
        options: dict[str, Any] = {} if count is None else {"objects": count}
        number = max(evaluation.captions // len(groups), 1)
        clips = heldout(model, workdir, number, **options)
        say(f"eval: {len(clips)} held-out captions, objects: {name}")
        real = np.stack([clip["video"] for clip in clips])
        videos = {"real": real, "reconstructed": reconstruct(model, real)}
        told = [clip["shots"] for clip in clips] if several else ()
        videos["generated"] = generated(model, [clip["caption"] for clip in clips], seed, told)
        if reword and (some := clips[: evaluation.paraphrases // len(groups)]):
            prompts, lists = zip(*map(reword, some), strict=True)
            videos["paraphrased"] = generated(model, prompts, seed, lists if several else ())
        made.append((clips, videos))
    shown = [np.stack([v["real"][:8], v["reconstructed"][:8]], 1) for _, v in made]
    pairs = np.concatenate([part.reshape(-1, *part.shape[2:]) for part in shown])
    write_reconstructions(workdir, pairs, model.config)
    return score_rows(dict(zip(groups, made, strict=True)), oracle)


def score_rows(
    groups: Mapping[str, tuple[list[dict[str, Any]], dict[str, np.ndarray]]], oracle: Oracle
) -> list[dict[str, Any]]:
    """The rows of each split and group of (clips, videos by split), and of all groups together."""
    rows, splits = [], list(next(iter(groups.values()))[1])
    for split in splits:
        read = {
            name: [
                oracle.score(*pair)
                for pair in each(
                    f"reading {split}", [*zip(videos[split], clips, strict=False)], "clips"
                )
            ]
            for name, (clips, videos) in groups.items()
        }
        for name in dict.fromkeys((*groups, "all")):
            chosen = list(groups) if name == "all" else [name]
            scores = [one for part in chosen for one in read[part]]
            captions = sum(len({clip["caption"] for clip in groups[part][0]}) for part in chosen)
            row: dict[str, Any] = {
                "split": split, "objects": name, "captions": min(captions, len(scores))
            } | oracle.aggregate(scores)  # fmt: skip
            for score in oracle.names:
                count = sum(not math.isnan(one[score]) for one in scores)
                # An upper bound where scores are fractions of a clip.
                row[f"{score}_low"], row[f"{score}_high"] = wilson(row[score], count)
            if split == "reconstructed":
                again, real = (
                    np.concatenate([groups[part][1][which] for part in chosen])
                    for which in ("reconstructed", "real")
                )
                row |= quality(again, real)
            rows.append(row)
    return rows


def score_bodies(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """The rows of the stage eval of the world, by number of objects.

    With classes for captions nothing is paraphrased, and what is generated has the scores of its
    class alone.
    """
    label, known = model.config.data.label, oracle_of(model.config)
    counts = {"one": (1, 1)} if label else OBJECTS
    rows = score_captions(model, workdir, seed, known, None if label else _in_synonyms, counts)
    if not label:
        return rows
    applies = {*OF_CLASS, label}
    return [
        {name: value for name, value in row.items() if row["split"] != "generated"
         or name.removesuffix("_low").removesuffix("_high") in applies}
        for row in rows
    ]  # fmt: skip


def score_shots(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """The rows of the stage eval of clips of several shots."""
    return score_captions(model, workdir, seed, oracle_of(model.config), _in_synonyms)


def _in_synonyms(clip: dict[str, Any]) -> Any:
    told = [(at, paraphrase(text)) for at, text in clip.get("shots", ())]
    return paraphrase(clip["caption"]), told


def score_playground(model: Model, workdir: Path, seed: int) -> list[dict[str, Any]]:
    """The rows of the stage eval of playgrounds, of one shot or of several."""
    return score_captions(
        model, workdir, seed, oracle_of(model.config),
        lambda clip: (clip["paraphrase"], clip.get("paraphrased_shots", ())),
    )  # fmt: skip
