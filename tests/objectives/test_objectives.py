"""Objectives: keyed by sample, given tokens without loss, a known optimum."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.config import default, joined
from vdit.config.identity import stage_fields
from vdit.denoiser import Denoiser
from vdit.diffusion.schedule import process, sample_times
from vdit.errors import UserError
from vdit.models.dit import DiT
from vdit.models.lpips import LPIPS
from vdit.models.text import TextEncoder
from vdit.models.vae import VAE
from vdit.nn.patch import to_float, to_uint8
from vdit.objectives.diffusion import Dense, denoising_objective
from vdit.objectives.objective import Objective, low_discrepancy, sample_keys
from vdit.objectives.vae import Perceptual, cropped, on_crops, vae_objective
from vdit.published.text_folder import encoder
from vdit.tokens import dense_tokens, pattern_shares, patterns

N, P, FPS = 4, 2, 10.0
FROZEN = {"mean": jnp.array([0.5, -1.0, 0.0]), "std": jnp.array([2.0, 1.0, 0.5])}


TEXT = encoder("learned", vocab=300, width=16, depth=1, heads=2)


def diffusion(
    shares: dict[str, float],
    name: str = "flow",
    text: TextEncoder = TEXT,
    learned: bool = False,
    caption_drop: float = 0.0,
    longest: tuple[int, int] | None = None,
) -> Objective:
    table = patterns(N, P, FPS)
    network = DiT(width=16, depth=1, heads=2, learned_variance=learned)
    denoiser = Denoiser(network, process(name), "flow" if name == "flow" else "eps", text)
    times = functools.partial(sample_times, process(name))
    rows = Dense(table, pattern_shares(table, shares), times, 0.5, caption_drop, longest)
    return denoising_objective(denoiser, rows)


def batch(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "latent": rng.normal(size=(rows, N + 3, 2, 2, 3)).astype(np.float32),
        "ids": rng.integers(1, 300, (rows, 5)).astype(np.int32),
        "mask": np.arange(5)[None] < rng.integers(1, 6, (rows, 1)),
        "ordinal": np.arange(10, 10 + rows).astype(np.uint32),
    }


def shots(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with three captions a clip: its own, and those of two shots; one has one shot."""
    rng = np.random.default_rng(1)
    rows = len(data["ids"])
    ids = rng.integers(1, 300, (rows, 3, 5)).astype(np.int32)
    mask = np.arange(5) < rng.integers(0, 6, (rows, 3, 1))
    starts = np.array([[0.0, 0.3], *[[0.0, np.inf]] * (rows - 1)], np.float32)
    return data | {"ids": ids, "mask": mask, "starts": starts}


def perturbed(objective: Objective, data: Any) -> Any:
    params = jax.jit(objective.init)(jax.random.key(0), data)
    return jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)


@pytest.mark.parametrize("start", [0, 12_345, 2**32 - 16])
def test_times_of_a_batch_lie_evenly(start: int) -> None:
    """Of any 32 samples that follow one another, the last of a 32-bit count too: gaps at most 1.8
    times their mean (independent ones reach 4), and each is what it is in another batch."""
    ordinal = np.arange(start, start + 32).astype(np.uint32)
    u = np.asarray(low_discrepancy(jnp.asarray(ordinal)))
    assert ((u >= 0) & (u < 1)).all()
    gaps = np.diff(np.sort(u), append=1 + u.min())
    assert gaps.max() < 1.8 / 32
    np.testing.assert_array_equal(low_discrepancy(jnp.asarray(ordinal[5:9])), u[5:9])


@pytest.mark.parametrize(("name", "several"), [("flow", False), ("flow", True), ("ddpm", False)])
def test_a_batch_is_the_sum_of_its_samples_alone(name: str, several: bool) -> None:
    """Loss and gradient of each sample do not depend on its neighbours (noise is keyed by it)."""
    shares = {"text": 0.5, "prefix": 0.3, "last": 0.2}
    objective = diffusion(shares, name, caption_drop=0.3 if several else 0.0)
    data = shots(batch(4)) if several else batch(4)
    params = perturbed(objective, data)
    key = jax.random.key(5)

    @jax.jit
    def value(params: Any, part: Any) -> Any:
        def total(params: Any) -> Any:
            loss, weight, _ = objective.loss(params, FROZEN, part, key)
            return loss, weight

        return jax.value_and_grad(total, has_aux=True)(params)

    whole = value(params, data)
    alone = [value(params, {k: v[i : i + 1] for k, v in data.items()}) for i in range(4)]
    summed = jax.tree.map(lambda *parts: sum(parts), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), whole, summed)


