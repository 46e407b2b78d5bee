"""Kernels kept as narrow as their products have them: the same videos, to the bit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import base
from tools.planning.step import sampling, text_encoder
from vdit.model import Inputs, narrow
from vdit.nn.narrow import operand_dtypes
from vdit.sample import Model


def draw(tree: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), tree)


def made(dtype: str) -> tuple[Any, Any, Any]:
    """A tiny model, guided and pushed; the shapes that the planner has, and arguments."""
    config = base.get_config("smoke")
    config.run.dtype, config.sample.batch, config.sample.steps = dtype, 1, 2
    config.sample.guidance, config.sample.push = 2.0, 0.5
    planned = sampling(config)
    params, (mask, features, starts, clean, given, times, seeds, label, *_) = planned.arguments
    inputs = Inputs(
        np.ones(mask.shape, bool), draw(features), starts, draw(clean), np.zeros(given.shape, bool),
        np.arange(times.shape[1], dtype=np.float32)[None], np.zeros(seeds.shape, seeds.dtype),
        label,
    )  # fmt: skip
    encoder = text_encoder(config, None, None)
    return Model(config, None, encoder, draw(params), {}), planned, inputs  # type: ignore[arg-type]


def test_sampling_with_narrow_kernels_is_equal_to_the_bit() -> None:
    model, planned, inputs = made("bfloat16")
    wide = model.params.copy()
    expected = model.scan.compiled(None)(wide, inputs, settings=planned.settings)
    got = model.scan(inputs, planned.settings)
    assert bool((expected == got).all()) and float(jnp.abs(got).max()) > 0.1
    kept, shapes = (jax.tree.leaves(tree) for tree in (model.params, planned.arguments[0]))
    assert [x.dtype for x in kept] == [x.dtype for x in shapes]
    # Kernels of attention and MLP; those of modulation stay, six of 22 width² a layer.
    narrowed = sum(x.size for x in kept if x.dtype == jnp.bfloat16)
    assert narrowed / sum(x.size for x in jax.tree.leaves(model.params["dit"])) > 0.5


def test_float32_stays_as_it_is() -> None:
    model, planned, inputs = made("float32")
    run = functools.partial(model.scan.compiled(None), settings=planned.settings)
    before = jax.tree.leaves(model.params)
    narrow(model.params, operand_dtypes(run, model.params, inputs))
    assert all(a is b for a, b in zip(before, jax.tree.leaves(model.params), strict=True))
