"""Processes: their curves, forward marginals, training times and sampling grids."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit.diffusion.schedule import (
    PROCESSES,
    RATIOS,
    Process,
    add_noise,
    half_log_snr,
    like,
    process,
    sample_times,
    seen,
    shifted,
    time_at,
    timesteps,
)
from vdit.errors import UserError

BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.cumprod(1.0 - BETAS)


@pytest.mark.parametrize("name", PROCESSES)
def test_curves_start_clean_and_are_monotonic(name: str) -> None:
    p = process(name)
    t = jnp.linspace(0.0, 1.0, 1001)
    alpha, sigma = p.alpha(t), p.sigma(t)
    assert (alpha[0], sigma[0]) == (1.0, 0.0)
    assert (np.diff(alpha) < 0).all() and (np.diff(sigma) > 0).all()
    assert sigma[-1] <= 1.0 and alpha[-1] < (0.069 if name == "scaled_linear" else 0.0064)
    if name != "flow":
        np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=2e-7)
    if p.points is None:
        assert (alpha[-1], sigma[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("name", PROCESSES)
def test_times_of_any_shape(name: str) -> None:
    p = process(name)
    curves = (p.alpha, p.sigma, p.d_alpha, p.d_sigma, p.network_time)
    read = jax.jit(lambda t: [curve(t) for curve in curves])
    t = jnp.linspace(0.0, 1.0, 6).reshape(1, 2, 3)
    for values, last in zip(read(t), read(t[0, 1, 2]), strict=True):
        assert values.shape == t.shape and values.dtype == jnp.float32 and last.shape == ()
        np.testing.assert_allclose(np.asarray(values)[0, 1, 2], last, rtol=1e-6)


@pytest.mark.parametrize("name", ["flow", "cosine"])
def test_derivatives_are_those_of_the_curves(name: str) -> None:
    p = process(name)
    t = jnp.linspace(0.0, 1.0, 11)
    for curve, derivative in ((p.alpha, p.d_alpha), (p.sigma, p.d_sigma)):
        np.testing.assert_allclose(jax.vmap(jax.grad(curve))(t), derivative(t), atol=1e-6)


def test_ddpm_table_is_the_papers() -> None:
    p = process("ddpm")
    t = jnp.arange(1001) / 1000
    np.testing.assert_allclose(p.alpha(t)[1:], np.sqrt(ALPHA_BAR), rtol=1e-7)
    np.testing.assert_allclose(p.sigma(t)[1:], np.sqrt(1 - ALPHA_BAR), rtol=1e-7)
    # Public weights see 0 .. 999 for the paper's 1 .. 1000; clean tokens have their own number.
    np.testing.assert_array_equal(p.network_time(t), np.arange(-1.0, 1000.0))
    # The derivatives integrate to the curves.
    for curve, slope in ((p.alpha, p.d_alpha), (p.sigma, p.d_sigma)):
        middle = (slope(t)[1:-1]).sum() / 1000
        ends = (curve(t)[-1] + curve(t)[-2] - curve(t)[1] - curve(t)[0]) / 2
        np.testing.assert_allclose(middle, ends, atol=1e-5)


def test_ddpm_marginal_is_the_forward_chain() -> None:
    """Eq. 2 applied t times gives Eq. 4's mean and variance."""
    p = process("ddpm")
    scale, variance = 1.0, 0.0
    for i, beta in enumerate(BETAS, 1):
        scale, variance = np.sqrt(1 - beta) * scale, (1 - beta) * variance + beta
        if i in (1, 2, 10, 500, 1000):
            t = jnp.full((), i / 1000)
            np.testing.assert_allclose(p.alpha(t), scale, rtol=1e-6)
            np.testing.assert_allclose(p.sigma(t) ** 2, variance, rtol=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_add_noise_has_its_marginal_at_each_tokens_level(name: str) -> None:
    """x0 (B, L, C), one level a token (B, L); clean tokens come back to the bit."""
    p, rng = process(name), np.random.default_rng(0)
    x0 = jnp.asarray(rng.normal(size=(2, 3, 1)) * np.ones((1, 1, 20000)), jnp.float32)
    eps = jnp.asarray(rng.normal(size=x0.shape), jnp.float32)
    t = jnp.array([[0.0, 0.2, 0.5], [0.7, 0.95, 1.0]])
    x_t = jax.jit(add_noise, static_argnums=0)(p, x0, eps, t)
    np.testing.assert_array_equal(x_t[0, 0], x0[0, 0])
    np.testing.assert_allclose(x_t.mean(-1), p.alpha(t) * x0[..., 0], atol=4.5 / 20000**0.5)
    np.testing.assert_allclose(x_t.std(-1), p.sigma(t), rtol=4.5 / 40000**0.5, atol=1e-5)


def test_like_appends_axes() -> None:
    x = jnp.zeros((2, 3, 4))
    assert like(jnp.zeros(()), x).shape == (1, 1, 1)
    assert like(jnp.zeros((2,)), x).shape == (2, 1, 1)
    assert like(jnp.zeros((2, 3)), x).shape == (2, 3, 1)
    assert like(1, x).dtype == jnp.float32


def test_training_times_of_ddpm_are_uniform_over_1_to_T() -> None:
    p = process("ddpm")
    u = (np.arange(4000) + 0.5) / 4000
    indices = np.round(np.asarray(sample_times(p, jnp.asarray(u, jnp.float32))) * 1000)
    np.testing.assert_array_equal(np.bincount(indices.astype(int)), [0] + [4] * 1000)
    ends = sample_times(p, jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))]))
    np.testing.assert_array_equal(ends, np.float32([1 / 1000, 1.0]))


