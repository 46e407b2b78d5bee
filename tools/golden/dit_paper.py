"""Makes tests/golden/dit_paper: small DiT and Latte models of random weights by diffusers.

Each is a folder as diffusers writes it, in float16; expected.npz holds inputs and the float32
outputs of diffusers. Run where torch and diffusers are installed:

    python tools/golden/dit_paper.py tests/golden/dit_paper
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, LatteTransformer3DModel

COMMON = {"activation_fn": "gelu-approximate", "attention_bias": True}
DIT = COMMON | {"norm_type": "ada_norm_zero", "norm_elementwise_affine": False}
LATTE = DIT | {"norm_type": "ada_norm_single", "cross_attention_dim": 24, "norm_eps": 1e-6}

# name: (class, its configuration, inputs as frames x rows x columns, largest shard). Some inputs
# differ from the training size, or have an odd number of tokens, one token, or one frame.
CASES: dict[str, tuple[Any, dict[str, Any], tuple[tuple[int, int, int], ...], str]] = {
    "dit": (
        DiTTransformer2DModel,
        DIT | {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "in_channels": 4,
            "out_channels": 8, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
        },
        ((1, 8, 8), (1, 6, 6), (1, 2, 2)),
        "10GB",
    ),
    "dit_one_place": (
        DiTTransformer2DModel,
        DIT | {
            "num_attention_heads": 3, "attention_head_dim": 4, "num_layers": 1, "in_channels": 3,
            "sample_size": 5, "patch_size": 1, "num_embeds_ada_norm": 4, "norm_eps": 1e-6,
        },
        ((1, 5, 5), (1, 7, 7)),
        "10GB",
    ),
    "latte": (
        LatteTransformer3DModel,
        LATTE | {
            "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2, "in_channels": 4,
            "out_channels": 8, "sample_size": 8, "patch_size": 2, "caption_channels": 20,
            "video_length": 3,
        },
        ((3, 8, 8), (3, 6, 10), (1, 8, 8), (3, 2, 2)),
        "40KB",
    ),
    "latte_large": (
        LatteTransformer3DModel,
        LATTE | {
            "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "in_channels": 4,
            "sample_size": 128, "patch_size": 4, "caption_channels": 16, "video_length": 2,
        },
        ((2, 12, 20), (1, 8, 4)),
        "10GB",
    ),
}  # fmt: skip
BATCH, TEXT = 3, 7
TIMES = (0, 413, 999)


def main(target: str) -> None:
    """Writes each case's folder and expected.npz."""
    found: dict[str, Any] = {}
    for number, (name, (kind, config, shapes, shard)) in enumerate(CASES.items()):
        torch.manual_seed(number)
        model = kind(**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # large enough for every part to matter
                parameter.add_(0.1 * torch.randn_like(parameter))
            tie(model)
        folder = Path(target) / name
        model.half().save_pretrained(folder, max_shard_size=shard)
        model = kind.from_pretrained(folder, torch_dtype=torch.float32).eval()
        for frames, rows, columns in shapes:
            case = f"{name}/{frames}x{rows}x{columns}"
            x = torch.randn(BATCH, config["in_channels"], frames, rows, columns)
            given: dict[str, Any] = {"timestep": torch.tensor(TIMES)}
            if kind is DiTTransformer2DModel:
                classes = config["num_embeds_ada_norm"]
                given["class_labels"] = torch.tensor([0, classes - 1, classes])  # the last: null
                found[f"{case}/label"] = given["class_labels"].numpy()
                with torch.no_grad():
                    out = model(x[:, :, 0], **given).sample[:, :, None]
            else:
                text = torch.randn(BATCH, TEXT, config["caption_channels"])
                mask = torch.arange(TEXT)[None] < torch.tensor([TEXT, 1, 4])[:, None]
                found[f"{case}/text"], found[f"{case}/mask"] = text.numpy(), mask.numpy()
                # The mask is repeated per frame here; the model repeats only the text.
                bias = (1.0 - mask.float())[:, None].repeat_interleave(frames, dim=0) * -1e9
                with torch.no_grad():
                    out = model(
                        x, encoder_hidden_states=text, encoder_attention_mask=bias, **given
                    ).sample
            found[f"{case}/x"] = x.permute(0, 2, 3, 4, 1).numpy()
            found[f"{case}/out"] = out.permute(0, 2, 3, 4, 1).numpy()
    np.savez_compressed(Path(target) / "expected.npz", times=np.array(TIMES), **found)


def tie(model: Any) -> None:
    """Shares the first block's time and class embedders, as in the published DiT."""
    first = getattr(model.transformer_blocks[0].norm1, "emb", None)
    if first is not None:
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first.state_dict())


if __name__ == "__main__":
    main(*sys.argv[1:])
