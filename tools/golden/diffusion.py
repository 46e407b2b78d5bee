"""Writes tests/golden/diffusion.npz: outputs of diffusers' schedulers.

    python tools/golden/diffusion.py        (in an environment with torch and diffusers)

Their code runs on a float64 table of betas: in float32, 1 - alpha_t / alpha_prev is off by up to
3e-4 near the clean end. One case (`shipped`) keeps the float32 table, to show that nothing else
differs. Timesteps are the public 0 .. 999. Keys are
`scheduler/case/array`; arrays are float32 (steps, batch, channels) unless their name says other.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

PATH = Path(__file__).resolve().parents[2] / "tests/golden/diffusion.npz"
PREDICTIONS = ("epsilon", "sample", "v_prediction")
BATCH, CHANNELS = 2, 3


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def torched(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x, np.float64))


def exact(scheduler: Any) -> Any:
    """The scheduler with its table recomputed in float64."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1.0 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    if isinstance(scheduler, diffusers.DDIMScheduler) and not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def ddpm_step(scheduler: Any, y: torch.Tensor, t: int, x: torch.Tensor, z: torch.Tensor) -> Any:
    """One DDPMScheduler step with given noise: it only takes a generator."""
    with mock.patch.object(
        diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: z
    ):
        return scheduler.step(y, t, x)


def toy_x0(x: torch.Tensor) -> torch.Tensor:
    """A denoiser that is easy to compute on both sides."""
    return 0.8 * torch.tanh(2.0 * x)


def toy_eps(scheduler: Any, x: torch.Tensor, t: int) -> torch.Tensor:
    alpha_bar = scheduler.alphas_cumprod[t]
    return (x - alpha_bar**0.5 * toy_x0(x)) / (1.0 - alpha_bar) ** 0.5


def ddpm(rng: np.random.Generator) -> dict[str, Any]:
    out: dict[str, Any] = {}
    grids = {
        # single steps t -> t - 1 of the full chain, and a respaced chain with uneven gaps
        "full": ([999, 998, 750, 500, 250, 100, 10, 2, 1, 0], None),
        "respaced": ([999, 800, 555, 300, 120, 40, 7, 0],) * 2,
    }
    for grid, (times, custom) in grids.items():
        x, y, z = (draw(rng, len(times), BATCH, CHANNELS) for _ in range(3))
        out |= {f"ddpm/{grid}/{n}": v for n, v in (("t_int", times), ("x", x), ("y", y), ("z", z))}
        for prediction in PREDICTIONS:
            for variance in ("fixed_small", "fixed_large"):
                options = dict(
                    prediction_type=prediction, variance_type=variance, clip_sample=False
                )
                scheduler = exact(diffusers.DDPMScheduler(**options))
                if custom:
                    scheduler.set_timesteps(timesteps=custom)
                made = [
                    ddpm_step(scheduler, torched(y[i]), t, torched(x[i]), torched(z[i]))
                    for i, t in enumerate(times)
                ]
                name = f"ddpm/{grid}/{prediction}/{variance}"
                out[f"{name}/x0"] = np.stack([m.pred_original_sample for m in made])
                out[f"{name}/prev"] = np.stack([m.prev_sample for m in made])
    shipped, made = diffusers.DDPMScheduler(clip_sample=False), []
    x, y, z = (torch.from_numpy(out[f"ddpm/full/{n}"]) for n in "xyz")
    for i, t in enumerate(grids["full"][0]):
        made.append(ddpm_step(shipped, y[i], t, x[i], z[i]).prev_sample)
    out["ddpm/shipped/prev"] = np.stack(made)
    for variance in ("fixed_small", "fixed_large"):  # whole chains, trailing, 20 steps
        scheduler = exact(
            diffusers.DDPMScheduler(
                variance_type=variance, clip_sample=False, timestep_spacing="trailing"
            )
        )
        scheduler.set_timesteps(20)
        z = draw(rng, 20, BATCH, CHANNELS)
        x = x_init = draw(rng, BATCH, CHANNELS)
        x, chain = torched(x), []
        for i, t in enumerate(scheduler.timesteps.tolist()):
            x = ddpm_step(scheduler, toy_eps(scheduler, x, t), t, x, torched(z[i])).prev_sample
            chain.append(x)
        name = f"ddpm/chain/{variance}"
        out |= {f"{name}/x_init": x_init, f"{name}/z": z, f"{name}/chain": np.stack(chain)}
        out[f"{name}/t_int"] = scheduler.timesteps.numpy()
    return out


