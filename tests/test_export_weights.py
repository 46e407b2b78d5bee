"""Workdirs as safetensors: in other libraries' layouts where there are such, and in vdit's own."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import base, dit_paper, unet
from tools import export_weights, exporting, import_weights
from tools.importing.own import own_shapes
from vdit.config import joined
from vdit.config.autoencoder import build_vae
from vdit.config.denoiser import build_dit
from vdit.config.identity import USED, read_config, write_config
from vdit.config.text import build_tokenizer
from vdit.published import vae_folder, vivit_folder, weights
from vdit.runtime.checkpoint import Checkpoints, restore_ema
from vdit.sample import load
from vdit.stages import stage_meta

GOLDEN = Path(__file__).parent / "golden"


def random(shapes: Any, seed: int) -> Any:
    made = np.random.default_rng(seed)
    return jax.tree.map(lambda x: made.standard_normal(x.shape, np.float32), shapes)


def trained(config: Any, workdir: Path, *stages: str) -> dict[str, Any]:
    """A workdir as training leaves it: parameters, another EMA, statistics; by stage."""
    write_config(config, workdir)
    if config.text.encoder == "learned":
        build_tokenizer(config, workdir, lambda: [chr(97 + i % 26) * 3 for i in range(99)])
    made = {}
    for stage in stages:
        shapes = own_shapes(config, stage, workdir)
        params, ema = random(shapes, 0), random(shapes, 1)
        channels = config.vae.channels
        spread = {"mean": [0.25] * channels, "std": [1 + i / 8 for i in range(channels)]}
        meta = stage_meta(config, stage) | {"latents": spread}
        checkpoints = Checkpoints(workdir / "checkpoints" / stage)
        checkpoints.save(3, {"params": params, "step": np.int32(3)}, ema, None, meta)
        checkpoints.close()
        made[stage] = {"raw": params, "ema": ema}
    return made


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("raw", [False, True])
def test_a_workdir_comes_back_from_vdit_s_own_files(tmp_path: Path, raw: bool) -> None:
    config = base.get_config("smoke")
    config.vae.adversarial_weight = 0.5  # whose discriminator stays behind
    work, out, again = tmp_path / "work", tmp_path / "out", tmp_path / "again"
    made = trained(config, work, "vae", "dit")
    flags = [f"--workdir={work}", f"--out={out}", "--own", *["--raw"] * raw]
    assert export_weights.main(flags) == 0
    names = {"config.json", "dit.safetensors", "tokenizer.json", "vae.safetensors", "vdit.json"}
    assert {path.name for path in out.iterdir()} == names | {"digests.json"}
    assert "dit/blocks/joint/attention/q/kernel" in load_file(out / "dit.safetensors")
    assert import_weights.main([f"--source={out}", f"--workdir={again}"]) == 0
    for stage in ("vae", "dit"):
        kept = made[stage]["raw" if raw else "ema"]
        same(restore_ema(again / "checkpoints" / stage, 0), {n: kept[n] for n in USED[stage]})
    model = load(again)
    np.testing.assert_array_equal(model.codec.statistics["std"], [1 + i / 8 for i in range(8)])
    assert model.config.to_dict() == read_config(work).to_dict()


def test_what_is_not_whole_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = base.get_config("smoke")
    work, out, again = tmp_path / "work", tmp_path / "out", tmp_path / "again"
    trained(config, work, "vae")
    flags = [f"--workdir={work}", f"--out={out}"]

    def refused(run: Any, flags: list[str], words: str) -> None:
        assert run(flags) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1, line
        assert not again.exists() and not list(tmp_path.glob(".*"))

    refused(export_weights.main, flags, "checkpoints/dit holds no checkpoint")
    refused(export_weights.main, [*flags, "--stage=vae"], "(vae.model=vivit) is no network of")
    refused(export_weights.main, [*flags, "--stage=vae", "--own"], "take no --stage")
    refused(export_weights.main, [*flags, "--stage=text"], "invalid choice")
    assert export_weights.main([*flags, "--own"]) == 0
    refused(export_weights.main, [*flags, "--own"], "already exists")
    back = [f"--source={out}", f"--workdir={again}"]
    refused(import_weights.main, [*back, f"--vae={out}"], "a complete workdir")
    file, good = out / "vae.safetensors", (out / "vae.safetensors").read_bytes()
    file.write_bytes(good[:-4])
    refused(import_weights.main, back, "vae.safetensors: ")
    (out / "digests.json").unlink()  # headers alone tell
    refused(import_weights.main, back, "its header says")
    tensors = load_file_bytes(good, tmp_path)
    tensors.pop("vae/embed_latent/bias")
    exporting.write(file, [(name, lambda v=v: v) for name, v in tensors.items()])
    refused(import_weights.main, back, "lacks the tensor vae/embed_latent/bias")
    file.write_bytes(good)
    (out / "vdit.json").write_text(json.dumps({"stages": {"gan": {}}}))
    refused(import_weights.main, back, "names no stages of vdit")


def load_file_bytes(data: bytes, folder: Path) -> dict[str, np.ndarray]:
    path = folder / "copy.safetensors"
    path.write_bytes(data)
    found = load_file(path)
    path.unlink()
    return found


# --------------------------------------------------------------------------------------------------
# Networks that exist elsewhere, trained here


def image_dit() -> Any:
    return dit_paper.get_config("image+smoke")


def latte() -> Any:
    config = dit_paper.get_config("text+smoke")
    config.dit.paper.conditioning = "adaln_single"
    config.vae.channels = 4
    return config


def image_unet() -> Any:
    config = unet.get_config("smoke")
    config.data.frames = 1
    config.dit.unet.temporal = False
    return config


@pytest.mark.parametrize(
    "make, name",
    [
        (image_dit, "DiTTransformer2DModel"),
        (latte, "LatteTransformer3DModel"),
        (image_unet, "UNet2DConditionModel"),
    ],
)
def test_a_denoiser_trained_here_is_one_of_diffusers(make: Any, name: str, tmp_path: Path) -> None:
    """What is written reads as that layout, and is the same network with the same parameters."""
    config, work, out, again = make(), tmp_path / "work", tmp_path / "out", tmp_path / "again"
    made = trained(config, work, "dit")
    assert export_weights.main([f"--workdir={work}", f"--out={out}", "--raw"]) == 0
    assert json.loads((out / "config.json").read_text())["_class_name"] == name
    assert import_weights.main([f"--source={out}", f"--workdir={again}"]) == 0
    same(restore_ema(again / "checkpoints" / "dit", 0)["dit"], made["dit"]["raw"]["dit"])
    theirs = read_config(again)
    theirs.run.unroll = config.run.unroll
    mine, other = build_dit(config), build_dit(theirs)
    for field in ("width", "depth", "widths", "depths", "heads", "epsilons", "level_theta"):
        assert getattr(mine, field, None) == getattr(other, field, None), field


@pytest.mark.parametrize(
    "changes",
    [
        {"dit.paper.conditioning": "adaln"},
        {"dit.paper.level_theta": 10_000.0},
        {"dit.preset": "nano"},
        {"data.frames": 5, "vae.patch": (4, 8, 8)},
        {"data.size": (32, 64)},
    ],
)
def test_a_denoiser_that_is_none_of_diffusers_is_told(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = image_dit()
    config.update_from_flattened_dict(changes)
    trained(config, tmp_path / "work", "dit")
    flags = [f"--workdir={tmp_path / 'work'}", f"--out={tmp_path / 'out'}"]
    assert export_weights.main(flags) == 2
    assert "is no network of diffusers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, patch, more",
    [
        ("kl", (1, 4, 4), {}),
        ("causal", (4, 4, 4), {}),
        ("causal", (4, 8, 8), {"vae.pixels": 2, "vae.residual": True, "vae.decoder_width": 6}),
    ],
)
def test_an_autoencoder_trained_here_is_one_of_diffusers(
    kind: str, patch: tuple[int, int, int], more: dict[str, Any], tmp_path: Path
) -> None:
    config = base.get_config("smoke")
    config.update_from_flattened_dict({
        "vae.model": kind, "vae.patch": patch, "vae.width": 4, "vae.multipliers": (1, 2, 2),
        "vae.groups": 2, "vae.blocks": 1, **more,
    })  # fmt: skip
    work, out = tmp_path / "work", tmp_path / "out"
    made = trained(config, work, "vae", "dit")
    assert export_weights.main([f"--workdir={work}", f"--out={out}", "--stage=vae"]) == 0
    module, plan = vae_folder.read_module(out)
    mine = build_vae(config)
    assert all(getattr(module, name) == getattr(mine, name) for name in vae_folder.FIELDS)
    same(weights.load(plan), made["vae"]["ema"]["vae"])
    statistics = vae_folder.read_statistics(out) or {}
    np.testing.assert_array_equal(statistics["std"], [1 + i / 8 for i in range(8)])
    np.testing.assert_array_equal(statistics["mean"], np.full(8, 0.25))


@pytest.mark.parametrize("name", ["kl", "wan21", "wan22"])
def test_autoencoders_go_back_to_the_bit(name: str, tmp_path: Path) -> None:
    """By the commands: weights, and what the configuration says of latents too."""
    source, work, out = GOLDEN / "vae" / name, tmp_path / "work", tmp_path / "out"
    assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 0
    joined.check(read_config(work))
    assert export_weights.main([f"--workdir={work}", f"--out={out}", "--stage=vae"]) == 0
    old, new = (load_file(f / f"{vae_folder.STEM}.safetensors") for f in (source, out))
    assert old.keys() == new.keys()
    for key, value in old.items():
        assert value.shape == new[key].shape and value.dtype == new[key].dtype
        np.testing.assert_array_equal(value, new[key])
    assert vae_folder.read_module(out)[0] == vae_folder.read_module(source)[0]
    said, theirs = (vae_folder.read_statistics(folder) for folder in (out, source))
    jax.tree.map(np.testing.assert_array_equal, said, theirs)


def test_a_vivit_trained_here_is_transformers_one(tmp_path: Path) -> None:
    """As tests/test_import_vivit.py has it for folders, to the bit."""
    config = base.get_config("smoke")
    config.stages, config.data.objects = ("classify",), (1, 1)
    config.classify.preset = "smoke/8x4"
    work, out = tmp_path / "work", tmp_path / "out"
    made = trained(config, work, "classify")
    assert export_weights.main([f"--workdir={work}", f"--out={out}", "--stage=classify"]) == 0
    said = json.loads((out / "config.json").read_text())
    assert (said["tubelet_size"], said["id2label"]["0"]) == ([4, 8, 8], "motion: falls")
    found = vivit_folder.read_module(out)
    assert found.classes == [said["id2label"][str(i)] for i in range(10)]
    same(vivit_folder.folded(weights.load(found.plan)), made["classify"]["ema"]["vivit"])
