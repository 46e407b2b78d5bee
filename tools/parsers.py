"""The flags of the tools, apart from what they do: help and wrong flags need no JAX.

Each function gives one tool's parser, with its module's docstring as the description, or in brief
with an example, for the command `vdit`.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from vdit.errors import UserError

SHOWN = 300  # characters of a message


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        raise UserError(f"{text if len(text) <= SHOWN else text[:SHOWN] + '...'}; see --help")


def _parser(name: str, text: str | None, brief: str, example: str, exact: bool = False) -> Parser:
    return Parser(
        prog=name if text else f"vdit {name}",
        description=text or brief,
        epilog=None if text else f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=not exact,
    )


def plan(text: str | None = None) -> Parser:
    """Also takes --config.field=value."""
    parser = _parser(
        "plan", text,
        "What a run needs on TPUs, without a TPU: memory, step time, chip-hours, by formula and\n"
        "by XLA's TPU compiler. --config.field=value as for run.",
        "vdit plan --config=experiments/ten_b.py --topology=v5p:4x4x8", exact=True,
    )  # fmt: skip
    parser.add_argument("--config", required=True, help="experiments/NAME.py[:ARGUMENT]")
    parser.add_argument("--topology", required=True, help="KIND:AxBxC, for example v5e:4x4")
    parser.add_argument("--mesh", default="", help="AXIS:SIZE,... (all meshes are tried)")
    parser.add_argument("--mode", choices=("train", "sample"), default="train")
    parser.add_argument("--stage", choices=("vae", "dit", "classify"), default="dit")
    parser.add_argument("--best", type=int, default=3, help="meshes that are compiled (3)")
    parser.add_argument("--fast", action="store_true", help="by formula alone")
    parser.add_argument("--row", action="store_true", help="print a row of docs/scale.md")
    return parser


def import_weights(text: str | None = None) -> Parser:
    """Also takes --config.field=value, with --config."""
    parser = _parser(
        "import" if text is None else "import_weights", text,
        "A workdir from published weights: pipelines and denoisers of diffusers (DiT, Latte,\n"
        "Wan, U-Nets), autoencoders, ViTs and ViViTs of transformers, and `vdit export --own`.",
        "vdit import --source=FOLDER --workdir=runs/imported",
    )  # fmt: skip
    parser.add_argument("--source", type=Path, required=True, help="config.json and safetensors")
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder")
    parser.add_argument("--vae", type=Path, help="folder of the autoencoder")
    parser.add_argument("--text", type=Path, help="folder of the text encoder")
    parser.add_argument("--image", type=Path, help="folder of the image encoder")
    parser.add_argument("--copy", action="store_true", help="copy the weights, link to none")
    parser.add_argument("--mesh", default="", help="AXIS:SIZE,... that checkpoints are sharded for")
    parser.add_argument("--parity", type=Path, help="stored activations to compare with")
    parser.add_argument("--config", help="the network to initialise from a ViT or ViViT")
    parser.add_argument(
        "--start", choices=("central", "inflate"), help="with --config: of tubelets"
    )
    return parser


def export_weights(text: str | None = None) -> Parser:
    """Of tools.export_weights."""
    parser = _parser(
        "export" if text is None else "export_weights", text,
        "Networks as safetensors: for diffusers and transformers where they have them, or (--own)\n"
        "all that sampling needs, under vdit's names.",
        "vdit export --workdir=runs/base --out=exported --own",
    )  # fmt: skip
    parser.add_argument("--workdir", type=Path, required=True, help="or weights in the package")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--stage", choices=("classify", "dit", "low", "vae"), help="one network")
    parser.add_argument("--raw", action="store_true", help="the raw parameters instead of the EMA")
    parser.add_argument("--own", action="store_true", help="all stages, under vdit's names")
    parser.add_argument("--lora", action="store_true", help="the denoiser's adapters alone")
    parser.add_argument("--pipeline", choices=("copy", "link"), help="the whole pipeline")
    parser.add_argument("--source", type=Path, help="with --pipeline: the folder that was imported")
    return parser


def restore_checkpoint(text: str | None = None) -> Parser:
    """Of tools.restore_checkpoint."""
    parser = _parser(
        "restore" if text is None else "restore_checkpoint", text,
        "Lists, inspects, verifies and copies the checkpoints of a workdir. A damaged file is\n"
        "named, with exit status 1.",
        "vdit restore verify runs/base",
    )  # fmt: skip
    parser.add_argument("command", choices=("copy", "inspect", "list", "verify"))
    parser.add_argument("workdir", type=Path, help="or weights in the package")
    parser.add_argument("--stage", help="a stage's name, such as vae or dit")
    parser.add_argument("--step", type=int)
    parser.add_argument("--to", type=Path, help="copy: the workdir to copy to")
    parser.add_argument("--mesh", default="", help="copy: AXIS:SIZE,... to split the arrays for")
    parser.add_argument("--drop", choices=("optimizer",), help="copy: what to leave out")
    return parser


CURATED = {
    "min-seconds": 1.0, "max-seconds": 10.0, "min-motion": 0.002, "max-motion": 0.2,
    "min-sharpness": 0.01, "black": 0.5, "duplicates": 6.0,
}  # fmt: skip


def curate(text: str | None = None) -> Parser:
    """Of tools.curate."""
    parser = _parser(
        "curate", text,
        "Splits the films of a folder into shots, drops poor ones (short, black, static, blurred,\n"
        "duplicates), and writes a table of the rest, on which `vdit run folder` trains.",
        "vdit curate films --min-seconds=2 --out=films/captions.jsonl",
    )  # fmt: skip
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="the table (FOLDER/captions.jsonl)")
    for name, value in CURATED.items():
        shown = f"({value:g})"
        parser.add_argument(f"--{name}", type=float, default=value, metavar="X", help=shown)
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--dry", action="store_true", help="write nothing, print the report")
    return parser


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text}: HEIGHTxWIDTH")
    return int(height), int(width)


def measure(text: str | None = None) -> Parser:
    """Of tools.measure."""
    parser = _parser(
        "measure", text,
        "FVD, KVD, PSNR, SSIM and LPIPS of two folders of videos, or of a workdir, with intervals\n"
        "and with the protocol that the numbers are of.",
        "vdit measure --real=clips --made=samples --metrics=fvd,kvd --out=result.json",
    )  # fmt: skip
    parser.add_argument("--real", type=Path, help="a folder of videos")
    parser.add_argument("--made", type=Path, help="a folder of videos")
    parser.add_argument("--workdir", type=Path, help="or weights in the package")
    parser.add_argument("--metrics", default="fvd,kvd", help="of fvd,kvd,psnr,ssim,lpips (fvd,kvd)")
    parser.add_argument("--frames", type=int, default=16, help="first frames of each video (16)")
    parser.add_argument("--fps", type=float, default=0.0, help="(that of the first real video)")
    parser.add_argument("--size", type=_size, help="HEIGHTxWIDTH (that of the first real video)")
    parser.add_argument("--count", type=int, default=256, help="--workdir: held-out clips (256)")
    parser.add_argument("--out", type=Path, help="a JSON file of the results")
    parser.add_argument("--compare", type=Path, nargs="+", help="results side by side")
    return parser


PARTS = ("dit", "wan", "vae", "sampling", "compile", "checkpoint", "attention", "loader")
NUMBERS = {
    "width": 384, "depth": 12, "tokens": 512, "batch": 4, "levels": 2, "steps": 50, "repeats": 5,
}  # fmt: skip


def bench(text: str | None = None) -> Parser:
    """Of tools.bench."""
    parser = _parser(
        "bench", text,
        "Times networks, sampling, compilation, checkpoints, attention and data loading on this\n"
        "machine, beside PyTorch where another Python has it.",
        "vdit bench --only=attention,checkpoint --json=bench.jsonl", exact=True,
    )  # fmt: skip
    parser.add_argument(
        "--only", default=",".join(PARTS), metavar="PART,...", help=f"some of {','.join(PARTS)}"
    )
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch")
    parser.add_argument("--json", type=Path, help="rows of results")
    for name, value in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"({value})")
    return parser