def learned(rng: np.random.Generator) -> dict[str, Any]:
    """DDPM's step with a learned variance: the network predicts eps and a variance fraction."""
    out: dict[str, Any] = {}
    grids = {"full": ([999, 750, 250, 10, 2, 1], None), "respaced": ([999, 555, 120, 7],) * 2}
    for grid, (times, custom) in grids.items():
        x, y, v, z = (draw(rng, len(times), BATCH, CHANNELS) for _ in range(4))
        scheduler = exact(diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False))
        if custom:
            scheduler.set_timesteps(timesteps=custom)
        both = np.concatenate([y, np.clip(v, -1.0, 1.0)], axis=-1)
        made = [
            ddpm_step(scheduler, torched(both[i]), t, torched(x[i]), torched(z[i])).prev_sample
            for i, t in enumerate(times)
        ]
        arrays = {"t_int": times, "x": x, "y": y, "v": np.clip(v, -1.0, 1.0), "z": z}
        out |= {f"learned/{grid}/{name}": value for name, value in arrays.items()}
        out[f"learned/{grid}/prev"] = np.stack(made)
    return out


def ddim(rng: np.random.Generator) -> dict[str, Any]:
    out: dict[str, Any] = {}
    cases = {"trailing": True, "leading": False}  # spacing: set_alpha_to_one
    for spacing, to_one in cases.items():
        x, y, z = (draw(rng, 10, BATCH, CHANNELS) for _ in range(3))
        out |= {f"ddim/{spacing}/{n}": v for n, v in (("x", x), ("y", y), ("z", z))}
        for prediction in PREDICTIONS:
            scheduler = exact(
                diffusers.DDIMScheduler(
                    prediction_type=prediction,
                    clip_sample=False,
                    set_alpha_to_one=to_one,
                    timestep_spacing=spacing,
                )
            )
            scheduler.set_timesteps(10)
            out[f"ddim/{spacing}/t_int"] = scheduler.timesteps.numpy()
            for eta in (0.0, 0.5, 1.0):
                out[f"ddim/{spacing}/{prediction}/{eta}/prev"] = np.stack(
                    [
                        scheduler.step(
                            torched(y[i]), t, torched(x[i]), eta=eta, variance_noise=torched(z[i])
                        ).prev_sample
                        for i, t in enumerate(scheduler.timesteps.tolist())
                    ]
                )
    return out


