"""Scores against evaluations of the denoiser for each sampler, as Markdown and as a plot.

python -m tools.solvers --workdir=runs/base
python -m tools.solvers --workdir=runs/base --samplers='ddim;unipc' --plot=solvers.png

With --ema also for averages of the weights of these lengths (`sample.ema`). The same held-out
captions, seeds, guidance and times for all; an evaluation is a call of the denoiser, guidance's
passes included in it. Seconds are of denoising and decoding a clip, without compilation.
"""

import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vdit.config import joined
from vdit.config.identity import read_config
from vdit.data.sources import most_shots
from vdit.errors import UserError
from vdit.evaluate import heldout
from vdit.sample import Model, load
from vdit.shipped import find
from vdit.worlds.scores import oracle_of

from .parsers import Parser
from .table import markdown, percent

EVALUATIONS = (4, 6, 8, 12, 25)


class Row(NamedTuple):
    """Options of a sampler, and the evaluations of a step."""

    options: dict[str, Any]
    calls: int = 1


ROWS: dict[str, Row] = {
    "ddim": Row({"sampler": "ddim", "eta": 0.0}),
    "ddim, fresh noise": Row({"sampler": "ddim", "eta": 1.0}),
    "heun": Row({"sampler": "heun"}, 2),
    "edm, churn": Row({"sampler": "edm", "churn": 0.3}, 2),
    "dpmpp_2m": Row({"sampler": "dpmpp_2m"}),
    "dpmpp_2m_sde": Row({"sampler": "dpmpp_2m_sde"}),
    "dpmpp_3m": Row({"sampler": "dpmpp_3m"}),
    "unipc": Row({"sampler": "unipc", "order": 2}),
    "unipc, order 3": Row({"sampler": "unipc", "order": 3}),
}


class Score(NamedTuple):
    """A row of the table."""

    name: str
    ema: float
    evaluations: int
    seconds: float  # a clip
    scores: dict[str, float]


def measure(
    model: Model, clips: Sequence[dict[str, Any]], name: str, evaluations: int, seed: int
) -> Score:
    """Scores of what is generated from the captions of `clips`."""
    row, oracle = ROWS[name], oracle_of(model.config)
    # Heun's last step is Euler's: one evaluation less.
    steps = (evaluations + row.calls - 1) // row.calls
    prompts = [clip["caption"] for clip in clips]
    shots = [clip["shots"] for clip in clips] if most_shots(model.config) else ()
    batch, options = model.config.sample.batch, {"steps": steps, "seed": seed, **row.options}
    first = model.generate(prompts[:batch], shots=shots[:batch], **options)
    _ = [result.video for result in first]  # compiled
    start = time.perf_counter()
    results = model.generate(prompts, shots=shots, **options)
    videos = [result.video for result in results]
    seconds = (time.perf_counter() - start) / len(clips)
    scores = [oracle.score(video, clip) for video, clip in zip(videos, clips, strict=True)]
    ema = model.config.sample.ema
    return Score(name, ema, row.calls * steps - (row.calls - 1), seconds, oracle.aggregate(scores))


def table(rows: Sequence[Score]) -> str:
    """The scores as Markdown."""
    several = len({row.ema for row in rows}) > 1
    heads = ["sampler", *["ema"] * several, "evaluations", "seconds a clip"]
    heads += ["every attribute", "permanence", "gravity error"]
    lines = []
    for row in rows:
        read = row.scores
        low, high = read.get("every_attribute_low"), read.get("every_attribute_high")
        interval = "" if low is None else f" ({low:.2f}–{high:.2f})"
        line = [row.name, *[f"{row.ema:g}"] * several, str(row.evaluations), f"{row.seconds:.3f}"]
        line += [f"{read['every_attribute']:.2f}{interval}", f"{read['permanence']:.2f}"]
        lines.append([*line, percent(read.get("gravity_error_median"))])
    return markdown(heads, lines)


def plot(rows: Sequence[Score], path: Path) -> None:
    """Every attribute against evaluations, a line a sampler and average."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, ema in dict.fromkeys((row.name, row.ema) for row in rows):
        mine = [row for row in rows if (row.name, row.ema) == (name, ema)]
        scores = [row.scores["every_attribute"] for row in mine]
        label = f"{name}, ema {ema:g}" if ema else name
        axes.plot([row.evaluations for row in mine], scores, marker="o", label=label)
    axes.set_xscale("log")
    ticks = sorted({row.evaluations for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="evaluations of the denoiser", ylabel="every attribute right")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def measured(arguments: Sequence[str]) -> None:
    """Prints a line for each row as it is measured, then the table."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--workdir", required=True, help="a trained workdir of a simulated source, or base"
    )
    parser.add_argument("--captions", type=int, default=128, help="held-out captions")
    parser.add_argument("--samplers", default=";".join(ROWS), help=f"some of {'; '.join(ROWS)}")
    parser.add_argument("--evaluations", default=",".join(map(str, EVALUATIONS)))
    parser.add_argument("--ema", default="0", help="lengths of sample.ema, as 0,0.05,0.1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", default="", help="PNG file to write")
    flags = parser.parse_args(arguments)
    names = [name.strip() for name in flags.samplers.split(";")]
    if unknown := [name for name in names if name not in ROWS]:
        raise UserError(f"--samplers={unknown[0]}: known are {'; '.join(ROWS)}")
    texts = flags.evaluations.split(",")
    if not all(text.isdecimal() and int(text) > 1 for text in texts) or flags.captions < 1:
        raise UserError("--evaluations of 2 or more, as 4,8,25, and --captions of 1 or more")
    workdir, rows = find(flags.workdir), []
    config = read_config(workdir)
    for length in flags.ema.split(","):
        try:
            config.sample.ema = float(length)
        except ValueError:
            raise UserError(f"--ema={length}: numbers as 0,0.05,0.1 are allowed") from None
        joined.check(config)
        model = load(workdir, config)
        clips = heldout(model, workdir, flags.captions)
        for name, text in itertools.product(names, texts):
            rows.append(measure(model, clips, name, int(text), flags.seed))
            print(f"{length} {name} {text} {rows[-1].scores['every_attribute']:.3f}", flush=True)
    if flags.plot:
        plot(rows, Path(flags.plot))
    print(table(rows))


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    try:
        measured(argv)
        return 0
    except UserError as error:
        print(f"vdit: {error}", file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
