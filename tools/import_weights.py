"""Imports published weights into a workdir, which then samples as any other.

    python -m tools.import_weights --source=FOLDER --workdir=DIR [--vae=FOLDER] [--text=FOLDER]
        [--mesh=fsdp:8] [--parity=FILE]
    python -m vdit.main --mode=sample --workdir=DIR --prompt="golden retriever"

FOLDER is as diffusers writes it: a pipeline's, of which the folders transformer/ or unet/, vae/,
text_encoder/ and tokenizer/ are read, or a denoiser's alone (config.json and safetensors, or
shards of them) with --vae and --text beside it. Known are the layouts of `vdit/models/layouts.py`
(facebook/DiT-XL-2-256 and its kin, maxin-cn/Latte-1, the U-Net of Stable Diffusion 1 and 2), the
autoencoder of stabilityai/sd-vae-ft-mse, T5 and CLIP. A text encoder is not copied: DIR refers to
its folder. FOLDER may also be what `tools.export_weights --own` wrote, or an autoencoder's alone
(AutoencoderKL, AutoencoderKLWan), which becomes the stage vae.

FOLDER may be transformers' ViT or ViViT, with a head or without: it becomes the stage classify.

    python -m tools.import_weights --source=FOLDER --workdir=DIR [--start=central|inflate]
        --config=experiments/vivit.py --config.classify.preset=B/16x2 ...

makes of it the start of the network that the configuration names, any of the four models (ViViT,
section 3.4): tubelets read their central frame, or all of theirs alike (--start=inflate); positions
are interpolated to another data.size; the head is new. `python -m vdit.main` with the same flags
and --workdir=DIR trains it.

DIR gets checkpoints with digests, split for --mesh, and config.json; it is written under another
name and renamed when it is whole. All of FOLDER is checked first; what does not fit is named.
--parity compares with stored activations of a reference (`tools/parity.py`), block by block. Exit
status 2 for wrong arguments or weights.
"""

import argparse
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tools import import_classifier, parity
from tools.flags import Parser, mesh_of
from tools.flags import read_config as read_experiment
from tools.import_classifier import STARTS, Target
from tools.planning.step import text_params, training
from vdit import build, checks, stages
from vdit.config import default
from vdit.errors import UserError
from vdit.models import layouts, vae_folder, vivit_folder, weights
from vdit.models.text_folder import TOKENIZER_BYTES
from vdit.models.vae_conv import ConvVAE
from vdit.runtime.checkpoint import Checkpoints
from vdit.runtime.files import write_text
from vdit.runtime.mesh import param_sharding
from vdit.runtime.progress import say
from vdit.sample import read_config
from vdit.tokens import Condition, Layout

STEP = 0  # of an imported checkpoint


def configured(changes: Mapping[str, Any]) -> ConfigDict:
    """The default configuration with these fields ("dit.patch") changed."""
    config = default()
    config.update_from_flattened_dict(dict(changes))
    return config


def shapes(config: ConfigDict, text: int) -> Any:
    """The abstract parameters of a denoiser with `text` numbers of each token of its text."""
    model, patch = build.dit(config), config.dit.patch
    x = jax.ShapeDtypeStruct((1, 1, config.vae.channels * patch[0] * patch[1]), jnp.float32)

    def init(x: jax.Array) -> Any:
        one = jnp.ones((1, 1), jnp.int32)
        layout = Layout(jnp.zeros((1, 1, 3)), one, one, None, (1, 1, 1))
        features = jnp.zeros((1, 1, text))
        told = Condition(features, one, one > 0, features, jnp.zeros((1, 1)), one[0])
        return model.init(jax.random.key(0), x, layout, told)["params"]

    return jax.eval_shape(init, x)


@dataclass(frozen=True)
class Part:
    """What a stage is imported from: a folder, the plan of its parameters, what is said of it.

    The plan's paths begin with the stage's groups of parameters if it has `groups`; else they are
    of its first. `finish` makes the stage's parameters of those that are read.
    """

    folder: Path
    plan: weights.Plan
    meta: dict[str, Any]
    groups: bool = False
    finish: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Import:
    """All that goes into a workdir."""

    config: ConfigDict
    parts: dict[str, Part]  # by stage
    files: dict[str, str]  # others of the workdir: name, content


