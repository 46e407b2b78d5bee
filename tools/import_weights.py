"""Imports published weights into a workdir, which then samples like any other.

    python -m tools.import_weights --source=FOLDER --workdir=DIR [--vae=FOLDER] [--text=FOLDER]
        [--image=FOLDER] [--copy] [--mesh=fsdp:8] [--parity=FILE]
    python -m vdit.main --mode=sample --workdir=DIR --prompt="golden retriever"

FOLDER is one of

- a pipeline of diffusers, with the folders transformer/ (of two experts transformer_2/ as well) or
  unet/, vae/, text_encoder/, tokenizer/, image_encoder/ and scheduler/, or a denoiser alone
  (config.json and safetensors, possibly sharded), with --vae, --text and --image. Nothing is stored
  twice: DIR has links to the files of the denoiser and the autoencoder, with digests, and refers to
  the folders of text and image encoders;
- an autoencoder alone, which becomes the stage vae;
- a ViT or ViViT of transformers, with or without a head, which becomes the stage classify;
- the output of `tools.export_weights --own`.

Supported families are the rows of `vdit/published/families.py` (facebook/DiT-XL-2-256,
maxin-cn/Latte-1, the U-Net of Stable Diffusion 1 and 2, stabilityai/sd-vae-ft-mse, transformers and
autoencoders of Wan 2.1 and 2.2, T5, UMT5, CLIP, ViT, ViViT).

    python -m tools.import_weights --source=FOLDER --workdir=DIR [--start=central|inflate]
        --config=experiments/vivit.py --config.classify.preset=B/16x2 ...

initialises the network of the configuration, any of the four models, from a ViT or ViViT (ViViT,
section 3.4): by central frame or filter inflation of the tubelet embedding (--start), with
positions interpolated to data.size and a new head. `python -m vdit.main` with the same flags and
--workdir=DIR trains it.

DIR gets config.json and checkpoints with digests: links, or with --copy or --mesh copies, sharded
for the mesh. It is written under a temporary name and renamed when complete. FOLDER is validated
first; errors name the file or tensor. --parity compares activations with those stored from a
reference implementation (`tools/parity.py`), block by block. Exit status 2 for invalid arguments or
weights.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdit.config.autoencoder import build_vae
from vdit.config.classifier import build_classifier
from vdit.config.denoiser import build_dit
from vdit.config.identity import USED, write_config
from vdit.config.shared import value_of
from vdit.errors import UserError
from vdit.published import weights
from vdit.runtime import linked
from vdit.runtime.checkpoint import IMPORTED, Checkpoints, write_digests
from vdit.runtime.files import atomic_folder, write_text
from vdit.runtime.machine import return_freed_memory
from vdit.runtime.mesh import param_sharding
from vdit.runtime.progress import Progress, say
from vdit.shipped import OWN

from . import parity, parsers
from .flags import mesh_of, read_config
from .importing.classifier import STARTS, Target
from .importing.own import own
from .importing.parts import Import, Part
from .importing.published import planned

FOLDERS = ("vae", "text", "image")  # flags of folders beside --source


def link(folder: Path, group: str, plan: weights.Plan) -> None:
    """Puts links to the files of a plan, and their table, in the place of a step's EMA."""
    shutil.rmtree(folder / "ema")
    (folder / "ema").mkdir()
    rows: dict[str, Any] = {}
    for parts, source in plan.items():
        rank = len(source.shape) - source.stacked  # without trailing ones of the file
        dtypes = [weights.FLOATS[tensor.dtype] for _, tensor in source.tensors]
        rows["/".join((group, *parts))] = {
            "shape": source.shape, "dtype": jnp.result_type(*dtypes).name,
            "stacked": source.stacked, "axes": source.axes, "tensors": [
                (tensor.file.name, dtype.name, tensor.begin, tensor.shape[:rank])
                for (_, tensor), dtype in zip(source.tensors, dtypes, strict=True)
            ],
        }  # fmt: skip
    for path in {tensor.file for source in plan.values() for _, tensor in source.tensors}:
        (folder / "ema" / path.name).symlink_to(path.resolve())
    write_text(folder / "ema" / linked.TABLE, json.dumps(rows))
    write_digests(folder)


