"""Estimates memory, FLOPs and time of a step without compiling it.

Parameters, optimizer and EMA are counted exactly. Activations are the traced residuals of the
gradient; the working set of a layer's backward pass is `WORKING` times its residuals, calibrated
against XLA's TPU compiler (docs/scale.md). For sampling they follow that compiler's report.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from vdit.config.autoencoder import build_vae
from vdit.config.denoiser import latent_shape
from vdit.diffusion.sampler import configured
from vdit.models.dit import preset
from vdit.runtime.attention import exchange
from vdit.runtime.mesh import AXES, STACKED, map_paths, param_sharding
from vdit.runtime.products import flops, widest
from vdit.train import init_state

from . import step
from .chips import Topology

WORKING = 1.0  # working set of a rematerialised layer's backward pass, in residuals
MOVED = 2.6  # memory traffic of a layer in training, in residuals
STREAMS = 3  # float32 arrays of the size of a layer's input that sampling holds beside the MLP's
FORWARD = 1.1  # memory traffic of a layer in sampling, in residuals


class Bytes(NamedTuple):
    """Bytes of one sample's activations."""

    all: float
    split: float  # of these, activations of heads and MLPs, which tensor splits

    def times(self, factor: float) -> "Bytes":
        return Bytes(factor * self.all, factor * self.split)

    def over(self, tensor: int) -> float:
        """The share of each tensor shard."""
        return self.all - self.split + self.split / tensor


class Model(NamedTuple):
    """Mesh-independent quantities; bytes and FLOPs per sample, over all devices."""

    state: Any  # shapes of state and EMA; of sampling {"params": ...} and nothing
    params: int  # with those that are frozen
    model_flops: float  # forward and backward, nothing twice; of sampling all its steps
    again_flops: float  # rematerialisation
    saved: Bytes  # residuals between the forward and the backward pass
    working: Bytes  # working set of a layer's backward pass, or of a layer in sampling
    moved: Bytes  # memory traffic of this layer
    layers: int
    layer_params: float  # elements of one layer's parameters
    passes: int  # through the layers, forward and backward
    inputs: float = 0.0  # bytes of a batch's data
    stream: float = 0.0  # elements between two of the denoiser's layers; 0: not of a denoiser
    heads: int = 1
    frozen: Any = ()  # shapes of what adapters are laid beside
    outside: float = 0.0  # bytes of the largest parameter outside of the layers
    beside: Any = ()  # of sampling: shapes of the other parts' parameters, and those not split


class Estimate(NamedTuple):
    """A train step, or a batch of videos, on one device: bytes by part, seconds by bottleneck."""

    params: float
    optimizer: float
    ema: float
    inputs: float  # its share of a batch, or all of it
    temporaries: float
    compute: float
    hbm: float
    ici: float
    frozen: float = 0.0  # bytes of the base of adapters
    beside: float = 0.0  # bytes of the text encoder and the autoencoder while sampling

    @property
    def total(self) -> float:
        """Bytes."""
        return self.kept + self.temporaries

    @property
    def held(self) -> float:
        """Bytes, with those that are no part of the step."""
        return self.total + self.beside

    @property
    def kept(self) -> float:
        """Bytes of the step's arguments."""
        return self.params + self.frozen + self.optimizer + self.ema + self.inputs

    @property
    def seconds(self) -> float:
        """Lower bound: full rates and full overlap."""
        return max(self.compute, self.hbm, self.ici)

    @property
    def most(self) -> float:
        """Full rates without overlap."""
        return self.compute + self.hbm + self.ici


class Options(NamedTuple):
    """Options of training or sampling that determine the step's size."""

    batch: int
    accumulate: int = 1


def with_(config: ConfigDict, **changes: Any) -> ConfigDict:
    """A copy with changes, {"dit_train_batch": 1} style: section.field names by "__"."""
    made = config.copy_and_resolve_references()
    for name, value in changes.items():
        *path, last = name.split("__")
        functools.reduce(lambda node, part: node[part], path, made)[last] = value
    return made


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree of shapes, without random keys."""
    return sum(
        math.prod(x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    )


def device_bytes(mesh: AbstractMesh, tree: Any) -> int:
    """Bytes of one device's share of parameters, moments or EMA."""
    shares = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(where.shard_shape(x.shape), x.dtype),
        tree,
        param_sharding(mesh, tree),  # type: ignore[arg-type]
    )
    return nbytes(shares)


