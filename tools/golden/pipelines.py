"""Makes tests/golden/pipelines/: tiny DiT and Latte pipelines of diffusers, and their samples.

Each is a folder as diffusers writes it (model_index.json, transformer/, vae/, scheduler/; of Latte
text_encoder/ and tokenizer/ too), random weights in float16. expected.npz has for each the initial
noise, the denoised latents and the images, in float32; Latte's empty text is the end token alone.
Run where torch, diffusers and transformers are installed:

    python tools/golden/pipelines.py tests/golden/pipelines tests/golden/text_encoders/t5_gated
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LattePipeline,
    LatteTransformer3DModel,
)
from transformers import AutoTokenizer, T5EncoderModel

COMMON: dict[str, Any] = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False,
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "in_channels": 4,
    "out_channels": 8, "sample_size": 4, "patch_size": 2,
}  # fmt: skip
STEPS, SEED, PROMPT = 10, 7, "a small red ball falls"
CLASSES = (3, 999)
NAMES = {i: f"name {i}, other {i}" for i in range(1000)}


def drawn(model: Any) -> Any:
    """Enlarges the weights for every part to matter, and rounds them to float16."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        blocks = getattr(model, "transformer_blocks", [])
        for block in blocks:  # the published DiT shares one embedder among blocks
            if hasattr(block.norm1, "emb"):
                block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    return model.half().float().eval()


def autoencoder() -> AutoencoderKL:
    return drawn(AutoencoderKL(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=8, scaling_factor=0.3,
    ))  # fmt: skip


def watched(pipeline: Any) -> list[torch.Tensor]:
    """Records the inputs of the decoder."""
    found, decode = [], pipeline.vae.decode

    def recorded(latents: torch.Tensor, **options: Any) -> Any:
        found.append(latents.clone())
        return decode(latents, **options)

    pipeline.vae.decode = recorded
    return found


def last(x: torch.Tensor) -> np.ndarray:
    """Channels last: (B, T, H, W, C) of (B, C, T, H, W)."""
    return x.permute(0, 2, 3, 4, 1).numpy()


def save(pipeline: Any, folder: Path) -> None:
    """Writes the pipeline in float16, without defaults that depend on the version."""
    pipeline.to(torch.float16).save_pretrained(folder)
    pipeline.to(torch.float32)
    for path in folder.rglob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=0) + "\n")


def dit(folder: Path) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    model = drawn(DiTTransformer2DModel(**COMMON, norm_type="ada_norm_zero"))
    pipeline = DiTPipeline(model, autoencoder(), DDIMScheduler(clip_sample=False), NAMES)
    save(pipeline, folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": NAMES}))
    latents = watched(pipeline)
    noise = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(SEED))
    pictures = pipeline(
        list(CLASSES), guidance_scale=3.0, num_inference_steps=STEPS, output_type="np",
        generator=torch.Generator().manual_seed(SEED),
    ).images  # fmt: skip
    return {
        "noise": last(noise[:, :, None]),
        "latents": last(0.3 * latents[0][:, :, None]),
        "pictures": pictures[:, None],
    }


def latte(folder: Path, text: Path) -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    model = drawn(LatteTransformer3DModel(
        **COMMON, norm_type="ada_norm_single", cross_attention_dim=16, norm_eps=1e-6,
        caption_channels=12, video_length=3,
    ))  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    encoder = T5EncoderModel.from_pretrained(text, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(text)
    pipeline = LattePipeline(tokenizer, encoder, autoencoder(), model, scheduler)
    save(pipeline, folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text / name, folder / "tokenizer" / name)

    def features(prompt: str) -> torch.Tensor:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            return encoder(ids)[0]

    prompt, nothing = features(PROMPT), features("")
    assert nothing.shape[1] == 1
    noise = torch.randn((1, 4, 3, 4, 4), generator=torch.Generator().manual_seed(SEED))
    common = {
        "num_inference_steps": STEPS, "latents": noise, "prompt_embeds": prompt,
        "negative_prompt_embeds": nothing.expand_as(prompt), "guidance_scale": 3.0,
        "negative_prompt": None, "video_length": 3, "height": 8, "width": 8,
    }  # fmt: skip
    latents = pipeline(**common, output_type="latent").frames
    pictures = pipeline(**common, output_type="np").frames
    return {"noise": last(noise), "latents": last(latents), "pictures": np.asarray(pictures)}


def main(target: str, text: str) -> None:
    """Writes the folders and expected.npz into `target`, which is emptied first."""
    root = Path(target)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    made = {"dit": dit(root / "dit"), "latte": latte(root / "latte", Path(text))}
    flat: dict[str, Any] = {}
    for name, parts in made.items():
        flat |= {f"{name}/{part}": value for part, value in parts.items()}
    np.savez_compressed(root / "expected.npz", **flat)


if __name__ == "__main__":
    main(*sys.argv[1:])
