"""The autoencoder's promises: causal, streams, any length and size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.config import default
from vdit.config.autoencoder import build_vae
from vdit.models.vae import VAE
from vdit.nn.patch import patchify

P, Q, R = PATCH = (2, 4, 4)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(model: VAE, method: str, params: dict, *args):
    return model.apply(params, *args, method=method)


@pytest.fixture(scope="module")
def made() -> tuple[VAE, dict, jax.Array]:
    model = VAE(PATCH, channels=3, width=16, encoder_depth=2, decoder_depth=2, heads=2, window=2)
    video = jax.random.normal(jax.random.key(0), (1, 1 + 4 * P, 8, 12, 3))
    noise = jnp.zeros((1, *model.latent_shape(*video.shape[1:4])))
    return model, jax.jit(model.init)(jax.random.key(1), video, noise), video


def test_latents_do_not_see_later_frames(made) -> None:
    model, params, video = made

    @jax.jit
    @jax.grad
    def influence(video: jax.Array, latent: jax.Array) -> jax.Array:
        mean, log_variance, _ = run(model, "encode", params, video)
        return (mean[:, latent] + log_variance[:, latent]).sum()

    for latent in range(5):
        seen = jnp.abs(influence(video, latent)).sum((0, 2, 3, 4)) > 0
        last = latent * P
        assert not seen[last + 1 :].any()
        assert seen[max(last - P + 1, 0) : last + 1].all()


def test_frames_do_not_see_later_latents_and_the_window_is_finite(made) -> None:
    model, params, video = made
    latent, _, _ = run(model, "encode", params, video)

    @jax.jit
    @jax.grad
    def influence(latent: jax.Array, frame: jax.Array) -> jax.Array:
        return run(model, "decode", params, latent)[0][:, frame].sum()

    for frame in range(video.shape[1]):
        seen = jnp.abs(influence(latent, frame)).sum((0, 2, 3, 4)) > 0
        own = -(-frame // P)
        reach = model.decoder_depth * (model.window - 1)
        assert seen[own] and not seen[own + 1 :].any()
        assert not seen[: max(own - reach, 0)].any()


def test_a_prefix_is_the_prefix_of_the_encoding(made) -> None:
    model, params, video = made
    whole, _, _ = run(model, "encode", params, video)
    for count in (1, 1 + P, 1 + 3 * P):
        part, _, _ = run(model, "encode", params, video[:, :count])
        np.testing.assert_allclose(part, whole[:, : part.shape[1]], atol=1e-5)


@pytest.mark.parametrize("cuts", [(1, 3), (3, 7), (5,), (1, 3, 5, 7)])
def test_chunk_by_chunk_equals_the_whole(made, cuts) -> None:
    model, params, video = made
    whole, _, _ = run(model, "encode", params, video)
    state, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, video.shape[1]), strict=True):
        part, _, state = run(model, "encode", params, video[:, start:stop], state)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)
    assert int(state.frames) == whole.shape[1]

    out, _ = run(model, "decode", params, whole)
    state, parts = None, []
    for start, stop in zip((0, 1, 3), (1, 3, 5), strict=True):
        part, state = run(model, "decode", params, whole[:, start:stop], state)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), out, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4), (5, 6, 9)])
def test_any_length_and_size_come_back(made, shape) -> None:
    model, params, _ = made
    video = jax.random.normal(jax.random.key(2), (2, *shape, 3))
    noise = jnp.zeros((2, *model.latent_shape(*shape)))
    out, mean, log_variance = run(model, "__call__", params, video, noise)
    assert out.shape == video.shape and mean.shape == noise.shape == log_variance.shape


def test_detail_reaches_more_directions_than_the_width(made) -> None:
    """A linear map from D features spans D directions of a tubelet's pixels; `detail` spans more,
    and begins as nothing beside that map."""
    plain, params, _ = made
    model = plain.clone(detail=64)
    latent = 3 * jax.random.normal(jax.random.key(2), (40, 1, 2, 3, 3))
    init = jax.jit(functools.partial(model.init, method="decode"))
    added = init(jax.random.key(1), latent[:1])["params"]["detail_pixels"]
    wide = {"params": {**params["params"], "detail_pixels": added}}

    def patches(model: VAE, params: dict) -> np.ndarray:
        video, _ = run(model, "decode", params, jnp.tile(latent, (1, 2, 1, 1, 1)))
        return np.asarray(patchify(video[:, 1:], PATCH)).reshape(-1, P * Q * R * 3)

    def rank(rows: np.ndarray) -> int:
        return int(np.linalg.matrix_rank(rows - rows.mean(0), rtol=1e-4))

    np.testing.assert_array_equal(patches(model, wide), patches(plain, params))
    assert rank(patches(plain, params)) == plain.width
    down = jax.random.normal(jax.random.key(3), added["down"]["kernel"].shape)
    added["down"]["kernel"] = down
    assert rank(patches(model, wide)) > 2 * plain.width


def test_no_detail_is_no_layer() -> None:
    config = default()
    config.vae.detail = 0
    assert (
        "detail_pixels"
        not in jax.eval_shape(
            lambda key: build_vae(config).init(
                key, jnp.zeros((1, 5, 8, 8, 3)), jnp.zeros((1, 2, 1, 1, 24))
            ),
            jax.random.key(0),
        )["params"]
    )
