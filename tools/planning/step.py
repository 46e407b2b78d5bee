"""Lowers the steps of a run from shapes, without data, parameters or devices.

Dimension key: B batch, T frames, H height, W width; n latent frames, h w places, Z latent
channels, J captions of a clip (its own, and its shots'), S text tokens, E text width.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vdit import stages
from vdit.config.autoencoder import build_lpips, build_vae
from vdit.config.classes import read_classes
from vdit.config.denoiser import build_dit, latent_shape, targets, token_pixels
from vdit.config.lora import BASE_DTYPES
from vdit.config.text import Vocabulary, build_text_encoder, build_tokenizer
from vdit.data import sources
from vdit.errors import UserError
from vdit.initial import text_shapes
from vdit.model import Inputs, Scan, narrow, settings_of
from vdit.models.text import TextEncoder
from vdit.models.text_encoders import T5
from vdit.nn.lora import flat, narrowed
from vdit.nn.narrow import operand_dtypes
from vdit.objectives.lora import lora
from vdit.objectives.objective import Objective
from vdit.published.text_folder import FAMILIES
from vdit.runtime.mesh import batch_sharding, param_sharding, replicated
from vdit.tokens import Budget
from vdit.train import abstract_state, compiled_step

Shapes = dict[str, jax.ShapeDtypeStruct]
IMAGE = 257  # features of an image by CLIP ViT-H/14: 16 x 16 patches, and a class token


class Training(NamedTuple):
    """The step of a stage: its objective and the shapes of its inputs."""

    stage: str
    objective: Objective
    options: ConfigDict
    batch: Shapes
    frozen: Any
    seed: int


def shape(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


# Published text encoders that a plan knows without their folder: UMT5-XXL, the one of Wan.
PUBLISHED = {"umt5": T5(256_384, 4096, 24, 64, 64, 10_240, "gated-gelu", 32, 128, 1e-6, True)}


def without_folder(config: ConfigDict) -> bool:
    """Whether the text encoder is one of `PUBLISHED`, and its folder is not given."""
    return config.text.encoder in PUBLISHED and not config.text.path


def text_encoder(config: ConfigDict, mesh: Mesh | None, platform: str | None) -> TextEncoder:
    """The text encoder; a learned one has the largest vocabulary configured."""
    tokens: Any = Vocabulary(config.text.vocab)
    if without_folder(config):
        name = config.text.encoder
        return TextEncoder(name, PUBLISHED[name].width, frozen=True, module=PUBLISHED[name])
    if config.text.encoder in FAMILIES:
        tokens = build_tokenizer(config, Path())  # of the folder
    return build_text_encoder(config, tokens, mesh, platform)


IMAGE_TOKENS = 257  # of CLIP's ViT-H, which Wan 2.1 reads


def token_grid(config: ConfigDict) -> tuple[int, int, int]:
    """Tokens (t, h, w) of a clip."""
    t, h, w, _ = latent_shape(config, config.data.frames, *config.data.size)
    rows, columns = config.dit.patch
    return t, h // rows, w // columns


def training(
    config: ConfigDict, stage: str, mesh: Mesh | None = None, platform: str | None = None
) -> Training:
    """The step of stage "vae", "dit" or "classify", for a mesh or for one device of a platform."""
    options, (height, width) = config[stage].train, config.data.size
    frozen: dict[str, Any] = {}
    batch: Shapes = {"ordinal": shape((options.batch,), jnp.uint32)}
    video = (options.batch, config.data.frames, height, width, 3)
    if stage == "vae":
        batch["video"] = shape(video, jnp.uint8)
        if config.vae.body_weight:
            batch["bodies"] = shape(video[:-1], bool)
        objective = stages.compression(config, mesh, platform)
        if config.vae.lpips_weight:
            frame = shape((1, height, width, 3), jnp.float32)
            net = build_lpips(config, mesh, platform)
            frozen["lpips"] = jax.eval_shape(net.init, jax.random.key(0), frame, frame)["params"]
        return Training(stage, objective, options, batch, frozen, config.seed)
    if stage == "classify":
        batch["video"] = shape(video, jnp.uint8)
        batch["label"] = shape((options.batch, len(config.classify.questions)), jnp.int32)
        objective = stages.classification(config, mesh, platform)
        return Training(stage, objective, options, batch, {}, config.seed)
    encoder = text_encoder(config, mesh, platform)
    kind = "features" if encoder.frozen and config.latents.features else "ids"
    if config.data.shapes:
        tokens, samples, text = config.dit.pack
        budget = Budget(tokens, samples, text, config.text.length)
        if min(budget) < 1:
            raise UserError(
                f"dit.pack is {tuple(config.dit.pack)}: to plan packed rows before there is data,"
                " give tokens, samples and caption tokens of a row, all above 0"
            )
        batch = packed_batch(config, budget, kind, encoder.dim)
        objective = stages.packed_denoising(config, encoder, budget, mesh, platform)
    else:
        token_grid(config)
        batch |= dense_batch(config, kind, encoder.dim)
        objective = stages.denoising(config, encoder, mesh, platform)
    batch |= truth_batch(config)
    channels = shape((config.vae.channels,), jnp.float32)
    frozen = {"mean": channels, "std": channels}
    if encoder.frozen and kind == "ids":
        frozen["text"] = text_shapes(encoder, config.text.length)
    if config.dit.lora.rank:
        objective, frozen["base"] = adapted(config, objective, batch)
    return Training(stage, objective, options, batch, frozen, config.seed + 1)


def adapted(config: ConfigDict, base: Objective, batch: Shapes) -> tuple[Objective, Any]:
    """The objective of adapters, and the frozen parameters beside them (`stages.adapted`)."""
    made = config.dit.lora
    dtype = BASE_DTYPES[made.base_dtype]
    leaves = flat(jax.eval_shape(base.init, jax.random.key(0), batch))
    for path in list(leaves):
        if dtype and path.startswith("dit/") and path.endswith("kernel"):
            leaves |= jax.eval_shape(lambda x, path=path: narrowed(path, x, dtype), leaves[path])
    groups = unflatten_dict(leaves, sep="/")
    return lora(base, made.paths, made.rank, made.alpha, made.dropout), groups


def dense_batch(config: ConfigDict, kind: str, width: int) -> Shapes:
    """A batch of `stages.dense_batches`, without the ordinals."""
    rows, length = config.dit.train.batch, config.text.length
    t, h, w, channels = latent_shape(config, config.data.frames, *config.data.size)
    stored, shots = len(stages.pattern_table(config).times), sources.most_shots(config)
    captions = (rows, 1 + shots, length) if shots else (rows, length)
    batch = {
        "latent": shape((rows, stored, h, w, channels), jnp.float16),
        "ids": shape(captions, jnp.int32),
        "mask": shape(captions, bool),
    }
    if shots:
        batch["starts"] = shape((rows, shots), jnp.float32)
    if kind == "features":
        batch["features"] = shape((*captions, width), jnp.float16)
    if config.data.label:
        batch["label"] = shape((rows,), jnp.int32)
    if build_dit(config).beside:
        batch["beside"] = shape((rows, t, h, w, channels), jnp.float16)
    if config.dit.wan.image:
        batch["image"] = shape((rows, IMAGE_TOKENS, config.dit.wan.image), jnp.float16)
    return batch


def packed_batch(config: ConfigDict, budget: Budget, kind: str, width: int) -> Shapes:
    """A batch of `data.packing.pack`."""
    rows = config.dit.train.batch
    channels = config.vae.channels * config.dit.patch[0] * config.dit.patch[1]
    text: tuple[tuple[int, ...], Any] = ((rows, budget.text), jnp.int32)
    if kind == "features":
        text = (rows, budget.text, width), jnp.float16
    return {
        "tokens": shape((rows, budget.tokens, channels), jnp.float16),
        "position": shape((rows, budget.tokens, 3), jnp.float32),
        "segment": shape((rows, budget.tokens), jnp.int32),
        "given": shape((rows, budget.tokens), bool),
        "ordinal": shape((rows, budget.samples), jnp.uint32),
        kind: shape(*text),
        "text": shape((rows, budget.text), jnp.int32),
    }


def truth_batch(config: ConfigDict) -> Shapes:
    """The truth in a batch, where an auxiliary loss reads it: as much as the first clip has."""
    if "truth" not in targets(config):
        return {}
    rows = config.dit.train.batch
    clip = sources.training_clips(config, Path())[0]
    each = sources.known(config, "truth", "dit.auxiliary")(clip).shape[1:]
    count = config.dit.pack[0] if config.data.shapes else len(stages.pattern_table(config).times)
    return {"truth": shape((rows, count, *each), jnp.float16)}


def placed(tree: Any, sharding: NamedSharding) -> Any:
    """The shapes with shardings on a mesh."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def split(tree: Any, mesh: Mesh) -> Any:
    """The shapes of parameters, sharded as in training."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        param_sharding(mesh, tree),
    )


def lowered(function: Any, mesh: Mesh, *arguments: Any, **static: Any) -> jax.stages.Lowered:
    """A jitted function for the mesh's platform, which need not be this machine's."""
    traced = function.trace(*arguments, **static)
    if mesh.devices.flat[0].platform in ("cpu", "tpu"):
        return traced.lower()
    return traced.lower(lowering_platforms=("cuda",))


def lower_training(config: ConfigDict, stage: str, mesh: Mesh) -> jax.stages.Lowered:
    """The train step that `train.fit` would run on the mesh."""
    made = training(config, stage, mesh)
    abstract = abstract_state(made.objective, made.options, made.batch, mesh, made.seed)
    step = compiled_step(made.objective, made.options, config.run, mesh, abstract)
    with jax.set_mesh(mesh):
        frozen = placed(made.frozen, replicated(mesh))
        if "base" in frozen:
            frozen["base"] = split(made.frozen["base"], mesh)
        return lowered(step, mesh, *abstract, frozen, placed(made.batch, batch_sharding(mesh)))


def beside(config: ConfigDict) -> tuple[Any, Any]:
    """Parameters that sampling holds beside the denoiser's: of the text encoder, which a mesh
    splits (a published one's are bfloat16), and of the autoencoder, which it does not."""
    encoder = text_encoder(config, None, None)
    text = text_shapes(encoder, config.text.length)
    if encoder.name in FAMILIES:
        text = jax.tree.map(lambda x: shape(x.shape, jnp.bfloat16), text)
    vae = build_vae(config)
    video = shape((1, 1, *token_pixels(config), 3), jnp.float32)
    latent = shape((1, *vae.latent_shape(*video.shape[1:4])), jnp.float32)
    return text, jax.eval_shape(vae.init, jax.random.key(0), video, latent)["params"]


class Sampling(NamedTuple):
    """The functions that `model.Scan` runs for a batch, as (jitted function, shapes) by name."""

    denoise: Any
    arguments: tuple[Any, ...]
    settings: Any


def sampling(config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None) -> Sampling:
    """The denoising scan of a batch of videos of the training shape."""
    encoder = text_encoder(config, mesh, platform)
    made = training(config, "dit", mesh, platform)
    params = jax.eval_shape(lambda batch: made.objective.init(jax.random.key(0), batch), made.batch)
    rows, shots = config.sample.batch, sources.most_shots(config)
    captions = (rows, 1 + shots, config.text.length)
    count, h, w, channels = latent_shape(config, config.data.frames, *config.data.size)
    inputs = Inputs(
        shape(captions, bool),
        shape((*captions, encoder.dim), jnp.float32),
        shape((rows, shots), jnp.float32) if shots else None,
        shape((rows, count, h, w, channels), jnp.float32),
        shape((rows, count), bool),
        shape((rows, count), jnp.float32),
        shape((rows,), jnp.uint32),
        shape((rows,), jnp.int32) if read_classes(config, Path()) else None,
    )
    if config.dit.model == "wan" and config.dit.wan.beside:  # image to video
        inputs = inputs._replace(
            beside_BnhwZ=shape((rows, count, h, w, config.dit.wan.beside), jnp.float32)
        )
    if config.dit.model == "wan" and config.dit.wan.image:
        inputs = inputs._replace(image_BSE=shape((rows, IMAGE, config.dit.wan.image), jnp.float32))
    run = Scan(config, encoder, {}, mesh).compiled(mesh, platform)
    settings = settings_of(config)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        dtypes = operand_dtypes(run, params, inputs, settings=settings)
    params = jax.eval_shape(lambda params: narrow(params, dtypes), params)
    return Sampling(run, (params, inputs), settings)


def lower_sampling(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    """The denoising scan on the mesh: parameters sharded as in training, and a replicated batch,
    which the scan splits."""
    made = sampling(config, mesh)
    params, inputs = made.arguments
    with jax.set_mesh(mesh):
        inputs = placed(inputs, replicated(mesh))
        return lowered(made.denoise, mesh, split(params, mesh), inputs, settings=made.settings)
