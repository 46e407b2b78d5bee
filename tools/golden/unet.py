"""Makes tests/golden/unet: small latent-diffusion U-Nets of random weights by diffusers.

Each is a folder as diffusers writes it, in float16; expected.npz holds inputs and the float32
outputs of diffusers. Run where torch and diffusers are installed:

    python tools/golden/unet.py tests/golden/unet
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

Shape = tuple[int, int, int, int]  # frames, rows, columns, tokens of the text

# name: (configuration, inputs). Stable Diffusion 1 has one number of heads and
# convolutions around transformers; 2 has a number of heads per level, and linear layers.
CASES: dict[str, tuple[dict[str, Any], tuple[Shape, ...]]] = {
    "sd1": (
        {
            "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 2,
            "norm_num_groups": 4, "cross_attention_dim": 12, "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        ((1, 7, 5, 7), (3, 4, 6, 77), (1, 1, 1, 1)),
    ),
    "sd2": (
        {
            "block_out_channels": (4, 12), "layers_per_block": 1, "attention_head_dim": (1, 3),
            "norm_num_groups": 2, "cross_attention_dim": 10, "sample_size": 4,
            "transformer_layers_per_block": 2, "use_linear_projection": True,
            "in_channels": 3, "out_channels": 3,
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        },
        ((1, 4, 4, 5), (2, 3, 6, 200)),
    ),
}  # fmt: skip
BATCH = 3
TIMES = (0, 413, 999)


def frames(model: Any, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Applies the image model to each frame of x (B, T, H, W, C); channels last."""
    out = []
    for frame in x.unbind(1):
        answer = model(
            frame.permute(0, 3, 1, 2), torch.tensor(TIMES), text, encoder_attention_mask=mask
        )
        out.append(answer.sample.permute(0, 2, 3, 1))
    return torch.stack(out, 1)


def random(config: dict[str, Any], seed: int) -> Any:
    """A model with parameters large enough for every part to matter."""
    torch.manual_seed(seed)
    model = UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(config: dict[str, Any], shape: Shape) -> tuple[torch.Tensor, ...]:
    """Latents (B, T, H, W, C), text (B, S, E) of different lengths, and its mask."""
    count, rows, columns, length = shape
    x = torch.randn(BATCH, count, rows, columns, config.get("in_channels", 4))
    text = torch.randn(BATCH, length, config["cross_attention_dim"])
    mask = torch.arange(length)[None] < torch.tensor([length, 1, (length + 1) // 2])[:, None]
    return x, text, mask


def main(target: str) -> None:
    """Writes each case's folder and expected.npz."""
    found: dict[str, Any] = {}
    for number, (name, (config, shapes)) in enumerate(CASES.items()):
        folder = Path(target) / name
        random(config, number).half().save_pretrained(folder)
        model = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
        for shape in shapes:
            case = f"{name}/{'x'.join(map(str, shape))}"
            given = inputs(config, shape)
            with torch.no_grad():
                out = frames(model, *given)
            for key, value in zip(("x", "text", "mask", "out"), (*given, out), strict=True):
                found[f"{case}/{key}"] = value.numpy()
    np.savez_compressed(Path(target) / "expected.npz", times=np.array(TIMES), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
