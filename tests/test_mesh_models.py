"""The real objectives on meshes of eight devices: the same loss and gradients as on one."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments import dit_paper, unet
from experiments.base import get_config
from tools.planning.hlo import COLLECTIVE, axes_of, groups_of, size_of
from tools.planning.step import lower_training, sampling, text_encoder, token_grid, training
from vdit.config.autoencoder import build_vae
from vdit.config.classifier import answer_counts, build_classifier
from vdit.config.denoiser import build_denoiser, build_process
from vdit.diffusion.schedule import sample_times
from vdit.model import Inputs, Scan
from vdit.models.dit import preset
from vdit.objectives.auxiliary import auxiliary
from vdit.objectives.classify import classify_objective
from vdit.objectives.diffusion import Dense, denoising_objective
from vdit.objectives.lora import lora
from vdit.objectives.objective import Objective
from vdit.objectives.vae import vae_objective
from vdit.published.text_folder import encoder
from vdit.runtime.machine import matmul
from vdit.runtime.mesh import batch_sharding, make_mesh, param_sharding, spread
from vdit.tokens import pattern_shares, patterns

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 2, "data": 4},
    {"sequence": 4, "data": 2},
    {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2},
]

GIVEN: dict[str, dict[str, float]] = {
    "dit": {"text": 0.6, "prefix": 0.2, "last": 0.2}, "unet": {"text": 1.0}, "paper": {"text": 1.0},
    "truth": {"text": 0.6, "suffix": 0.4}, "wan": {"text": 1.0}, "lora": {"text": 1.0},
}  # fmt: skip
# The U-Net's steps are many to compile: the mesh of all axes, and one where no batch is split.
CASES: list[Any] = [(stage, axes) for stage in ("vae", "dit", "classify") for axes in MESHES]
CASES += [pytest.param("unet", MESHES[-1], marks=pytest.mark.slow)]
CASES += [("unet", {"tensor": 2, "sequence": 4})]
CASES += [(stage, MESHES[-1]) for stage in ("paper", "truth", "wan", "lora")]


def made(
    stage: str, mesh: Mesh | None = None, how: str = "auto", side: int = 4
) -> tuple[Objective, Any, Any]:
    """The smoke experiment's objective, frozen arrays and a batch (of side x side places)."""
    of = {"unet": unet.get_config, "paper": dit_paper.get_config}.get(stage, get_config)
    config = of("smoke")
    config.run.dtype = "float32"
    config.run.sequence = how
    if stage == "wan":
        config.dit.model, config.dit.preset, config.dit.wan.hidden = "wan", "64x2x2", 192
    config.dit.unet.depths = (1, 0)  # transformers at one level and in the middle are enough
    rng = np.random.default_rng(0)
    ordinal = np.arange(8, dtype=np.uint32)
    if stage == "vae":
        video = rng.integers(0, 255, (8, 17, 32, 32, 3), dtype=np.uint8)
        objective = vae_objective(build_vae(config, mesh), 1e-4, 0.0)
        return objective, {}, {"video": video, "ordinal": ordinal}
    if stage == "classify":
        config.classify.preset = "smoke/8x4"
        video = rng.integers(0, 255, (8, 17, 32, 32, 3), dtype=np.uint8)
        label = np.stack([rng.integers(0, 6, 8), rng.integers(0, 4, 8)], -1).astype(np.int32)
        model = build_classifier(config, mesh)
        objective = classify_objective(model, answer_counts(config), 0.1)
        return objective, {}, {"video": video, "label": label, "ordinal": ordinal}
    table = patterns(5, 4, 10.0)
    times = functools.partial(sample_times, build_process(config))
    text = encoder("learned", vocab=300, width=32, depth=1, heads=2, matmul=matmul("float32", mesh))
    denoiser = build_denoiser(config, text, mesh)
    rows = Dense(table, pattern_shares(table, GIVEN[stage]), times, text_drop=0.2)
    more = auxiliary((("truth", 0.7),), denoiser.network) if stage == "truth" else ()
    objective = denoising_objective(denoiser, rows, auxiliary=more)
    batch = {
        "latent": rng.normal(size=(8, 8, side, side, 8)).astype(np.float32),
        "ids": rng.integers(1, 300, (8, 12)).astype(np.int32),
        "mask": np.ones((8, 12), bool),
        "ordinal": ordinal,
    }
    if stage == "truth":
        batch["truth"] = rng.normal(size=(8, 8, 2, 16)).astype(np.float16)
    if config.data.label:
        batch["label"] = (ordinal % 3).astype(np.int32)
    frozen = {"mean": np.zeros(8, np.float32), "std": np.ones(8, np.float32)}
    if stage == "lora":
        shapes = jax.eval_shape(objective.init, jax.random.key(0), batch)
        base = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.1, shapes)
        frozen["base"] = base if mesh is None else spread(mesh, base)
        objective = lora(objective, r"^dit/.*/kernel$", rank=16)
    return objective, frozen, batch


@functools.cache
def one_device(stage: str, side: int = 4) -> tuple[Any, Any]:
    objective, frozen, batch = made(stage, side=side)
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    # Zero-initialised gates would leave most gradients zero.
    params = jax.tree.map(lambda x: x + 0.02 * np.cos(np.arange(x.size)).reshape(x.shape), params)
    return params, value(objective, frozen)(params, batch)


