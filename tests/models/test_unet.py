"""Latent diffusion's U-Net: diffusers' numbers, its folders and back, its video form, refusals."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from tools import export_weights, import_weights
from vdit.config import default
from vdit.config.denoiser import build_dit
from vdit.config.identity import read_config
from vdit.errors import UserError
from vdit.models.unet import UNet
from vdit.published.layouts import STEM
from vdit.runtime.checkpoint import newest_good_step, restore_ema
from vdit.tokens import Condition, Layout, dense_tokens, drop_text, text_condition

GOLDEN = Path(__file__).parents[1] / "golden" / "unet"
EXPECTED = np.load(GOLDEN / "expected.npz")
CASES = [key[:-2] for key in EXPECTED.files if key.endswith("/x")]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder's workdir, model and parameters, by the folder's name."""

    @functools.cache
    def read(name: str) -> tuple[Path, UNet, Any]:
        work = tmp_path_factory.mktemp(name) / "work"
        assert import_weights.main([f"--source={GOLDEN / name}", f"--workdir={work}"]) == 0
        config = read_config(work)
        config.run.dtype = "float32"
        step = newest_good_step(work / "checkpoints" / "dit")
        assert step is not None
        return work, build_dit(config), restore_ema(work / "checkpoints" / "dit", step)["dit"]

    return read


def told(x: Any, text: Any, mask: Any, times: Any) -> tuple[jax.Array, Layout, Condition]:
    """Tokens, layout and condition of latents (B, T, H, W, C), a frame in 1/8 s."""
    seconds = jnp.broadcast_to(jnp.arange(x.shape[1]) / 8, x.shape[:2])
    tokens, layout = dense_tokens(jnp.asarray(x), (1, 1), seconds, seconds < 0)
    caption = jnp.asarray(text)[:, None], jnp.asarray(mask)[:, None], jnp.zeros((len(x), 1, 1))
    return tokens, layout, text_condition(*caption, jnp.asarray(times, jnp.float32)[:, None])


def inputs(case: str) -> tuple[jax.Array, Layout, Condition]:
    x, text, mask = (EXPECTED[f"{case}/{key}"] for key in ("x", "text", "mask"))
    return told(x, text, mask, EXPECTED["times"])


@functools.partial(jax.jit, static_argnums=0)
def run(model: UNet, params: Any, *given: Any) -> Any:
    return model.apply({"params": params}, *given)


@functools.partial(jax.jit, static_argnums=0)
def started(model: UNet, *given: Any) -> Any:
    key = jax.random.key(0, impl="unsafe_rbg")  # a call of the default one takes long to compile
    return model.init(key, *given)["params"]


def answer(model: UNet, params: Any, *given: Any) -> np.ndarray:
    out = run(model, params, *given)
    assert given[1].grid is not None
    return np.asarray(out).reshape(len(out), *given[1].grid, -1)


@pytest.mark.parametrize("case", CASES)
def test_its_numbers_are_those_of_diffusers(imported: Any, case: str) -> None:
    _, model, params = imported(case.split("/")[0])
    got, want = answer(model, params, *inputs(case)), EXPECTED[f"{case}/out"]
    assert got.shape == want.shape
    assert np.abs(got - want).max() / np.abs(want).max() < 2e-5


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_folder_comes_back_to_the_bit(imported: Any, name: str, tmp_path: Path) -> None:
    work, _, _ = imported(name)
    out = tmp_path / "out"
    assert export_weights.main([f"--workdir={work}", f"--out={out}"]) == 0
    old, new = (load_file(folder / f"{STEM}.safetensors") for folder in (GOLDEN / name, out))
    assert old.keys() == new.keys()
    for key, value in old.items():
        assert value.shape == new[key].shape and value.tobytes() == new[key].tobytes(), key
    again = tmp_path / "again"
    assert import_weights.main([f"--source={out}", f"--workdir={again}"]) == 0
    assert (again / "config.json").read_text() == (work / "config.json").read_text()