def folders(source: Path, vae: Path | None, text: Path | None) -> dict[str, Path]:
    """The folders "denoiser", and "vae" and "text_encoder" where they are."""
    for flag, path in (("source", source), ("vae", vae), ("text", text)):
        if path is not None and not path.is_dir():
            raise UserError(f"--{flag}={path}: there is no such folder")
    found = {name: source / name for name in layouts.PARTS if (source / name).is_dir()}
    denoisers = [found.pop(name) for name in ("transformer", "unet") if name in found]
    if found and not denoisers:
        raise UserError(f"{source} holds no folder transformer or unet")
    given = {"vae": vae, "text_encoder": text}
    more = {name: path for name, path in given.items() if path is not None}
    return found | more | {"denoiser": (denoisers or [source])[0]}


# A scheduler's fields for each table, and what vdit calls what its network predicts.
TABLES: dict[str, dict[str, Any]] = {
    "ddpm": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012
    },
}  # fmt: skip
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def read_schedule(source: Path, process: str) -> dict[str, Any]:
    """What a pipeline's scheduler says for the configuration: spacing of steps, prediction.

    `UserError` where its noise is not the table `process`.
    """
    path = source / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return {"sample.spacing": "leading"}  # diffusers' default
    config = weights.read_json(path, weights.CONFIG_BYTES)
    for field, value in {
        "num_train_timesteps": 1000, **TABLES[process], "clip_sample": False,
        "thresholding": False, "rescale_betas_zero_snr": False, "trained_betas": None,
    }.items():  # fmt: skip
        if config.get(field, value) != value:
            raise UserError(f"{path}: {field} is {config[field]!r}; allowed: {value!r}")
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in ("leading", "trailing"):
        raise UserError(f"{path}: timestep_spacing is {spacing!r}; allowed: leading, trailing")
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise UserError(f"{path}: prediction_type is {kind!r}; allowed: {', '.join(PREDICTIONS)}")
    return {"sample.spacing": spacing, "dit.prediction": PREDICTIONS[kind]}


def class_names(source: Path, count: int) -> list[str]:
    """The names of a pipeline's classes, in order; none if it does not tell them."""
    path = source / "model_index.json"
    named = weights.read_json(path, TOKENIZER_BYTES).get("id2label") if path.exists() else None
    if not named or not count:
        return []
    if not isinstance(named, dict) or set(named) != {str(i) for i in range(count)}:
        raise UserError(f"{path}: id2label does not name the classes 0 to {count - 1}")
    return [str(named[str(i)]) for i in range(count)]