def value(objective: Objective, frozen: Any) -> Any:
    def total(params: Any, batch: Any) -> Any:
        loss, weight, _ = objective.loss(params, frozen, batch, jax.random.key(1))
        return loss / weight

    return jax.jit(jax.value_and_grad(total))


@pytest.mark.parametrize("stage, axes", CASES, ids=lambda x: x if type(x) is str else "-".join(x))
def test_loss_and_gradients_equal_one_device_s(stage: str, axes: dict[str, int]) -> None:
    equal(stage, axes)


@pytest.mark.parametrize(
    ("axes", "how"),
    [
        ({"data": 4, "sequence": 2}, "ulysses"),
        ({"sequence": 8}, "ring"),
        ({"fsdp": 2, "tensor": 2, "sequence": 2}, "ring"),
    ],
    ids=str,
)
def test_so_they_do_however_the_tokens_meet(axes: dict[str, int], how: str) -> None:
    equal("dit", axes, how)


@pytest.mark.parametrize("how", ["auto", "gather"])
def test_so_they_do_where_the_shards_do_not_divide_the_tokens(how: str) -> None:
    """5 x 3 x 3 tokens on eight devices: two heads for tokens, keys round a ring of four."""
    equal("dit", {"sequence": 8}, how, side=3)


def equal(stage: str, axes: dict[str, int], how: str = "auto", side: int = 4) -> None:
    params, (loss, gradient) = one_device(stage, side)
    mesh = make_mesh(axes)
    objective, frozen, batch = made(stage, mesh, how, side)
    placed = jax.device_put(params, param_sharding(mesh, params))
    if axes.get("fsdp", 1) > 1 or axes.get("tensor", 1) > 1:
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    with jax.set_mesh(mesh):
        split = jax.device_put(batch, batch_sharding(mesh))
        many, gradients = value(objective, frozen)(placed, split)
    np.testing.assert_allclose(many, loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradients), strict=True):
        scale = float(np.linalg.norm(a)) + 1e-3
        assert float(np.linalg.norm(np.asarray(a) - np.asarray(b))) / scale < 1e-5


def test_what_travels_in_a_step() -> None:
    """Parameters and gradients, and heads for tokens: no tokens are gathered, though a device has
    several rows, and more numbers in its tokens than in any parameter."""
    config = get_config("smoke")
    config.dit.train.batch, config.dit.train.accumulate, config.run.unroll = 64, 1, 1
    mesh = make_mesh({"fsdp": 4, "sequence": 2})
    step = training(config, "dit", mesh)
    abstract = jax.eval_shape(step.objective.init, jax.random.key(0), step.batch)
    layers = jax.tree_util.tree_map_with_path(
        lambda path, x: x.size // (x.shape[0] if "blocks" in jax.tree_util.keystr(path) else 1),
        abstract,
    )
    largest = max(jax.tree.leaves(layers))
    width = preset(config.dit.preset)["width"]
    assert largest < 64 // 8 * math.prod(token_grid(config)) * width
    text = lower_training(config, "dit", mesh).compile().as_text()
    sent = [
        (found[2], axes, max(size_of(found[1])))
        for line in text.splitlines()
        # Of groups of one device nothing is sent.
        if (found := COLLECTIVE.search(line)) and (axes := axes_of(groups_of(line), mesh.shape))
    ]
    # Sums aside, and what is a number of each sample, as its noise level.
    kinds = {(kind, axes) for kind, axes, size in sent if kind != "all-reduce" and size > 4 * 64}
    assert kinds == {("all-gather", "fsdp+sequence"), ("all-to-all", "sequence")}
    assert max(size for kind, _, size in sent if kind != "all-to-all") <= 4 * largest


@pytest.mark.parametrize("side", [32, 24])
def test_guided_sampling_on_a_mesh_is_that_of_one_device(side: int) -> None:
    """One video: its two rows on two devices each, its tokens on four (45 of 24x24 pixels)."""
    config = get_config("smoke")
    config.data.size = (side, side)
    config.run.dtype, config.sample.batch, config.sample.steps = "float32", 1, 2
    assert config.sample.guidance != 1
    made = sampling(config)
    rng = np.random.default_rng(0)
    params, (mask, features, starts, clean, given, times, _, label, *_) = made.arguments
    draw = functools.partial(jax.tree.map, lambda x: 0.1 * rng.normal(size=x.shape).astype("f4"))
    inputs = Inputs(
        np.ones(mask.shape, bool), draw(features), starts, draw(clean), np.zeros(given.shape, bool),
        np.arange(times.shape[1], dtype=np.float32)[None], np.zeros(1, np.uint32), label,
    )  # fmt: skip
    encoder = text_encoder(config, None, None)
    weights = draw(params)
    one, two = (
        Scan(config, encoder, dict(weights), mesh)(inputs, made.settings)
        for mesh in (None, make_mesh({"data": 2, "sequence": 4}))
    )
    assert np.linalg.norm(one - two) / np.linalg.norm(one) < 1e-5
