"""DiT and Latte of medium size beside diffusers' own, live: `pytest -m reference`.

Random weights go to a folder by diffusers, into a workdir by the import, and back by the export.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import answer as ours
from tests.reference import drawn
from tools import export_weights, import_weights
from vdit.config.denoiser import build_dit
from vdit.config.identity import read_config
from vdit.runtime.checkpoint import restore_ema
from vdit.sample import load
from vdit.tokens import dense_tokens

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.reference

COMMON: dict[str, Any] = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False,
    "num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 4, "out_channels": 8,
    "sample_size": 32, "patch_size": 2,
}  # fmt: skip
DIT = COMMON | {"norm_type": "ada_norm_zero", "num_layers": 8}
LATTE = COMMON | {
    "norm_type": "ada_norm_single", "num_layers": 3, "cross_attention_dim": 384, "norm_eps": 1e-6,
    "caption_channels": 512, "video_length": 5,
}  # fmt: skip


def imported(folder: Path, work: Path) -> tuple[Any, Any]:
    """The denoiser of an imported folder, and its parameters."""
    assert import_weights.main([f"--source={folder}", f"--workdir={work}"]) == 0
    config = read_config(work)
    config.run.dtype = "float32"
    return build_dit(config), restore_ema(work / "checkpoints" / "dit", 0)["dit"]


@pytest.mark.parametrize("name", ["dit", "latte"])
def test_the_transformer_and_the_way_back(name: str, tmp_path: Path, near: Any) -> None:
    """An answer at another size than that of training; the exported folder's, to the bit."""
    latte = name == "latte"
    kind = diffusers.LatteTransformer3DModel if latte else diffusers.DiTTransformer2DModel
    theirs = drawn(kind(**(LATTE if latte else DIT)))
    theirs.save_pretrained(tmp_path / "folder")
    model, params = imported(tmp_path / "folder", tmp_path / "work")
    x = torch.randn(2, 4, *((5, 18, 26) if latte else (1, 18, 18)))
    given: dict[str, Any] = {"timestep": torch.tensor([3, 950])}
    stored: dict[str, Any] = {"x": x.permute(0, 2, 3, 4, 1).numpy(), "time": np.array([3, 950])}
    if latte:
        text = torch.randn(2, 120, 512)
        mask = torch.arange(120)[None] < torch.tensor([120, 11])[:, None]
        bias = (1.0 - mask.float())[:, None].repeat_interleave(5, dim=0) * -1e9
        given |= {"encoder_hidden_states": text, "encoder_attention_mask": bias}
        stored |= {"text": text.numpy(), "mask": mask.numpy()}
    else:
        x = x[:, :, 0]
        given["class_labels"] = torch.tensor([207, 1000])
        stored["label"] = np.array([207, 1000])

    def answer(model: Any) -> np.ndarray:
        with torch.no_grad():
            out = model(x, **given).sample
        return (out if latte else out[:, :, None]).permute(0, 2, 3, 4, 1).numpy()

    want = answer(theirs)
    near(kind.__name__, ours(model, params, stored), want)
    out = tmp_path / "out"
    assert export_weights.main([f"--workdir={tmp_path / 'work'}", f"--out={out}"]) == 0
    np.testing.assert_array_equal(answer(kind.from_pretrained(out).eval()), want)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_whole_sampling_loop(
    guidance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: Any
) -> None:
    """DiTPipeline's pictures from the same noise: 20 steps of DDIM without fresh noise."""
    vae = drawn(diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64, 64), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ))  # fmt: skip
    theirs = drawn(diffusers.DiTTransformer2DModel(**DIT | {"num_layers": 4, "sample_size": 16}))
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipeline = diffusers.DiTPipeline(theirs, vae, scheduler)
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(
        [1, 980], guidance_scale=guidance, num_inference_steps=20, output_type="np",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    noise = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    imported(tmp_path / "pipeline", tmp_path / "work")
    config = read_config(tmp_path / "work")
    config.run.dtype = "float32"
    model = load(tmp_path / "work", config)
    times = jnp.zeros((2, 1))
    latents = jnp.asarray(noise.permute(0, 2, 3, 1)[:, None].numpy())
    tokens, _ = dense_tokens(latents, model.dit.patch, times, times > 0)
    monkeypatch.setattr("vdit.model.initial_noise", lambda keys, shape: tokens)
    made = model.generate(["1", "980"], steps=20, guidance=guidance)
    got = np.stack([result.video[0] for result in made]) / 255.0
    # Ours are bytes: half a step of 1/255, and what twenty steps make of 2e-5.
    near(f"DiTPipeline's pictures, guidance {guidance:g}", got, want, 0.51 / 255 + 1e-3)
