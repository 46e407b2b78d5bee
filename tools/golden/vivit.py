"""Makes tests/golden/vivit.npz: ViT's and ViViT's outputs on random weights by transformers.

Run where torch and transformers are installed:

    python tools/golden/vivit.py tests/golden/vivit.npz
"""

import sys
from typing import Any

import numpy as np
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    VivitConfig,
    VivitForVideoClassification,
)

# name: batch, frames, (rows, columns), tubelet, width, depth, heads, mlp. Some sizes are not
# multiples of the tubelet; "vit" has one frame and the exact GELU.
CASES = {
    "vivit_plain": (2, 4, (8, 12), (2, 4, 4), 16, 2, 2, 32),
    "vivit_left_over": (2, 5, (9, 14), (2, 4, 4), 16, 2, 4, 24),
    "vivit_odd": (1, 9, (10, 6), (3, 5, 2), 20, 1, 5, 24),
    "vivit_frames": (3, 3, (6, 6), (1, 2, 3), 12, 1, 1, 36),
    "vit_plain": (3, 1, (8, 12), (1, 4, 4), 16, 3, 4, 24),
    "vit_odd": (2, 1, (9, 11), (1, 3, 5), 18, 2, 3, 20),
}
CLASSES = 5


def main(target: str) -> None:
    """Writes each case's numbers, video (B, T, H, W, C), last hidden state, logits and state dict.

    The state dict is stored as names, shapes ("16,3,4,4") and one array of all values: a few
    large members make the file a third smaller than many small ones.
    """
    found: dict[str, Any] = {}
    for number, (name, case) in enumerate(CASES.items()):
        batch, frames, size, tubelet, width, depth, heads, mlp = case
        torch.manual_seed(number)
        options = {
            "image_size": size, "hidden_size": width, "num_hidden_layers": depth,
            "num_attention_heads": heads, "intermediate_size": mlp, "num_labels": CLASSES,
            "layer_norm_eps": 1e-6,
        }  # fmt: skip
        if name.startswith("vivit"):
            config = VivitConfig(num_frames=frames, tubelet_size=list(tubelet), **options)
            model = VivitForVideoClassification(config).eval()
        else:
            model = ViTForImageClassification(ViTConfig(patch_size=tubelet[1:], **options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # large enough for every part to matter
                parameter.add_(0.25 * torch.randn_like(parameter))
            pixels = torch.randn(batch, frames, 3, *size)
            given = pixels if name.startswith("vivit") else pixels[:, 0]
            hidden = model.base_model(given).last_hidden_state
            logits = model(given).logits
        found[f"{name}/case"] = np.array([*tubelet, width, depth, heads, mlp])
        found[f"{name}/video"] = pixels.permute(0, 1, 3, 4, 2).numpy()
        found[f"{name}/hidden"] = hidden.numpy()
        found[f"{name}/logits"] = logits.numpy()
        state = model.state_dict()
        found[f"{name}/names"] = np.array(list(state))
        found[f"{name}/shapes"] = np.array([",".join(map(str, v.shape)) for v in state.values()])
        found[f"{name}/values"] = np.concatenate([v.numpy().ravel() for v in state.values()])
    np.savez_compressed(target, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
