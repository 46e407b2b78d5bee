"""Makes tests/golden/vae/: tiny autoencoders of diffusers and their outputs.

Folders as `save_pretrained` writes them, random weights in half precision: `kl` (AutoencoderKL),
`wan21` and `wan22` (AutoencoderKLWan). expected.npz has, for each folder F and case I, F/I/video
(B, T, H, W, 3), F/I/mean and F/I/log_variance (B, t, h, w, Z) and F/I/decoded from the mean, in
float32; sizes that do not divide are edge-padded first. kl/tiled/... use tiling. Run where torch
and diffusers are installed:

    python tools/golden/vae.py tests/golden/vae
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan

WAN = {"base_dim": 4, "z_dim": 3, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
       "temperal_downsample": [True, True]}  # fmt: skip
MODELS: dict[str, Any] = {
    "kl": AutoencoderKL(
        block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=16,
    ),
    "wan21": AutoencoderKLWan(
        **WAN, latents_mean=[0.1, -0.2, 0.3], latents_std=[1.5, 2.0, 0.5], scale_factor_spatial=4
    ),
    "wan22": AutoencoderKLWan(
        **WAN, decoder_base_dim=6, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
        latents_mean=[0.0] * 3, latents_std=[1.0] * 3,
    ),
}  # fmt: skip
CASES = ((2, 1, 8, 16), (1, 5, 16, 24), (1, 9, 9, 14))  # batch, frames, height, width
TILED = (1, 1, 28, 36)


def apply(model: Any, video: torch.Tensor, images: bool) -> dict[str, np.ndarray]:
    """Moments and reconstruction of a (B, T, H, W, 3) video, channels last."""
    given = video.permute(0, 4, 1, 2, 3)
    if images:
        given = given.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        made = model.encode(given).latent_dist
        parts = {"mean": made.mean, "log_variance": made.logvar}
        parts["decoded"] = model.decode(made.mean).sample
    last = {}
    for name, part in parts.items():
        if images:
            part = part.unflatten(0, video.shape[:2]).transpose(1, 2)
        last[name] = part.permute(0, 2, 3, 4, 1).numpy()
    return last


def main(target: str) -> None:
    """Writes the folders and expected.npz into `target`, which is emptied first."""
    root = Path(target)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    expected: dict[str, Any] = {}
    for number, (name, model) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                draw = torch.randn_like(parameter)
                if path.endswith("weight") and parameter.ndim > 1:
                    parameter.copy_(draw * parameter[0].numel() ** -0.5)
                elif path.endswith(("gamma", "weight")):
                    parameter.copy_(1.0 + 0.3 * draw)
                else:
                    parameter.copy_(0.2 * draw)
        model.half().save_pretrained(root / name)
        config = root / name / "config.json"  # without defaults of the version
        config.write_text(json.dumps(json.loads(config.read_text()), indent=1) + "\n")
        model = model.float().eval()
        q = 4 * (model.config.get("patch_size") or 1)
        for case, (batch, frames, height, width) in enumerate(CASES):
            video = torch.rand(batch, frames, height, width, 3) * 2 - 1
            whole = torch.nn.functional.pad(
                video.permute(0, 4, 1, 2, 3),
                (0, -width % q, 0, -height % q, 0, 0), mode="replicate",
            ).permute(0, 2, 3, 4, 1)  # fmt: skip
            made = {"video": video.numpy(), **apply(model, whole, name == "kl")}
            expected |= {f"{name}/{case}/{part}": value for part, value in made.items()}
        if name != "wan22":
            video = torch.rand(*TILED, 3) * 2 - 1
            sizes = {} if name == "kl" else {
                "tile_sample_min_height": 16, "tile_sample_min_width": 16,
                "tile_sample_stride_height": 12, "tile_sample_stride_width": 12,
            }  # fmt: skip
            model.enable_tiling(**sizes)
            made = {"video": video.numpy(), **apply(model, video, name == "kl")}
            expected |= {f"{name}/tiled/{part}": value for part, value in made.items()}
    expected["versions"] = np.array([f"torch {torch.__version__}",
                                     f"diffusers {diffusers.__version__}"])  # fmt: skip
    np.savez_compressed(root / "expected.npz", **expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
