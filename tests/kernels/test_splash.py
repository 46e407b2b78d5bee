"""The TPU's kernel, interpreted: xla's numbers and gradients, at lengths that it must pad."""

import functools

import jax.numpy as jnp
import pytest
from beside import beside_xla, difference

from vdit.kernels import splash

INTERPRETED = functools.partial(splash.attend, interpret=True)


@pytest.mark.parametrize(
    ("length", "keys", "masked"),
    [(128, 128, False), (128, 128, True), (130, 9, False), (5, 140, True)],
)
def test_output_and_gradients_are_xla_s(length: int, keys: int, masked: bool) -> None:
    for mine, want in zip(*beside_xla(INTERPRETED, length, keys, masked), strict=True):
        assert mine.dtype == jnp.float32 and mine.shape == want.shape
        assert difference(mine, want) < 1e-5


def test_narrow_operands_are_within_their_rounding() -> None:
    mine, want = beside_xla(INTERPRETED, 20, 140, True, jnp.bfloat16)
    assert [x.dtype for x in mine] == [jnp.float32] + 3 * [jnp.bfloat16]
    assert all(difference(a, b) < 2**-7 for a, b in zip(mine, want, strict=True))


def test_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splash, "BLOCK", 128)
    several = functools.partial(splash.attend, interpret=True)
    for mine, want in zip(*beside_xla(several, 150, 260, True), strict=True):
        assert difference(mine, want) < 1e-5
