"""The U-Net beside diffusers' own, live: `pytest -m reference`, with the extra of that name."""

from pathlib import Path
from typing import Any

import pytest

from tests.reference import answer
from tools import import_weights
from vdit.config.denoiser import build_dit
from vdit.config.identity import read_config
from vdit.runtime.checkpoint import newest_good_step, restore_ema

pytestmark = pytest.mark.reference

MEDIUM = {
    "block_out_channels": (32, 64, 96), "layers_per_block": 2, "attention_head_dim": (2, 4, 4),
    "norm_num_groups": 8, "cross_attention_dim": 48, "sample_size": 16,
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SHAPES = ((2, 16, 11, 77), (1, 9, 16, 300))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_medium_model_is_diffusers(shape: tuple[int, ...], tmp_path: Path, near: Any) -> None:
    import torch

    from tools.golden import unet as golden

    theirs = golden.random(MEDIUM, seed=3)
    theirs.save_pretrained(tmp_path / "unet")
    x, text, mask = golden.inputs(MEDIUM, shape)
    with torch.no_grad():
        want = golden.frames(theirs, x, text, mask).numpy()
    work = tmp_path / "work"
    assert import_weights.main([f"--source={tmp_path / 'unet'}", f"--workdir={work}"]) == 0
    config = read_config(work)
    config.run.dtype = "float32"
    step = newest_good_step(work / "checkpoints" / "dit")
    assert step is not None
    params, model = restore_ema(work / "checkpoints" / "dit", step)["dit"], build_dit(config)
    given = {"x": x.numpy(), "text": text.numpy(), "mask": mask.numpy(), "time": golden.TIMES}
    near(f"UNet2DConditionModel, {shape}", answer(model, params, given), want)
