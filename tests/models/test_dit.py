"""The transformer's promises: levels a token, text by shot, packed rows, one stack for all runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.errors import UserError
from vdit.models.dit import PRESETS, DiT, skipped, without_attention
from vdit.nn.modulation import SUMMED_SLOTS
from vdit.tokens import Layout, drop_text, grid_positions, latent_times, text_condition

GRID = (3, 2, 2)
LENGTH = 12


@functools.partial(jax.jit, static_argnums=0)
def run(model: DiT, params, x, layout, condition):
    return model.apply(params, x, layout, condition)


@functools.partial(jax.jit, static_argnums=0)
def init(model: DiT, x, layout, condition):
    return model.init(jax.random.key(1), x, layout, condition)


def layout(batch: int, given: int = 0) -> Layout:
    position = grid_positions(latent_times(3, 4, 10.0), 2, 2)
    slot = jnp.zeros((batch, LENGTH), jnp.int32).at[:, :given].set(1)
    shot = jnp.ones((batch, LENGTH), jnp.int32)
    return Layout(jnp.tile(jnp.asarray(position)[None], (batch, 1, 1)), slot, shot, None, GRID)


def condition(batch: int, level: float = 500.0):
    text = jax.random.normal(jax.random.key(3), (batch, 5, 6))
    mask = jnp.arange(5)[None] < jnp.arange(2, 2 + batch)[:, None]
    levels = jnp.tile(jnp.array([[level, 0.0]]), (batch, 1))
    return text_condition(text[:, None], mask[:, None], text.mean(1)[:, None], levels)


@pytest.fixture(scope="module")
def made():
    model = DiT(width=24, depth=2, heads=2)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 4))
    params = init(model, x, layout(2), condition(2))
    return model, shaken(params), x


@pytest.fixture(scope="module", params=["cross", "context"])
def either(request: pytest.FixtureRequest, made):
    model, params, x = made
    if request.param == "cross":
        return made
    model = model.clone(text="context")
    return model, shaken(init(model, x, layout(2), condition(2))), x


def shaken(params):
    """Parameters with noise added: zero-initialised gates would hide everything behind them."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def test_starts_at_zero_and_a_block_at_identity() -> None:
    model = DiT(width=24, depth=2, heads=2)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 4))
    params = init(model, x, layout(2), condition(2))
    assert jnp.abs(run(model, params, x, layout(2), condition(2))).max() == 0


@pytest.mark.parametrize("choice", [{"unroll": 2}, {"remat": "full"}, {"remat": "dots"}])
def test_unroll_and_remat_change_nothing(made, choice) -> None:
    model, params, x = made
    other = model.clone(**choice)

    def loss(params, model):
        return jnp.square(run(model, params, x, layout(2, 4), condition(2))).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    want, got = gradient(params, model), gradient(params, other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), want, got)


def test_all_layers_are_stacked(made) -> None:
    _, params, _ = made
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(params["params"]["blocks"]))


def test_a_token_is_modulated_by_its_own_level(made) -> None:
    """One level for all by the broadcast path equals the same level in every slot."""
    model, params, x = made
    both = condition(2)
    both = both.replace(level=both.level.at[:, 1].set(500.0))
    one = both.replace(level=both.level[:, :1], pooled=both.pooled[:, :1])
    np.testing.assert_allclose(
        run(model, params, x, layout(2, 4), both),
        run(model, params, x, layout(2), one),
        atol=1e-5,
    )
    other = run(model, params, x, layout(2, 4), condition(2))
    assert jnp.abs(other - run(model, params, x, layout(2), one)).max() > 1e-3


def test_few_and_many_levels_modulate_alike(made) -> None:
    """The sum over a few levels equals the product with a table of many."""
    model, params, x = made
    few = condition(2)
    many = dataclasses.replace(
        few,
        level=jnp.tile(few.level, (1, SUMMED_SLOTS)),
        pooled=jnp.tile(few.pooled, (1, SUMMED_SLOTS, 1)),
    )
    assert few.level.shape[1] <= SUMMED_SLOTS < many.level.shape[1]
    here = layout(2, given=4)
    np.testing.assert_allclose(
        run(model, params, x, here, few), run(model, params, x, here, many), atol=1e-5
    )


