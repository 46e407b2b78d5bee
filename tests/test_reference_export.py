"""Exported workdirs of random weights run where they are exported to: `pytest -m reference`.

A workdir as training leaves it is exported, loaded by diffusers or transformers, and both answer.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import base, dit_paper, unet
from experiments.vivit import get_config as vivit_config
from tests import reference
from tools import export_weights
from tools.import_weights import MODELS, exact
from tools.importing.own import own_shapes
from vdit.config.identity import read_config, write_config
from vdit.config.text import build_tokenizer
from vdit.runtime.checkpoint import Checkpoints
from vdit.stages import stage_meta

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

GROUPS = {"dit": "dit", "vae": "vae", "classify": "vivit"}


def exported(config: Any, stage: str, folder: Path) -> tuple[Any, Any]:
    """Writes a workdir of random weights and its export, `folder`/out; our network and weights."""
    work = folder / "work"
    write_config(config, work)
    if config.text.encoder == "learned":
        build_tokenizer(config, work, lambda: [chr(97 + i % 26) * 3 for i in range(99)])
    ema = reference.random(own_shapes(config, stage, work), 1)
    checkpoints = Checkpoints(work / "checkpoints" / stage)
    checkpoints.save(3, {"step": np.int32(3)}, ema, None, stage_meta(config, stage))
    checkpoints.close()
    flags = [f"--workdir={work}", f"--out={folder / 'out'}", f"--stage={stage}"]
    assert export_weights.main(flags) == 0
    return MODELS[stage](exact(read_config(work))), ema[GROUPS[stage]]


def rows(x: np.ndarray) -> Any:
    """Channels-last to torch's."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def back(x: Any) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def text_of(batch: int, width: int) -> dict[str, np.ndarray]:
    mask = np.arange(20)[None] < np.array([20, 3][:batch])[:, None]
    return {"text": normal(batch, 20, width), "mask": mask}


TIME = np.array([3, 950])


def test_a_dit_runs_in_diffusers(tmp_path: Path, near: Any) -> None:
    config = dit_paper.get_config("image+smoke")
    config.dit.preset = "192x4x6"
    model, params = exported(config, "dit", tmp_path)
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    side, channels = theirs.config.sample_size, theirs.config.in_channels
    label = np.array([1, config.dit.paper.classes])
    x = normal(2, 1, side, side, channels)
    with torch.no_grad():
        made = theirs(
            rows(x[:, 0]), timestep=torch.tensor(TIME), class_labels=torch.tensor(label)
        ).sample
    got = reference.answer(model, params, {"x": x, "time": TIME, "label": label})
    near("exported DiTTransformer2DModel", got[:, 0], back(made))


def test_a_latte_runs_in_diffusers(tmp_path: Path, near: Any) -> None:
    config = dit_paper.get_config("text+smoke")
    config.dit.paper.conditioning = "adaln_single"
    config.dit.preset = "192x4x6"
    config.vae.channels = 4
    model, params = exported(config, "dit", tmp_path)
    theirs = diffusers.LatteTransformer3DModel.from_pretrained(tmp_path / "out").eval()
    said = theirs.config
    x = normal(2, said.video_length, said.sample_size, said.sample_size, said.in_channels)
    text = text_of(2, said.caption_channels)
    bias = (1.0 - torch.tensor(text["mask"]).float())[:, None]
    with torch.no_grad():
        made = theirs(
            rows(x), timestep=torch.tensor(TIME), encoder_hidden_states=torch.tensor(text["text"]),
            encoder_attention_mask=bias.repeat_interleave(said.video_length, dim=0) * -1e9,
        ).sample  # fmt: skip
    got = reference.answer(model, params, {"x": x, "time": TIME, **text})
    near("exported LatteTransformer3DModel", got, back(made))


def test_a_unet_runs_in_diffusers(tmp_path: Path, near: Any) -> None:
    config = unet.get_config("smoke")
    config.data.frames, config.dit.unet.temporal = 1, False
    config.dit.unet.widths, config.dit.unet.heads = (32, 64), (2, 4)
    config.dit.unet.depths, config.dit.unet.groups = (1, 0), 8
    model, params = exported(config, "dit", tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out").eval()
    side, channels = theirs.config.sample_size, theirs.config.in_channels
    x, text = normal(2, 1, side, side, channels), text_of(2, theirs.config.cross_attention_dim)
    with torch.no_grad():
        made = theirs(
            rows(x[:, 0]), torch.tensor(TIME), torch.tensor(text["text"]),
            encoder_attention_mask=torch.tensor(text["mask"]),
        ).sample  # fmt: skip
    got = reference.answer(model, params, {"x": x, "time": TIME, **text})
    near("exported UNet2DConditionModel", got[:, 0], back(made))


AUTOENCODERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "AutoencoderKL": ("AutoencoderKL", 1, {"vae.model": "kl", "vae.patch": (1, 4, 4)}),
    "Wan 2.1": ("AutoencoderKLWan", 9, {"vae.model": "causal", "vae.patch": (4, 4, 4)}),
    "Wan 2.2": ("AutoencoderKLWan", 9, {
        "vae.model": "causal", "vae.patch": (4, 8, 8), "vae.pixels": 2, "vae.residual": True,
        "vae.decoder_width": 24, "vae.multipliers": (1, 2, 2),
    }),
}  # fmt: skip


@pytest.mark.parametrize("which", AUTOENCODERS)
def test_an_autoencoder_runs_in_diffusers(which: str, tmp_path: Path, near: Any) -> None:
    name, frames, changes = AUTOENCODERS[which]
    config = base.get_config("smoke")
    config.update_from_flattened_dict({
        "vae.width": 16, "vae.multipliers": (1, 2, 4), "vae.groups": 8, "vae.blocks": 2, **changes
    })  # fmt: skip
    model, params = exported(config, "vae", tmp_path)
    theirs = getattr(diffusers, name).from_pretrained(tmp_path / "out").eval()
    video = np.tanh(normal(1, frames, 32, 48, 3))
    image = frames == 1
    with torch.no_grad():
        made = theirs.encode(rows(video[:, 0] if image else video)).latent_dist
        pixels = theirs.decode(made.mean).sample
    latent = back(made.mean)[:, None] if image else back(made.mean)
    encoded, decoded = reference.called(model, params, {"video": video, "latent": latent})
    near(f"exported {which}, mean", encoded[0], latent)
    wanted = back(pixels)[:, None] if image else back(pixels)
    # diffusers' causal one ends in a clip to [-1, 1].
    near(f"exported {which}, video", decoded[0] if image else np.clip(decoded[0], -1, 1), wanted)


@pytest.mark.parametrize("frames, preset", [(1, "96x3x4/8x1"), (9, "96x3x4/8x2")])
def test_a_classifier_runs_in_transformers(
    frames: int, preset: str, tmp_path: Path, near: Any
) -> None:
    config = vivit_config("smoke")
    config.classify.preset, config.data.frames = preset, frames
    model, params = exported(config, "classify", tmp_path)
    name = "ViTForImageClassification" if frames == 1 else "VivitForVideoClassification"
    theirs, lost = getattr(transformers, name).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not lost["missing_keys"] and not lost["unexpected_keys"], lost
    video = normal(2, frames, *config.data.size, 3)
    pixels = torch.from_numpy(np.moveaxis(video, -1, 2).copy())
    with torch.no_grad():
        made = theirs.eval()(pixels[:, 0] if frames == 1 else pixels).logits.numpy()
    (got,) = reference.called(model, params, {"video": video})
    near(f"exported {name}", got, made)