@pytest.mark.parametrize("name", ["flow", "cosine"])
def test_training_times_of_continuous_processes(name: str) -> None:
    p = process(name)
    u = jnp.asarray((np.arange(10000) + 0.5) / 10000, jnp.float32)
    ends = jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))])
    options = [{}, {"shift": 3.0}, {"logit_normal": (0.3, 0.7)}]
    options += [{"shift": 3.0, "logit_normal": (0.3, 0.7)}, {"shift": 1.15}]
    draw = jax.jit(lambda u: [sample_times(p, u, **one) for one in options])
    even, moved, normal, both, _ = (np.asarray(t) for t in draw(u))
    np.testing.assert_allclose(np.sort(even), u, atol=1e-6)
    np.testing.assert_allclose(moved, 3 * even / (1 + 2 * even), atol=1e-6)
    logits = np.log(normal) - np.log1p(-normal)
    np.testing.assert_allclose([logits.mean(), logits.std()], [0.3, 0.7], atol=2e-3)
    np.testing.assert_allclose(both, 3 * normal / (1 + 2 * normal), atol=1e-6)
    for t in draw(ends):
        assert (t > 0).all() and (t <= 1).all()


@pytest.mark.parametrize("options", [{"shift": 5.0}, {"shift": 3.0, "logit_normal": (0.3, 0.7)}])
def test_times_between_two_are_those_of_all_that_lie_there(options: dict[str, Any]) -> None:
    """The same quantiles as of all times, cut to the range."""
    p, count = process("flow"), 20_000
    u = jnp.asarray((np.arange(count) + 0.5) / count, jnp.float32)
    every = np.sort(sample_times(p, u, **options))
    for low, high in ((0.0, 0.875), (0.875, 1.0), (0.2, 0.6)):
        found = np.sort(sample_times(p, u, **options, between=(low, high)))
        assert low <= found[0] and found[-1] <= high
        inside = every[(every >= low) & (every <= high)]
        quantiles = np.linspace(0.02, 0.98, 25)
        want = np.quantile(inside, quantiles)
        np.testing.assert_allclose(np.quantile(found, quantiles), want, atol=2e-3)
    with pytest.raises(UserError, match="times between"):
        sample_times(process("ddpm"), u, between=(0.5, 1.0))


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0])
def test_continuous_grid(shift: float) -> None:
    even = np.linspace(1.0, 0.0, 8)
    times = timesteps(process("flow"), 7, shift)
    np.testing.assert_allclose(times, shift * even / (1 + (shift - 1) * even), rtol=1e-6)
    assert (times[0], times[-1]) == (1.0, 0.0)