class Kept(NamedTuple):
    """One device's bytes of a state."""

    params: int
    wide: int  # of them those of float32
    optimizer: int
    ema: int
    frozen: int


def state_bytes(model: Model, sizes: Mapping[str, int]) -> Kept:
    """One device's share."""
    mesh, (state, ema) = abstract_mesh(sizes), model.state
    wide = jax.tree.map(lambda x: x if x.dtype == "float32" else None, state["params"])
    trees = state["params"], wide, state["opt"], ema, model.frozen
    return Kept(*(device_bytes(mesh, tree) for tree in trees))


def beside_bytes(model: Model, sizes: Mapping[str, int]) -> int:
    """One device's bytes of `Model.beside`."""
    split, whole = model.beside or ({}, {})
    return device_bytes(abstract_mesh(sizes), split) + nbytes(whole)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)


def residuals(config: ConfigDict, stage: str, platform: str) -> Bytes:
    """Residuals of the gradient for a sample."""
    if platform == "gpu":  # keeps what cuDNN's keeps, and needs no plugin to be traced
        config = with_(config, run__attention="chunked")
    key = jax.eval_shape(lambda: jax.random.key(0))
    one, two = (
        step.training(with_(config, **{f"{stage}__train__batch": batch}), stage, None, platform)
        for batch in (1, 2)
    )
    inside = insides(config) if stage == "dit" else ()

    def kept(made: step.Training) -> Bytes:
        def back(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
            return jax.vjp(lambda p: made.objective.loss(p, frozen, batch, key)[0], params)[1]

        params = jax.eval_shape(made.objective.init, key, made.batch)
        leaves = jax.tree.leaves(jax.eval_shape(back, params, made.frozen, made.batch, key))
        split = [x for x in leaves if x.shape[-1:] in inside or x.shape[-2:] in inside]
        return Bytes(nbytes(leaves), nbytes(split))

    return Bytes(*(b - a for a, b in zip(kept(one), kept(two), strict=True)))


def insides(config: ConfigDict) -> tuple[tuple[int, ...], ...]:
    """Trailing shapes of (heads, head dim), (heads, 1) and hidden MLP activations."""
    if config.dit.model == "unet":
        return ()
    size = preset(config.dit.preset)
    heads, width = size["heads"], size["width"]
    hidden = config.dit.wan.hidden if config.dit.model == "wan" else 4 * width
    return (heads, width // heads), (heads, 1), (hidden,)


def gradient_flops(config: ConfigDict, stage: str, platform: str) -> int:
    """FLOPs of the matrix products of one sample's loss and gradient."""
    made = step.training(with_(config, **{f"{stage}__train__batch": 1}), stage, None, platform)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(made.objective.init, key, made.batch)

    def loss(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return made.objective.loss(params, frozen, batch, key)[0]

    return flops(jax.make_jaxpr(jax.grad(loss))(params, made.frozen, made.batch, key).jaxpr)


def layers_of(params: Any) -> tuple[int, float]:
    """Depth of the deepest stack of layers, and the parameter count of one layer."""
    stacks: dict[str, float] = {}
    depth = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if found := STACKED.search(name):
            stack = name[: found.end()]
            depth[stack] = leaf.shape[0]
            stacks[stack] = stacks.get(stack, 0.0) + math.prod(leaf.shape[1:])
    if not stacks:
        return 1, 0.0
    most = max(stacks, key=lambda stack: stacks[stack])
    return max(depth.values()), stacks[most]


def outside_of(params: Any) -> float:
    """Bytes of the largest parameter that is in no stack of layers."""
    found = [0]

    def one(name: str, leaf: Any) -> None:
        if not STACKED.search(name):
            found.append(math.prod(leaf.shape) * leaf.dtype.itemsize)

    map_paths(one, params)
    return float(max(found))


def stream_of(config: ConfigDict, stage: str) -> tuple[float, int]:
    """Elements of a clip's activations between layers of the denoiser, and its heads; 0 unless a
    denoiser is trained on clips of one shape."""
    if stage != "dit" or config.dit.model == "unet" or config.data.shapes:
        return 0.0, 1
    size = preset(config.dit.preset)
    return float(math.prod(step.token_grid(config)) * size["width"]), size["heads"]


def model_of(config: ConfigDict, stage: str, platform: str = "tpu") -> Model:
    """Traces the step of a stage (a few seconds, no device)."""
    # Products inside a kernel are blockwise, and cuDNN's cannot be traced everywhere: plain XLA.
    plain = with_(config, run__attention="xla")
    made = step.training(plain, stage, None, platform)
    begin = functools.partial(init_state, made.objective, made.options, seed=made.seed)
    state, ema = jax.eval_shape(begin, made.batch)
    per_sample = {
        remat: residuals(with_(config, run__remat=remat), stage, platform)
        for remat in {"none", config.run.remat}
    }
    once = gradient_flops(with_(plain, run__remat="none"), stage, platform)
    remat = config.run.remat
    again = 0 if remat == "none" else gradient_flops(plain, stage, platform) - once
    group = {"vae": "vae", "dit": "dit", "classify": "vivit"}[stage]
    frozen = made.frozen.get("base", {})
    network = {group: (frozen or state["params"])[group]}
    layers, layer_params = layers_of(network)
    stream, heads = stream_of(config, stage)
    a_layer = per_sample["none"].times(1 / layers if remat != "none" else 0.0)
    return Model(
        state=(state, ema),
        params=sum(math.prod(x.shape) for x in jax.tree.leaves((state["params"], frozen))),
        model_flops=once,
        again_flops=again,
        saved=per_sample[remat],
        working=a_layer.times(WORKING),
        moved=a_layer.times(MOVED),
        layers=layers,
        layer_params=layer_params,
        passes=3 if again else 2,
        inputs=nbytes(made.batch) / made.options.batch,
        stream=stream,
        heads=heads,
        frozen=frozen,
        outside=outside_of(network),
    )


def sampling_of(config: ConfigDict, platform: str = "tpu") -> Model:
    """Traces the denoising scan of a batch of videos; a sample is one video."""
    plain = with_(config, run__attention="xla", run__remat="none")
    made = step.sampling(plain, None, platform)
    run = functools.partial(made.denoise, settings=made.settings)
    traced = jax.make_jaxpr(run)(*made.arguments).jaxpr
    params = made.arguments[0]
    layers, layer_params = layers_of({"dit": params["dit"]})
    stream, heads = stream_of(config, "dit")
    rows = 2 if config.sample.guidance != 1.0 else 1
    calls = rows + bool(config.sample.push)  # the weaker predictions come after the others
    # Training batches hold no image, and a layer's residuals hardly depend on it.
    imageless = {"dit__wan__beside": 0, "dit__wan__image": 0}
    row = residuals(with_(config, run__remat="none", **imageless), "dit", platform)
    moved = row.times(FORWARD * rows / layers)
    inside = 4 * widest(traced) / config.sample.batch
    held = Bytes(inside + 4 * STREAMS * rows * stream, inside)
    return Model(
        state=({"params": params, "opt": ()}, ()),
        params=sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        model_flops=flops(traced) / config.sample.batch,
        again_flops=0.0,
        saved=Bytes(0.0, 0.0),
        working=held if stream else moved,
        moved=moved,
        layers=layers,
        layer_params=layer_params,
        passes=config.sample.steps * configured(config.sample.sampler, config.sample).evaluations,
        inputs=nbytes(made.arguments[1:]) / config.sample.batch,
        stream=calls * stream,
        heads=heads,
        outside=outside_of({"dit": params["dit"]}),
        beside=step.beside(config),
    )


def decode_flops(config: ConfigDict, platform: str = "tpu") -> int:
    """FLOPs of the matrix products and convolutions that decode one clip in one piece."""
    vae = build_vae(with_(config, run__attention="xla"), None, platform)
    dims = latent_shape(config, config.data.frames, *config.data.size)
    latent = jax.ShapeDtypeStruct((1, *dims), "float32")
    video = jax.ShapeDtypeStruct((1, config.data.frames, *config.data.size, 3), "float32")
    params = jax.eval_shape(vae.init, jax.random.key(0), video, latent)
    decode = functools.partial(vae.apply, method=vae.decode)
    return flops(jax.make_jaxpr(decode)(params, latent).jaxpr)


Sent = tuple[str, str, float]  # kind of collective, axes, bytes that a device sends


def sent_between(
    model: Model, share: float, sizes: Mapping[str, int], how: str, training: bool
) -> Iterator[Sent]:
    """What a device sends due to split tokens, heads or MLP columns: `share` samples at a time, in
    every pass of every layer."""
    tensor, shards = sizes["tensor"], sizes["sequence"]
    local = share * model.stream * model.passes * model.layers  # elements of a device's part
    # Partial sums in float32 after attention, cross-attention and MLP, in both directions.
    yield "all-reduce", "tensor", 3 * 4 * local * 2 * (tensor - 1) / tensor
    if shards > 1 and how == "gather":
        yield "all-gather", "sequence", 2 * 2 * local / tensor * (shards - 1)
    elif shards > 1:
        u, r = exchange(how, max(model.heads // tensor, 1), shards)
        # q, k, v and the output, bfloat16
        yield "all-to-all", "sequence", 4 * 2 * local / tensor * (u - 1) / u
        # Keys and values circulate in bfloat16, in the backward pass with float32 gradients.
        bytes_of = (2 + 6) / 2 if training else 2
        yield "collective-permute", "sequence", 2 * bytes_of * local / tensor * (r - 1)


def sent_by(
    model: Model, parts: int, share: float, sizes: Mapping[str, int], how: str, trained: float
) -> Iterator[Sent]:
    """All that a device sends, `parts` times with `share` samples; `trained`: its bytes of the
    parameters that have gradients, 0 in sampling."""
    # Parameters are split over fsdp and sequence; the other axes of tokens sum their gradients.
    split = sizes["fsdp"] * sizes["sequence"] if sizes["fsdp"] > 1 else 1
    copies, summed = sizes["data"], "data"
    if split == 1:
        copies, summed = copies * sizes["sequence"], "data+sequence"
    whole = 4 * model.params / sizes["tensor"]  # of one tensor shard, float32
    gathered = parts * model.passes * whole / 2
    if trained and not model.frozen:
        gathered += parts * whole
    yield "all-gather", "fsdp+sequence", gathered * (split - 1) / split
    yield "all-reduce", summed, 2 * trained * (copies - 1) / copies
    for kind, axes, size in sent_between(model, share, sizes, how, trained > 0):
        yield kind, axes, parts * size


def estimate(
    model: Model,
    options: Options,
    sizes: Mapping[str, int],
    where: Topology,
    how: str = "auto",
    kept: Kept | None = None,
) -> Estimate:
    """Estimates a train step, or all sampling steps, of `options.batch` samples on a mesh.

    `how` is run.sequence, `kept` the `state_bytes` where they are known. Tokens are split over
    data, fsdp and sequence, heads and an MLP's inside over tensor.
    """
    params, wide, optimizer, ema, frozen = kept or state_bytes(model, sizes)
    training = bool(optimizer)
    devices = math.prod(sizes.values())
    parts = options.accumulate
    # Samples at a time (a guided video's two rows may lie on two devices).
    share = options.batch / (sizes["data"] * sizes["fsdp"] * parts * sizes["sequence"])
    # A training batch is split; initial noise of sampling is replicated.
    inputs = options.batch * model.inputs / (sizes["data"] * sizes["fsdp"] if training else 1)
    saved, working, moved = (
        share * part.over(sizes["tensor"]) for part in (model.saved, model.working, model.moved)
    )
    temporaries = saved + working
    temporaries += wide / 2  # in bfloat16, once, before the layers run
    if training:
        temporaries += params * (2 if parts > 1 else 1)  # gradients
    trained = training and not frozen
    if sizes["fsdp"] > 1:  # a gathered layer in bfloat16, what else is gathered, and gradients
        temporaries += model.layer_params / sizes["tensor"] * (6 if trained else 2)
        temporaries += model.outside * (2 if trained else 1)
    total = options.batch * (model.model_flops + model.again_flops)
    whole = 4 * model.params / sizes["tensor"]  # of one tensor shard, float32
    # State moves once each way, bfloat16 weights once per pass, residuals twice.
    traffic = parts * model.passes * whole / 2
    if training:
        traffic += 2 * (2 * params + optimizer)
        traffic += 2 * parts * (saved + moved * model.layers)
    else:
        traffic += 2 * moved * model.layers * model.passes
    sent = sent_by(model, parts, share, sizes, how, params if training else 0)
    chip = where.chip
    return Estimate(
        params, optimizer, ema, inputs, temporaries,
        total / devices / chip.flops, traffic / chip.hbm_rate,
        sum(where.seconds(*part, sizes) for part in sent), frozen, beside_bytes(model, sizes),
    )  # fmt: skip
