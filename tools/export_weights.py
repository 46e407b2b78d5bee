"""Exports a workdir's networks as safetensors.

    python -m tools.export_weights --workdir=DIR --out=FOLDER [--stage=vae] [--raw] [--own]
        [--lora] [--pipeline=link|copy [--source=FOLDER]]

--stage=dit (the default), low (of two experts of Wan that for low noise levels), vae or classify:
FOLDER gets config.json and the weights for diffusers or transformers, if the network is of a family
in `vdit/published/families.py`: for example
DiTTransformer2DModel, LatteTransformer3DModel, UNet2DConditionModel (also denoisers trained here:
choose the scheduler by dit.process), WanTransformer3DModel, AutoencoderKL, AutoencoderKLWan,
VivitForVideoClassification (of one frame: ViTForImageClassification). The frame size is that of
training.

--pipeline writes the complete pipeline of an imported workdir, as diffusers' from_pretrained reads
it: what was trained since is written, all other parts are links to the folder that was imported, or
copies of it. --source says where that folder is now, if it was moved.

Other networks (vdit's DiT, the ViViT autoencoder, a learned text encoder) need --own: FOLDER gets
everything that sampling needs, under vdit's names: config.json, STAGE.safetensors for each stage,
tokenizer.json, classes.json, vdit.json, and digests of these. `tools.import_weights --source=FOLDER
--workdir=OTHER` restores the workdir, to the bit; --mode=sample takes FOLDER as --workdir.

DIR may be the name of weights in the package.

Of a workdir of adapters (dit.lora) the denoiser is exported with them merged. With --lora FOLDER
gets the adapters alone, pytorch_lora_weights.safetensors as diffusers and PEFT read it (of a second
expert in FOLDER/transformer_2); of networks that diffusers does not have, under vdit's names.

Exports the EMA, or with --raw the raw parameters; more than 5 GB go to several shards with an
index. Exit status 2 for invalid arguments or models. FOLDER is written completely or not at all.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from vdit import initial
from vdit.config import default
from vdit.config.autoencoder import build_vae
from vdit.config.classifier import answer_names, build_classifier
from vdit.config.identity import USED, read_config, write_config
from vdit.errors import UserError
from vdit.loading import (
    DENOISERS,
    adapters_in,
    own_stages,
    read_meta,
    read_own,
    read_stage,
    stages_of,
    with_bases,
)
from vdit.published import layouts, lora, vae_folder, vivit_folder, weights
from vdit.published.family import Sizes
from vdit.published.layouts import LAYOUTS
from vdit.runtime.checkpoint import (
    load_meta,
    newest_good_step,
    write_digests,
)
from vdit.runtime.files import atomic_folder, write_text
from vdit.shipped import OWN, Stage, find

from . import exporting, parsers
from .importing.own import COPIED


class Folder(NamedTuple):
    """A network for another library: config.json, the file's stem, parameters and key table."""

    config: dict[str, Any]
    stem: str
    params: Any
    rows: Sequence[weights.Row]
    layers: int = 1  # repeats of a tensor with {*} in its name


def flat(config: ConfigDict) -> dict[str, Any]:
    """The fields of a configuration: {"dit.patch": (1, 1), ...}."""
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


def denoiser(config: ConfigDict, stage: Stage, workdir: Path) -> Folder | None:
    """A denoiser of a published family."""
    del workdir
    params = traverse_util.flatten_dict(stage.params["dit"], sep="/")
    latent = build_vae(config).latent_shape(config.data.frames, *config.data.size)
    sizes = Sizes(latent, exporting.text_width(params))
    found = exporting.to_layout(flat(config), sizes, flat(default()))
    if found is None:
        return None
    layout, numbers = found
    count = layout.layers(numbers)
    return Folder(numbers, layouts.STEM, stage.params["dit"], layout.rows, count)


def autoencoder(config: ConfigDict, stage: Stage, workdir: Path) -> Folder | None:
    """A convolutional autoencoder, with the latents' statistics of its denoiser or its folder."""
    meta = read_meta(workdir, "dit") if "dit" in stages_of(workdir) else stage.meta
    found = exporting.autoencoder_folder(build_vae(config), meta.get("latents"))
    if found is None:
        return None
    return Folder(found[0], vae_folder.STEM, stage.params["vae"], found[1])


def classifier(config: ConfigDict, stage: Stage, workdir: Path) -> Folder | None:
    """A ViViT with joint attention over tubelets; of one frame a ViT."""
    found = vivit_folder.to_folder(
        build_classifier(config), config.data.frames, tuple(config.data.size)
    )
    if found is None:
        return None
    labelled, rows, patch = found
    answers = [
        name if question == "class" else f"{question}: {name}"
        for question, names in answer_names(config, workdir).items()
        for name in names
    ]
    labelled |= {"id2label": {str(i): name for i, name in enumerate(answers)}}
    params = vivit_folder.unfolded(stage.params["vivit"], patch)
    return Folder(labelled, vivit_folder.STEM, params, rows)


STAGES = {"dit": denoiser, "low": denoiser, "vae": autoencoder, "classify": classifier}


def write(path: Path, params: Any, rows: Sequence[weights.Row], layers: int = 1) -> None:
    """Writes parameters to a safetensors file by a key table."""
    exporting.write(path, weights.unload(params, rows, layers))


def foreign(config: ConfigDict, workdir: Path, out: Path, stage: str, raw: bool) -> None:
    """Writes one stage for another library."""
    folder = STAGES[stage](config, read_stage(workdir, stage, raw=raw), workdir)
    if folder is None:
        model = config["dit" if stage == "low" else stage].model
        raise UserError(
            f"{workdir}: its {stage} ({stage}.model={model}) is no network of diffusers or"
            " transformers; use --own"
        )
    write(out / f"{folder.stem}.safetensors", folder.params, folder.rows, folder.layers)
    write_text(out / "config.json", json.dumps(folder.config, indent=2) + "\n")


