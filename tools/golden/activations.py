"""Stores the activations of a network of diffusers or transformers on random inputs, for a parity
report block by block.

Run where torch, diffusers and transformers are installed, on a folder of the network (in a
pipeline: transformer/, unet/ or vae/); then pass the file to
`python -m tools.import_weights --parity=FILE`:

    python tools/golden/activations.py FOLDER FILE.npz [SIDE]

SIDE: height and width in latents or pixels (default: of config.json, always used for ViT, ViViT and
DiT).
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from safetensors import safe_open

BATCH, TEXT, FRAMES = 2, 7, 5
TIMES = (17, 801)
# The stored modules, by class or name; their submodules are not stored.
BLOCKS = {
    "BasicTransformerBlock", "ResnetBlock2D", "Transformer2DModel", "Attention", "Downsample2D",
    "Upsample2D", "WanResidualBlock", "WanAttentionBlock", "WanResample", "ViTLayer", "VivitLayer",
}  # fmt: skip
ENDS = re.compile(r"(.*\.)?(conv_in|conv_out|(post_)?quant_conv|proj_out(_2)?|classifier)")

Tensors = dict[str, torch.Tensor]


def last(x: torch.Tensor) -> np.ndarray:
    """Moves channels last, for images (B, C, H, W) and videos (B, C, T, H, W)."""
    order = {4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}.get(x.ndim)
    return (x if order is None else x.permute(*order)).contiguous().numpy()


def text_of(width: int) -> Tensors:
    """Text features and a mask with one shorter row."""
    mask = torch.arange(TEXT)[None] < torch.tensor([TEXT, 3])[:, None]
    return {"text": torch.randn(BATCH, TEXT, width), "mask": mask}


def dit(model: Any, side: int | None) -> Tensors:
    """An image DiT; the second label is the null class."""
    config = model.config
    classes = config.num_embeds_ada_norm
    x = torch.randn(BATCH, config.in_channels, config.sample_size, config.sample_size)
    given = {"time": torch.tensor(TIMES), "label": torch.tensor([classes // 2, classes])}
    model(x, timestep=given["time"], class_labels=given["label"])
    return given | {"x": x[:, :, None].permute(0, 2, 3, 4, 1)}


def latte(model: Any, side: int | None) -> Tensors:
    """Latte, its text masked by a bias."""
    config = model.config
    shape = config.in_channels, config.video_length, config.sample_size, config.sample_size
    x, time = torch.randn(BATCH, *shape), torch.tensor(TIMES)
    text = text_of(config.caption_channels)
    bias = (1.0 - text["mask"].float())[:, None].repeat_interleave(shape[1], dim=0) * -1e9
    model(x, timestep=time, encoder_hidden_states=text["text"], encoder_attention_mask=bias)
    return text | {"time": time, "x": x.permute(0, 2, 3, 4, 1)}


def unet(model: Any, side: int | None) -> Tensors:
    """The U-Net on one frame."""
    config = model.config
    side = side or config.sample_size
    x = torch.randn(BATCH, config.in_channels, side, side)
    time, text = torch.tensor(TIMES), text_of(config.cross_attention_dim)
    model(x, time, text["text"], encoder_attention_mask=text["mask"])
    return text | {"time": time, "x": x.permute(0, 2, 3, 1)[:, None]}


def autoencoder(model: Any, side: int | None) -> Tensors:
    """Encodes and decodes images, or a clip with a causal autoencoder."""
    images = isinstance(model, diffusers.AutoencoderKL)
    shape = (1 if images else FRAMES), side or 64, side or 64
    video = torch.rand(1, 3, *shape) * 2 - 1
    latent = model.encode(video[:, :, 0] if images else video).latent_dist.mean
    model.decode(latent)
    latent = latent[:, :, None] if images else latent
    return {"video": video.permute(0, 2, 3, 4, 1), "latent": latent.permute(0, 2, 3, 4, 1)}


def classifier(model: Any, side: int | None) -> Tensors:
    """A ViT on an image, a ViViT on a clip."""
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    frames = getattr(model.config, "num_frames", 0)
    pixels = torch.randn(1, frames or 1, 3, height, width)
    model(pixels if frames else pixels[:, 0])
    return {"video": pixels.permute(0, 1, 3, 4, 2)}


RUNS = {
    "DiTTransformer2DModel": dit, "Transformer2DModel": dit, "LatteTransformer3DModel": latte,
    "UNet2DConditionModel": unet, "AutoencoderKL": autoencoder, "AutoencoderKLWan": autoencoder,
    "ViTForImageClassification": classifier, "VivitForVideoClassification": classifier,
    "ViTModel": classifier, "VivitModel": classifier,
}  # fmt: skip


def tensor_names(folder: Path) -> list[str]:
    """The tensor names in the files, which may differ from those in memory."""
    found: list[str] = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found += file.keys()
    return found


def main(folder: str, target: str, side: str = "") -> None:
    """Runs the network once, in float32."""
    config = json.loads((Path(folder) / "config.json").read_text())
    name = config.get("_class_name") or config["architectures"][0]
    kind = "DiTTransformer2DModel" if name == "Transformer2DModel" else name
    library: Any = diffusers if "_class_name" in config else transformers
    model = getattr(library, kind).from_pretrained(folder).float().eval()
    there = tensor_names(Path(folder))
    found: dict[str, list[torch.Tensor]] = {}

    def store(name: str) -> Any:
        def hook(module: Any, inputs: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            if name.startswith("temporal_"):  # rows are positions
                out = out.unflatten(0, (BATCH, -1)).transpose(1, 2).flatten(0, 1)
            found.setdefault(name, []).append(out)

        return hook

    taken = ""
    for path, module in model.named_modules():
        inside = taken and path.startswith(f"{taken}.")
        if not inside and (type(module).__name__ in BLOCKS or ENDS.fullmatch(path)):
            taken = path
            if not any(tensor.startswith(f"{path}.") for tensor in there):
                path = path.replace("layers.", "encoder.layer.")
            module.register_forward_hook(store(path))
    torch.manual_seed(0)
    with torch.no_grad():
        given = RUNS[name](model, int(side) if side else None)
    # A causal autoencoder runs in chunks.
    arrays: dict[str, Any] = {f"in/{k}": v.contiguous().numpy() for k, v in given.items()}
    for path, parts in found.items():
        arrays[f"out/{path}"] = last(torch.cat(parts, dim=2 if parts[0].ndim == 5 else 0))
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
