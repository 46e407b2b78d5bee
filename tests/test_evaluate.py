"""Scores of pixels against their definitions."""

import numpy as np

from vdit.evaluate import gain, psnr, ssim


def clips(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (2, 3, 16, 16, 3), dtype=np.uint8)


def test_psnr_of_a_known_error() -> None:
    x = np.full((1, 2, 4, 4, 3), 100, np.uint8)
    np.testing.assert_allclose(psnr(x + np.uint8(10), x), 20 * np.log10(255 / 10))


def test_ssim_is_one_for_the_same_and_falls_with_noise() -> None:
    x = clips()
    np.testing.assert_allclose(ssim(x, x), 1.0)
    near = np.clip(x.astype(int) + clips(1) % 20 - 10, 0, 255).astype(np.uint8)
    assert (ssim(clips(2), x) < ssim(near, x)).all() and (ssim(near, x) < 1).all()


def test_ssim_of_a_constant_shift_has_its_closed_form() -> None:
    """Without variance SSIM is its luminance term (Wang et al. 2004, Eq. 6)."""
    x, y = np.full((1, 1, 12, 12, 3), 50, np.uint8), np.full((1, 1, 12, 12, 3), 80, np.uint8)
    c1 = (0.01 * 255) ** 2
    want = (2 * 50 * 80 + c1) / (50**2 + 80**2 + c1)
    np.testing.assert_allclose(ssim(x, y), want, rtol=1e-6)


def test_gain_is_of_all_clips_together_whatever_stands_still() -> None:
    """A clip that a frozen frame gets exactly right counts as little error, not as many dB."""
    near, still = np.full(50, 10.0), np.full(50, 40.0)
    assert abs(gain(near, still)["gain_db"] - 10 * np.log10(4)) < 1e-9
    near[0] = still[0] = 0.0
    made = gain(near, still)
    assert abs(made["gain_db"] - 10 * np.log10(4)) < 1e-9
    assert made["gain_db_low"] <= made["gain_db"] <= made["gain_db_high"]
    some = gain(np.random.default_rng(1).uniform(1, 20, 50), still)
    assert some["gain_db_low"] < some["gain_db"] < some["gain_db_high"]