@pytest.mark.parametrize("slots", [2, SUMMED_SLOTS + 2])
def test_what_is_modulated_by_levels_keeps_no_more_for_its_gradient_than_by_one(
    made, slots: int
) -> None:
    """A token's own shift, scale and gate are made again from its row's."""
    model, params, x = made
    two = condition(2)

    def kept(levels: int) -> int:
        """Arrays of a token's width that the stack's layers keep."""
        told = dataclasses.replace(
            two,
            level=jnp.tile(two.level[:, :1], (1, levels)),
            pooled=jnp.tile(two.pooled[:, :1], (1, levels, 1)),
        )
        back = jax.vjp(lambda params: model.apply(params, x, layout(2), told), params)[1]
        shape = model.depth, 2, LENGTH, 24
        return sum(leaf.shape == shape for leaf in jax.tree.leaves(back))

    assert kept(slots) == kept(1) > 0


def test_one_shot_is_one_caption(made) -> None:
    """A clip's caption alone, a shot's alone, and both in shots that say the same."""
    model, params, x = made
    text = jax.random.normal(jax.random.key(3), (2, 1, 5, 6))
    mask = jnp.arange(5)[None, None] < jnp.array([2, 3])[:, None, None]
    text = jnp.where(mask[..., None], text, 0)
    pooled = text.sum(2) / mask.sum(2)[..., None]
    level = jnp.tile(jnp.array([[500.0, 0.0]]), (2, 1))

    def pair(first, second):
        return [jnp.concatenate(parts, 1) for parts in zip(first, second, strict=True)]

    clip = (text, mask, pooled)
    none = tuple(jnp.zeros_like(part) for part in clip)
    here = layout(2, 4)
    want = run(model, params, x, here, text_condition(*clip, level))
    for captions in (pair(clip, none), pair(none, clip), pair(none, pair(clip, clip))):
        got = run(model, params, x, here, text_condition(*captions, level))
        np.testing.assert_allclose(got, want, atol=1e-5)
    told = text_condition(*pair(none, pair(clip, clip)), level)
    half = jnp.arange(LENGTH)[None] >= LENGTH // 2  # the later tokens in a second shot
    two = here.replace(slot=here.slot + 2 * half, shot=here.shot + half)
    np.testing.assert_allclose(run(model, params, x, two, told), want, atol=1e-5)


def test_padding_of_the_text_has_no_influence_and_dropped_text_none_at_all(either) -> None:
    model, params, x = either
    told = condition(2)

    def value(text, drop):
        dropped = drop_text(told.replace(text=text), jnp.full((2,), drop))
        return jnp.square(run(model, params, x, layout(2), dropped)).sum()

    seen = jnp.abs(jax.jit(jax.grad(value))(told.text, False)).sum(-1) > 0
    np.testing.assert_array_equal(seen, (told.shot > 0) & ~told.null)
    assert jnp.abs(jax.jit(jax.grad(value))(told.text, True)).max() == 0


def test_text_in_the_row_has_no_order_and_is_one_caption() -> None:
    """Words stand at no place of the video; they see it, and each other."""
    model = DiT(width=24, depth=2, heads=2, text="context")
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 4))
    told = condition(2)
    params = shaken(init(model, x, layout(2), told))
    assert "cross" not in params["params"]["blocks"]["joint"]
    assert sorted(params["params"]["blocks"]["joint"]) == ["adaln", "attention", "mlp"]
    out = run(model, params, x, layout(2), told)
    turned = told.replace(**{n: getattr(told, n)[:, ::-1] for n in ("text", "shot", "null")})
    np.testing.assert_allclose(run(model, params, x, layout(2), turned), out, atol=2e-5)
    longer = told.replace(
        text=jnp.pad(told.text, ((0, 0), (0, 3), (0, 0)), constant_values=1.0),
        shot=jnp.pad(told.shot, ((0, 0), (0, 3))),
        null=jnp.pad(told.null, ((0, 0), (0, 3))),
    )
    np.testing.assert_allclose(run(model, params, x, layout(2), longer), out, atol=2e-5)
    level, pooled = jnp.tile(told.level, (1, 2)), jnp.tile(told.pooled, (1, 2, 1))
    shots = told.replace(level=level, pooled=pooled)
    with pytest.raises(UserError, match="one caption a sample"):
        run(model, params, x, layout(2), shots)
    with pytest.raises(UserError, match="joint is allowed"):
        run(model.clone(axes="factorised"), params, x, layout(2), told)


def test_text_reaches_only_its_shot() -> None:
    """Two shots in a clip: a token sees its own shot's caption (by cross-attention)."""
    model = DiT(width=24, depth=1, heads=2)
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, 4))
    base = layout(1)
    two = base.replace(shot=jnp.where(jnp.arange(LENGTH)[None] < 6, 1, 2))
    text = jax.random.normal(jax.random.key(3), (1, 6, 6))
    told = condition(1).replace(
        text=text,
        shot=jnp.array([[1, 1, 1, 2, 2, 2]]),
        null=jnp.array([[True, False, False, True, False, False]]),
    )
    params = shaken(init(model, x[:1], two, told))

    def value(text, token):
        out = run(model, params, x[:1], two, told.replace(text=text))
        return jnp.square(out[0, token]).sum()

    for token, own in ((0, [1, 2]), (11, [4, 5])):
        seen = jnp.abs(jax.jit(jax.grad(value))(text, token)).sum(-1)[0] > 1e-4
        assert np.flatnonzero(seen).tolist() == own