def grown(model: UNet, params: Any, given: Any, scale: float) -> tuple[UNet, Any]:
    """The video form of an image model; its layers over time as at the start, and random beside."""
    video = model.clone(temporal=True)
    fresh = started(video, *given)
    rng = np.random.default_rng(0)
    fresh = jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype(np.float32), fresh)
    flat = traverse_util.flatten_dict(fresh) | traverse_util.flatten_dict(params)
    return video, traverse_util.unflatten_dict(flat)


@pytest.mark.slow
def test_the_video_form_starts_as_the_image_model_of_each_frame(imported: Any) -> None:
    _, model, params = imported("sd1")
    given = inputs("sd1/3x4x6x77")
    video, all_params = grown(model, params, given, 0.0)
    more = set(traverse_util.flatten_dict(all_params)) - set(traverse_util.flatten_dict(params))
    assert {path[-1] for path in more} and all({"time", "time_conv"} & set(path) for path in more)
    alone = answer(model, params, *given)
    np.testing.assert_allclose(answer(video, all_params, *given), alone, rtol=1e-5, atol=1e-5)
    # Once they have learned, what is before and behind a frame matters, and so does when it is.
    video, all_params = grown(model, params, given, 0.1)
    tokens, layout, condition = given
    whole = answer(video, all_params, *given)
    later = layout.replace(position=layout.position * jnp.array([2.0, 1.0, 1.0])[None, None])
    assert np.abs(answer(video, all_params, tokens, later, condition) - whole).max() > 1e-3

    @jax.jit
    @jax.grad
    def influence(x: jax.Array) -> jax.Array:
        return run(video, all_params, x, layout, condition)[:, 24:48].sum()  # of the middle frame

    seen = jnp.abs(influence(tokens)).reshape(3, 3, -1).max((0, 2))
    assert (seen > 0).all()


def small(**options: Any) -> tuple[UNet, Any]:
    sizes: dict[str, Any] = {"widths": (8, 8), "heads": (2, 1), "depths": (2, 0), "blocks": 1}
    model = UNet(**{**sizes, "groups": 2, "temporal": True, **options})
    rng = np.random.default_rng(0)
    given = told(
        rng.normal(size=(2, 3, 3, 5, 4)).astype(np.float32),
        rng.normal(size=(2, 6, 5)).astype(np.float32),
        np.arange(6)[None] < np.array([[6], [2]]),
        [3.0, 700.0],
    )
    return model, given


def moved(params: Any) -> Any:
    """Parameters none of which is where it started."""
    return jax.tree.map(lambda x: x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape), params)


