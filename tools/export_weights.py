"""Exports a denoiser of the paper's layouts to a folder that diffusers loads.

    python -m tools.export_weights --workdir=DIR --out=FOLDER

It is the EMA, and of an imported workdir alone. Exit status 2 for wrong arguments or models.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tools.flags import Parser
from tools.import_weights import configured
from vdit.config import stage_fields
from vdit.errors import UserError
from vdit.models import layouts, weights
from vdit.runtime.checkpoint import load_meta, newest_good_step, restore_ema
from vdit.runtime.files import atomic_path, write_text
from vdit.sample import read_config


def architecture(config: ConfigDict) -> dict[str, Any]:
    """The fields that say what the network is."""
    fields = stage_fields(config, "dit")
    said = ("dit.model", "dit.preset", "dit.patch", "dit.axes", "dit.learned_variance")
    sizes = ("dit.paper.", "dit.unet.")
    return {k: v for k, v in fields.items() if k in said or k.startswith(sizes)}


def export(workdir: Path, out: Path) -> None:
    """Writes out/config.json and the tensors, under the names of the layout it came from."""
    config = read_config(workdir)
    directory = workdir / "checkpoints" / "dit"
    step = newest_good_step(directory)
    if step is None:
        raise UserError(f"{directory} holds no checkpoint")
    imported: Any = load_meta(directory, step).get("imported")
    if imported is None:
        raise UserError(f"{workdir} was not imported: its layout has no folder in diffusers")
    numbers = imported["numbers"]
    # An older workdir says no layout.
    name = imported.get("layout") or ("latte" if "video_length" in numbers else "dit")
    layout = layouts.LAYOUTS[name]
    ours, theirs = (architecture(c) for c in (config, configured(layout.to_vdit(numbers))))
    if ours != theirs:
        raise UserError(f"{workdir / 'config.json'} is not that of the imported weights")
    if out.exists():
        raise UserError(f"--out={out} is there already; choose another")
    params = restore_ema(directory, step)[layout.stage]
    tensors = weights.unload(params, layout.rows, layout.layers(numbers))
    with atomic_path(out / f"{layouts.STEM}.safetensors") as temporary:
        weights.write(temporary, tensors)
    said = {name: value for name, value in numbers.items() if value}
    known = {k: layout.fixed[k] for k in layouts.WRITTEN if k in layout.fixed}
    text = {"_class_name": layout.classes[0], **known, **said}
    write_text(out / "config.json", json.dumps(text, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(
        prog="export_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    try:
        options = parser.parse_args(arguments)
        export(options.workdir, options.out)
    except UserError as error:
        print(f"export_weights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
