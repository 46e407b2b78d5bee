"""Published layouts: diffusers' numbers, the way back to the bit, and folders that do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tools import export_weights, import_weights
from vdit.config.denoiser import build_dit
from vdit.config.identity import read_config
from vdit.nn.patch import unpatchify
from vdit.published.layouts import STEM
from vdit.runtime.checkpoint import newest_good_step, restore_ema
from vdit.tokens import class_condition, dense_tokens, text_condition

GOLDEN = Path(__file__).parent / "golden" / "dit_paper"
EXPECTED = np.load(GOLDEN / "expected.npz")


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def answer(model: Any, params: Any, case: str) -> np.ndarray:
    """Latents (B, n, h, w, kinds Z), as diffusers lays them out."""
    x, time = EXPECTED[f"{case}/x"], jnp.asarray(EXPECTED["times"], jnp.float32)
    zeros = jnp.zeros(x.shape[:2])
    values, layout = dense_tokens(jnp.asarray(x), model.patch, zeros, zeros > 0)
    if f"{case}/label" in EXPECTED.files:
        told = class_condition(jnp.asarray(EXPECTED[f"{case}/label"]), time)
    else:
        text, mask = EXPECTED[f"{case}/text"], jnp.asarray(EXPECTED[f"{case}/mask"])
        caption = jnp.asarray(text)[:, None], mask[:, None], zeros[:, :1, None]
        told = text_condition(*caption, time[:, None])
    out = jax.jit(model.apply)({"params": params}, values, layout, told)
    parts = jnp.split(out, 1 + model.learned_variance, axis=-1)
    back = [unpatchify(p.reshape(len(x), *layout.grid, -1), (1, *model.patch)) for p in parts]
    return np.concatenate(back, -1)


@pytest.mark.parametrize("name", ["dit", "dit_one_place", "latte", "latte_large"])
def test_it_is_diffusers_model_and_goes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    assert import_weights.main([f"--source={GOLDEN / name}", f"--workdir={work}"]) == 0
    config = read_config(work)
    config.run.dtype = "float32"
    directory = work / "checkpoints" / "dit"
    step = newest_good_step(directory)
    assert step is not None
    params, model = restore_ema(directory, step)["dit"], build_dit(config)
    cases = [key[:-2] for key in EXPECTED.files if key.startswith(f"{name}/") and key[-2:] == "/x"]
    for case in cases:
        got, want = answer(model, params, case), EXPECTED[f"{case}/out"]
        assert np.abs(got - want).max() / np.abs(want).max() < 2e-5
    assert export_weights.main([f"--workdir={work}", f"--out={out}"]) == 0
    old, new = tensors(GOLDEN / name), tensors(out)
    assert old.keys() == new.keys()
    for key, value in old.items():
        assert value.dtype == new[key].dtype and value.tobytes() == new[key].tobytes()
    said = json.loads((out / "config.json").read_text())
    theirs = json.loads((GOLDEN / name / "config.json").read_text())
    assert said.items() <= theirs.items()


def test_what_does_not_fit_is_one_line_and_nothing_is_written(tmp_path: Path, capsys: Any) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    shutil.copytree(GOLDEN / "dit", source)
    path, good = source / f"{STEM}.safetensors", tensors(source)
    config = json.loads((source / "config.json").read_text())

    def refused(what: str) -> None:
        assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 2
        line = capsys.readouterr().err
        assert what in line and line.count("\n") == 1 and not work.exists(), line

    out = "proj_out_2.bias"
    save_file({key: value for key, value in good.items() if key != out}, path)
    refused(f"lacks the tensor {out}")
    save_file(good | {"more": good[out]}, path)
    refused("an unexpected tensor: more")
    save_file(good | {out: good[out][:-1]}, path)
    refused(f"tensor {out} is (31,); allowed: (32,)")
    save_file(good | {out: good[out] * np.float16(np.nan)}, path)
    refused(f"tensor {out} has values that are not finite")
    copied = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    save_file(good | {copied: good[copied] + np.float16(1)}, path)
    refused(f"tensor {copied} differs from")
    save_file(good, path)
    path.write_bytes(path.read_bytes()[:-1])
    refused("its header says")
    path.write_bytes((2**40).to_bytes(8, "little"))
    refused("its header says 1099511627776 bytes; allowed")
    path.unlink()
    refused("holds neither")
    for change, what in (
        ({"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel'; allowed: DiT"),
        ({"norm_type": "ada_norm"}, "norm_type is 'ada_norm'; allowed: 'ada_norm_zero'"),
        ({"out_channels": 5}, "out_channels is 5; allowed: 4 or 8"),
    ):
        (source / "config.json").write_text(json.dumps(config | change))
        refused(what)
    shutil.rmtree(source)
    shutil.copytree(GOLDEN / "latte", source)
    next(source.glob("*00002*")).unlink()
    refused("No such file")
