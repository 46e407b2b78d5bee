"""Packed rows: a sample's loss and gradient are its own, wherever and beside whatever it lies."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.data.packing import Sample, draw_sample, pack
from vdit.denoiser import Denoiser
from vdit.diffusion.schedule import process, sample_times
from vdit.errors import UserError
from vdit.models.dit import DiT
from vdit.objectives.diffusion import Dense, denoising_objective
from vdit.objectives.objective import Objective
from vdit.objectives.packed import Packed
from vdit.published.text_folder import encoder
from vdit.tokens import (
    Budget,
    dense_tokens,
    drop_text,
    extra_spans,
    pattern_shares,
    patterns,
    text_condition,
)

BUDGET = Budget(tokens=60, samples=4, text=12, caption=5)
PATCH = (1, 2)
FROZEN = {"mean": jnp.array([0.5, -1.0, 0.0]), "std": jnp.array([2.0, 1.0, 0.5])}
KEY = jax.random.key(5)
MODEL = DiT(width=16, depth=1, heads=2)
TEXT = encoder("learned", vocab=300, width=16, depth=1, heads=2)
FLOW = process("flow")
DENOISER = Denoiser(MODEL, FLOW, "flow", TEXT, PATCH)
TEXT_DROP = 0.4


def times(u: jax.Array) -> jax.Array:
    return sample_times(FLOW, u)


def objective(**options: Any) -> Objective:
    options = {"budget": BUDGET, "text_drop": TEXT_DROP, **options}
    return denoising_objective(DENOISER, Packed(sample_times=times, **options))


def sample(
    frames: int, height: int, width: int, fps: float, words: int, ordinal: int, pattern: str
) -> Sample:
    """A clip of which the spans of a pattern are given; behind its latents lie those of spans."""
    rng = np.random.default_rng(ordinal)
    stored = frames + sum(1 + count // 4 for _, count in extra_spans(frames, 4))
    latent = rng.normal(size=(stored, height, width, 3)).astype(np.float32)
    text = rng.integers(1, 300, words).astype(np.int32)
    told = np.arange(words) != (2 if words == 5 else -1)  # in two chunks, or in one
    table = patterns(frames, 4, fps)
    return draw_sample({"latent": latent}, text, told, ordinal, table, {pattern: 1.0}, 0)


# Images and videos of several aspects, lengths and frame rates, of every pattern of given spans;
# one has no caption.
SAMPLES = [
    sample(3, 2, 4, 10.0, 5, 3, "text"),
    sample(1, 4, 2, 10.0, 2, 14, "text"),
    sample(4, 2, 6, 24.0, 1, 15, "between"),
    sample(1, 3, 6, 10.0, 0, 9, "text"),
    sample(2, 1, 8, 30.0, 3, 2, "prefix"),
    sample(5, 1, 4, 12.0, 2, 21, "suffix"),
    sample(4, 2, 2, 8.0, 2, 5, "last"),
    sample(4, 1, 6, 24.0, 3, 6, "first_last"),
]
ROWS = [[0, 1, 3, 4], [2, 1, 4], [1], [3, 2], [0, 2], [5, 6, 7, 2], [7, 4, 5]]


def batch(*rows: Sequence[int]) -> dict[str, np.ndarray]:
    made = [pack([SAMPLES[i] for i in row], BUDGET, PATCH) for row in rows]
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def value_and_grad(objective: Objective, frozen: Any = None) -> Any:
    """A jitted function of parameters and batch: ((loss, weight), gradient)."""

    def total(params: Any, data: Any) -> tuple[jax.Array, jax.Array]:
        loss, weight, _ = objective.loss(params, frozen or FROZEN, data, KEY)
        return loss, weight

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def perturbed(params: Any) -> Any:
    """No gate is at zero any more, so that everything behind it shows."""
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)


@pytest.fixture(scope="module")
def start() -> Any:
    return jax.jit(objective().init)(jax.random.key(0), batch([0, 1]))


@pytest.fixture(scope="module")
def made(start: Any) -> tuple[Any, Any]:
    return value_and_grad(objective()), perturbed(start)


def dropped() -> np.ndarray:
    """Whether each sample's caption is dropped."""
    keys = [jax.random.fold_in(KEY, own.ordinal) for own in SAMPLES]
    numbers = np.array([jax.random.uniform(jax.random.split(key)[0], (2,)) for key in keys])
    return numbers[:, 1] < TEXT_DROP


