"""The paper's DiT walks the road: classes and texts, one time for all tokens, and its refusals."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdit
from experiments.dit_paper import VARIANTS, get_config
from vdit.config import joined
from vdit.data.labels import by_caption
from vdit.denoiser import Denoiser
from vdit.diffusion.schedule import process, sample_times
from vdit.errors import UserError
from vdit.models.dit_paper import CONDITIONINGS, DiTPaper
from vdit.models.text import Tokenizer, learned_tokenizer, no_tokenizer
from vdit.objectives.diffusion import Dense, denoising_objective
from vdit.objectives.objective import Objective
from vdit.published.text_folder import encoder
from vdit.run import run
from vdit.runtime.metrics import read
from vdit.sample import Given, Model
from vdit.tokens import pattern_shares, patterns
from vdit.worlds.bodies.physics import MOTIONS
from vdit.worlds.bodies.source import World, by_truth
from vdit.worlds.forms import COLOURS

FROZEN = {"mean": jnp.array([0.5, -1.0]), "std": jnp.array([2.0, 1.0])}
NONE = encoder("none")


def smallest() -> Any:
    config = get_config("smoke")
    config.data.frames = 5
    config.vae.train.steps = config.dit.train.steps = 2
    config.vae.train.warmup = config.dit.train.warmup = 1
    config.latents.clips = config.latents.batch = config.latents.shard = 16
    config.sample.steps = 2
    config.sample.clips = config.eval.captions = config.sample.batch = 2
    config.run.log_every = config.run.save_every = 2
    return config


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("paper")
    run(smallest(), workdir)
    return workdir


@pytest.fixture(scope="module")
def model(road: Path) -> Model:
    return vdit.load(road)


@pytest.mark.slow
def test_the_road_ends_with_samples_and_scores_of_classes(road: Path) -> None:
    assert json.loads((road / "classes.json").read_text()) == list(MOTIONS)
    asked = json.loads((road / "samples" / "text-00.json").read_text())
    assert asked["prompt"] == MOTIONS[asked["class"]] and asked["variance"] == "learned"
    assert not list((road / "samples").glob("extend*"))
    rows = {(row["split"], row["objects"]): row for row in read(road) if "split" in row}
    assert {objects for _, objects in rows} == {"one", "all"}
    assert rows["real", "all"]["clips"] == 2 and "colour" in rows["real", "all"]
    made = rows["generated", "all"]  # a class says nothing of the colour
    assert {"motion", "permanence"} <= made.keys() and not {"colour", "shape"} & made.keys()


@pytest.mark.slow
def test_a_class_is_asked_for_by_name_or_number(model: Model) -> None:
    assert [model.label(text) for text in ("falls", " ROLLS_left ", "2", "")] == [0, 3, 2, -1]
    with pytest.raises(UserError, match="'flies' names no class: a number from 0 to 5 or.*falls"):
        model.generate("flies")
    model.classes = ["crane, bird", "crane, machine", "2"]
    assert model.label("Machine") == 1 and model.label("2") == 2
    with pytest.raises(UserError, match=r"is 2 classes, numbers \[0, 1\]"):
        model.label("crane")
    model.classes = MOTIONS


@pytest.mark.slow
def test_the_class_is_what_the_samples_differ_by(model: Model) -> None:
    """Far from their start the weights tell classes apart; name and number are one class."""
    params = jax.tree.map(
        lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), model.params["dit"]
    )
    made = Model(
        model.config, model.tokenizer, model.encoder, model.params | {"dit": params},
        {name: np.asarray(value) for name, value in model.codec.statistics.items()},
        classes=model.classes,
    )  # fmt: skip
    one, same, other = (made.generate(text, seed=3)[0] for text in ("falls", "0", "rests"))
    assert [result.settings["class"] for result in (one, same, other)] == [0, 0, 5]
    np.testing.assert_array_equal(one.video, same.video)
    assert (one.video != other.video).any()


@pytest.mark.slow
def test_given_frames_and_shots_are_refused_in_one_line(model: Model) -> None:
    frame = np.zeros((1, 32, 32, 3), np.uint8)
    for asked in ({"given": [Given(frame)]}, {"shots": [(0.0, "falls")]}):
        with pytest.raises(UserError, match="one time for all tokens") as caught:
            model.generate("falls", **asked)
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# What is learned


def objective(
    drop: float, conditioning: str = "adaln_zero", axes: str = "joint", **changes: Any
) -> Objective:
    table, made = patterns(3, 2, 10.0), process("ddpm")
    options: dict[str, Any] = {"width": 8, "depth": 2, "heads": 2, "patch": (1, 1), "classes": 3}
    text = changes.pop("encoder", NONE)
    network = DiTPaper(**(options | changes), conditioning=conditioning, axes=axes)
    times = functools.partial(sample_times, made)
    rows = Dense(table, pattern_shares(table, {"text": 1.0}), times, text_drop=drop)
    return denoising_objective(Denoiser(network, made, "eps", text), rows)


def batch(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "latent": rng.normal(size=(rows, 3, 2, 2, 2)).astype(np.float32),
        "ids": np.zeros((rows, 1), np.int32),
        "mask": np.zeros((rows, 1), bool),
        "features": np.zeros((rows, 1, 1), np.float16),
        "label": (np.arange(rows) % 2).astype(np.int32),
        "ordinal": np.arange(10, 10 + rows).astype(np.uint32),
    }


def gradients(made: Objective, data: Any, key: int = 5) -> Any:
    params = jax.jit(made.init)(jax.random.key(0), data)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)

    def total(params: Any) -> Any:
        return made.loss(params, FROZEN, data, jax.random.key(key))[0]

    return params, jax.jit(jax.value_and_grad(total))(params)


@pytest.mark.parametrize("drop, rows", [(0.0, [0, 1]), (1.0, [3])])
def test_only_the_classes_that_are_shown_learn(drop: float, rows: list[int]) -> None:
    """Labels 0 and 1 are there, 2 never; a dropped one is the null class behind them."""
    _, (_, gradient) = gradients(objective(drop), batch(4))
    moved = jnp.abs(gradient["dit"]["classes"]).max(-1) > 0
    assert jnp.flatnonzero(moved).tolist() == rows


@pytest.mark.parametrize(
    "conditioning",
    [
        pytest.param(name, marks=() if name == "adaln_zero" else pytest.mark.slow)
        for name in CONDITIONINGS
        if name != "adaln_single"
    ],
)
def test_a_batch_is_the_sum_of_its_samples_alone(conditioning: str) -> None:
    axes = "joint" if conditioning == "in_context" else "factorised"
    made, data = objective(0.5, conditioning, axes), batch(3)
    params, whole = gradients(made, data)
    alone = []

    @jax.jit
    def value(params: Any, part: Any) -> Any:
        def total(params: Any) -> Any:
            return made.loss(params, FROZEN, part, jax.random.key(5))[0]

        return jax.value_and_grad(total)(params)

    for i in range(3):
        part = {name: value[i : i + 1] for name, value in data.items()}
        alone.append(value(params, part))
    summed = jax.tree.map(lambda *parts: sum(parts), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-4), whole, summed)


def test_a_text_without_words_stands_for_a_dropped_one() -> None:
    """As in published models: dropping a caption and asking for "" are the same condition."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(3, 1, 4, 1)), jnp.float32)
    mask = jnp.array([[[True, True, True, False]]] * 2 + [[[False] * 4]])
    empty = {"features": jnp.full((4, 1), 7.0), "mask": jnp.array([True, False, False, False])}
    drop = jnp.array([False, True, False])
    network = DiTPaper(width=8, depth=1, heads=1, text=True)
    denoiser = Denoiser(network, process("ddpm"), "eps", NONE)
    told = jax.jit(denoiser.condition)(features, mask, drop, empty=empty)
    seen = (told.shot > 0) & ~told.null
    assert seen.sum(1).tolist() == [3, 1, 1]
    assert told.text[1][seen[1]].ravel().tolist() == told.text[2][seen[2]].ravel().tolist() == [7.0]
    np.testing.assert_array_equal(told.text[0][seen[0]], features[0, 0, :3])


