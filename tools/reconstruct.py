"""Scores an autoencoder by itself: what the oracle reads in reconstructed held-out clips.

    python -m tools.reconstruct --workdir=DIR [--count=48] [--picture=FILE.png]

Real and reconstructed clips of a simulated source, score by score; no denoiser is needed, and no
score of one will be above these. --picture: four clips, each above its reconstruction. Exit status
2 for wrong arguments or workdirs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vdit.config.identity import read_config
from vdit.data import sources
from vdit.errors import UserError
from vdit.evaluate import heldout, reconstruct
from vdit.loading import read_stage
from vdit.model import Codec
from vdit.runtime.progress import say
from vdit.runtime.video import contact_sheet
from vdit.shipped import find
from vdit.worlds.scores import oracle_of, score_rows

from .parsers import Parser
from .table import markdown

SHOWN = 4  # clips of the picture
FRAMES = 8  # of each


def codec(workdir: Path) -> Codec:
    """The autoencoder of a workdir; its latents are not normalised."""
    config = read_config(workdir)
    if not sources.SOURCES[config.data.source].endless:
        raise UserError(f"data.source={config.data.source}: only simulated clips have an oracle")
    width = config.vae.channels
    plain = {"mean": np.zeros(width, np.float32), "std": np.ones(width, np.float32)}
    return Codec(config, read_stage(workdir, "vae").params, plain)


def score(workdir: Path, count: int, picture: Path | None) -> list[dict[str, Any]]:
    """The rows of both splits."""
    model = codec(workdir)
    clips = heldout(model, workdir, count)
    real = np.stack([clip["video"] for clip in clips])
    again = reconstruct(model, real, batch=8)
    if picture is not None:
        pairs = [video for both in zip(real[:SHOWN], again[:SHOWN], strict=True) for video in both]
        contact_sheet(picture, pairs, every=-(-real.shape[1] // FRAMES), scale=2)
    videos = {"real": real, "reconstructed": again}
    return score_rows({"all": (clips, videos)}, oracle_of(model.config))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(
        prog="reconstruct", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--picture", type=Path)
    try:
        options = parser.parse_args(arguments)
        if options.count < 1:
            raise UserError(f"--count={options.count}: 1 is the least")
        rows = score(find(options.workdir), options.count, options.picture)
    except UserError as error:
        print(f"reconstruct: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    names = [name for name in rows[0] if isinstance(rows[0][name], float) and "_" != name[0]]
    names = [name for name in names if not name.endswith(("_low", "_high"))]
    names += [name for name in rows[1] if name in ("psnr", "ssim")]
    lines = [
        [name.replace("_", " "), *(f"{row[name]:.2f}" if name in row else "–" for row in rows)]
        for name in names
    ]
    say(markdown(["", *(row["split"] for row in rows)], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