def close(got: Any, want: Any, relative: float = 1e-5) -> None:
    """Every array to `relative` of its own norm."""

    def one(path: Any, a: jax.Array, b: jax.Array) -> None:
        size = float(jnp.linalg.norm(b.reshape(-1)))
        off = float(jnp.linalg.norm((a - b).reshape(-1)))
        assert off <= relative * size, f"{jax.tree_util.keystr(path)}: {off} of {size}"

    jax.tree_util.tree_map_with_path(one, got, want)


def test_a_packed_row_is_the_sum_of_its_samples_alone(made: Any) -> None:
    value, params = made
    alone = [value(params, batch([i])) for i in range(len(SAMPLES))]
    for row in ROWS:
        summed = jax.tree.map(lambda *parts: sum(parts), *(alone[i] for i in row))
        close(value(params, batch(row)), summed)


@pytest.mark.parametrize("row", [ROWS[0], ROWS[5]])
def test_each_sample_of_a_row_has_its_own_loss_and_gradient(made: Any, row: list[int]) -> None:
    """All others of the row are made given tokens: they are there, but have no loss."""
    value, params = made
    for place, number in enumerate(row):
        data = batch(row)
        data["given"] |= (data["segment"] != place + 1) & (data["segment"] > 0)
        close(value(params, data), value(params, batch([number])))


def test_the_order_of_a_row_changes_nothing(made: Any) -> None:
    value, params = made
    want = value(params, batch(ROWS[0]))
    for order in ([3, 1, 0, 2], [1, 2, 3, 0]):
        close(value(params, batch([ROWS[0][i] for i in order])), want)


def test_rows_of_a_batch_add_up(made: Any) -> None:
    value, params = made
    want = jax.tree.map(jnp.add, value(params, batch(ROWS[0])), value(params, batch(ROWS[1])))
    close(value(params, batch(*ROWS[:2])), want)


@pytest.mark.parametrize("content", [np.nan, np.inf, 1e30])
def test_padding_has_no_influence(made: Any, content: float) -> None:
    value, params = made
    clean, data = batch(ROWS[1]), batch(ROWS[1])
    nothing = data["segment"] == 0
    assert nothing.any() and (data["text"] == 0).any()
    data["tokens"][nothing] = content
    data["position"][nothing] = content
    data["given"][nothing] = True
    data["ids"][data["text"] == 0] = 299
    (loss, weight), gradient = value(params, data)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    jax.tree.map(np.testing.assert_array_equal, ((loss, weight), gradient), value(params, clean))


def test_one_compilation_serves_all_shapes(made: Any) -> None:
    value, params = made
    value(params, batch([0]))
    before = value._cache_size()
    losses = {float(value(params, batch(row))[0][0]) for row in ROWS}
    assert len(losses) == len(ROWS)
    assert value._cache_size() == before


def test_only_wanted_real_tokens_weigh(made: Any) -> None:
    value, params = made
    for row in ROWS:
        channels = 3 * PATCH[0] * PATCH[1]
        want = 0
        for own in (SAMPLES[i] for i in row):
            _, height, width, _ = own.latent.shape
            want += (~own.given).sum() * height * width // 2 * channels
        assert value(params, batch(row))[0][1] == want