def test_discrete_grid() -> None:
    p = process("ddpm")
    index = np.round(np.asarray(timesteps(p, 1000)) * 1000)
    np.testing.assert_array_equal(index, np.arange(1000, -1, -1))
    np.testing.assert_array_equal(p.network_time(timesteps(p, 1000)), np.arange(999, -2, -1))
    np.testing.assert_array_equal(p.network_time(timesteps(p, 4)), [999, 749, 499, 249, -1])
    leading = p.network_time(timesteps(p, 3, spacing="leading"))
    np.testing.assert_array_equal(leading, [666, 333, 0, -1])
    uneven = np.asarray(timesteps(p, 7)) * 1000
    np.testing.assert_allclose(uneven, np.round(np.arange(7, -1, -1) * 1000 / 7), atol=1e-4)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("name", PROCESSES)
def test_grids_of_noise_levels(name: str, spacing: str) -> None:
    """EDM's Eq. 5 and even steps of log-SNR, from pure noise; on a table its nearest points."""
    p, steps = process(name), 12
    times = timesteps(p, steps, spacing=spacing)
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, steps + 1)
    least, most = RATIOS
    if p.points:
        ends = jnp.array([1 / p.points, 1.0])
        least, most = (float(v) for v in p.sigma(ends) / p.alpha(ends))
    share = np.linspace(0.0, 1.0, steps)
    want = most ** (1 - share) * least**share
    if spacing == "karras":
        want = (most ** (1 / 7) + share * (least ** (1 / 7) - most ** (1 / 7))) ** 7
    ratio = np.asarray(p.sigma(times[1:-1]) / p.alpha(times[1:-1]))
    np.testing.assert_allclose(ratio / want[1:], 1.0, atol=0.6 if p.points else 1e-4)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_points_of_a_table_are_distinct(spacing: str) -> None:
    p = process("ddpm", points=50)
    for steps in (7, 50):
        index = np.asarray(timesteps(p, steps, spacing=spacing)) * 50
        assert index[0] == 50 and index[-1] == 0 and (np.diff(index) < -0.99).all()


# Steps, shift, spacing; the first and last times that the network sees, and how many of them are at
# least 875 and 900: those of diffusers' UniPCMultistepScheduler and of Wan2.1's FlowUniPC.
SEEN = """
50 3 flow_sigmas 999 993 986 162 113 60 16 13
50 3 wan         999 992 985 160 111 57 15 13
50 5 flow_sigmas 999 995 991 244 175 96 21 18
50 5 wan         999 995 991 241 172 92 21 18
50 8 flow_sigmas 999 997 994 341 254 146 27 24
50 8 wan         999 997 994 337 249 140 27 24
40 3 flow_sigmas 999 991 982 197 138 74 13 11
40 3 wan         999 991 982 195 136 71 12 10
40 5 flow_sigmas 999 994 989 291 211 117 17 15
40 5 wan         999 994 989 288 208 113 17 15
40 12 flow_sigmas 999 997 995 496 391 242 26 23
40 12 wan         999 997 995 492 386 235 26 23
"""


@pytest.mark.parametrize("row", SEEN.strip().splitlines())
def test_published_grids_of_whole_numbers(row: str) -> None:
    steps, shift, spacing, *wanted = row.split()
    p = process("flow")
    times = timesteps(p, int(steps), float(shift), spacing)
    whole = np.asarray(jax.jit(seen(p, spacing).network_time)(times), int)[:-1]
    found = [*whole[:3], *whole[-3:], (whole >= 875).sum(), (whole >= 900).sum()]
    assert found == [int(x) for x in wanted]
    assert times[0] < 1.0 and times[-1] == 0.0 and (np.diff(times) < 0.0).all()
    first = {"flow_sigmas": 1.0, "wan": 0.999}[spacing]
    np.testing.assert_allclose(times[0], shifted(first, float(shift)), atol=1.1e-6)