def own(workdir: Path, out: Path, raw: bool = False, dtype: Any = None) -> None:
    """Writes all stages of a workdir under vdit's names; the tensors in `dtype`, if it is given."""
    stages: dict[str, Mapping[str, Any]] = {}
    for stage in stages_of(workdir):
        step, groups, meta = read_stage(workdir, stage, raw=raw)
        groups = {name: groups[name] for name in USED[stage] if name in groups}
        if dtype is not None:
            groups = jax.tree.map(lambda x: np.asarray(x).astype(dtype), groups)
        write(out / f"{stage}.safetensors", groups, [(r"(.*)", r"\1", None)])
        stages[stage] = {**meta, "step": step}
    if not stages:
        raise UserError(f"{workdir} holds no checkpoints")
    for name in ("config.json", *COPIED):
        if (workdir / name).exists():
            shutil.copyfile(workdir / name, out / name)
    if adapters_in(workdir):  # merged
        config = read_config(workdir)
        config.dit.lora = default().dit.lora
        write_config(config, out)
    write_text(out / OWN, json.dumps({"format": 1, "stages": stages}, indent=1) + "\n")
    write_digests(out)


def adapters(workdir: Path, out: Path, raw: bool) -> None:
    """Writes the adapters of a denoiser alone, of a second expert into a folder of its own."""
    config, made = read_config(workdir), adapters_in(workdir)
    if not made:
        raise UserError(f"{workdir}: it was trained without adapters (dit.lora.rank is 0)")
    shapes = initial.shapes(config, "dit", workdir)["dit"]
    layout, scale = LAYOUTS.get(config.dit.model), (made["alpha"] or made["rank"]) / made["rank"]
    prefix, second = layout.folders[0] if layout else ("transformer", "")
    for stage in [s for s in own_stages(workdir) if s in DENOISERS] or ["dit"]:
        groups = read_own(workdir, stage, raw=raw).params["lora"]
        if others := groups.keys() - {"dit"}:
            raise UserError(
                f"{workdir}: --lora writes the denoiser's adapters, not {others.pop()}'s"
            )
        tensors, metadata = lora.to_peft(groups["dit"], shapes, scale, prefix)
        folder = out / second if stage == "low" else out
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / lora.WEIGHTS, metadata)


def pipeline(
    workdir: Path, out: Path, raw: bool, place: Callable[[Path, Path], None], source: Path | None
) -> None:
    """Writes the imported pipeline with the networks that were trained since; `place` links or
    copies the other parts."""
    steps, imported = dict[str, int](), dict[str, Any]()
    for folder in with_bases(workdir):
        for stage in (*DENOISERS, "vae"):
            directory = folder / "checkpoints" / stage
            if (step := newest_good_step(directory)) is not None:
                steps[stage] = steps.get(stage) or step
                imported[stage] = load_meta(directory, step).get("imported", {})
    if "source" not in imported.get("dit", {}):
        raise UserError(f"--pipeline: {workdir} was not imported from a pipeline's folder")
    source = Path(source or imported["dit"]["source"])
    if not (source / "model_index.json").is_file():
        raise UserError(
            f"--pipeline: {source}, from which {workdir} was imported, holds no model_index.json;"
            " if the pipeline was moved, give --source=FOLDER"
        )
    first = next(name for name in layouts.DENOISERS if (source / name).is_dir())
    folders = {first: "dit", layouts.DENOISERS[first]: "low", "vae": "vae"}
    for name, stage in folders.items():
        said = imported.get(stage, {}).get("digest")
        if said and weights.digest(weights.read_headers(source / name, layouts.STEM)) != said:
            raise UserError(f"{source}: its {name} is not the one that {workdir} was imported from")
    for part in sorted(source.iterdir()):
        stage = folders.get(part.name, "")
        if steps.get(stage):  # not IMPORTED
            (out / part.name).mkdir()
            foreign(read_config(workdir), workdir, out / part.name, stage, raw)
        elif not part.name.startswith("."):
            place(part.resolve(), out / part.name)


def export(out: Path, write: Callable[[Path], None]) -> None:
    """Calls write(FOLDER), whose content becomes `out`, completely or not at all."""
    if out.exists():
        raise UserError(f"--out={out} already exists; choose another")
    with atomic_folder(out) as temporary:
        write(temporary)


def chosen(options: argparse.Namespace) -> Callable[[Path, Path], None]:
    """The function of (workdir, out) that the flags ask for."""
    if (options.own or options.pipeline or options.lora) and options.stage:
        raise UserError("--own and --pipeline take no --stage: they write all of them; nor --lora")
    if sum(map(bool, (options.own, options.pipeline, options.lora))) > 1:
        raise UserError("--own, --pipeline, --lora: one of them is allowed")
    if options.source and not options.pipeline:
        raise UserError("--source is allowed with --pipeline")
    raw, stage = options.raw, options.stage or "dit"
    if options.pipeline:
        place, source = exporting.PLACES[options.pipeline], options.source
        return lambda workdir, out: pipeline(workdir, out, raw, place, source)
    if options.lora:
        return lambda workdir, out: adapters(workdir, out, raw)
    if options.own:
        return lambda workdir, out: own(workdir, out, raw)
    return lambda workdir, out: foreign(read_config(workdir), workdir, out, stage, raw)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = parsers.export_weights(__doc__)
    try:
        options = parser.parse_args(arguments)
        export(options.out, functools.partial(chosen(options), find(options.workdir)))
    except UserError as error:
        print(f"export_weights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
