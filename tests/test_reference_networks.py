"""Autoencoders, classifiers and text encoders of medium size beside diffusers' and transformers'
own, live: `pytest -m reference`. Random weights go to a folder there, and are read here."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests import reference
from tools.importing.inflation import fit_positions
from vdit.published import text_folder, vae_folder, vivit_folder, weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

WAN = {"base_dim": 16, "z_dim": 8, "dim_mult": [1, 2, 4], "num_res_blocks": 2,
       "temperal_downsample": [False, True]}  # fmt: skip
AUTOENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("AutoencoderKL", {
        "block_out_channels": (32, 64, 128), "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 3, "norm_num_groups": 16,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }),
    "wan 2.1": ("AutoencoderKLWan", WAN | {"latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}),
    "wan 2.2": ("AutoencoderKLWan", WAN | {
        "dim_mult": [1, 2, 2],
        "decoder_base_dim": 24, "is_residual": True, "patch_size": 2, "in_channels": 12,
        "out_channels": 12, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8,
    }),
}  # fmt: skip


def last(x: Any) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_both_ways(name: str, tmp_path: Path, near: Any) -> None:
    kind, options = AUTOENCODERS[name]
    reference.drawn(getattr(diffusers, kind)(**options)).save_pretrained(tmp_path)
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path).eval()
    model, plan = vae_folder.read_module(tmp_path)
    image = name == "sd"
    video = torch.rand(1, 3, 1 if image else 9, 48, 64) * 2 - 1
    with torch.no_grad():
        made = theirs.encode(video[:, :, 0] if image else video).latent_dist
        pixels = theirs.decode(made.mean).sample
    mean, logs, pixels = ((p[:, :, None] if image else p) for p in (made.mean, made.logvar, pixels))
    encoded, decoded = reference.called(
        model, weights.load(plan), {"video": last(video), "latent": last(mean)}
    )
    near(f"{kind}, {name}, mean", encoded[0], last(mean))
    near(f"{kind}, {name}, log variance", encoded[1], last(logs))
    got = decoded[0] if image else np.clip(decoded[0], -1, 1)
    near(f"{kind}, {name}, video", got, last(pixels))


SIZES = {
    "image_size": (48, 64), "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6,
    "intermediate_size": 288, "num_labels": 11,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Vit", "Vivit"])
def test_a_classifier(kind: str, tmp_path: Path, near: Any) -> None:
    """With the folder's own names of tensors, epsilon and activation."""
    sizes = dict(SIZES)
    if kind == "Vit":
        sizes["image_size"] = (48, 48)  # positions of no other are interpolated there
        config = transformers.ViTConfig(patch_size=16, **sizes)
        theirs = transformers.ViTForImageClassification(config)
    else:
        config = transformers.VivitConfig(num_frames=9, tubelet_size=[2, 16, 16], **sizes)
        theirs = transformers.VivitForVideoClassification(config)
    reference.drawn(theirs).save_pretrained(tmp_path)
    found = vivit_folder.read_module(tmp_path)
    params = vivit_folder.folded(weights.load(found.plan))
    video = torch.randn(2, found.frames, 3, *found.size)
    with torch.no_grad():
        want = theirs(video[:, 0] if kind == "Vit" else video).logits.numpy()
    (got,) = reference.called(found.model, params, {"video": np.moveaxis(video.numpy(), 2, -1)})
    near(type(theirs).__name__, got, want)
    if kind == "Vit":  # images of another size
        old, size = found.model.position_grid(1, *found.size), (80, 64)
        pixels = torch.randn(2, 3, *size)
        with torch.no_grad():
            want = theirs(pixels, interpolate_pos_encoding=True).logits.numpy()
        place, new = params["encoder"]["position"], found.model.position_grid(1, *size)
        params["encoder"]["position"] = fit_positions(place, old, new)
        video = np.moveaxis(pixels.numpy(), 1, -1)[:, None]
        (got,) = reference.called(found.model, params, {"video": video})
        near(f"{type(theirs).__name__}, another size", got, want)


def _t5(kind: str) -> Any:
    options = {
        "vocab_size": 500, "d_model": 96, "d_kv": 16, "d_ff": 192, "num_layers": 4, "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    if kind == "umt5":
        return transformers.UMT5EncoderModel(transformers.UMT5Config(**options))
    return transformers.T5EncoderModel(transformers.T5Config(**options))


def _clip() -> Any:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=500, hidden_size=96, intermediate_size=288, num_hidden_layers=4,
        num_attention_heads=6, projection_dim=32, bos_token_id=498, eos_token_id=499,
    ))  # fmt: skip


@pytest.mark.parametrize("kind, length", [("t5", 512), ("umt5", 120), ("clip", 77)])
def test_a_text_encoder(kind: str, length: int, tmp_path: Path, near: Any) -> None:
    """All of a long text, and the words of a short one."""
    theirs = reference.drawn(_clip() if kind == "clip" else _t5(kind), scale=0.1)
    theirs.save_pretrained(tmp_path)
    model, plan = text_folder.read_module(kind, str(tmp_path))
    ids = np.random.default_rng(0).integers(1, 490, (2, length)).astype(np.int32)
    mask = np.arange(length)[None] < np.array([length, 9])[:, None]
    with torch.no_grad():
        want = theirs(
            torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()
        ).last_hidden_state.numpy()
    got = np.asarray(jax.jit(model.apply)({"params": weights.load(plan)}, ids, mask))
    near(type(theirs).__name__, got[mask], want[mask])
