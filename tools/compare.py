"""Compares networks at equal training time: the tables of docs/comparison.md.

    python -m tools.compare --minutes=5 [--vae-minutes=5] [--seeds=2] [--only=dit,unet]
                            [--out=runs/compare] [--page=docs/comparison.md] [--cores=0,1] [--smoke]

Every row of `VARIANTS` is `experiments/base.py` with a few fields changed. Autoencoders train for
--vae-minutes (default: --minutes), denoisers for --minutes. All denoisers learn text to video only,
on latents of the autoencoder of their seed; those with the same autoencoder share it (as hard
links). The held-out captions are then scored as in stage eval.

Minutes exclude compilation. Step time is measured first: `PROBE` steps in a temporary folder, of
which the first, which compile, do not count. The run gets as many steps as fit into its minutes, so
that its schedule ends with its time; the table reports the actual duration. Runs are sequential, in
this process and on its cores (--cores pins it).

The same command resumes: finished runs are skipped, interrupted ones continue. OUT holds a workdir
per autoencoder and per run, and comparison.json; the tables are written between the markers of
--page after every run. --smoke runs at the size of experiments/base.py:smoke. Exit status 2 for
wrong arguments, 1 for a loss that is not finite, 143 after a signal.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import traverse_util
from ml_collections import ConfigDict

from experiments import base, unet
from vdit.errors import Diverged, Interrupted, UserError
from vdit.run import run
from vdit.runtime.checkpoint import newest_good_step, restore_ema
from vdit.runtime.files import write_text
from vdit.runtime.metrics import environment, read
from vdit.runtime.progress import say

from .parsers import Parser
from .table import COLUMNS, markdown, mean_row, newest

PROBE, EACH = 22, 2  # steps that are measured; in parts of so many
MARKERS = "<!-- comparison -->", "<!-- end of comparison -->"
SHARED = ("checkpoints/vae", "latents", "tokenizer.json")  # of the runs with one autoencoder
GRAVITY = "gravity_error_median"


def overrides(config: ConfigDict, of: ConfigDict) -> dict[str, Any]:
    """The fields in which a configuration differs from another: {"dit.model": "unet", ...}."""
    ours, theirs = (traverse_util.flatten_dict(c.to_dict(), sep=".") for c in (config, of))
    return {name: value for name, value in ours.items() if theirs[name] != value}


class Variant(NamedTuple):
    """A network: its title, and the fields it changes, at full and at smoke size."""

    title: str
    changes: Mapping[str, Any]
    small: Mapping[str, Any] | None = None
    vae: str = "vivit"


_CONV = {
    "vae.model": "causal", "vae.width": 16, "vae.pixels": 2, "vae.multipliers": (1, 2, 4),
    "vae.blocks": 1, "vae.train.adam_learning_rate": 1e-3,
}  # fmt: skip
AUTOENCODERS = {
    "vivit": Variant("ViViT", {}),
    "conv": Variant("causal convolutions", _CONV, _CONV | {"vae.width": 8}),
}
VARIANTS = {
    "dit": Variant("DiT", {}),
    "context": Variant("DiT, text in context", {"dit.text": "context"}),
    "unet": Variant(
        "U-Net",
        overrides(unet.get_config("flow"), base.get_config()),
        overrides(unet.get_config("flow+smoke"), base.get_config("smoke")),
    ),
    "factorised": Variant("DiT, factorised attention", {"dit.axes": "factorised"}),
    "conv": Variant("DiT, convolutional autoencoder", {}, vae="conv"),
}


def configured(name: str, seed: int, smoke: bool) -> ConfigDict:
    """The configuration of a row of `VARIANTS` or, as "vae-conv", of its autoencoder alone."""
    config = base.get_config("smoke" if smoke else "")
    config.seed = seed
    for given in config.dit.given:
        config.dit.given[given] = float(given == "text")
    config.eval.given = 0
    config.sample.push = 0.0  # which a U-Net does not know
    config.dit.auxiliary = ()  # nor has it tokens that could learn the truth
    vae = name.removeprefix("vae-") if name.startswith("vae-") else VARIANTS[name].vae
    for row in (AUTOENCODERS[vae], *([VARIANTS[name]] if name in VARIANTS else [])):
        small = smoke and row.small is not None
        config.update_from_flattened_dict(dict(row.small or {} if small else row.changes))
    config.stages = ("dit", "eval") if name in VARIANTS else ("vae", "latents")
    return config


def rows_of(workdir: Path, stage: str) -> list[dict[str, Any]]:
    """The rows of a stage in metrics.jsonl that have its rate."""
    return [r for r in read(workdir) if r["stage"] == stage and "steps_per_second" in r]


def spent(rows: Sequence[Mapping[str, Any]], usual: float) -> float:
    """Seconds of training; rows that include compilation count `usual` seconds a step."""
    total, before = 0.0, 0
    for row in rows:
        steps = row["step"] - before
        seconds = steps / row["steps_per_second"]
        total += steps * usual if row["seconds"] <= 1.001 * seconds else seconds
        before = row["step"]
    return total


def share(workdir: Path, source: Path) -> None:
    """Hard-links the autoencoder and latents of another workdir."""
    for name in SHARED:
        if (source / name).is_dir():
            shutil.copytree(source / name, workdir / name, copy_function=os.link)
        elif (source / name).exists():
            (workdir / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / name, workdir / name)


def planned(config: ConfigDict, stage: str, workdir: Path, minutes: float) -> dict[str, Any]:
    """plan.json of a workdir: the number of steps that fit into the minutes, measured if missing.

    A shared autoencoder must be linked before.
    """
    path = workdir / "plan.json"
    if not path.exists():
        probe = workdir.with_name(f".{workdir.name}.probe")
        shutil.rmtree(probe, ignore_errors=True)
        share(probe, workdir)
        short = config.copy_and_resolve_references()
        short.stages = (stage,)
        short[stage].train.steps = PROBE
        short.run.log_every, short.run.save_every = EACH, PROBE
        say(f"{workdir}: {PROBE} steps, to know what one takes")
        try:
            run(short, probe)
            rates = [row["steps_per_second"] for row in rows_of(probe, stage)]
        finally:
            shutil.rmtree(probe, ignore_errors=True)
        second = 1 / statistics.median(rates[1:])
        steps = max(round(60 * minutes / second), 2)
        made = {"minutes": minutes, "seconds_a_step": second, "steps": steps}
        write_text(path, json.dumps(made, indent=1) + "\n")
    plan = read_plan(workdir)
    if plan["minutes"] != minutes:
        raise UserError(
            f"{workdir} is of {plan['minutes']:g} minutes, not of {minutes:g}: choose another --out"
        )
    return plan


def parameters(workdir: Path, stage: str) -> dict[str, int]:
    """The number of parameters of each group that a stage trained."""
    directory = workdir / "checkpoints" / stage
    step = newest_good_step(directory)
    assert step is not None
    groups = restore_ema(directory, step)
    return {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in groups.items()}


def lasts(train: ConfigDict, steps: int) -> None:
    """Sets the steps of a stage; warmup is at most half of them."""
    train.steps, train.warmup = steps, min(train.warmup, steps // 2)


def learn(name: str, seed: int, out: Path, minutes: float, smoke: bool) -> dict[str, Any]:
    """Trains an autoencoder or a variant unless finished; returns its result.json."""
    workdir, config = out / f"{name}-{seed}", configured(name, seed, smoke)
    path, stage = workdir / "result.json", config.stages[0]
    first = out / f"vae-{VARIANTS[name].vae}-{seed}" if stage == "dit" else None
    if first is not None:  # which is finished
        lasts(config.vae.train, read_plan(first)["steps"])
    if not (workdir / "plan.json").exists():
        shutil.rmtree(workdir, ignore_errors=True)
        if first is not None:
            share(workdir, first)
    plan = planned(config, stage, workdir, minutes)
    if not path.exists():
        train = config[stage].train
        lasts(train, plan["steps"])
        config.run.log_every = min(config.run.log_every, max(train.steps // 4, 1))
        run(config, workdir)
        rows = rows_of(workdir, stage)
        usual = 1 / statistics.median([row["steps_per_second"] for row in rows])
        figures = {
            "name": name, "seed": seed, "steps": train.steps, "minutes": minutes,
            "seconds": spent(rows, usual), "parameters": parameters(workdir, stage),
            "scores": newest(workdir) if stage == "dit" else [], **environment(),
        }  # fmt: skip
        write_text(path, json.dumps(figures, indent=1) + "\n")
        jax.clear_caches()
    return json.loads(path.read_text(encoding="utf-8"))


def read_plan(workdir: Path) -> dict[str, Any]:
    """The plan that `planned` wrote."""
    return json.loads((workdir / "plan.json").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------
# Scores in the table


def spread(values: Iterable[float], show: str) -> str:
    """The mean, with minimum and maximum if there are several values."""
    values = list(values)
    mean, *ends = (f"{v:{show}}" for v in (sum(values) / len(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({'–'.join(ends)})"


def how(results: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> list[str]:
    """Parameters, steps, seconds per step, and minutes of training."""
    count = sum(results[0]["parameters"].get(group, 0) for group in groups)
    return [
        f"{count / 1e6:.2f}M",
        spread([r["steps"] for r in results], ".0f"),
        spread([r["seconds"] / r["steps"] for r in results], ".3f"),
        spread([r["seconds"] / 60 for r in results], ".2f"),
    ]


def score_rows(results: Sequence[Mapping[str, Any]], split: str) -> list[dict[str, Any]]:
    """The rows of all clips of a split, one for each result."""
    return [
        row
        for result in results
        for row in result["scores"]
        if row.get("split") == split and row["objects"] == "all"
    ]


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """The tables of denoisers and autoencoders, of all finished runs."""
    by = {
        name: [r for r in results if r["name"] == name]
        for name in (*VARIANTS, *(f"vae-{vae}" for vae in AUTOENCODERS))
    }
    scores = [*COLUMNS, GRAVITY]
    heads = ["", "seeds", "parameters", "steps", "seconds a step", "minutes"]
    heads += [name.replace("_", " ") for name in COLUMNS]

    def line(title: str, rows: Sequence[dict[str, Any]], facts: Sequence[str]) -> list[str]:
        return [title, str(len(rows)), *facts, *(mean_row(rows, name) for name in scores)]

    lines: list[list[str]] = []
    decoders: list[list[str]] = []
    for name, variant in VARIANTS.items():
        if by[name]:
            made = score_rows(by[name], "generated")
            lines.append(line(variant.title, made, how(by[name], ("dit", "text"))))
    for vae, variant in AUTOENCODERS.items():
        # The ceilings depend on the autoencoder alone, so any run has them.
        first = next((by[n] for n, v in VARIANTS.items() if v.vae == vae and by[n]), [])
        if not first:
            continue
        ceilings = {s: score_rows(first, s) for s in ("real", "reconstructed")}
        if not decoders:
            lines.append(line("real clips", ceilings["real"], ["", "", "", ""]))
        title, again = f"reconstructed, {variant.title}", ceilings["reconstructed"]
        lines.append(line(title, again, ["", "", "", ""]))
        decoders.append([
            variant.title, str(len(again)), *how(by[f"vae-{vae}"], ("vae",)),
            spread([row["psnr"] for row in again], ".1f") + " dB",
            spread([row["ssim"] for row in again], ".3f"),
        ])  # fmt: skip
    return "\n\n".join([
        markdown([*heads, "gravity error"], lines),
        markdown(["autoencoder", *heads[1:6], "PSNR", "SSIM"], decoders),
    ])  # fmt: skip


def publish(options: argparse.Namespace, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes comparison.json and the tables between the markers of the page."""
    write_text(options.out / "comparison.json", json.dumps(results, indent=1) + "\n")
    if not any(result["scores"] for result in results):
        return
    before, after = split_page(options.page)
    at = f"--minutes={options.minutes:g} --vae-minutes={options.vae_minutes:g}"
    at += f" --seeds={options.seeds}" + " --smoke" * options.smoke
    machine = ", ".join(f"{results[-1][name]}" for name in ("device", "python", "jax"))
    text = f"```bash\npython -m tools.compare {at}\n```\n\n{tables(results)}\n\n"
    text += f"On {len(os.sched_getaffinity(0))} core(s): {machine} (device, Python, JAX).\n"
    write_text(options.page, f"{before}{MARKERS[0]}\n{text}{MARKERS[1]}{after}")


