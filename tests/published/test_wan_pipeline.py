"""A Wan pipeline's folder: imported, sampled from, continued and exported; what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tools import export_weights, import_weights
from vdit.config.identity import read_config
from vdit.errors import UserError
from vdit.published.layouts import STEM
from vdit.published.wan.transformer import ROWS
from vdit.sample import Given, load

GOLDEN = Path(__file__).parents[1] / "golden"
SHIFT = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0, "use_flow_sigmas": True,
         "prediction_type": "flow_prediction"}  # fmt: skip


def pipeline(root: Path, name: str) -> Path:
    """A pipeline's folder of golden parts."""
    for part, source in (("transformer", f"wan/{name}"), ("vae", "vae/wan21")):
        shutil.copytree(GOLDEN / source, root / part)
    text = GOLDEN / "text_encoders" / "umt5"
    shutil.copytree(text, root / "text_encoder", ignore=shutil.ignore_patterns("tokenizer*"))
    (root / "tokenizer").mkdir()
    (root / "scheduler").mkdir()
    for file in text.glob("tokenizer*"):
        shutil.copy(file, root / "tokenizer")
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(SHIFT))
    index = {"_class_name": "WanPipeline", "boundary_ratio": None}
    index |= {"expand_timesteps": name == "ti2v"}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def refusal(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert import_weights.main(command) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize("name", ["t2v", "ti2v"])
def test_a_pipeline_both_ways(name: str, tmp_path: Path) -> None:
    source, work, out = pipeline(tmp_path / "source", name), tmp_path / "work", tmp_path / "out"
    assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 0
    config = read_config(work)
    assert (config.dit.shift, config.text.length, config.vae.patch) == (5.0, 512, (4, 4, 4))
    model = load(work)
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), np.uint8)
    size: dict[str, Any] = {"seconds": 0.5, "size": (16, 24), "steps": 2}
    prompt = "a small red ball falls"
    plain = model.generate(prompt, **size)[0].video
    assert plain.shape == (9, 16, 24, 3) and plain.std() > 1
    if name == "ti2v":
        video = model.generate(prompt, given=[Given(image)], **size)[0].video
        np.testing.assert_array_equal(video[:1], image)
        assert (video[1:] != plain[1:]).any()
        with pytest.raises(UserError, match="neither frames given later nor shots"):
            model.generate(prompt, given=[Given(image, 4)], **size)
    else:
        with pytest.raises(UserError, match="one time for all tokens"):
            model.generate(prompt, given=[Given(image)], **size)
    assert export_weights.main([f"--workdir={work}", f"--out={out}"]) == 0
    ours, theirs = (load_file(folder / f"{STEM}.safetensors")
                    for folder in (out, source / "transformer"))  # fmt: skip
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
    said = [json.loads((f / "config.json").read_text()) for f in (out, source / "transformer")]
    assert {**said[1], **said[0], "_diffusers_version": ""} == {**said[1], "_diffusers_version": ""}


def test_the_original_release(tmp_path: Path, capsys: Any) -> None:
    """The original's names and config.json are the same network; a video's image is not known."""
    theirs = load_file(GOLDEN / "wan" / "t2v" / f"{STEM}.safetensors")
    names = {there[1]: row[1] for row, there in zip(ROWS[len(ROWS) // 2 :], ROWS, strict=False)}
    renamed = {}
    for name, value in theirs.items():
        number = (re.findall(r"^blocks\.(\d+)\.", name) or [""])[0]
        stem = re.sub(r"^blocks\.\d+\.", "blocks.{}.", name)
        renamed[names[stem].format(number)] = value
    assert {"blocks.1.norm3.bias", "blocks.0.self_attn.q.weight"} <= renamed.keys()
    source, work, out = (tmp_path / name for name in ("source", "work", "out"))
    source.mkdir()
    save_file(renamed, source / f"{STEM}.safetensors")
    config = {"_class_name": "WanModel", "dim": 16, "num_heads": 2, "in_dim": 3, "out_dim": 3}
    config |= {"ffn_dim": 40, "num_layers": 2, "freq_dim": 256, "eps": 1e-6, "text_dim": 12}
    for kind in ("vace", "t2v"):
        text = json.dumps(config | {"model_type": kind, "text_len": 512})
        (source / "config.json").write_text(text)
        command = [f"--source={source}", f"--workdir={work}"]
        if kind == "vace":
            assert "model_type is" in refusal(command, capsys)
    assert import_weights.main(command) == 0
    assert export_weights.main([f"--workdir={work}", f"--out={out}"]) == 0
    ours = load_file(out / f"{STEM}.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == value).all() for name, value in theirs.items())


def test_an_image_is_needed_where_weights_take_one(tmp_path: Path) -> None:
    source, work = pipeline(tmp_path / "source", "i2v"), tmp_path / "work"
    assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 0
    with pytest.raises(UserError, match="needs an image's latents"):
        load(work).generate("a", 0.1, size=(16, 24), steps=1)


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("model_index.json", {"boundary_ratio": 0.9}, "two experts"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIM"}, "allowed: UniPCMultistep"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "use_flow_sigmas"),
        ("transformer/config.json", {"pos_embed_seq_len": 514}, "pos_embed_seq_len is 514"),
        ("transformer/config.json", {"in_channels": 9}, "in_channels is 9; allowed: 3 or 10"),
        ("transformer/config.json", {"image_dim": 6}, "added_kv_proj_dim"),
        ("transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}, "_class_name"),
        ("transformer/config.json", {"ffn_dim": 44}, "allowed: (16, 44)"),
    ],
)
def test_what_is_refused(
    file: str, change: dict[str, Any], words: str, tmp_path: Path, capsys: Any
) -> None:
    source = pipeline(tmp_path / "source", "t2v")
    config = json.loads((source / file).read_text())
    (source / file).write_text(json.dumps(config | change))
    work = tmp_path / "place" / "work"
    assert words in refusal([f"--source={source}", f"--workdir={work}"], capsys)
    assert not work.parent.exists()
