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
from vdit.model import phases_of, settings_of
from vdit.published.layouts import STEM
from vdit.published.wan.transformer import ROWS
from vdit.runtime.mesh import make_mesh
from vdit.runtime.metrics import Metrics
from vdit.sample import Given, Model, load
from vdit.show import sample_stage

GOLDEN = Path(__file__).parents[1] / "golden"
SHIFT = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0, "use_flow_sigmas": True,
         "prediction_type": "flow_prediction"}  # fmt: skip


def pipeline(root: Path, name: str, boundary: float | None = None) -> Path:
    """A pipeline's folder of golden parts; with a boundary, of two experts that are the same."""
    parts = {"transformer": f"wan/{name}", "vae": "vae/wan21"}
    parts |= {"transformer_2": f"wan/{name}"} if boundary else {}
    parts |= {"image_encoder": "clip_vision"} if name == "i2v" else {}
    for part, source in parts.items():
        shutil.copytree(GOLDEN / source, root / part)
    if name == "i2v":
        (root / "image_processor").mkdir()
        file = root / "image_encoder" / "preprocessor_config.json"
        file.rename(root / "image_processor" / file.name)
    text = GOLDEN / "text_encoders" / "umt5"
    shutil.copytree(text, root / "text_encoder", ignore=shutil.ignore_patterns("tokenizer*"))
    (root / "tokenizer").mkdir()
    (root / "scheduler").mkdir()
    for file in text.glob("tokenizer*"):
        shutil.copy(file, root / "tokenizer")
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(SHIFT))
    index: dict[str, Any] = {"_class_name": "WanPipeline", "boundary_ratio": boundary}
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


def test_the_stage_sample_gives_the_image(tmp_path: Path) -> None:
    work = imported(tmp_path, "a14b", 0.9)
    config = read_config(work)
    config.sample.steps, config.sample.clips = 2, 1
    config.data.frames, config.data.size = 9, (32, 32)
    with Metrics(work) as metrics:
        sample_stage(load(work, config), work, metrics)
    assert {path.stem for path in (work / "samples").glob("*.mp4")} == {"image-00"}