def vae_fields(folder: Path, module: ConvVAE) -> dict[str, Any]:
    """The configuration of an autoencoder; `UserError` for one that has none."""
    width, decoder_width = module.widths[0], module.decoder_widths[0]
    fields: dict[str, Any] = {
        "vae.model": "causal" if module.causal else "kl", "vae.patch": module.patch,
        "vae.channels": module.channels, "vae.width": width,
        "vae.multipliers": tuple(w // width for w in module.widths),
        "vae.blocks": module.blocks, "vae.groups": module.groups or 32, "vae.pixels": module.pixels,
        "vae.residual": module.residual,
        "vae.decoder_width": 0 if decoder_width == width else decoder_width,
    }  # fmt: skip
    made = build.vae(configured(fields))
    for name in vae_folder.FIELDS:
        ours, theirs = getattr(made, name), getattr(module, name)
        if ours != theirs:
            raise UserError(f"{folder}: its autoencoder has {name} {theirs}; allowed: {ours}")
    return fields


def statistics_of(folder: Path) -> dict[str, list[float]]:
    """The latents' mean and deviation that an autoencoder's folder says; nothing if it does not."""
    found = vae_folder.read_statistics(folder) or {}
    return {name: [float(x) for x in values] for name, values in found.items()}


def planned(
    source: Path, vae: Path | None = None, text: Path | None = None, target: Target | None = None
) -> Import:
    """What is to be imported, checked by headers; no tensor is read."""
    found = folders(source, vae, text)
    folder = found["denoiser"]
    said = weights.read_json(folder / "config.json", weights.CONFIG_BYTES)
    kind = str(said.get("_class_name") or said.get("model_type"))
    alone = kind in vae_folder.FAMILIES or kind in vivit_folder.FAMILIES
    if target is not None and kind not in vivit_folder.FAMILIES:
        raise UserError(f"--config with {folder}: only a ViT's or ViViT's folder takes it")
    if alone and len(found) > 1:
        raise UserError(f"--vae or --text with {folder} of {kind}: only a denoiser takes them")
    if not alone:
        return denoiser(source, found)
    return classifier(folder, target) if kind in vivit_folder.FAMILIES else autoencoder(folder)


def part_of(
    config: ConfigDict, stage: str, folder: Path, plan: weights.Plan, **more: Any
) -> Part:
    """A part whose checkpoint says what one that was trained here would."""
    fields = stages.all_fields(config, stage)
    meta = {"stage": stage, "fields": fields, "digest": stages.digest(fields)}
    return Part(folder, plan, meta, **more)


def autoencoder(folder: Path) -> Import:
    """An autoencoder alone."""
    module, plan = vae_folder.read_module(folder)
    config = configured({"stages": ("vae",), **vae_fields(folder, module)})
    if not module.causal:
        config.data.frames = 1
    part = part_of(config, "vae", folder, plan)
    if spread := statistics_of(folder):
        part.meta["latents"] = spread
    return Import(config, {"vae": part}, {})


def classifier(folder: Path, target: Target | None) -> Import:
    """A ViT or ViViT as it is, or as the start of another network."""
    found = vivit_folder.read_module(folder)
    if target is not None:
        config, names = target.config, {}
        finish = import_classifier.started(folder, found, target)
    else:
        config = configured(import_classifier.fields(found))
        finish = import_classifier.with_head(found, config)
        names = {build.CLASSES: build.to_json(found.classes)} if found.classes else {}
    part = part_of(config, "classify", folder, found.plan, finish=finish)
    return Import(config, {"classify": part}, names)


def denoiser(source: Path, found: Mapping[str, Path]) -> Import:
    """A denoiser and what a pipeline's folder has beside it."""
    folder = found["denoiser"]
    others = (*vae_folder.FAMILIES, *(f"model_type {kind}" for kind in vivit_folder.FAMILIES))
    name, numbers = layouts.read_layout(folder, others)
    layout = layouts.LAYOUTS[name]
    told = "cross_attention_dim" if name == "unet" else "caption_channels"  # width of its text
    try:
        changes = layout.to_vdit(numbers)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    changes |= read_schedule(source, changes["dit.process"])
    plans: dict[str, tuple[Path, weights.Plan]] = {}
    scale = [1.0 / layouts.SCALING] * changes["vae.channels"]
    statistics = {"mean": [0.0] * len(scale), "std": scale}
    if "vae" in found:
        module, plan = vae_folder.read_module(found["vae"])
        if module.causal:
            raise UserError(f"{found['vae']} is causal in time; allowed by {folder}: AutoencoderKL")
        changes |= vae_fields(found["vae"], module)
        if module.channels != numbers["in_channels"]:
            raise UserError(
                f"{found['vae']} has latents of {module.channels} channels; allowed by {folder}:"
                f" {numbers['in_channels']}"
            )
        pixels = numbers["sample_size"] * module.patch[1]
        changes |= {"data.size": (pixels, pixels), "sample.zoom": max(1, 256 // pixels)}
        statistics = statistics_of(found["vae"])
        plans["vae"] = found["vae"], plan
    if changes.get("text.encoder") in ("t5", "clip") and "text_encoder" in found:
        changes["text.path"] = str(found["text_encoder"].absolute())
    config = configured(changes)
    if config.text.path:
        encoder = build.text_encoder(config, build.tokenizer(config, Path()))
        build.look_through_text(config)
        if encoder.dim != numbers[told]:
            raise UserError(
                f"{config.text.path} has features of {encoder.dim} numbers; allowed by {folder}:"
                f" {numbers[told]}"
            )
    abstract = shapes(config, numbers.get(told, 1))
    tensors = weights.read_headers(folder, layouts.STEM)
    layers = layout.layers(numbers)
    plan = weights.plan(tensors, abstract, layout.rows, layout.others, folder, layers)
    plans["dit"] = folder, plan
    imported = {"digest": weights.digest(tensors), "numbers": numbers, "layout": name}
    more = {"dit": {"latents": statistics, "imported": imported}}
    content = build.text_content(config) if config.text.path else {}
    parts = {}
    for stage, (where, made) in plans.items():
        fields = stages.stage_fields(config, stage) | (content if stage == "dit" else {})
        meta = {"stage": stage, "fields": fields, "digest": stages.digest(fields)}
        parts[stage] = Part(where, made, meta | more.get(stage, {}))
    classes = class_names(source, config.dit.paper.classes)
    return Import(config, parts, {build.CLASSES: build.to_json(classes)} if classes else {})


OWN = "vdit.json"  # of an exported workdir: what its stages say of themselves
COPIED = ("tokenizer.json", build.CLASSES)


def groups_of(stage: str) -> tuple[str, ...]:
    """The groups of parameters of a stage that are of use behind training."""
    return {"vae": ("vae",), "dit": ("dit", "text"), "classify": ("vivit",)}[stage]


def own(source: Path) -> Import:
    """A workdir that was exported under vdit's own names, checked by headers."""
    config = read_config(source)
    checks.check(config)
    build.look_through_text(config)
    said = weights.read_json(source / OWN, weights.CONFIG_BYTES).get("stages")
    if not isinstance(said, dict) or not said or said.keys() - {"vae", "dit", "classify"}:
        raise UserError(f"{source / OWN} names no stages of vdit")
    parts = {}
    for stage, told in said.items():
        file = source / f"{stage}.safetensors"
        made = own_shapes(config, stage, source)
        plan = weights.plan(weights.read_header(file), made, [(r"(.*)", r"\1", None)], (), file)
        part = parts[stage] = part_of(config, stage, file, plan, groups=True)
        if stage == "dit" or (isinstance(told, dict) and "latents" in told):
            part.meta["latents"] = own_statistics(told, config.vae.channels, source / OWN)
    there = [source / name for name in COPIED if (source / name).exists()]
    files = {f.name: weights.read_bytes(f, TOKENIZER_BYTES).decode() for f in there}
    return Import(config, parts, files)


def own_shapes(config: ConfigDict, stage: str, source: Path) -> dict[str, Any]:
    """The abstract parameters of a stage, by group."""
    if stage != "dit":
        made = training(config, stage)
        init = functools.partial(made.objective.init, jax.random.key(0))
        found = jax.eval_shape(init, made.batch)
        return {name: found[name] for name in groups_of(stage)}
    encoder = build.text_encoder(config, build.tokenizer(config, source))
    groups = {"dit": shapes(config, encoder.dim)}
    if not encoder.frozen:
        groups["text"] = text_params(encoder, config.text.length)
    return groups


def own_statistics(told: Any, channels: int, path: Path) -> dict[str, list[float]]:
    """The latents' mean and deviation, as numbers."""
    try:
        found = {name: [float(x) for x in told["latents"][name]] for name in ("mean", "std")}
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: the latents' mean and std are not there as numbers") from error
    values = np.array([*found.values()])
    if values.shape != (2, channels) or not np.isfinite(values).all() or values[1].min() <= 0:
        raise UserError(f"{path}: the latents' mean and std: {channels} numbers, std above 0")
    return found


def write_part(stage: str, part: Part, mesh: Mesh | None, workdir: Path) -> Any:
    """Reads one network, saves it as workdir/checkpoints/STAGE/0, and returns its parameters."""
    group = groups_of(stage)[0]

    def named(tree: Any) -> Any:
        return tree if part.groups else {group: tree}

    def split(tree: Any) -> Any:
        """The shardings of a tree as `part.plan` has it."""
        if mesh is None:
            return None
        made = param_sharding(mesh, named(tree))
        return made if part.groups else made[group]

    flat = {key: jax.ShapeDtypeStruct(s.shape, jnp.float32) for key, s in part.plan.items()}
    placed = split(traverse_util.unflatten_dict(flat))
    params = weights.load(part.plan, None if mesh is None else traverse_util.flatten_dict(placed))
    if part.finish is not None:
        shapes = jax.eval_shape(part.finish, params)
        params = jax.jit(part.finish, out_shardings=split(shapes))(params)
    # There is nothing to resume: the weights are the EMA, and the state is a step.
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    checkpoints = Checkpoints(workdir / "checkpoints" / stage, keep=1, in_flight=largest)
    state = {"step": np.zeros((), np.int32)}
    checkpoints.save(STEP, state, named(params), None, part.meta)
    checkpoints.close()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    say(f"{part.folder}: {count:,} parameters, stage {stage}")
    return params


def write(
    made: Import, workdir: Path, mesh: Mesh | None, stored: parity.Stored | None
) -> None:
    """The workdir, whole or not at all."""
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"{workdir} is there already; choose another --workdir")
    temporary = workdir.with_name(f".{workdir.name}.{os.getpid()}.tmp")
    try:
        write_text(temporary / "config.json", json.dumps(made.config.to_dict(), indent=1) + "\n")
        for name, text in made.files.items():
            write_text(temporary / name, text)
        for stage, part in made.parts.items():
            params = write_part(stage, part, mesh, temporary)
            if stored is not None and parity.fits(stored, part.plan):
                report(MODELS[stage](exact(made.config)), params, part.plan, stored)
            del params
        os.replace(temporary, workdir)
    except OSError as error:
        raise UserError(f"cannot write {workdir}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


MODELS: dict[str, Callable[[ConfigDict], Any]] = {
    "dit": build.dit, "vae": build.vae, "classify": build.classifier
}  # fmt: skip


def exact(config: ConfigDict) -> ConfigDict:
    """The configuration with operands in float32."""
    made = config.copy_and_resolve_references()
    made.run.dtype = "float32"
    return made


def report(model: Any, params: Any, plan: weights.Plan, stored: parity.Stored) -> None:
    """Prints the differences from stored activations, block by block."""
    wide = max(map(len, (*stored.blocks, "block")))
    say(f"{'block':{wide}} {'largest':>10} {'mean':>10} {'of at most':>12}")
    for row in parity.compare(model, params, plan, stored):
        say(f"{row.name:{wide}} {row.largest:10.2e} {row.mean:10.2e} {row.reference:12.2e}")


def made_of(options: argparse.Namespace, changes: Sequence[str]) -> Import:
    """What the flags ask for, checked by headers."""
    given = {name: getattr(options, name) for name in ("vae", "text", "parity", "config", "start")}
    if (options.source / OWN).exists():
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UserError(f"--{wrong[0]} with {options.source}, which holds all: not allowed")
        return own(options.source)
    target = None
    if options.config is not None:
        if options.parity is not None:
            raise UserError("--parity with --config: weights that start another network have none")
        start = STARTS[options.start or "central"]
        target = Target(read_experiment(options.config, changes), start)
    elif changes or options.start:
        raise UserError(f"{(*changes, '--start')[0]} is allowed with --config=FILE")
    return planned(options.source, options.vae, options.text, target)


def activations(path: Path | None, made: Import) -> parity.Stored | None:
    """Stored activations of one of the networks."""
    if path is None:
        return None
    stored = parity.read(path)
    if not any(parity.fits(stored, part.plan) for part in made.parts.values()):
        names = ", ".join([*stored.blocks][:3])
        raise UserError(f"{path}: its blocks ({names}, ...) are of another network")
    return stored


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(
        prog="import_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--vae", type=Path, help="folder of the autoencoder")
    parser.add_argument("--text", type=Path, help="folder of the text encoder")
    parser.add_argument("--mesh", default="", help="AXIS:SIZE,... that checkpoints are split for")
    parser.add_argument("--parity", type=Path, help="stored activations to compare with")
    parser.add_argument("--config", help="a ViT's or ViViT's: the network that it is the start of")
    parser.add_argument("--start", choices=sorted(STARTS), help="with --config: of tubelets")
    try:
        options, changes = parser.parse_known_args(arguments)
        mesh = mesh_of(options.mesh)
        made = made_of(options, changes)
        write(made, options.workdir, mesh, activations(options.parity, made))
    except UserError as error:
        print(f"import_weights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    said = {"dit": "dit.preset", "vae": "vae.model", "classify": "classify.preset"}
    flat = ((said[stage], said[stage].split(".")) for stage in made.parts)
    sizes = [f"{name}={made.config[section][field]}" for name, (section, field) in flat]
    say(f"{options.workdir}: {', '.join(sizes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