def test_the_texts_of_learned_encoders_train_too() -> None:
    """The gradient reaches the text encoder through the blocks that attend to its tokens."""
    text = encoder("learned", vocab=300, width=16, depth=1, heads=2)
    made = objective(0.0, axes="factorised", classes=0, text=True, encoder=text)
    data = {name: value for name, value in batch(4).items() if name not in ("label", "features")}
    data |= {"ids": np.full((4, 5), 7, np.int32), "mask": np.ones((4, 5), bool)}
    _, (_, gradient) = gradients(made, data)
    assert jnp.abs(gradient["text"]["tokens"]["embedding"][7]).max() > 0


# --------------------------------------------------------------------------------------------------
# Classes of sources, tokenizers


def test_clips_carry_their_class_and_its_name() -> None:
    world = World(0, size=(8, 8), objects=(1, 1))
    clips = by_truth(world, "colour")
    for i in range(6):
        clip = clips[i]
        assert clip["label"] == world[i]["truth"]["colour"][0]
        assert clip["caption"] == COLOURS[clip["label"]]
    named = by_caption([{"caption": "b", "video": 1}, {"caption": "a", "video": 2}], ("a", "b"))
    assert [(clip["label"], clip["video"]) for clip in named] == [(1, 1), (0, 2)]


def test_texts_without_words() -> None:
    none = Tokenizer(no_tokenizer(), 1)
    ids, mask = none.encode(["a ball\nfalls", ""])
    assert ids.shape == (2, 1) and not mask.any()
    assert not Tokenizer(learned_tokenizer(["a b"], 300), 4).empty()[1].any()


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("data.label", "", "need data.label"),
        ("data.label", "impacts", "allowed are colour, shape, size, motion"),
        ("data.objects", (1, 2), r"\(1, 1\) is allowed"),
        ("dit.paper.classes", 7, "6 is allowed"),
        ("dit.paper.text", True, "one of both"),
        ("text.encoder", "learned", "none is allowed"),
        ("dit.given.prefix", 0.1, "dit.given.prefix is 0.1.*0 is allowed"),
        ("data.shapes", ((5, 32, 32, 10.0),), "one shape"),
        ("dit.paper.conditioning", "in_context", "joint is allowed"),
        ("dit.model", "vdit", "no other takes it"),
        ("dit.wan.boundary", -1.0, "only wan takes it"),
        ("sample.spacing", "even", "exponential, flow_sigmas, wan or times"),
    ],
)
def test_what_cannot_be_trained_is_one_line(field: str, value: Any, words: str) -> None:
    config = get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=words) as caught:
        joined.check(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", ["", *VARIANTS, "image+adaln+smoke"])
def test_every_variant_can_be_trained(variant: str) -> None:
    config = get_config(variant)
    joined.check(config)
    with pytest.raises(UserError, match="known variants"):
        get_config("image+big")
