"""Stores what diffusers' DiT or Latte makes of random inputs, block by block, for a parity report.

Run where torch and diffusers are installed, on a folder of the network (of a pipeline,
transformer/); then give the file to `python -m tools.import_weights --parity=FILE`:

    python tools/golden/activations.py FOLDER FILE.npz
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, LatteTransformer3DModel

BATCH, TEXT = 2, 7
TIMES = (17, 801)
KINDS = {kind.__name__: kind for kind in (DiTTransformer2DModel, LatteTransformer3DModel)}


def main(folder: str, target: str) -> None:
    """Runs the network once, in float32."""
    name = json.loads((Path(folder) / "config.json").read_text())["_class_name"]
    kind = KINDS["DiTTransformer2DModel" if name == "Transformer2DModel" else name]
    model = kind.from_pretrained(folder, torch_dtype=torch.float32).eval()
    latte, config = kind is LatteTransformer3DModel, model.config
    frames = config.video_length if latte else 1
    side, patch = config.sample_size, config.patch_size
    torch.manual_seed(0)
    x = torch.randn(BATCH, config.in_channels, frames, side, side)
    found: dict[str, Any] = {"time": np.array(TIMES), "x": x.permute(0, 2, 3, 4, 1).numpy()}
    given: dict[str, Any] = {"timestep": torch.tensor(TIMES)}
    if latte:
        text = torch.randn(BATCH, TEXT, config.caption_channels)
        mask = torch.arange(TEXT)[None] < torch.tensor([TEXT, 3])[:, None]
        found |= {"text": text.numpy(), "mask": mask.numpy()}
        bias = (1.0 - mask.float())[:, None].repeat_interleave(frames, dim=0) * -1e9
        given |= {"encoder_hidden_states": text, "encoder_attention_mask": bias}
    else:
        classes = config.num_embeds_ada_norm
        given["class_labels"] = torch.tensor([classes // 2, classes])  # the last is none
        found["label"] = given["class_labels"].numpy()
        x = x[:, :, 0]
    places = (side // patch) ** 2

    def store(name: str) -> Any:
        def hook(module: Any, inputs: Any, out: torch.Tensor) -> None:
            if name.startswith("time"):  # rows are places
                out = out.reshape(BATCH, places, frames, -1).transpose(1, 2)
            found[name] = out.reshape(BATCH, frames * places, -1).numpy()

        return hook

    stacks = {"space" if latte else "joint": model.transformer_blocks}
    stacks |= {"time": model.temporal_transformer_blocks} if latte else {}
    for axes, blocks in stacks.items():
        for i, block in enumerate(blocks):
            block.register_forward_hook(store(f"{axes}/{i}"))
    with torch.no_grad():
        out = model(x, **given).sample
    out = out if latte else out[:, :, None]
    found["out"] = out.permute(0, 2, 3, 4, 1).numpy()
    np.savez_compressed(target, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
