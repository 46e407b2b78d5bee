"""Convolutional autoencoders: against diffusers, causal, in chunks, in tiles, from folders."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vdit.config import default, joined
from vdit.config.autoencoder import build_vae
from vdit.config.identity import stage_fields
from vdit.errors import UserError
from vdit.nn.tiles import tiled
from vdit.published import vae_folder, weights

GOLDEN = Path(__file__).parents[1] / "golden" / "vae"
FOLDERS = ("kl", "wan21", "wan22")


@pytest.fixture(scope="module")
def expected() -> Any:
    return np.load(GOLDEN / "expected.npz")


@functools.cache
def opened(name: str) -> tuple[Any, Any]:
    model, plan = vae_folder.read_module(GOLDEN / name)
    with jax.ensure_compile_time_eval():
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), weights.load(plan))
    return model, params


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name: str, method: str, *args: Any) -> Any:
    model, params = opened(name)
    return model.apply({"params": params}, *args, method=method)


def close(found: Any, wanted: Any) -> None:
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found) - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("name", FOLDERS)
def test_moments_and_videos_are_those_of_diffusers(expected: Any, name: str, case: int) -> None:
    video = expected[f"{name}/{case}/video"]
    mean, log_variance, _ = run(name, "encode", video)
    assert mean.shape[1:] == opened(name)[0].latent_shape(*video.shape[1:4])
    close(mean, expected[f"{name}/{case}/mean"])
    close(log_variance, expected[f"{name}/{case}/log_variance"])
    decoded, _ = run(name, "decode", mean)
    if name != "kl":
        decoded = jnp.clip(decoded, -1.0, 1.0)  # which diffusers leaves to its other pipelines
    close(decoded, expected[f"{name}/{case}/decoded"])


@pytest.mark.parametrize("name", ["kl", "wan21"])
def test_tiles_are_those_of_diffusers(expected: Any, name: str) -> None:
    video = jnp.asarray(expected[f"{name}/tiled/video"])
    mean = tiled(lambda part: run(name, "encode", part)[0], video, 16, 12, ((4, 3),) * 2)
    close(mean, expected[f"{name}/tiled/mean"])
    decoded = tiled(lambda part: run(name, "decode", part)[0], mean, 4, 3, ((16, 12),) * 2)
    close(decoded if name == "kl" else jnp.clip(decoded, -1, 1), expected[f"{name}/tiled/decoded"])


@pytest.mark.parametrize("name", FOLDERS)
def test_chunk_by_chunk_equals_the_whole(expected: Any, name: str) -> None:
    video = expected[f"{name}/2/video"]
    whole = run(name, "encode", video)[0]
    state, parts = None, []
    for start, stop in ((0, 1), (1, 5), (5, 9)):
        part, _, state = run(name, "encode", video[:, start:stop], state)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)
    wanted = run(name, "decode", whole)[0]
    state, parts = None, []
    for start in range(whole.shape[1]):
        part, state = run(name, "decode", whole[:, start : start + 1], state)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), wanted, atol=1e-5)


@pytest.mark.parametrize("name", FOLDERS)
def test_latents_do_not_see_later_frames(expected: Any, name: str) -> None:
    video = jnp.asarray(expected[f"{name}/1/video"])
    p = opened(name)[0].patch[0]

    @jax.jit
    @jax.grad
    def influence(video: jax.Array) -> jax.Array:
        return run(name, "encode", video)[0][:, 0 if p > 1 else 2].sum()

    seen = jnp.abs(influence(video)).sum((0, 2, 3, 4)) > 0
    last = 0 if p > 1 else 2
    assert seen[last] and not seen[last + 1 :].any()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{vae_folder.STEM}.safetensors"
    shutil.copy(GOLDEN / name / "config.json", tmp_path)
    tensors = load_file(GOLDEN / name / file.name)
    one = "quant_conv.bias"
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != one}, "lacks"),
        (tensors | {"more": tensors[one]}, "an unexpected tensor"),
        (tensors | {one: tensors[one][1:]}, "allowed"),
    ):
        save_file(changed, file)
        with pytest.raises(UserError, match=words):
            vae_folder.read_module(tmp_path)


def test_statistics_are_those_of_the_config() -> None:
    kl, wan = (vae_folder.read_statistics(GOLDEN / name) for name in ("kl", "wan21"))
    assert kl is not None and wan is not None
    np.testing.assert_allclose(kl["std"], np.full(3, 1 / 0.18215), rtol=1e-6)
    np.testing.assert_allclose(wan["std"], [1.5, 2.0, 0.5])
    np.testing.assert_allclose(wan["mean"], [0.1, -0.2, 0.3], rtol=1e-6)


def test_fields_of_the_convolutions_change_no_older_digest() -> None:
    config = default()
    old = stage_fields(config, "vae")
    own = ("model", "multipliers", "blocks", "groups", "pixels", "residual", "decoder_width")
    assert not {f"vae.{name}" for name in own} & set(old)
    config.vae.model = "causal"
    assert stage_fields(config, "vae") == old | {"vae.model": "causal"}


def test_squares_of_pixels_stand_for_a_level() -> None:
    config = default()
    config.vae.model, config.vae.pixels, config.vae.multipliers = "causal", 2, (1, 2, 4)
    joined.check(config)
    model = build_vae(config)
    assert model.patch == (4, 8, 8) and model.pixels == 2
    video, noise = jnp.zeros((1, 5, 16, 8, 3)), jnp.zeros((1, 2, 2, 1, model.channels))
    (out, mean, _), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), video, noise)
    assert out.shape == video.shape and mean.shape == noise.shape


@pytest.mark.parametrize(
    "model, changes, words",
    [
        ("kl", {}, "vae.patch is"), ("kl", {"patch": (1, 16, 16), "pixels": 2}, "only causal"),
        ("vivit", {"pixels": 2}, "only causal"), ("vivit", {"residual": True}, "only causal"),
        ("causal", {"patch": (4, 8, 4)}, "vae.patch is"), ("causal", {"pixels": 2}, "vae.patch is"),
        ("causal", {"pixels": 0}, "vae.pixels is 0"), ("cnn", {}, "vae.model='cnn'"),
        ("causal", {"decoder_width": -2}, "vae.decoder_width is -2"),
        ("causal", {"decoder_width": 3}, "even numbers"),
        ("causal", {"residual": True, "multipliers": (1, 2, 4, 8)}, "a multiple of 1024"),
        ("causal", {"residual": True, "multipliers": (2, 3, 3, 3)}, "a multiple of 384"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_there_is_refused(
    model: str, changes: dict[str, Any], words: str
) -> None:
    config = default()
    config.vae.model = model
    config.vae.update(changes)
    with pytest.raises(UserError, match=words):
        joined.check(config)


def test_a_folder_of_levels_without_averages_is_refused(tmp_path: Path) -> None:
    said = json.loads((GOLDEN / "wan22" / "config.json").read_text()) | {"dim_mult": [1, 2, 4]}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="config.json: residual levels .* a multiple of 16"):
        vae_folder.read_module(tmp_path)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_are_only_asked_of_the_model_that_has_them(heads: int) -> None:
    config = default()
    config.vae.heads = heads
    with pytest.raises(UserError, match="heads of even width"):
        joined.check(config)
    config.vae.model = "causal"
    config.vae.multipliers = (1, 1, 1, 1)
    joined.check(config)