@pytest.mark.parametrize("number", [0, 2, 4, 6])
def test_a_packed_sample_has_the_loss_of_a_dense_one(made: Any, number: int) -> None:
    """Worked out from the dense layout, with the sample's random numbers spelled out here."""
    value, params = made
    own = SAMPLES[number]
    choice_key, noise_key = jax.random.split(jax.random.fold_in(KEY, own.ordinal))
    _, drop_u = jax.random.uniform(choice_key, (2,))
    time_u = own.ordinal * 0x9E3779B9 % 2**32 / 2**32  # multiples of the golden ratio
    frames = len(own.times)
    given = own.given[None]
    clean = (own.latent - FROZEN["mean"][None, None, None]) / FROZEN["std"][None, None, None]
    x0, layout = dense_tokens(clean[None], PATCH, jnp.asarray(own.times)[None], given)
    eps = jnp.stack(
        [jax.random.normal(jax.random.fold_in(noise_key, i), (6,)) for i in range(x0.shape[1])]
    )[None]
    t = times(time_u)
    wanted = ~np.repeat(given, x0.shape[1] // frames, axis=1)[..., None]
    x_t = jnp.where(wanted, (1 - t) * x0 + t * eps, x0)
    ids = jnp.zeros((1, 5), jnp.int32).at[0, : len(own.text)].set(own.text)
    mask = jnp.zeros((1, 5), bool).at[0, : len(own.text)].set(own.mask)
    features = TEXT.apply(params["text"], ids, mask)
    level = 1000.0 * jnp.stack([t, 0.0 * t])[None]
    pooled = TEXT.pool(features, mask)
    told = text_condition(features[:, None], mask[:, None], pooled[:, None], level)
    told = drop_text(told, (drop_u < TEXT_DROP)[None])
    out: Any = jax.jit(MODEL.apply)({"params": params["dit"]}, x_t, layout, told)
    want = jnp.where(wanted, jnp.square(out - (eps - x0)), 0.0).sum()
    (loss, weight), _ = value(params, batch([number]))
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert weight == wanted.sum() * 6


def test_the_samples_cover_given_and_dropped() -> None:
    """The proofs here see samples with and without given spans, told and dropped."""
    known = {tuple(np.flatnonzero(own.given)) for own in SAMPLES if len(own.times) == 4}
    assert known == {(0, 2, 3), (3,), (0, 3)}  # between, last, first and last
    captioned = dropped()[[len(own.text) > 0 for own in SAMPLES]]
    assert captioned.any() and not captioned.all()


def test_cached_features_serve_as_ids_do(made: Any) -> None:
    value, params = made
    data = batch(ROWS[0])
    ids = np.zeros((4, 5), np.int32)
    mask = np.zeros((4, 5), bool)
    for place, number in enumerate(ROWS[0]):
        words = SAMPLES[number].text
        ids[place, : len(words)], mask[place, : len(words)] = words, SAMPLES[number].mask
    features = np.asarray(TEXT.apply(params["text"], ids, mask))
    samples = [
        SAMPLES[number]._replace(text=features[place, : len(SAMPLES[number].text)])
        for place, number in enumerate(ROWS[0])
    ]
    cached = {name: value[None] for name, value in pack(samples, BUDGET, PATCH).items()}
    assert "ids" not in cached
    got, weight, _ = jax.jit(objective().loss)(params, FROZEN, cached, KEY)
    (want, same), _ = value(params, data)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert weight == same


def test_packed_and_dense_training_begin_with_the_same_parameters(start: Any) -> None:
    table = patterns(3, 4, 10.0)
    rows = Dense(table, pattern_shares(table, {"text": 1.0}), times, text_drop=0.0)
    dense = denoising_objective(DENOISER, rows)
    data = {
        "latent": SAMPLES[0].latent[None],
        "ids": np.ones((1, 5), np.int32),
        "mask": np.ones((1, 5), bool),
        "ordinal": np.zeros(1, np.uint32),
    }
    want = jax.jit(dense.init)(jax.random.key(0), data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), start, want)


def test_patterns_are_drawn_by_their_shares_and_hold_what_the_dense_table_says() -> None:
    table, shares = patterns(4, 4, 10.0), {"text": 0.4, "prefix": 0.3, "suffix": 0.2, "last": 0.1}
    element, words = {"latent": np.arange(7.0)[:, None, None, None]}, np.ones(1, np.int32)
    count = dict.fromkeys(table.names, 0)
    for ordinal in range(2000):
        got = draw_sample(element, words, words > 0, ordinal, table, shares, 5)
        again = draw_sample(element, words, words > 0, ordinal, table, shares, 5)
        np.testing.assert_array_equal(got.latent, again.latent)
        source = got.latent[:, 0, 0, 0].astype(int)
        rows = (table.source == source).all(1) & (table.given == got.given).all(1)
        (pattern,) = np.flatnonzero(rows)
        np.testing.assert_array_equal(got.times, table.times[source])
        count[table.names[pattern]] += 1
    for name, share in zip(table.names, pattern_shares(table, shares), strict=True):
        off = abs(count[name] - 2000 * share)
        assert off <= 4 * np.sqrt(2000 * share * (1 - share)), name
    prefix = {"text": 0.0, "prefix": 1.0}
    image = draw_sample(element, words, words > 0, 3, patterns(1, 4, 10.0), prefix, 5)
    assert len(image.latent) == 1 and not image.given.any()
    with pytest.raises(UserError, match="encoded without the spans"):
        element["latent"] = element["latent"][:4]
        draw_sample(element, words, words > 0, 0, table, {"suffix": 1.0}, 5)