def test_whole_numbers_do_not_depend_on_float32() -> None:
    """Shift 1: each of 1000 steps is at a whole number, and rounds to another as often as not."""
    times = timesteps(process("flow"), 1000, 1.0, "wan")
    exact = np.floor(1000 * np.linspace(np.float64(np.float32(0.999)), 0.0, 1001)[:-1])
    whole = seen(process("flow"), "wan").network_time(times)[:-1]
    np.testing.assert_array_equal(whole, exact)


def test_listed_times() -> None:
    times = timesteps(process("cosine"), 3, spacing="1, 0.6,.25")
    np.testing.assert_array_equal(times, np.array([1.0, 0.6, 0.25, 0.0], np.float32))
    listed = timesteps(process("ddpm"), 2, spacing="1,0.4996")
    np.testing.assert_array_equal(process("ddpm").network_time(listed), [999, 499, -1])


@pytest.mark.parametrize("name", PROCESSES)
def test_time_at_inverts_the_ratio(name: str) -> None:
    p, t = process(name), jnp.array([0.001, 0.2, 0.5, 0.9])
    back = time_at(p, p.sigma(t) / p.alpha(t) * (0.9999 if p.points else 1.0))
    if p.points:
        np.testing.assert_array_equal(p.network_time(back), p.network_time(t))
    else:
        np.testing.assert_allclose(back, t, rtol=1e-5)
    value, finite = half_log_snr(p, jnp.array([0.0, 0.5]))
    assert not finite[0] and finite[1] and value[0] == 0.0


def test_one_object_for_the_same_arguments() -> None:
    assert process("ddpm", points=10) is process("ddpm", points=10)
    assert isinstance(process("flow"), Process)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: process("karras"), "'karras': known are flow, cosine, ddpm"),
        (lambda: process("flow", beta_end=1), "'beta_end' of process 'flow': known are none"),
        (lambda: process("ddpm", beta=1), "known are points, beta_start, beta_end"),
        (lambda: process("ddpm", beta_end=2.0), "beta_end=2.0"),
        (lambda: timesteps(process("flow"), 0), "steps was 0: at least 1"),
        (lambda: timesteps(process("ddpm"), 1001), "steps was 1001: 1 to 1000"),
        (lambda: timesteps(process("ddpm"), 10, shift=3.0), "shift was 3.0"),
        (lambda: timesteps(process("flow"), 10, spacing="leading"), "leading on a table alone"),
        (lambda: timesteps(process("flow"), 10, shift=0.0), "shift was 0.0"),
        (lambda: timesteps(process("flow"), 4, shift=3.0, spacing="karras"), "'karras' allows 1"),
        (
            lambda: timesteps(process("flow"), 2, spacing="even"),
            "flow_sigmas, wan or times as 1,0.75",
        ),
        (lambda: timesteps(process("flow"), 2, spacing="0.5,1"), "falling times from at most 1"),
        (lambda: timesteps(process("flow"), 2, spacing="1,nan"), "falling times from at most 1"),
        (lambda: timesteps(process("ddpm"), 2, spacing="0.5,0.4999"), "on 1000 points"),
        (lambda: timesteps(process("cosine"), 2, spacing="wan"), "'cosine': flow is allowed"),
        (lambda: timesteps(process("flow"), 2, -1.0, "wan"), "shift was -1.0"),
        (lambda: timesteps(process("flow"), 5, spacing="1,0.5"), "lists 2 times for 5 steps"),
        (lambda: sample_times(process("ddpm"), jnp.zeros(1), (0.0, 1.0)), "continuous"),
        (lambda: sample_times(process("flow"), jnp.zeros(1), (0.0, 0.0)), "deviation was 0.0"),
    ],
)
def test_what_is_refused(call, words: str) -> None:  # noqa: ANN001
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
