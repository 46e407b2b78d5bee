"""Makes tests/golden/clip_vision: a small CLIP image encoder of random weights by transformers.

The folder as transformers writes it, in float16, with its preprocessor_config.json; expected.npz
holds images, the pixels of CLIPImageProcessor (with Pillow's resizing), and the float32 features
before the last layer. Run where torch and transformers are installed:

    python tools/golden/clip_vision.py tests/golden/clip_vision
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

# The features' width fits tests/golden/wan/i2v. Odd sizes, upright and wide.
SIZES = ((13, 9), (11, 24), (12, 12))
CONFIG = CLIPVisionConfig(
    hidden_size=6, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, image_size=12,
    patch_size=4, hidden_act="gelu",
)  # fmt: skip


def main(target: str) -> None:
    """Writes the folder and expected.npz into `target`, which is emptied first."""
    root = Path(target)
    shutil.rmtree(root, ignore_errors=True)
    torch.manual_seed(0)
    model = CLIPVisionModel(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for every part to matter
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.half().save_pretrained(root)
    model = CLIPVisionModel.from_pretrained(root, dtype=torch.float32).eval()
    sides = {"height": CONFIG.image_size, "width": CONFIG.image_size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": CONFIG.image_size}, crop_size=sides)
    processor.save_pretrained(root)
    draw = np.random.default_rng(0)
    expected: dict[str, Any] = {}
    for number, size in enumerate(SIZES):
        image = draw.integers(0, 256, (*size, 3), np.uint8)
        pixels = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = model(pixels, output_hidden_states=True).hidden_states[-2]
        expected[f"{number}/image"] = image
        expected[f"{number}/pixels"] = pixels[0].permute(1, 2, 0).numpy()
        expected[f"{number}/features"] = features[0].numpy()
    np.savez_compressed(root / "expected.npz", **expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
