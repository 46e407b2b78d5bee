"""config.init: a run that begins from the weights of another workdir, or of the package.

Its autoencoder is taken over as it is; it may be all that is there. Denoiser and text encoder begin
at step 0 with these weights and a new optimizer, and keep what they have learned with: the
tokenizer, and the mean and deviation that latents are normalised with.
"""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from vdit.config.autoencoder import build_vae
from vdit.config.denoiser import build_dit
from vdit.config.identity import differences, of_networks, read_config, stage_fields
from vdit.config.text import build_text_encoder, build_tokenizer
from vdit.errors import UserError
from vdit.loading import read_meta, read_stage, stage_shapes, stages_of
from vdit.models.text import TextEncoder
from vdit.runtime.checkpoint import Checkpoints
from vdit.runtime.files import write_text
from vdit.runtime.progress import say
from vdit.shipped import find
from vdit.tokens import Condition, Layout
from vdit.train import Begin

TOKENIZER = "tokenizer.json"


def check(config: ConfigDict, workdir: Path) -> None:
    """Refuses (UserError) weights that do not fit the configuration, before anything is written."""
    if config.dit.lora.rank:
        return _check_base(config, workdir)
    if not config.init or Checkpoints(workdir / "checkpoints" / "dit").steps():
        return
    source = find(config.init)
    if "classify" in config.stages or source.resolve() == workdir.resolve():
        raise UserError(
            f"init is {config.init}: another workdir is allowed, for the stages vae and dit"
        )
    theirs = read_config(source)
    if theirs.text.encoder != config.text.encoder:
        raise UserError(
            f"init={config.init} has text.encoder={theirs.text.encoder}, this run has"
            f" {config.text.encoder}"
        )
    for stage in ("vae", "dit") if "dit" in stages_of(source) else ("vae",):
        wanted = flatten_dict(shapes(config, stage, source), sep="/")
        there = stage_shapes(source, stage)
        for name in sorted(wanted.keys() | there.keys()):
            ours = wanted[name].shape if name in wanted else "absent"
            if ours != there.get(name, "absent"):
                raise UserError(
                    f"init={config.init}: {name} is {there.get(name, 'absent')} there, {ours} in"
                    f" this run; the fields of config.{stage} and config.text must be those of"
                    f" {source / 'config.json'}"
                )


def _check_base(config: ConfigDict, workdir: Path) -> None:
    """Refuses (UserError) a base of adapters with other networks, and names the fields."""
    base = config.dit.lora.base
    source = find(base)
    if config.init:
        raise UserError(f"init={config.init} with dit.lora.base={base}: one of both is allowed")
    if source.resolve() == workdir.resolve():
        raise UserError(f"dit.lora.base is {base}: another workdir is allowed")

    def networks(config: ConfigDict) -> dict[str, Any]:
        fields = of_networks(stage_fields(config, "dit"))
        return {
            k: v for k, v in fields.items() if not re.match(r"init$|text\.length$|dit\.lora", k)
        }

    theirs, ours = networks(read_config(source)), networks(config)
    if theirs != ours:
        raise UserError(
            f"dit.lora.base={base} has other networks: {differences(theirs, ours)};"
            " experiments/lora.py:WORKDIR takes a base's fields"
        )


def take_tokenizer(config: ConfigDict, folder: Path) -> None:
    """Copies the tokenizer into a folder that has none."""
    path = folder / TOKENIZER
    origin = config.dit.lora.base if config.dit.lora.rank else config.init
    if origin and not path.exists() and (find(origin) / TOKENIZER).exists():
        write_text(path, (find(origin) / TOKENIZER).read_text(encoding="utf-8"))


def begin(config: ConfigDict, stage: str) -> Begin | None:
    """What `train.fit` begins a stage with: a function from the placement of parameters to the step
    and the parameters; None without config.init."""
    if not config.init:
        return None

    def read(place: Callable[[Any], Any]) -> tuple[int, Any]:
        if stage not in stages_of(find(config.init)):
            say(f"{stage}: begins from random weights: {config.init} has an autoencoder alone")
            return 0, {}
        step, params, _ = read_stage(find(config.init), stage, place)
        say(f"{stage}: begins from the weights of {config.init}")
        return max(step, config.vae.train.steps) if stage == "vae" else 0, params

    return read


def statistics(config: ConfigDict, checkpoints: Checkpoints) -> dict[str, np.ndarray] | None:
    """The latents' "mean" and "std" that the denoiser has learned with, if it has begun."""
    meta = checkpoints.newest_meta()
    if meta is None and config.init and "dit" in stages_of(find(config.init)):
        meta = read_meta(find(config.init), "dit")
    if meta is None or "latents" not in meta:
        return None
    return {name: np.asarray(value, np.float32) for name, value in meta["latents"].items()}


# --------------------------------------------------------------------------------------------------
# Shapes of parameters, without data


def shapes(config: ConfigDict, stage: str, folder: Path) -> dict[str, Any]:
    """The abstract parameters of stage vae or dit, by group; `folder` has the tokenizer."""
    if stage == "vae":
        model = build_vae(config)
        clip = config.data.frames, *config.data.size
        video = jax.ShapeDtypeStruct((1, *clip, 3), jnp.float32)
        noise = jax.ShapeDtypeStruct((1, *model.latent_shape(*clip)), jnp.float32)
        init = functools.partial(model.init, jax.random.key(0))
        return {"vae": jax.eval_shape(init, video, noise)["params"]}
    encoder = build_text_encoder(config, build_tokenizer(config, folder))
    groups = {"dit": denoiser_shapes(config, encoder.dim)}
    if not encoder.frozen and stage == "dit":
        groups["text"] = text_shapes(encoder, config.text.length)
    return groups


def text_shapes(encoder: TextEncoder, length: int) -> Any:
    """The abstract parameters of a text encoder."""
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, length), bool)
    return jax.eval_shape(encoder.module.init, jax.random.key(0), ids, mask).get("params", {})


def denoiser_shapes(config: ConfigDict, text: int) -> Any:
    """The abstract parameters of a denoiser whose text features have width `text`."""
    model, pixels = build_dit(config), math.prod(config.dit.patch)
    x = jax.ShapeDtypeStruct((1, 1, config.vae.channels * pixels), jnp.float32)

    def init(x: jax.Array) -> Any:
        one = jnp.ones((1, 1), jnp.int32)
        layout = Layout(jnp.zeros((1, 1, 3)), one, one, None, (1, 1, 1))
        features = jnp.zeros((1, 1, text))
        condition = Condition(features, one, one > 0, features, jnp.zeros((1, 1)), one[0])
        return model.init(jax.random.key(0), x, layout, condition)["params"]

    return jax.eval_shape(init, x)
