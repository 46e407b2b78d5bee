"""Imports published weights into a workdir.

    python -m tools.import_weights --source=FOLDER --workdir=DIR

FOLDER is as diffusers writes it: a network's (config.json and safetensors, or shards of them), or a
pipeline's, of which the folders transformer/ and vae/ are read. Known are the layouts of
`vdit/models/layouts.py`: facebook/DiT-XL-2-256 and its kin, maxin-cn/Latte-1. DIR gets a checkpoint
with digests and config.json. All of FOLDER is checked before anything is written; what does not fit
is named. Exit status 2 for wrong arguments or weights.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tools.flags import Parser
from vdit import build, stages
from vdit.config import default
from vdit.errors import UserError
from vdit.models import layouts, weights
from vdit.models.dit_paper import DiTPaper
from vdit.runtime.checkpoint import Checkpoints
from vdit.runtime.files import write_text
from vdit.runtime.progress import say
from vdit.tokens import Condition, Layout

STEP = 0  # of an imported checkpoint


def configured(changes: Mapping[str, Any]) -> ConfigDict:
    """The default configuration with these fields ("dit.patch") changed."""
    config = default()
    config.update_from_flattened_dict(dict(changes))
    return config


def shapes(model: DiTPaper, channels: int, text: int) -> Any:
    """The abstract parameters of a denoiser with `channels` of latents and `text` of its text."""
    x = jax.ShapeDtypeStruct((1, 1, channels * model.patch[0] * model.patch[1]), jnp.float32)

    def init(x: jax.Array) -> Any:
        one = jnp.ones((1, 1), jnp.int32)
        layout = Layout(jnp.zeros((1, 1, 3)), one, one, None, (1, 1, 1))
        features = jnp.zeros((1, 1, text))
        told = Condition(features, one, one > 0, features, jnp.zeros((1, 1)), one[0])
        return model.init(jax.random.key(0), x, layout, told)["params"]

    return jax.eval_shape(init, x)


def parts(source: Path) -> list[Path]:
    """The folders of a pipeline that have a layout, or the folder of one network."""
    if not source.is_dir():
        raise UserError(f"--source={source}: there is no such folder")
    found = [source / part for part in layouts.PARTS if (source / part).is_dir()]
    if not found:
        return [source]
    stages_known = {layout.stage for layout in layouts.LAYOUTS.values()}
    known = [path for path in found if layouts.PARTS[path.name] in stages_known]
    for path in found:
        if path not in known:
            say(f"{path}: not imported, no layout of {layouts.PARTS[path.name]} is known yet")
    if not known:
        raise UserError(f"{source} holds no folder transformer")
    return known


def scaling(source: Path) -> float:
    """What a pipeline multiplies its autoencoder's latents with."""
    path = source / "vae" / "config.json"
    if not path.exists():
        return layouts.SCALING
    config = weights.read_json(path, weights.CONFIG_BYTES)
    return weights.fields(config, {"scaling_factor": layouts.SCALING}, path.parent)[
        "scaling_factor"
    ]


def check_schedule(source: Path) -> None:
    """Refuses a pipeline whose noise is not the table `ddpm`."""
    path = source / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return
    config = weights.read_json(path, weights.CONFIG_BYTES)
    for field, value in {
        "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
        "beta_schedule": "linear", "prediction_type": "epsilon",
    }.items():  # fmt: skip
        if config.get(field, value) != value:
            raise UserError(f"{path}: {field} is {config[field]!r}; allowed: {value!r}")


def import_part(folder: Path, source: Path, workdir: Path) -> None:
    """One network to workdir/checkpoints/STAGE, and its configuration."""
    layout, numbers = layouts.read_layout(folder)
    try:
        changes = layout.to_vdit(numbers)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    directory = workdir / "checkpoints" / layout.stage
    for path in (directory, workdir / "config.json"):
        if path.exists():
            raise UserError(f"{path} is there already; choose another --workdir")
    config = configured(changes)
    model = build.dit(config)
    found = weights.read_headers(folder, layouts.STEM)
    plan = weights.plan(
        found,
        shapes(model, config.vae.channels, numbers.get("caption_channels", 1)),
        layout.rows,
        layout.others,
        folder,
        layout.layers(numbers),
    )
    check_schedule(source)
    scale = scaling(source)
    say(f"{folder}: {len(found)} tensors")
    params = {layout.stage: weights.load(plan)}
    spread = [1.0 / scale] * config.vae.channels
    fields = stages.stage_fields(config, layout.stage)
    meta = {
        "stage": layout.stage, "fields": fields, "digest": stages.digest(fields),
        "latents": {"mean": [0.0] * config.vae.channels, "std": spread},
        "imported": {"digest": weights.digest(found), "numbers": numbers},
    }  # fmt: skip
    checkpoints = Checkpoints(directory, keep=1)
    # There is nothing to resume: the weights are the EMA, and the state is a step.
    checkpoints.save(STEP, {"step": np.zeros((), np.int32)}, params, None, meta)
    checkpoints.close()
    write_text(workdir / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    say(f"{directory / str(STEP)}: {count:,} parameters, dit.preset={config.dit.preset}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(
        prog="import_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    try:
        options = parser.parse_args(arguments)
        for folder in parts(options.source):
            import_part(folder, options.source, options.workdir)
    except UserError as error:
        print(f"import_weights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