@pytest.mark.parametrize("several", [False, True])
def test_given_tokens_weigh_nothing(several: bool) -> None:
    data = shots(batch(3)) if several else batch(3)
    weights = []
    for shares in ({"text": 1.0}, {"prefix": 1.0}):
        objective = diffusion(shares)
        params = perturbed(objective, data)
        weights.append(float(objective.loss(params, FROZEN, data, jax.random.key(1))[1]))
    whole = 3 * N * 4 * 3
    assert weights[0] == whole
    assert 0 < weights[1] < whole and weights[1] % (4 * 3) == 0


def test_a_perfect_denoiser_has_no_loss() -> None:
    """At its start the network answers 0, so the loss is the mean square of the target."""
    objective = diffusion({"text": 1.0}, "ddpm")
    data = batch(64)
    params = jax.jit(objective.init)(jax.random.key(0), data)
    loss, weight, _ = jax.jit(objective.loss)(params, FROZEN, data, jax.random.key(1))
    assert abs(float(loss / weight) - 1.0) < 0.1  # eps has unit variance


def test_a_learned_variance_adds_the_bound_and_leaves_the_mean_alone() -> None:
    """The hybrid loss: its gradient for the prediction is that of the simple loss."""
    data = batch(6)
    simple, hybrid = (
        diffusion({"prefix": 1.0}, "ddpm", learned=learned) for learned in (False, True)
    )
    params = perturbed(hybrid, data)
    half = dict(params, dit=dict(params["dit"], out=jax.tree.map(
        lambda x: x[..., : x.shape[-1] // 2], params["dit"]["out"]
    )))  # fmt: skip

    def of(objective: Objective, params: Any) -> Any:
        return jax.jit(
            jax.value_and_grad(lambda p: objective.loss(p, FROZEN, data, jax.random.key(1))[0])
        )(params)

    (total, gradient), (expected, expected_gradient) = of(hybrid, params), of(simple, half)
    assert total > expected
    kernels = (made["dit"]["out"]["kernel"] for made in (gradient, expected_gradient))
    mean, variance = jnp.split(next(kernels), 2, axis=-1)
    np.testing.assert_allclose(mean, next(kernels), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(variance).max()) > 1e-3


def test_a_pretrained_encoder_gives_the_same_with_and_without_cached_features() -> None:
    data = batch(8)  # of which some keep their captions
    frozen_text = dataclasses.replace(TEXT, frozen=True)
    weights = TEXT.init(jax.random.key(3), data["ids"], data["mask"])
    objective = diffusion({"text": 1.0}, text=frozen_text)
    params = perturbed(objective, data)
    assert set(params) == {"dit"}
    cached = data | {"features": TEXT.apply(weights, data["ids"], data["mask"])}
    key = jax.random.key(1)
    fresh, _, _ = objective.loss(params, {**FROZEN, "text": weights}, data, key)
    kept, _, _ = objective.loss(params, FROZEN, cached, key)
    other, _, _ = objective.loss(
        params, FROZEN, cached | {"features": cached["features"][::-1]}, key
    )
    np.testing.assert_allclose(fresh, kept, rtol=1e-6)
    assert abs(float(other - kept)) > 1e-4


def test_captions_of_shots_that_never_begin_change_nothing() -> None:
    data = shots(batch(3))
    data["starts"][:, 1] = np.inf
    objective = diffusion({"text": 1.0})
    params = perturbed(objective, data)
    other = data | {"ids": np.copy(data["ids"])}
    other["ids"][:, 2] = 7
    loss = jax.jit(objective.loss)
    key = jax.random.key(1)
    before, after = (float(loss(params, FROZEN, part, key)[0]) for part in (data, other))
    assert before == after
    other["ids"][:, 1] = 7
    assert abs(float(loss(params, FROZEN, other, key)[0]) - before) > 1e-4


@pytest.mark.parametrize("most", [(4, 2), (2, 4)])
def test_padding_behind_the_longest_captions_is_left_out(most: tuple[int, int]) -> None:
    """The tokens of the clip and of a shot are all there are; with one less something is lost."""
    data = shots(batch(3))
    data["mask"] &= np.arange(5) < np.array([most[0], most[1], most[1]])[:, None]
    params = perturbed(diffusion({"text": 1.0}), data)

    def value(longest: tuple[int, int] | None) -> float:
        loss = jax.jit(diffusion({"text": 1.0}, longest=longest).loss)
        return float(loss(params, FROZEN, data, jax.random.key(1))[0])

    whole = value(None)
    assert abs(value(most) - whole) < 1e-6 * whole
    assert abs(value((most[0], most[1] - 1)) - whole) > 1e-3


def test_dropping_every_caption_is_dropping_the_text() -> None:
    """With both captions gone a token sees its null key alone, as where the text was dropped."""
    data = shots(batch(3))
    gone = diffusion({"text": 1.0}, caption_drop=1.0)
    params = perturbed(gone, data)
    other = data | {"ids": data["ids"][::-1], "mask": data["mask"][::-1]}
    key = jax.random.key(1)
    first, second = (jax.jit(gone.loss)(params, FROZEN, part, key)[0] for part in (data, other))
    np.testing.assert_allclose(first, second, rtol=1e-6)
    empty = data | {"mask": np.zeros_like(data["mask"])}
    np.testing.assert_allclose(gone.loss(params, FROZEN, empty, key)[0], first, rtol=1e-5)
    heard = jax.jit(diffusion({"text": 1.0}).loss)(params, FROZEN, data, key)[0]
    assert abs(float(heard - first)) > 1e-4


def test_dense_tokens_keep_the_order_of_time_rows_columns() -> None:
    latent = jnp.arange(2 * 3 * 2 * 2 * 5.0).reshape(2, 3, 2, 2, 5)
    times = jnp.array([[0.0, 0.1, 0.5]] * 2)
    given = jnp.array([[True, False, False]] * 2)
    x, layout = dense_tokens(latent, (1, 1), times, given)
    np.testing.assert_array_equal(x, latent.reshape(2, 12, 5))
    assert layout.slot[0].tolist() == [1] * 4 + [0] * 8
    np.testing.assert_allclose(layout.position[0, 11], [12.0, 1, 1])
    starts = jnp.array([[0.0, 0.1], [0.0, 0.2]])
    _, layout = dense_tokens(latent, (1, 1), times, given, starts)
    assert layout.shot[:, ::4].tolist() == [[1, 2, 2], [1, 1, 2]]
    assert layout.slot[:, ::4].tolist() == [[1, 2, 2], [1, 0, 2]]
    np.testing.assert_array_equal(layout.given()[:, ::4], given)


def test_the_autoencoder_s_loss_is_its_definition() -> None:
    model = VAE((2, 4, 4), channels=3, width=16, encoder_depth=1, decoder_depth=1, heads=2)
    objective = vae_objective(model, kl_weight=0.1, l1_weight=0.0)
    video = np.random.default_rng(0).integers(0, 255, (2, 3, 8, 8, 3)).astype(np.uint8)
    data = {"video": video, "ordinal": np.arange(2, dtype=np.uint32)}
    params = jax.jit(objective.init)(jax.random.key(0), data)
    loss, weight, sums = jax.jit(objective.loss)(params, {}, data, jax.random.key(1))
    np.testing.assert_allclose(loss, sums["mse"] + 0.1 * sums["kl"], rtol=1e-5)
    assert weight == 2
    encode: Any = jax.jit(functools.partial(model.apply, method=model.encode))
    mean, log_variance, _ = encode({"params": params["vae"]}, to_float(jnp.asarray(video)))
    closed = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    np.testing.assert_allclose(sums["kl"], closed.mean((1, 2, 3, 4)).sum(), rtol=1e-5)


def test_bodies_weigh_more_in_the_autoencoder_s_loss() -> None:
    model = VAE((2, 4, 4), channels=3, width=16, encoder_depth=1, decoder_depth=1, heads=2)
    plain = vae_objective(model, 0.1, 0.5)
    weighted = vae_objective(model, 0.1, 0.5, body_weight=3.0)
    random = np.random.default_rng(0)
    video = random.integers(0, 255, (2, 3, 8, 8, 3)).astype(np.uint8)
    data = {"video": video, "ordinal": np.arange(2, dtype=np.uint32)}
    masks = {"none": np.zeros((2, 3, 8, 8), bool), "some": random.random((2, 3, 8, 8)) < 0.3}
    params, key = jax.jit(plain.init)(jax.random.key(0), data), jax.random.key(1)
    lost, _, sums = jax.jit(plain.loss)(params, {}, data, key)
    loss = {
        name: jax.jit(weighted.loss)(params, {}, data | {"bodies": mask}, key)
        for name, mask in masks.items()
    }
    np.testing.assert_allclose(loss["none"][0], lost, rtol=1e-6)
    noise = jax.vmap(lambda k: jax.random.normal(k, model.latent_shape(3, 8, 8)))(
        sample_keys(key, data["ordinal"])
    )
    out, *_ = model.apply({"params": params["vae"]}, to_float(jnp.asarray(video)), noise)
    squared = np.square(np.asarray(out) - np.asarray(to_float(jnp.asarray(video))))
    more = (squared * masks["some"][..., None]).mean((1, 2, 3, 4)).sum()
    np.testing.assert_allclose(loss["some"][0], lost + 3.0 * more, rtol=1e-5)
    np.testing.assert_allclose(loss["some"][2]["mse"], sums["mse"], rtol=1e-6)


def test_crops_are_squares_of_their_clips_where_bodies_are() -> None:
    model = VAE((2, 4, 4), channels=3, width=16, encoder_depth=1, decoder_depth=1, heads=2)
    # Each pixel tells its clip, frame, row and column, so a square tells where it is from.
    index = np.indices((4, 3, 16, 24))
    video = np.stack([index[0] * 3 + index[1], index[2], index[3]], -1).astype(np.uint8)
    bodies = (np.abs(index[2] - 8) < 2) & (np.abs(index[3] - 18) < 2)
    data = {"video": video, "ordinal": np.arange(4, dtype=np.uint32)}
    key = jax.random.key(1)
    cut = jax.jit(cropped, static_argnums=(2, 3))
    plain, chosen = cut(data, key, 8, 5), cut(data | {"bodies": bodies}, key, 8, 5)
    for each in (plain, chosen):
        squares = np.asarray(each["video"])
        assert squares.shape == (20, 3, 8, 8, 3) and each["ordinal"].tolist() == list(range(20))
        for number, (_, row, column) in enumerate(squares[:, 0, 0, 0].tolist()):
            whole = video[number // 5, :, row : row + 8, column : column + 8]
            np.testing.assert_array_equal(squares[number], whole)
    rows, columns = np.asarray(plain["video"])[:, 0, 0, 0, 1:].T
    assert len(set(rows)) > 4 and rows.max() <= 8 and columns.max() <= 16
    assert chosen["bodies"].mean() > 2.5 * bodies.mean()
    objective = vae_objective(model, 0.1, 0.5, body_weight=3.0)
    params = jax.jit(objective.init)(key, data)
    found = jax.jit(on_crops(objective, 8, 5).loss)(params, {}, data | {"bodies": bodies}, key)
    want = jax.jit(objective.loss)(params, {}, chosen, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, want)


def test_pixels_round_trip() -> None:
    every = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(to_uint8(to_float(every)), every)


def test_lpips_is_added_as_a_mean_over_frames() -> None:
    model = VAE((2, 8, 8), channels=3, width=16, encoder_depth=1, decoder_depth=1, heads=2)
    net = LPIPS("vgg")
    frame = jnp.zeros((1, 16, 16, 3))
    frozen = {"lpips": jax.jit(net.init)(jax.random.key(2), frame, frame)["params"]}
    plain, objective = (
        vae_objective(model, 0.0, 0.0, given) for given in (None, Perceptual(net, 0.5))
    )
    video = np.random.default_rng(0).integers(0, 255, (2, 3, 16, 16, 3)).astype(np.uint8)
    data = {"video": video, "ordinal": np.arange(2, dtype=np.uint32)}
    params = objective.init(jax.random.key(0), data)
    noise = jax.vmap(lambda k: jax.random.normal(k, model.latent_shape(3, 16, 16)))(
        sample_keys(jax.random.key(1), data["ordinal"])
    )
    out, _, _ = jax.jit(model.apply)({"params": params["vae"]}, to_float(video), noise)
    frames = (jnp.asarray(x).reshape(6, 16, 16, 3) for x in (out, to_float(video)))
    want = jax.jit(net.apply)({"params": frozen["lpips"]}, *frames).reshape(2, 3).mean(1).sum()
    found, _, sums = jax.jit(objective.loss)(params, frozen, data, jax.random.key(1))
    without, _, _ = jax.jit(plain.loss)(params, {}, data, jax.random.key(1))
    np.testing.assert_allclose(sums["lpips"], want, rtol=1e-4)
    np.testing.assert_allclose(found, without + 0.5 * want, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lpips_weight": -1.0}, "vae.lpips_weight"),
        ({"lpips_net": "squeeze"}, "alex, vgg"),
        ({"lpips_weight": 1.0}, "pip install"),
    ],
)
def test_losses_that_are_not_possible_are_refused(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = default()
    config.vae.update(changes)
    with pytest.raises(UserError, match=words):
        joined.check(config)


def test_later_losses_change_no_older_digest() -> None:
    config = default()
    old = stage_fields(config, "vae")
    assert not [name for name in old if "lpips" in name or "advers" in name or "discrim" in name]
    config.vae.lpips_weight = 1.0
    assert stage_fields(config, "vae") == old | {"vae.lpips_weight": 1.0}