@pytest.mark.slow
def test_it_starts_at_zero_and_runs_change_nothing() -> None:
    model, given = small(learned_variance=True)
    params = started(model, *given)
    first = answer(model, params, *given)
    assert first.shape == (2, 3, 3, 5, 8) and np.abs(first).max() == 0
    params = moved(params)
    other = model.clone(unroll=2, remat="full")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def gradient(params: Any) -> Any:
        out = run(other, params, *given)
        return jnp.square(out).sum(), out

    (_, out), gradients = gradient(params)
    np.testing.assert_allclose(run(model, params, *given), out, rtol=1e-4, atol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0, path


def test_what_is_dropped_or_padding_is_not_seen() -> None:
    model, (tokens, layout, condition) = small(learned_variance=True)
    params = moved(started(model, tokens, layout, condition))
    other = condition.replace(text=condition.text + (condition.shot == 0)[..., None])
    base = answer(model, params, tokens, layout, condition)
    np.testing.assert_array_equal(answer(model, params, tokens, layout, other), base)
    dropped = drop_text(condition, jnp.array([True, False]))
    changed = np.abs(answer(model, params, tokens, layout, dropped) - base).max((1, 2, 3, 4))
    assert changed[0] > 1e-4 and changed[1] == 0
    nothing = dropped.replace(text=jnp.where(condition.null[..., None], condition.text, 0.0))
    np.testing.assert_array_equal(
        answer(model, params, tokens, layout, nothing)[0],
        answer(model, params, tokens, layout, dropped)[0],
    )


def test_its_public_size_is_that_of_stable_diffusion() -> None:
    """859.5 million parameters, Stable Diffusion 1; 865.9 for 2, of texts of width 1024."""
    for width, count, options in (
        (768, 859_520_964, {}),
        (1024, 865_910_724, {"heads": (5, 10, 20, 20), "linear": True}),
    ):
        x = np.zeros((1, 1, 8, 8, 4), np.float32)
        given = told(x, np.zeros((1, 2, width), np.float32), np.ones((1, 2), bool), [1.0])
        shapes = jax.eval_shape(UNet(**options).init, jax.random.key(0), *given)["params"]
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_what_such_a_model_cannot_do_is_refused_in_one_line() -> None:
    model, (tokens, layout, condition) = small()

    def refused(what: str, model: UNet, layout: Layout, condition: Condition) -> None:
        with pytest.raises(UserError, match=what) as caught:
            jax.eval_shape(model.init, jax.random.key(0), tokens, layout, condition)
        assert "\n" not in str(caught.value)

    two = condition.replace(level=jnp.zeros((2, 2)))
    refused("one time for all tokens: given frames are not", model, layout, two)
    refused("needs dense batches", model, layout.replace(grid=None), condition)
    refused("one number of each", model.clone(heads=(2,)), layout, condition)
    refused("above 0", model.clone(blocks=0), layout, condition)
    refused("must divide it", model.clone(groups=3), layout, condition)
    refused("even width", model.clone(heads=(8, 1)), layout, condition)


def test_a_folder_that_does_not_fit_is_one_line_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    shutil.copytree(GOLDEN / "sd1", source)
    config = json.loads((source / "config.json").read_text())
    path = source / f"{STEM}.safetensors"
    good = load_file(path)

    def refused(what: str) -> None:
        assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 2
        line = capsys.readouterr().err
        assert what in line and line.count("\n") == 1 and not work.exists(), line

    for change, what in (
        ({"attention_head_dim": [2] * 3}, "attention_head_dim is [2, 2, 2]; allowed: 2 numbers"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0"),
        ({"block_out_channels": [8] * 17}, "allowed: 1 to 16 numbers"),
        ({"down_block_types": ["AttnDownBlock2D"] * 2}, "down_block_types is ['AttnDownBlock2D'"),
        ({"up_block_types": ["UpBlock2D"] * 2}, "up_block_types is ['UpBlock2D', 'UpBlock2D'"),
        ({"use_linear_projection": "yes"}, 'use_linear_projection is "yes"; allowed: true or'),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
        ({"out_channels": 8}, "out_channels is 8; allowed: 4"),
    ):
        (source / "config.json").write_text(json.dumps(config | change))
        refused(what)
    (source / "config.json").write_text(json.dumps(config))
    one = "mid_block.attentions.0.proj_in.weight"
    save_file({key: value for key, value in good.items() if key != one}, path)
    refused(f"lacks the tensor {one}")
    save_file(good | {one: good[one][:-1]}, path)
    refused(f"tensor {one} is (15, 16, 1, 1); allowed: (16, 16)")


def test_a_pipeline_s_scheduler_says_what_is_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    shutil.copytree(GOLDEN / "sd2", source / "unet")
    (source / "scheduler").mkdir()
    scheduler = {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "prediction_type": "v_prediction",
    }  # fmt: skip
    path = source / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(scheduler | {"beta_schedule": "linear"}))
    assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 2
    assert "beta_schedule is 'linear'; allowed: 'scaled_linear'" in capsys.readouterr().err
    path.write_text(json.dumps(scheduler))
    assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 0
    config = read_config(work)
    assert (config.dit.process, config.dit.prediction) == ("scaled_linear", "v")
    assert config.dit.unet.heads == (1, 3) and config.dit.unet.depths == (2, 2)
    assert default().dit.unet.temporal and not config.dit.unet.temporal
