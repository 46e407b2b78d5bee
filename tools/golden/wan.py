"""Makes tests/golden/wan: small Wan transformers of random weights by diffusers.

Each is a folder as diffusers writes it, in float16; expected.npz holds inputs, the float32 outputs
of diffusers, and gradients of the sum of the outputs times "back" by the noisy latents and the
text. Run where torch and diffusers are installed:

    python tools/golden/wan.py tests/golden/wan
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel

# Latents and text features fit tests/golden/vae/wan21 and tests/golden/text_encoders/umt5.
CHANNELS, BATCH, WIDTH, TEXT, LENGTH = 3, 2, 12, 5, 512
COMMON = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": CHANNELS,
    "out_channels": CHANNELS, "text_dim": WIDTH, "ffn_dim": 40, "num_layers": 2,
}  # fmt: skip
MASKED = COMMON | {"in_channels": 2 * CHANNELS + 4}

# name: (further fields, inputs as frames x rows x columns). Odd numbers of tokens, and one frame.
CASES: dict[str, tuple[dict[str, Any], tuple[tuple[int, int, int], ...]]] = {
    "t2v": (COMMON, ((3, 6, 10), (1, 4, 4))),
    "i2v": (MASKED | {"image_dim": 6, "added_kv_proj_dim": 16}, ((3, 6, 2),)),
    "a14b": (MASKED, ((2, 2, 6),)),
    "ti2v": (COMMON, ((3, 6, 10),)),
}
TIMES = (413.0, 999.0)


def last(x: torch.Tensor) -> np.ndarray:
    """Channels last: (B, T, H, W, C) of (B, C, T, H, W)."""
    return x.detach().permute(0, 2, 3, 4, 1).numpy()


def case(model: Any, name: str, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Inputs, outputs and gradients. The text has `TEXT` tokens and a shorter one, then zeros."""
    frames, rows, columns = shape
    x = torch.randn(BATCH, CHANNELS, *shape, requires_grad=True)
    beside = torch.randn(BATCH, model.config.in_channels - CHANNELS, *shape)
    mask = torch.arange(TEXT)[None] < torch.tensor([TEXT, 2])[:, None]
    text = (torch.randn(BATCH, TEXT, WIDTH) * mask[..., None]).requires_grad_()
    long = torch.nn.functional.pad(text, (0, 0, 0, LENGTH - TEXT))
    found = {"x": last(x), "text": text.detach().numpy(), "mask": mask.numpy()}
    time = torch.tensor(TIMES)
    if name == "ti2v":  # the first frame is given
        tokens = rows * columns // 4
        time = time[:, None].repeat(1, frames * tokens)
        time[:, :tokens] = 0
    given = {}
    if beside.shape[1]:
        found["beside"] = last(beside)
    if model.config.image_dim:
        given["encoder_hidden_states_image"] = torch.randn(BATCH, 4, model.config.image_dim)
        found["image"] = given["encoder_hidden_states_image"].numpy()
    out = model(torch.cat([x, beside], 1), time, long, **given).sample
    back = torch.randn(out.shape)
    to_x, to_text = torch.autograd.grad((out * back).sum(), (x, text))
    found |= {"out": last(out), "back": last(back), "to_x": last(to_x), "to_text": to_text.numpy()}
    return found


def main(target: str) -> None:
    """Writes each case's folder and expected.npz into `target`, which is emptied first."""
    root = Path(target)
    shutil.rmtree(root, ignore_errors=True)
    expected: dict[str, Any] = {"times": np.array(TIMES)}
    for number, (name, (config, shapes)) in enumerate(CASES.items()):
        torch.manual_seed(number)
        model = WanTransformer3DModel(**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # large enough for every part to matter
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.half().save_pretrained(root / name)
        kind = WanTransformer3DModel
        model = kind.from_pretrained(root / name, torch_dtype=torch.float32).eval()
        for shape in shapes:
            key = f"{name}/{'x'.join(map(str, shape))}"
            expected |= {f"{key}/{part}": x for part, x in case(model, name, shape).items()}
    np.savez_compressed(root / "expected.npz", **expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