def test_a_packed_row_equals_its_samples_alone(either) -> None:
    model, params, x = either
    told = condition(2)
    alone = run(model, params, x, layout(2), told)
    one = layout(1)
    packed = Layout(
        position=jnp.concatenate([one.position] * 2, 1),
        slot=jnp.concatenate([one.slot, one.slot + 2], 1),
        shot=jnp.concatenate([one.shot, one.shot + 1], 1),
        segment=jnp.concatenate([one.shot, one.shot + 1], 1),
    )
    row = told.replace(
        text=told.text.reshape(1, -1, 6),
        shot=jnp.where(told.shot > 0, told.shot + jnp.arange(2)[:, None], 0).reshape(1, -1),
        null=told.null.reshape(1, -1),
        pooled=told.pooled.reshape(1, 4, 6),
        level=told.level.reshape(1, 4),
    )
    out = run(model, params, x.reshape(1, -1, 4), packed, row)
    np.testing.assert_allclose(out.reshape(alone.shape), alone, atol=2e-5)


def test_factorised_blocks_attend_over_space_then_time() -> None:
    model = DiT(width=24, depth=2, heads=2, axes="factorised")
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, 4))
    params = init(model, x, layout(1), condition(1))
    params = shaken(params)

    def value(x):
        return jnp.square(run(model, params, x, layout(1), condition(1))[0, 0]).sum()

    # Space first, then time: the first token sees the first place's row of times, each of which
    # has seen its whole frame.
    assert (jnp.abs(jax.jit(jax.grad(value))(x)).sum(-1) > 0).all()
    with pytest.raises(UserError, match="multiple of 2"):
        model.clone(depth=3).init(jax.random.key(1), x, layout(1), condition(1))
    with pytest.raises(UserError, match="dense"):
        run(model, params, x, layout(1).replace(grid=None), condition(1))


def test_windows_see_their_neighbourhood_and_the_next_layer_sees_further() -> None:
    tall = layout(1)
    assert tall.grid is not None
    shares = []
    for depth in (1, 2):
        model = DiT(width=24, depth=depth, heads=2, axes="windowed", window=(1, 1, 1))
        x = jax.random.normal(jax.random.key(0), (1, LENGTH, 4))
        params = shaken(init(model, x, tall, condition(1)))
        value = jax.grad(lambda x, m=model, p=params: run(m, p, x, tall, condition(1))[0, 0].sum())
        shares.append((jnp.abs(jax.jit(value)(x)).sum(-1) > 0).mean())
    near = np.prod([min(size, 2) for size in tall.grid]) / LENGTH
    far = np.prod([min(size, 3) for size in tall.grid]) / LENGTH
    np.testing.assert_allclose(shares, [near, far])
    with pytest.raises(UserError, match="dense"):
        run(model, params, x, tall.replace(grid=None), condition(1))


@pytest.mark.parametrize("part, alone", [((0.0, 1.0), True), ((0.0, 0.5), False)])
def test_without_attention_a_token_knows_no_other(made, part, alone) -> None:
    model, params, x = made
    weak = {"params": without_attention(params["params"], part)}
    told = layout(2), condition(2)
    before, after = (run(model, weak, value, *told) for value in (x, x.at[:, 3].add(1.0)))
    others = np.arange(LENGTH) != 3
    assert np.array_equal(before[:, others], after[:, others]) == alone
    assert (before[:, 3] != after[:, 3]).any()


def test_the_skipped_part_is_of_any_depth() -> None:
    middle = 0.25, 0.75
    assert [skipped(depth, middle) for depth in (1, 2, 4, 6)] == [[0], [0], [1, 2], [1, 2, 3]]
    assert skipped(28, middle) == list(range(7, 21))
    assert skipped(4, (0.4, 0.5)) == []


@pytest.mark.parametrize("preset, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_presets_have_about_the_paper_s_parameters(preset: str, millions: float) -> None:
    """Table 1 of the DiT paper, whose blocks have no cross-attention: that is left out here."""
    model = DiT(**PRESETS[preset])
    x = jnp.zeros((1, LENGTH, 16))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, layout(1), condition(1))["params"]
    shapes["blocks"]["joint"].pop("cross")
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) / 1e6
    assert abs(count - millions) / millions < 0.03