def write_part(stage: str, part: Part, mesh: Mesh | None, workdir: Path, copy: bool = True) -> Any:
    """Reads a network, saves it as workdir/checkpoints/STAGE/0, or links to its files, and returns
    its parameters."""
    group, copy = USED[stage][0], copy or part.groups or part.finish is not None

    def named(tree: Any) -> Any:
        return tree if part.groups else {group: tree}

    def split(tree: Any) -> Any:
        """The shardings of a tree that is structured like `part.plan`."""
        if mesh is None:
            return None
        shardings = param_sharding(mesh, named(tree))
        return shardings if part.groups else shardings[group]

    flat = {key: jax.ShapeDtypeStruct(s.shape, jnp.float32) for key, s in part.plan.items()}
    placed = split(traverse_util.unflatten_dict(flat))
    where = None if mesh is None else traverse_util.flatten_dict(placed)
    with Progress(f"importing {stage}", len(part.plan), unit="arrays", passing=True) as bar:
        params = weights.load(part.plan, where, done=bar.update)
    if part.finish is not None:
        shapes = jax.eval_shape(part.finish, params)
        params = jax.jit(part.finish, out_shardings=split(shapes))(params)
    # There is no training to resume: the weights are the EMA, and the state is a step.
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    checkpoints = Checkpoints(workdir / "checkpoints" / stage, keep=1, in_flight=largest)
    state = {"step": np.zeros((), np.int32)}
    checkpoints.save(IMPORTED, state, named(params) if copy else state, None, part.meta)
    checkpoints.close()
    if not copy:
        link(checkpoints.directory / str(IMPORTED), group, part.plan)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    say(f"{part.folder}: {count:,} parameters, stage {stage}")
    return params


def write(
    imported: Import, workdir: Path, mesh: Mesh | None, stored: parity.Stored | None, copy: bool
) -> None:
    """Writes the workdir, completely or not at all."""
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"{workdir} already exists; choose another --workdir")
    with atomic_folder(workdir) as temporary:
        write_config(imported.config, temporary)
        for name, text in imported.files.items():
            write_text(temporary / name, text)
        for stage, part in imported.parts.items():
            params = write_part(stage, part, mesh, temporary, copy)
            if stored is not None and parity.fits(stored, part.plan):
                report(MODELS[stage](exact(imported.config)), params, part.plan, stored)
            del params
            return_freed_memory()


MODELS: dict[str, Callable[[ConfigDict], Any]] = {
    "dit": build_dit, "low": build_dit, "vae": build_vae, "classify": build_classifier
}  # fmt: skip


def exact(config: ConfigDict) -> ConfigDict:
    """The configuration with float32 operands."""
    copied = config.copy_and_resolve_references()
    copied.run.dtype = "float32"
    return copied


def report(model: Any, params: Any, plan: weights.Plan, stored: parity.Stored) -> None:
    """Prints the differences from stored activations by block."""
    wide = max(map(len, (*stored.blocks, "block")))
    say(f"{'block':{wide}} {'largest':>10} {'mean':>10} {'of at most':>12}")
    for row in parity.compare(model, params, plan, stored):
        say(f"{row.name:{wide}} {row.largest:10.2e} {row.mean:10.2e} {row.reference:12.2e}")


def planned_by(options: argparse.Namespace, changes: Sequence[str]) -> Import:
    """The import that the flags describe, validated by headers."""
    given = {name: getattr(options, name) for name in FOLDERS}
    given |= {name: getattr(options, name) for name in ("parity", "config", "start")}
    if (options.source / OWN).exists():
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UserError(f"--{wrong[0]} with {options.source}, a complete workdir: not allowed")
        return own(options.source)
    target = None
    if options.config is not None:
        if options.parity is not None:
            raise UserError("--parity with --config: there is no reference for a new network")
        start = STARTS[options.start or "central"]
        target = Target(read_config(options.config, changes), start)
    elif changes or options.start:
        raise UserError(f"{(*changes, '--start')[0]} is allowed with --config=FILE")
    return planned(options.source, options.vae, options.text, target, options.image)


def activations(path: Path | None, imported: Import) -> parity.Stored | None:
    """Stored activations; `UserError` if they are of none of the imported networks."""
    if path is None:
        return None
    stored = parity.read(path)
    if not any(parity.fits(stored, part.plan) for part in imported.parts.values()):
        names = ", ".join([*stored.blocks][:3])
        raise UserError(f"{path}: its blocks ({names}, ...) belong to another network")
    return stored


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = parsers.import_weights(__doc__)
    try:
        options, changes = parser.parse_known_args(arguments)
        mesh = mesh_of(options.mesh)
        imported = planned_by(options, changes)
        copy = options.copy or mesh is not None  # whose files are in the mesh's shards
        write(imported, options.workdir, mesh, activations(options.parity, imported), copy)
    except UserError as error:
        print(f"import_weights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    shown = {
        "dit": "dit.preset", "low": "dit.wan.boundary", "vae": "vae.model",
        "classify": "classify.preset",
    }  # fmt: skip
    names = [shown[stage] for stage in imported.parts]
    sizes = [f"{name}={value_of(imported.config, name)}" for name in names]
    say(f"{options.workdir}: {', '.join(sizes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
