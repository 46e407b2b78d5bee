"""The truth as a target of tokens: the same for dense batches and packed rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import base, unet
from vdit.config.denoiser import targets
from vdit.data.packing import draw_sample, pack
from vdit.denoiser import Denoiser
from vdit.diffusion.schedule import process, sample_times
from vdit.models.dit import DiT
from vdit.objectives.auxiliary import auxiliary, truth_target
from vdit.objectives.diffusion import Dense
from vdit.objectives.packed import Packed
from vdit.published.text_folder import encoder
from vdit.tokens import Budget, pattern_shares, patterns

N, P, FPS, PATCH = 4, 2, 10.0, (2, 1)
NETWORK = DiT(width=16, depth=2, heads=2)
DENOISER = Denoiser(
    NETWORK, process("flow"), "flow", encoder("learned", vocab=300, width=16, depth=1, heads=2),
    PATCH,
)  # fmt: skip
TIMES = functools.partial(sample_times, process("flow"))
FROZEN = {"mean": jnp.zeros(3), "std": jnp.ones(3)}


def test_packed_rows_and_appended_spans_have_the_targets_of_dense_batches() -> None:
    """A clip whose end is given by a span of its own, dense, and second in a packed row."""
    rng, table = np.random.default_rng(0), patterns(N, P, FPS)
    element = {
        "latent": rng.normal(size=(N + 3, 4, 4, 3)).astype(np.float32),
        "truth": rng.uniform(0, 2, (N + 3, 2, 16)).astype(np.float16),
    }
    words, mask = np.ones(3, np.int32), np.ones(3, bool)
    shares = {"suffix": 1.0}
    batch = {
        "latent": element["latent"][None], "truth": element["truth"][None], "ids": words[None],
        "mask": mask[None], "ordinal": np.zeros(1, np.uint32),
    }  # fmt: skip
    sample = draw_sample(element, words, mask, 7, table, shares, 0, ("truth",))
    budget = Budget(tokens=72, samples=2, text=6, caption=3)
    row = {name: value[None] for name, value in pack([sample, sample], budget, PATCH).items()}
    row["truth"][:, 64:] = np.nan  # padding

    def target(source: Dense | Packed, data: Any) -> jax.Array:
        batch = data | {"features": np.zeros((*data["ids"].shape, 16), np.float32)}

        @jax.jit
        def draw(batch: Any) -> jax.Array:
            drawn = source.draw(DENOISER, {}, FROZEN, batch, jax.random.key(1), ("truth",))
            return truth_target(drawn.targets["truth"], drawn.layout, PATCH)

        return draw(batch)

    one = target(Dense(table, pattern_shares(table, shares), TIMES, 0.0), batch)
    two = target(Packed(budget, TIMES, 0.0), row)
    assert one.shape == (1, 32, 16) and float(jnp.abs(one).max()) > 0.1
    np.testing.assert_allclose(two[:, 32:64], one, atol=1e-5)
    assert not two[:, 64:].any()
    # By hand: the last token, of the span's last latent frame, at row 1 and column 3 of tokens.
    there, row_, column = element["truth"][N + 2, :, :3].astype(np.float64).T
    near = there * np.exp(-((row_ / 2 - 1.5) ** 2 + (column - 3.5) ** 2) / (2 * 0.7**2))
    np.testing.assert_allclose(one[0, -1, 0], near.sum() / np.sqrt(0.1 * np.pi * 0.49), rtol=1e-4)


def test_it_reads_half_of_the_depth_unless_a_layer_is_named() -> None:
    (one,), (two,) = (auxiliary(chosen, DiT(width=16, depth=4, heads=2))
                      for chosen in ((("truth", 0.7),), (("truth", 0.7, 3),)))  # fmt: skip
    assert one.row.hidden == (2,) and two.row.hidden == (3,) and one.row.targets == ("truth",)
    assert auxiliary((("truth", 0.0),), NETWORK) == []


@pytest.mark.parametrize(
    "config, source, names",
    [
        (base.get_config("smoke"), "world", ("truth",)),
        (base.get_config("smoke"), "folder", ()),
        (unet.get_config("smoke"), "world", ()),
    ],
    ids=["world", "folder", "unet"],
)
def test_truth_is_the_default_where_there_is_one(
    config: ConfigDict, source: str, names: tuple[str, ...]
) -> None:
    config.data.source = source
    assert targets(config) == names
    config.dit.auxiliary = ()
    assert targets(config) == ()