def original(folder: Path, name: str, kind: str) -> None:
    """A golden transformer as the original release has it: its names and config.json."""
    theirs = load_file(GOLDEN / "wan" / name / f"{STEM}.safetensors")
    names = {there[1]: row[1] for row, there in zip(ROWS[len(ROWS) // 2 :], ROWS, strict=False)}
    renamed = {}
    for key, value in theirs.items():
        number = (re.findall(r"^blocks\.(\d+)\.", key) or [""])[0]
        stem = re.sub(r"^blocks\.\d+\.", "blocks.{}.", key)
        renamed[names[stem].format(number)] = value
    assert {"blocks.1.norm3.bias", "blocks.0.self_attn.q.weight"} <= renamed.keys()
    folder.mkdir(parents=True)
    save_file(renamed, folder / f"{STEM}.safetensors")
    channels = renamed["patch_embedding.weight"].shape[1]
    config = {"_class_name": "WanModel", "dim": 16, "num_heads": 2, "in_dim": channels}
    config |= {"out_dim": 3, "ffn_dim": 40, "num_layers": 2, "freq_dim": 256, "eps": 1e-6}
    config |= {"text_dim": 12, "model_type": kind, "text_len": 512}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "name, kind, two, wanted",
    [
        ("t2v", "t2v", False, (50, 5.0, 0.0, 5.0, 0.0)),
        ("i2v", "i2v", False, (40, 5.0, 0.0, 5.0, 0.0)),
        ("t2v", "t2v", True, (40, 4.0, 3.0, 12.0, 0.875)),
        ("a14b", "i2v", True, (40, 3.5, 3.5, 5.0, 0.9)),
    ],
)
def test_the_original_release(
    name: str, kind: str, two: bool, wanted: tuple[float, ...], tmp_path: Path
) -> None:
    """The original's folders are the same networks, sampled as the release says."""
    source, work = tmp_path / "source", tmp_path / "work"
    for part in ("high_noise_model", "low_noise_model") if two else ("",):
        original(source / part, name, kind)
    assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 0
    config = read_config(work)
    sample = config.sample
    found = sample.steps, sample.guidance, sample.guidance_low, config.dit.shift
    assert (*found, config.dit.wan.boundary) == wanted
    assert (sample.sampler, sample.spacing) == ("unipc", "wan")
    theirs = load_file(GOLDEN / "wan" / name / f"{STEM}.safetensors")
    for stage in ("dit", "low")[: 1 + two]:
        out = tmp_path / stage
        assert export_weights.main([f"--workdir={work}", f"--out={out}", f"--stage={stage}"]) == 0
        ours = load_file(out / f"{STEM}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == value).all() for key, value in theirs.items())


def test_what_the_original_release_has_else(tmp_path: Path, capsys: Any) -> None:
    """VACE, FLF2V, and pickles."""
    for kind in ("vace", "flf2v"):
        original(tmp_path / kind, "t2v", kind)
        command = [f"--source={tmp_path / kind}", f"--workdir={tmp_path / 'work'}"]
        assert f'model_type is "{kind}"' in refusal(command, capsys)
    source, work = tmp_path / "source", tmp_path / "work"
    original(source, "t2v", "t2v")
    (source / f"{STEM}.safetensors").rename(source / "model.pth")
    line = refusal([f"--source={source}", f"--workdir={work}"], capsys)
    assert "model.pth is a pickle" in line and "save_file" in line
    command = [f"--source={source}", f"--workdir={work}", "--vae=Wan2.1_VAE.pth"]
    line = refusal(command, capsys)
    assert "--vae=Wan2.1_VAE.pth is a pickle" in line and "the folder vae/ of the release" in line


def imported(root: Path, name: str, boundary: float | None = None) -> Path:
    source = pipeline(root / "source", name, boundary)
    assert import_weights.main([f"--source={source}", f"--workdir={root / 'work'}"]) == 0
    return root / "work"


def sampled(model: Model, **more: Any) -> np.ndarray:
    return model.generate("a small red ball falls", 0.5, size=(16, 24), **more)[0].video


def test_sampling_as_published(tmp_path: Path) -> None:
    """What a folder says comes before what the release says."""
    (tmp_path / "t2v").mkdir()
    config = read_config(imported(tmp_path / "t2v", "t2v"))
    sample = config.sample
    assert (sample.sampler, sample.order, sample.bh) == ("unipc", 2, "bh2")
    assert (sample.spacing, sample.steps, sample.guidance) == ("flow_sigmas", 50, 5.0)
    assert (config.dit.shift, config.data.fps, config.data.frames) == (5.0, 16.0, 81)
    (tmp_path / "a14b").mkdir()
    config = read_config(imported(tmp_path / "a14b", "t2v", 0.8))
    sample = config.sample
    assert (sample.steps, sample.guidance, sample.guidance_low) == (40, 4.0, 3.0)
    assert (config.dit.shift, config.dit.wan.boundary) == (5.0, 0.8)


@pytest.mark.parametrize("name, boundary", [("i2v", None), ("a14b", 0.875)])
def test_an_image_to_video(
    name: str, boundary: float | None, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    work = imported(tmp_path, name, boundary)
    config = read_config(work)
    config.run.dtype = "float32"
    model = load(work, config)
    steps = config.sample.steps
    assert (steps, config.sample.guidance) == (40, 3.5 if boundary else 5.0)
    draw = np.random.default_rng(0)
    one, other = (draw.integers(0, 256, (1, 18, 20, 3), np.uint8) for _ in range(2))
    capsys.readouterr()
    first, again, another = (
        sampled(model, given=[Given(image)], steps=4) for image in (one, one, other)
    )
    assert "18x20: resized to 16x24" in capsys.readouterr().out
    np.testing.assert_array_equal(first, again)
    assert (first != another).mean() > 0.2
    for parts in ([], [Given(one, 4)], [Given(one), Given(other, 4)]):
        with pytest.raises(UserError, match="needs one image, given at 0"):
            sampled(model, given=parts, steps=4)
    if not boundary:  # what the network reads beside the latents matters
        monkeypatch.setattr(type(model.images), "pixels", lambda *_: np.zeros((12, 12, 3)))
        assert (sampled(model, given=[Given(one)], steps=4) != first).any()
    for stage in ("dit", "low")[: 2 if boundary else 1]:
        out = tmp_path / stage
        assert export_weights.main([f"--workdir={work}", f"--out={out}", f"--stage={stage}"]) == 0
        there = load_file(GOLDEN / "wan" / name / f"{STEM}.safetensors")
        ours = load_file(out / f"{STEM}.safetensors")
        assert ours.keys() == there.keys()
        assert all((ours[key] == value).all() for key, value in there.items())


def test_two_experts_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that are the same are one: the history of UniPC passes over the boundary. With little
    memory they take turns, and nothing changes; with other weights and guidance, the video does."""
    same: dict[str, Any] = {"steps": 5, "guidance": 3.0, "guidance_low": 3.0}
    for name, boundary in (("one", None), ("two", 0.9)):
        (tmp_path / name).mkdir()
        imported(tmp_path / name, "t2v", boundary)
    config = read_config(tmp_path / "two" / "work")
    one, two = (load(tmp_path / name / "work") for name in ("one", "two"))
    phases = phases_of(config, settings_of(config, **same))
    assert [(phase.network, phase.first, phase.last) for phase in phases] == [
        ("dit", 0, 2), ("low", 2, 5)
    ]  # fmt: skip
    off = phases_of(config, settings_of(config, guidance=1.0))
    assert [phase.guidance for phase in off] == [1.0, 1.0]
    want = sampled(one, **same)
    assert np.abs(sampled(two, **same).astype(int) - want).max() <= 1
    assert len(two.scan._networks) == 2
    assert (sampled(two, steps=5, guidance=3.0, guidance_low=1.5) != want).any()
    monkeypatch.setattr("vdit.model.device_memory", lambda: 1000)
    turns = load(tmp_path / "two" / "work")
    np.testing.assert_array_equal(sampled(turns, **same), sampled(two, **same))
    assert len(turns.scan._networks) == 1
    turns.params["low"]["out"]["bias"] = turns.params["low"]["out"]["bias"] + 1.0
    assert (sampled(turns, **same) != want).any()


@pytest.mark.slow
def test_two_experts_on_a_mesh(tmp_path: Path) -> None:
    """Rows and parameters over eight devices."""
    work = imported(tmp_path, "t2v", 0.9)
    config = read_config(work)
    config.run.dtype = "float32"
    mesh = make_mesh({"data": 2, "fsdp": 4})
    same: dict[str, Any] = {"steps": 3, "guidance": 3.0, "guidance_low": 2.0}
    split = sampled(load(work, config, mesh), **same)
    assert np.abs(split.astype(int) - sampled(load(work, config), **same)).max() <= 1


def test_sizes_are_rounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = load(imported(tmp_path, "t2v")).clip(0.5, None, (23, 31))
    assert clip[2:] == (16, 24) and "is rounded to 16x24" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("model_index.json", {"boundary_ratio": 0.9}, "there are no two experts"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIM"}, "allowed: UniPCMultistep"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "use_flow_sigmas"),
        ("scheduler/scheduler_config.json", {"solver_order": 3}, "solver_order is 3; allowed: 2"),
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
