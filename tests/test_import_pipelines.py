"""Pipelines of diffusers: imported whole or not at all, and sampled from with their numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools import export_weights, import_weights
from tools.importing import published
from vdit import main as program
from vdit.config.identity import read_config
from vdit.published import vae_folder, weights
from vdit.runtime.checkpoint import newest_good_step, restore_ema
from vdit.runtime.mesh import make_mesh, param_sharding
from vdit.sample import Model, load
from vdit.tokens import dense_tokens

GOLDEN = Path(__file__).parent / "golden"
PIPELINES = GOLDEN / "pipelines"
EXPECTED = np.load(PIPELINES / "expected.npz")
PROMPTS = {"dit": ["other 3", "999"], "latte": ["a small red ball falls"]}


@pytest.fixture(scope="module", params=list(PROMPTS))
def imported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    work = tmp_path_factory.mktemp("import") / request.param
    source = PIPELINES / request.param
    assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 0
    assert [path.name for path in work.parent.iterdir()] == [work.name]
    return request.param, work


def started(model: Model, noise: np.ndarray) -> Any:
    """In place of `initial_noise`: the tokens of stored latents."""
    times = jnp.zeros(noise.shape[:2])
    tokens, _ = dense_tokens(jnp.asarray(noise), model.dit.patch, times, times > 0)
    return lambda keys, shape: tokens


def test_it_samples_what_the_pipeline_does(
    imported: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same noise, ten steps of DDIM, guidance: the same latents and pictures."""
    name, work = imported
    noise, latents, pictures = (EXPECTED[f"{name}/{p}"] for p in ("noise", "latents", "pictures"))
    config = read_config(work)
    config.run.dtype = "float32"
    model = load(work, config)
    monkeypatch.setattr("vdit.model.initial_noise", started(model, noise))
    found, stream = [], model.stream
    monkeypatch.setattr(model, "stream", lambda x, *size: found.append(x) or stream(x, *size))
    made = model.generate(PROMPTS[name], steps=10, guidance=3.0)
    videos = np.stack([result.video for result in made])
    assert np.abs(np.concatenate(found) - latents).max() / np.abs(latents).max() < 1e-4
    assert np.abs(videos - 255 * pictures).max() < 0.6
    assert config.sample.spacing == {"dit": "leading", "latte": "trailing"}[name]


def test_the_command_samples_from_it(imported: tuple[str, Path], tmp_path: Path) -> None:
    name, work = imported
    ask = ["vdit", "--mode=sample", f"--workdir={work}", f"--prompt={PROMPTS[name][0]}"]
    try:
        assert program.main([*ask, f"--out={tmp_path}", "--num=1"]) == 0
    finally:
        program.FLAGS.unparse_flags()
    made = sorted(path.suffix for path in tmp_path.iterdir())
    still = [".png"] if name == "dit" else []
    assert made == sorted([".json", ".mp4", ".webp", *still])
    assert ("class" in json.loads(next(tmp_path.glob("*.json")).read_text())) == (name == "dit")


def test_the_autoencoder_is_the_folder_s(imported: tuple[str, Path]) -> None:
    name, work = imported
    _, plan = vae_folder.read_module(PIPELINES / name / "vae")
    directory = work / "checkpoints" / "vae"
    step = newest_good_step(directory)
    assert step is not None
    params = restore_ema(directory, step)["vae"]
    jax.tree.map(np.testing.assert_array_equal, params, weights.load(plan))
    out = work.parent / "out"
    assert export_weights.main([f"--workdir={work}", f"--out={out}"]) == 0


def test_a_network_alone_samples_with_an_autoencoder_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = PIPELINES / "dit"
    command = [f"--source={part / 'transformer'}", f"--workdir={tmp_path / 'bare'}"]
    assert import_weights.main(command) == 0
    with pytest.raises(Exception, match="checkpoints/vae holds no checkpoint"):
        load(tmp_path / "bare")
    command[1] = f"--workdir={tmp_path / 'whole'}"
    assert import_weights.main([*command, f"--vae={part / 'vae'}"]) == 0
    assert load(tmp_path / "whole").label("12") == 12
    wrong = [*command, f"--vae={GOLDEN / 'vae' / 'kl'}"]
    assert import_weights.main(wrong) == 2
    assert "latents of 3 channels; allowed by" in capsys.readouterr().err


def test_it_is_split_for_a_mesh_as_it_is_read(tmp_path: Path) -> None:
    """Every array lands on its devices' shares, and has the numbers of the whole."""
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    made = published.planned(GOLDEN / "dit_paper" / "dit", None, None)
    part = made.parts["dit"]
    split = import_weights.write_part("dit", part, mesh, tmp_path)
    whole = weights.load(part.plan)
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    wanted = param_sharding(mesh, {"dit": whole})["dit"]
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), split, wanted)
    assert all(jax.tree.leaves(same))
    assert sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(split)) >= 4
    again = restore_ema(tmp_path / "checkpoints" / "dit", 0)["dit"]
    jax.tree.map(np.testing.assert_array_equal, again, whole)


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample is True"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.012}, "beta_end is 0.012"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "linspace"}, "leading, trailing"),
        ("model_index.json", {"id2label": {"0": "x"}}, "does not name the classes 0 to 999"),
        ("vae/config.json", {"mid_block_add_attention": False}, "an unexpected tensor"),
        ("vae/config.json", {"_class_name": "VQModel"}, "AutoencoderKL"),
        ("vae/config.json", {"scaling_factor": 0.0}, "deviation must be above 0"),
    ],
)
def test_a_part_that_does_not_fit_leaves_nothing(
    file: str, change: dict[str, Any], words: str, tmp_path: Path, capsys: Any
) -> None:
    source = tmp_path / "source"
    shutil.copytree(PIPELINES / "dit", source)
    config = json.loads((source / file).read_text())
    (source / file).write_text(json.dumps(config | change))
    work = tmp_path / "place" / "work"
    assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1
    assert not work.parent.exists()


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, capsys: Any) -> None:
    """A number that is not finite shows when the tensors are read: in the last of the networks."""
    from safetensors.numpy import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(PIPELINES / "dit", source)
    path = source / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out_2.bias"][0] = np.inf
    save_file(tensors, path)
    work = tmp_path / "place" / "work"
    assert import_weights.main([f"--source={source}", f"--workdir={work}"]) == 2
    assert "not finite" in capsys.readouterr().err
    assert list((tmp_path / "place").iterdir()) == []
    (work / "mine").mkdir(parents=True)
    assert import_weights.main([f"--source={PIPELINES / 'dit'}", f"--workdir={work}"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert [p.name for p in work.iterdir()] == ["mine"]