def scaled_linear(rng: np.random.Generator) -> dict[str, Any]:
    """Stable Diffusion's table as shipped, in float32, and DDIM's steps on it."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(10)
    x, y = (draw(rng, 10, BATCH, CHANNELS) for _ in range(2))
    made = [
        scheduler.step(torch.from_numpy(y[i]), t, torch.from_numpy(x[i])).prev_sample
        for i, t in enumerate(scheduler.timesteps.tolist())
    ]
    arrays = {
        "alphas_cumprod": scheduler.alphas_cumprod, "t_int": scheduler.timesteps, "x": x, "y": y,
        "prev": np.stack(made),
    }  # fmt: skip
    return {f"scaled_linear/{name}": np.asarray(value) for name, value in arrays.items()}


def flow(rng: np.random.Generator) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for shift in (1.0, 3.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / 12, 12))
        y = draw(rng, 12, BATCH, CHANNELS)
        x_init = draw(rng, BATCH, CHANNELS)
        x, chain = torch.from_numpy(x_init), []
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.from_numpy(y[i]), t, x).prev_sample
            chain.append(x)
        arrays = dict(
            x_init=x_init, y=y, chain=np.stack(chain), sigmas=scheduler.sigmas.numpy(),
            network_time=scheduler.timesteps.numpy(),
        )  # fmt: skip
        out |= {f"flow/{shift}/{name}": value for name, value in arrays.items()}
    return out


def dpmpp_2m(rng: np.random.Generator) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for steps in (8, 20):
        scheduler = exact(
            diffusers.DPMSolverMultistepScheduler(
                beta_start=1e-4,
                beta_end=0.02,
                prediction_type="sample",
                algorithm_type="dpmsolver++",
                solver_order=2,
                solver_type="midpoint",
                timestep_spacing="trailing",
                final_sigmas_type="zero",
            )
        )
        scheduler.set_timesteps(steps)
        x_init = draw(rng, BATCH, CHANNELS)
        x, chain = torched(x_init), []
        for t in scheduler.timesteps:
            x = scheduler.step(toy_x0(x), t, x).prev_sample
            chain.append(x)
        out |= {f"dpmpp_2m/{steps}/x_init": x_init, f"dpmpp_2m/{steps}/chain": np.stack(chain)}
        out[f"dpmpp_2m/{steps}/t_int"] = scheduler.timesteps.numpy()
    return out


def walk(
    scheduler: Any, x: torch.Tensor, answer: Any, calls: int | None = None, **more: Any
) -> np.ndarray:
    """x after each of the first `calls` steps of the scheduler on answer(x, sigma, t)."""
    chain = []
    for number, t in enumerate(scheduler.timesteps[:calls]):
        sigma = scheduler.sigmas[number]
        options = {name: values[number] for name, values in more.items()}
        x = scheduler.step(answer(x, sigma, t), t, x, **options).prev_sample
        chain.append(x)
    return np.stack(chain)


def multistep(rng: np.random.Generator, steps: int = 8) -> dict[str, Any]:
    """UniPC on DDPM's table and on flow matching's, DPM-Solver++ 3M and SDE 2M on DDPM's."""
    x_init = draw(rng, BATCH, CHANNELS)
    z = draw(rng, steps, BATCH, CHANNELS)
    out: dict[str, Any] = {"multistep/x_init": x_init, "multistep/z": z}
    table = dict(
        beta_start=1e-4, beta_end=0.02, prediction_type="sample", timestep_spacing="trailing",
        final_sigmas_type="zero", lower_order_final=False,
    )  # fmt: skip
    for name, options, more in (
        ("dpmpp_3m", {"solver_order": 3}, {}),
        (
            "dpmpp_2m_sde",
            {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
            {"variance_noise": torched(z)},
        ),
    ):
        scheduler = exact(diffusers.DPMSolverMultistepScheduler(**table, **options))
        scheduler.set_timesteps(steps)
        out[f"multistep/{name}"] = walk(
            scheduler, torched(x_init), lambda x, sigma, t: toy_x0(x), **more
        )
    for order in (1, 2, 3):
        for bh in ("bh1", "bh2"):
            unipc: dict[str, Any] = dict(solver_order=order, solver_type=bh, disable_corrector=[])
            flow = dict(use_flow_sigmas=True, flow_shift=3.0)
            for process, extra in (("ddpm", {}), ("flow", flow)):
                scheduler = exact(diffusers.UniPCMultistepScheduler(**table, **unipc, **extra))
                scheduler.set_timesteps(steps)
                out[f"multistep/{process}/sigmas"] = scheduler.sigmas.numpy()
                # Their last step, to sigma 0, is of an order that it cannot have.
                out[f"multistep/{process}/unipc/{order}/{bh}"] = walk(
                    scheduler, torched(x_init), lambda x, sigma, t: toy_x0(x), calls=-1
                )
    return out


def heun(rng: np.random.Generator, steps: int = 8) -> dict[str, Any]:
    """Heun's method and Euler ancestral in sigma / alpha on DDPM's table, Heun's on flow's."""
    table = dict(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    x_init, z = draw(rng, BATCH, CHANNELS), draw(rng, steps, BATCH, CHANNELS)
    out: dict[str, Any] = {"heun/x_init": x_init, "heun/z": z}

    def eps(x: torch.Tensor, sigma: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x - toy_x0(x / (1.0 + sigma**2) ** 0.5)) / sigma

    def velocity(x: torch.Tensor, sigma: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x - toy_x0(x)) / sigma

    def stepped(scheduler: Any, x: np.ndarray) -> Any:
        scheduler.set_timesteps(steps)
        sigma = float(scheduler.sigmas[0])
        return scheduler, torched(x) * (1.0 + sigma**2) ** 0.5

    def whole(chain: np.ndarray) -> np.ndarray:
        return np.append(chain[1:-1:2], chain[-1:], axis=0)  # after both evaluations of a step

    scheduler, x = stepped(exact(diffusers.HeunDiscreteScheduler(**table)), x_init)
    out["heun/edm"] = whole(walk(scheduler, x, eps))
    scheduler, x = stepped(exact(diffusers.EulerAncestralDiscreteScheduler(**table)), x_init)
    noises = iter(torched(z))
    module = diffusers.schedulers.scheduling_euler_ancestral_discrete
    with mock.patch.object(module, "randn_tensor", lambda *args, **kwargs: next(noises)):
        out["heun/ancestral"] = walk(scheduler, x, eps)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    out["heun/flow/sigmas"] = np.append(scheduler.sigmas[:-1:2], 0.0)
    out["heun/flow"] = whole(walk(scheduler, torched(x_init), velocity))
    return out


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = ddpm(rng) | ddim(rng) | flow(rng) | dpmpp_2m(rng)
    arrays |= learned(np.random.default_rng(1)) | scaled_linear(np.random.default_rng(2))
    arrays |= multistep(np.random.default_rng(3)) | heun(np.random.default_rng(4))
    arrays = {
        name: np.asarray(value, np.int16 if name.endswith("t_int") else np.float32)
        for name, value in arrays.items()
    }
    PATH.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(PATH, allow_pickle=False, **arrays)
    print(f"{PATH}: {len(arrays)} arrays, {PATH.stat().st_size} bytes, {diffusers.__version__=}")


if __name__ == "__main__":
    main()