def split_page(page: Path) -> tuple[str, str]:
    """The text before and after the markers of a page; `UserError` if there are none."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--page={page}: {error.strerror or error}") from error
    before, begin, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not begin or not end:
        raise UserError(f"--page={page} lacks the lines {MARKERS[0]} and {MARKERS[1]}")
    return before, after


def compare(options: argparse.Namespace) -> int:
    """Runs everything, seed by seed; returns the exit status."""
    results, status = [], 0
    for seed in range(options.seeds):
        vaes = dict.fromkeys(f"vae-{VARIANTS[name].vae}" for name in options.only)
        for name in (*vaes, *options.only):
            minutes = options.minutes if name in VARIANTS else options.vae_minutes
            say(f"compare: {name}, seed {seed}")
            try:
                results.append(learn(name, seed, options.out, minutes, options.smoke))
            except Diverged as error:
                print(f"compare: {name}, seed {seed}: {error}", file=sys.stderr)
                status = 1
                if name in vaes:
                    return status
            publish(options, results)
    return status


def read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses and validates the flags."""
    parser = Parser(
        prog="compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--vae-minutes", type=float)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default=",".join(VARIANTS), help="rows of VARIANTS")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--page", type=Path, default=Path("docs/comparison.md"))
    parser.add_argument("--cores", default="", help="numbers of cores, as 0,1")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    options.vae_minutes = options.minutes if options.vae_minutes is None else options.vae_minutes
    for name in ("minutes", "vae_minutes", "seeds"):
        if not 0 < getattr(options, name) < 1e6:
            raise UserError(f"--{name}={getattr(options, name)}: a number above 0 is allowed")
    options.only = options.only.split(",")
    if wrong := [name for name in options.only if name not in VARIANTS]:
        raise UserError(f"--only={wrong[0]}: known are {', '.join(VARIANTS)}")
    split_page(options.page)
    return options


def pin(cores: str) -> None:
    """Pins this process and its future threads to some cores."""
    try:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    except (AttributeError, OSError, ValueError) as error:
        raise UserError(f"--cores={cores}: numbers of this machine's cores are allowed") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        options = read_flags(arguments)
        if options.cores:
            pin(options.cores)
        return compare(options)
    except UserError as error:
        print(f"compare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"compare: {error}", file=sys.stderr)
        return 143


if __name__ == "__main__":
    sys.exit(main())
